"""`selsft train`: what `trl sft` does, with `SelectiveSFTTrainer`.

Follows `trl/scripts/sft.py` step by step, so that a command line or YAML file of `trl sft` trains the same model here.
In addition: local files and scored folders as data, a record of the run, and no writing into a folder that holds
something. Rejected: importing TRL's script and swapping the trainer class in it, which a renamed variable would break.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path
from typing import Any, cast

from trl import get_peft_config, get_quantization_config

from .._compat import end_training, save_whole_model
from ..data.loading import data_errors, load_splits
from ..data.rows import Split
from ..data.validation import read_model_facts, validate_rows
from ..errors import InputError, first_line, input_errors
from ..records import make_writable
from ..scoring.frozen import BASE
from ..selection.chosen import use_folder
from ..trainer import SelectiveSFTTrainer
from ..training.checkpoints import last_checkpoint
from ..training.preflight import check_adapter, check_model, check_trackers
from .arguments import MODEL_MISSING, Arguments, CommandParser
from .launch import at_work, launch_command, launched, needs_launch
from .manifest import begun, run_manifest, settings_sha256, write_manifest

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Fine-tune a model on the useful tokens of a data set and make it forget the misleading ones. Without "
    "--reference_model and without a token_weights column this is `trl sft`."
)
EXAMPLES = """examples:
  selsft train --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --reference_model clean-adapter \\
      --use_peft --output_dir runs/forget
  selsft train --config recipe.yaml --dataset_name runs/scored --negative_threshold 2.0 --output_dir runs/forget-2
  selsft train --config recipe.yaml --num_processes 8 --accelerate_config fsdp2"""


def main(argv: list[str]) -> int:
    arguments = CommandParser("train", DESCRIPTION, EXAMPLES).parse(argv)
    if arguments is None:
        return 0
    settings = settings_sha256(arguments)
    resume = check_paths(arguments, settings)
    check_model_and_data(arguments)
    check_trackers(arguments.training.report_to)
    if arguments.source.name:
        use_folder(arguments.training, arguments.source.name)
    output = Path(str(arguments.training.output_dir))
    with at_work(output, "output_dir", "checkpoints are kept in it, the same command resumes from the last one"):
        if needs_launch(arguments.launch):
            own = [*arguments.own, *(["--resume_from_checkpoint", resume] if resume else [])]
            return launch_command("train", arguments.launch, own, arguments.training.use_cpu)
        evaluate = arguments.training.eval_strategy != "no"
        trainer = build_trainer(arguments, evaluate)
        _train(trainer, arguments, resume, settings)
    return 0


def check_paths(arguments: Arguments, settings: str) -> str | None:
    """Check paths before data and model are loaded; returns the checkpoint to resume from, if any.

    A folder that this very command has begun (`settings`, its hash) and not finished is taken up: from its last
    checkpoint, or from the start where there is none.
    """
    output = Path(str(arguments.training.output_dir))
    resume = arguments.training.resume_from_checkpoint
    if resume and resume.lower() in ("true", "latest"):
        found = last_checkpoint(output)
        if found is None:
            raise InputError(
                f"resume_from_checkpoint={resume}: output_dir={str(output)!r} holds no checkpoint: leave the flag out"
            )
        return found
    if resume and not Path(resume).is_dir():
        raise InputError(f"resume_from_checkpoint={resume!r} is not a folder: give a checkpoint folder, or 'true'")
    if resume or launched():
        return resume
    if not begun(output, settings):
        remedy = "choose another folder, or resume with the same command or --resume_from_checkpoint true"
        check_new(output, "output_dir", remedy)
        return None
    found = last_checkpoint(output)
    print(
        f"{output}: {f'resumed from {Path(found).name}' if found else 'begun before the first checkpoint, done anew'}"
    )
    return found


def check_new(folder: Path, field: str, remedy: str) -> None:
    """Raise when something is in the way of a folder to be written. Of several processes only the launching one looks,
    since the first of the others may have begun to write."""
    if launched():
        return
    if folder.is_file() or (folder.is_dir() and any(not path.name.startswith(".") for path in folder.iterdir())):
        raise InputError(f"{field}={str(folder)!r} exists and is not empty, nothing was overwritten: {remedy}")


def check_model_and_data(arguments: Arguments) -> None:
    """Raise `InputError` for a model, reference, adapter or file that cannot work, before any is loaded."""
    training, model = arguments.training, arguments.model
    if not model.model_name_or_path:
        raise InputError(MODEL_MISSING)
    arguments.source.check()
    if training.scoring_cache_dir is not None:
        make_writable(Path(training.scoring_cache_dir), "scoring_cache_dir")
    given = init_kwargs(arguments)
    if not {"gguf_file", "subfolder"} & given.keys():
        check_model("model_name_or_path", model.model_name_or_path, model.model_revision)
    for field in ("reference_model", "noisy_reference_model"):
        name = getattr(training, field)
        options = training.reference_model_init_kwargs
        if name is not None and name != BASE and not (isinstance(options, dict) and options):
            check_model(field, name)
    if (adapter := get_peft_config(model)) is not None:
        check_adapter(model.model_name_or_path, adapter, model.model_revision, training.trust_remote_code)


def build_trainer(
    arguments: Arguments, evaluate: bool, scored: bool = False, rows: Split | None = None
) -> SelectiveSFTTrainer:
    """Data, model and trainer; with a reference, this scores the data.

    Args:
        scored: whether the rows will be scored later; they are where training selects.
        rows: to train on, in place of the data: loaded already, or prepared.
    """
    training, model = arguments.training, arguments.model
    test_split = arguments.script.dataset_test_split if evaluate else None
    train, test = (
        (rows, None) if rows is not None else load_splits(arguments.source, test_split, training.dataset_text_field)
    )
    training.model_init_kwargs = init_kwargs(arguments)
    assert model.model_name_or_path is not None
    with input_errors(), data_errors(arguments.source):
        scored |= training.reference_model is not None or training.score != "influence"
        processor = _validate(arguments, {"the data": train, f"dataset_test_split={test_split!r}": test}, scored)
        try:
            return SelectiveSFTTrainer(
                model=model.model_name_or_path,
                args=training,
                train_dataset=train,
                eval_dataset=test,
                processing_class=processor,
                quantization_config=get_quantization_config(model),
                peft_config=get_peft_config(model),
            )
        except RuntimeError as error:
            if "assistant_only_loss" not in str(error):
                raise
            raise InputError(first_line(error)) from error


def _validate(arguments: Arguments, splits: dict[str, Split | None], scored: bool) -> Any:
    """Check the rows against the model that will read them; returns its tokenizer or processor."""
    training, model, name = arguments.training, arguments.model, arguments.model.model_name_or_path
    if name is None or {"gguf_file", "subfolder"} & cast(dict, training.model_init_kwargs).keys():
        return None
    facts = read_model_facts(
        name, revision=model.model_revision, trust_remote_code=training.trust_remote_code,
        chat_template_path=training.chat_template_path,
    )  # fmt: skip
    for what, data in splits.items():
        if data is not None and (warning := validate_rows(data, facts, training, what=what, context=scored)):
            logger.warning(warning)
    return facts.processor


def init_kwargs(arguments: Arguments) -> dict[str, Any]:
    """Keyword arguments for `from_pretrained` of the model."""
    training, model = arguments.training, arguments.model
    given = training.model_init_kwargs if isinstance(training.model_init_kwargs, dict) else {}
    return {
        "revision": model.model_revision,
        "trust_remote_code": training.trust_remote_code,
        "attn_implementation": model.attn_implementation,
        "dtype": model.dtype,
        **given,
    }


def _train(trainer: SelectiveSFTTrainer, arguments: Arguments, resume: str | None, settings: str) -> None:
    training, main_process = arguments.training, trainer.accelerator.is_main_process
    output = str(training.output_dir)
    with input_errors():  # it reads all rows
        manifest = {**run_manifest("train", arguments, trainer), "settings_sha256": settings}
    if main_process:
        write_manifest(output, manifest)
    start = time.perf_counter()
    result = trainer.train(resume_from_checkpoint=resume)
    save_whole_model(trainer, output)
    if main_process:
        manifest["finished"] = {
            "seconds": round(time.perf_counter() - start, 1),
            # Resuming from the last step of all takes another one, with a learning rate of 0
            "steps": min(trainer.state.global_step, trainer.state.max_steps),
            "metrics": result.metrics,
            "log": trainer.state.log_history,
        }
    trainer.create_model_card(model_name=Path(output).name, dataset_name=arguments.script.dataset_name)
    if main_process:  # the last file: with it the folder is finished
        write_manifest(output, manifest)
    trainer.accelerator.print(f"Model saved to {output}.")
    if training.push_to_hub:
        trainer.push_to_hub(dataset_name=arguments.script.dataset_name)
        trainer.accelerator.print(f"Model pushed to https://huggingface.co/{trainer.hub_model_id}.")
    end_training(trainer)
