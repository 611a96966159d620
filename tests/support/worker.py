"""One process of the distributed tests: trains every case and writes what it got. Started by `accelerate launch`."""

import dataclasses
import functools
import json
import os
import sys
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import save_file
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel, TrainerCallback

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft._compat import save_whole_model
from selsft.training.fingerprint import model_fingerprint
from tests.support import tiny


def unequal(index, row):
    """Rows 0 to 3 (process 0) have many negatives, rows 4 to 7 (process 1) few."""
    return [-1.0 if (t % 2 if index < 4 else t == 4) else 1.0 for t in range(len(row))]


def one_without_negatives(index, row):
    return [-1.0 if t % 2 and index < 4 else 1.0 for t in range(len(row))]


def one_without_tokens(index, row):
    return [(-1.0 if t % 2 else 1.0) if index < 4 else 0.0 for t in range(len(row))]


LORA = {"r": 4, "target_modules": ["q_proj", "v_proj", "lm_head"]}
EXCESS = {"score": "excess", "selection_scope": "batch", "positive_fraction": 0.6}
CASES = {
    "unequal": {"weights": unequal},
    "separate": {"weights": unequal, "forget_normalization": "separate"},
    "one_without_negatives": {"weights": one_without_negatives},
    "one_without_tokens": {"weights": one_without_tokens},
    "accumulated": {"weights": unequal, "gradient_accumulation_steps": 2},
    "lora_with_head": {"weights": unequal, "lora": True},
    "reference": {"reference": True},
    "reference_online": {"reference": True, "precompute_scores": False},
    "reference_online_lora": {"reference": True, "precompute_scores": False, "lora": True},
    "reference_adapter": {"reference": "adapter", "lora": True},
    "reference_adapter_full": {"reference": "adapter"},
    "packed": {"reference": True, "packing": True, "max_length": 14},
    "excess": {"reference": True, **EXCESS, "gradient_accumulation_steps": 2},
    "excess_online_lora": {"reference": True, **EXCESS, "precompute_scores": False, "lora": True},
    "excess_one_pass": {"reference": True, **EXCESS, "excess_passes": 1, "gradient_accumulation_steps": 2},
}


# Evaluated in every step, cut off after the second and resumed, saved at the end. The momentum is a state to resume
# with; torch has no sharded checkpoint of an optimizer without one ("Expected device to be set")
WHOLE = {
    "whole": {"loaded": True, "reference": "folder", "packing": True, "max_length": 14},
    "whole_lora": {"loaded": True, "reference": "folder", "precompute_scores": False, "lora": True},
}
# Models that are loaded from a folder, which processes may do in different ways
LOADED = {
    "loaded": {"loaded": True, "reference": "folder"},
    "loaded_npo": {"loaded": True, "weights": unequal, "forget_objective": "npo"},
    "loaded_online": {"loaded": True, "reference": "folder", "precompute_scores": False},
    "loaded_lora": {"loaded": True, "reference": "adapter", "lora": True},
    "loaded_full_adapter": {"loaded": True, "reference": "adapter"},
}


def saved_model(folder: Path, seed: int) -> str:
    """Folder of a model; made by the process that launches the others, since not all of them would save."""
    path = folder / f"model-{seed}"
    if not path.exists():
        tiny.llama(seed=seed, tie_word_embeddings=False).save_pretrained(path)
    return str(path)


