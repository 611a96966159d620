"""Which flag concerns which stage, so that another threshold does not train the reference again.

The names of TRL's and our settings are read from the source of their dataclasses: importing those takes five seconds
(they import torch and all of transformers), and a plan needs no more than the names. Rejected: lists of names, which
the next version of TRL would make wrong.
"""

from __future__ import annotations

import ast
import difflib
import functools
import importlib.util
from collections.abc import Set
from pathlib import Path

# Dataclass -> package and file that define it
_DEFINED = {
    "TrainingArguments": ("transformers", "training_args.py"),
    "_BaseConfig": ("trl", "trainer/base_config.py"),
    "SFTConfig": ("trl", "trainer/sft_config.py"),
    "ModelConfig": ("trl", "trainer/model_config.py"),
    "ScriptArguments": ("trl", "scripts/utils.py"),
    "DatasetMixtureConfig": ("trl", "scripts/utils.py"),
    "SelectiveSFTConfig": ("selsft", "config.py"),
    "EvaluateArguments": ("selsft", "evaluation/settings.py"),
    "ScoreArguments": ("selsft", "scoring/settings.py"),
    "RunSettings": ("selsft", "pipeline/recipe.py"),
    "SplitSettings": ("selsft", "pipeline/recipe.py"),
}


@functools.cache
def fields_of(name: str) -> frozenset[str]:
    """Names of the fields of a dataclass of `_DEFINED`, with those that it inherits."""
    package, file = _DEFINED[name]
    spec = importlib.util.find_spec(package)
    assert spec is not None and spec.submodule_search_locations
    found = next(
        node for node in _classes(Path(next(iter(spec.submodule_search_locations))) / file) if node.name == name
    )
    own = {
        item.target.id
        for item in found.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and "ClassVar" not in ast.dump(item)
    }
    above = [base.id for base in found.bases if isinstance(base, ast.Name) and base.id in _DEFINED]
    return frozenset(own).union(*map(fields_of, above))


@functools.cache
def _classes(path: Path) -> list[ast.ClassDef]:
    return [node for node in ast.parse(path.read_text(encoding="utf-8")).body if isinstance(node, ast.ClassDef)]


SFT = fields_of("SFTConfig")
DATA = fields_of("ScriptArguments") | fields_of("DatasetMixtureConfig") | {"columns", "format"}
MODEL = fields_of("ModelConfig")
OWN = fields_of("SelectiveSFTConfig") - SFT
SCORE, EVALUATE = fields_of("ScoreArguments"), fields_of("EvaluateArguments")
RUN, SPLIT = fields_of("RunSettings"), fields_of("SplitSettings")
# What becomes of tokens in training, whatever says which are negative; and what of it concerns positive ones, too
KEEPING = {"entropy_gate", "anchor_weight", "z_loss_weight"}
FORGET = KEEPING | {name for name in OWN if name.startswith("forget_")}
# What a scoring pass computes, besides the models
JUDGING = {"judged", "judged_test", "judged_group", "probe_clean", "probe_corruptions"}
POOLING = {"score_base_weight", "score_pooling", "score_row_worst", "score_lookahead"}
SCORING = {
    *(name for name in OWN if name.startswith("scoring_")), *JUDGING, "score", "probe", "noisy_reference_model",
    "reference_model", "reference_model_init_kwargs",
}  # fmt: skip
# How scores become weights
SELECTION = {"score", *POOLING} | (OWN - FORGET - SCORING - {"precompute_scores", "go_on"})
# Rules of which one is set
RULES = ("negative_threshold", "positive_fraction", "target_precision")
SCORED = ("influence", "surprisal", "probe", "contrast")
REFERENCED = ("influence", "contrast", "excess")
# What decides the tokens of a row and what a model makes of them, of all that SFTConfig has
ROWS = {
    "max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "chat_template_path",
    "dataset_text_field", "dataset_kwargs", "dataset_num_proc", "eos_token", "pad_token", "pad_to_multiple_of",
    "use_cpu", "bf16", "fp16", "tf32", "bf16_full_eval", "trust_remote_code", "model_init_kwargs", "seed",
    "per_device_eval_batch_size", "disable_tqdm", "report_to", "gradient_checkpointing",
} & SFT  # fmt: skip
PEFT = {name for name in MODEL if "lora" in name or "peft" in name or name == "use_rslora"}
# Flags that change neither weights nor figures
SILENT = {
    "output_dir", "run_name", "report_to", "disable_tqdm", "log_level", "log_on_each_node", "logging_dir",
    "logging_steps", "logging_strategy", "logging_first_step", "push_to_hub", "save_total_limit", "show_tokens",
    "dataset_num_proc", "dataloader_num_workers", "scoring_cache_dir", "project", "hub_token", "env", "go_on",
}  # fmt: skip
# Where rows and models come from: known by their content, rows only to the stage `split`
SOURCES = {
    "dataset_name", "dataset_config", "dataset_train_split", "dataset_test_split", "datasets", "streaming", "columns",
}  # fmt: skip
NAMES = {
    "model_name_or_path", "model_revision", "reference_model", "base_model_name_or_path", "judged", "judged_test",
    "probe", "probe_clean", "noisy_reference_model",
}  # fmt: skip
# What the flags of a stage in a recipe may be; `reference` and `train` take those of training
OF_STAGE = {
    "check": ROWS,
    "world": frozenset({"seed", "countries", "epochs"}),
    "split": SPLIT,
    "score": SCORE | DATA | MODEL | SFT | OWN,
    "select": SELECTION,
    "evaluate": EVALUATE | DATA | MODEL | SFT,
}
OF_TRAINING = DATA | MODEL | SFT | OWN


def concerns(stage: str, flag: str) -> bool:
    """Whether a flag that is given for all stages goes to this one."""
    known = OF_TRAINING | EVALUATE | SCORE | RUN
    launch = flag not in known and flag != "env"  # of `accelerate launch`
    match stage:
        case "reference":
            return flag in DATA | MODEL | SFT | {"env"} or launch
        case "check":
            return flag in ROWS | {"packing", "model_name_or_path", "model_revision"}
        case "score":
            return flag in DATA | (MODEL - PEFT) | ROWS | SCORING | SCORE | {"env"} or launch
        case "select":
            return flag in SELECTION
        case "train":
            return flag in OF_TRAINING | {"env"} or launch
        case "evaluate":
            return flag in DATA | (MODEL - PEFT) | ROWS | EVALUATE | {"env"}
    return False


def close_to(flag: str, known: Set[str]) -> str:
    """A hint for a flag that is misspelt; empty where none is like it."""
    close = difflib.get_close_matches(flag, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