def saved_adapter(folder: Path) -> str:
    """Folder of a LoRA adapter that changes what the model says; each process writes its own copy of the same one."""
    path = folder / f"adapter-{os.environ.get('RANK', '0')}"
    model = get_peft_model(tiny.llama(tie_word_embeddings=False), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    model.save_pretrained(path)
    return str(path)


class StopAfter(TrainerCallback):
    def __init__(self, step: int):
        self.step = step

    def on_step_end(self, args, state, control, **_):
        control.should_training_stop = state.global_step == self.step


def train(
    case: str, folder: Path, batch_size: int, kind: str = "single"
) -> tuple[list[dict], dict[str, torch.Tensor]]:
    """Three SGD steps over the same 8 rows, whatever the number of processes; the logs and the final weights."""
    settings = dict((CASES | WHOLE | LOADED)[case])
    weights, lora, reference, loaded = (settings.pop(k, None) for k in ("weights", "lora", "reference", "loaded"))
    if reference == "adapter":
        reference = saved_adapter(folder)
    elif reference is not None:
        reference = saved_model(folder, 1) if loaded else True
    accumulation = settings.pop("gradient_accumulation_steps", 1)
    rule = (
        {}
        if weights or "positive_fraction" in settings
        else {"negative_threshold": 0.1, "score_base_weight": 1.0, "score_pooling": "token"}
    )
    args = SelectiveSFTConfig(
        str(folder / f"{case}-out"), use_cpu=not kind.startswith("zero"), bf16=False, report_to="none",
        gradient_checkpointing=False,
        save_strategy="no", logging_steps=1, max_steps=3, learning_rate=0.2, optim="sgd", disable_tqdm=True,
        dataloader_pin_memory=False, train_sampling_strategy="sequential", forget_weight=1.0,
        forget_schedule="constant", scoring_cache_dir=str(folder / f"{case}-cache"),
        per_device_train_batch_size=batch_size // accumulation, gradient_accumulation_steps=accumulation,
        scoring_batch_size=2, **rule, **settings,
    )  # fmt: skip
    if case in WHOLE:
        whole = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 1}
        whole |= {"optim_args": "momentum=0.9"}
        whole |= {} if kind == "single" else {"save_strategy": "steps", "save_steps": 2}
        args = dataclasses.replace(args, **whole)
    columns = {"token_weights": weights} if weights else {}
    made = functools.partial(
        SelectiveSFTTrainer,
        train_dataset=tiny.tokenised_data(8, **columns),
        eval_dataset=tiny.tokenised_data(4) if case in WHOLE else None,
        processing_class=tiny.tokenizer(),
        peft_config=LoraConfig(**LORA) if lora else None,
    )

    def new() -> SelectiveSFTTrainer:
        model = saved_model(folder, 0) if loaded else tiny.llama(tie_word_embeddings=False)
        own = dataclasses.replace(args)  # a trainer takes the state of accelerate that its arguments have made
        if kind == "zero3":  # partition every parameter, however small
            own.deepspeed_plugin.deepspeed_config["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        return made(model, own, reference_model=tiny.llama(seed=1) if reference is True else reference)

    trainer = new()
    if lora:  # B = 0 gives the factors A no gradient in the first step
        with torch.no_grad():
            for name, parameter in trainer.model.named_parameters():
                if "lora_B" in name and not reference:
                    parameter.fill_(0.01)
    if case in WHOLE and kind != "single":
        trainer.add_callback(StopAfter(2))
        trainer.train()
        trainer = new()
    trainer.train(resume_from_checkpoint=case in WHOLE and kind != "single")
    if case in WHOLE:
        save_whole_model(trainer, str(folder / f"{case}-saved"))
    parameters = list(trainer.model_wrapped.parameters())
    assert kind.startswith("fsdp") == any(isinstance(parameter, DTensor) for parameter in parameters)
    assert (kind == "zero3") == any(hasattr(parameter, "ds_id") for parameter in parameters)
    state = trainer.accelerator.get_state_dict(trainer.model if kind in ("single", "ddp") else trainer.model_wrapped)
    (folder / f"{case}-{os.environ.get('RANK', '0')}.sha256").write_text(model_fingerprint(trainer.model))
    return [row for row in trainer.state.log_history if "grad_norm" in row or "eval_loss" in row], state


def shard_on_cpu() -> None:
    """Make accelerate run FSDP2 without an accelerator, which it refuses: it decides by the kind of device."""
    from accelerate.state import DistributedType, PartialState

    original = PartialState.__init__

    def on_an_accelerator(self, *args, **kwargs):
        original(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_XPU

    PartialState.__init__ = on_an_accelerator


def leave_weights_empty() -> None:
    """What `fsdp_cpu_ram_efficient_loading` may do, depending on the version of transformers: only the main process
    has the weights of a loaded model. Here the others have NaN, which shows in whatever is computed from it."""
    original = PreTrainedModel.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        model = original(cls, *args, **kwargs)
        if os.environ.get("RANK", "0") != "0":
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.fill_(torch.nan)
        return model

    PreTrainedModel.from_pretrained = classmethod(from_pretrained)


def run_deepspeed_on_cpu() -> None:
    """DeepSpeed compiles an operator for shared memory when it starts on a CPU: half a minute, and gloo needs none."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed.comm.torch
    from accelerate.state import DistributedType, PartialState

    deepspeed.comm.torch.build_shm_op = lambda: None
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_CPU)


def prepare_process(kind: str) -> None:
    if kind.startswith("fsdp"):
        shard_on_cpu()
    if kind.startswith("zero"):
        run_deepspeed_on_cpu()
    if kind == "fsdp_shipped":
        leave_weights_empty()


def main(folder: Path, kind: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    prepare_process(kind)
    for case in cases:
        rows, state = train(case, folder, batch_size=4, kind=kind)
        if torch.distributed.get_rank() == 0:
            plain = {name: value.detach().cpu().contiguous().clone() for name, value in state.items()}
            save_file(plain, folder / f"{case}.safetensors")
            (folder / f"{case}.json").write_text(json.dumps(rows))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
