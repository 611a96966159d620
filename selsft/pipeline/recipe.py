"""A recipe: the flags of `train` in a flat YAML file, as for `trl sft`, and what single stages do otherwise.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    dataset_name: messy.jsonl
    use_peft: true
    learning_rate: 1.0e-4
    stages:
      split: {reference_size: 0.2, eval_size: 0.05}
      reference: {learning_rate: 5.0e-5}     # overrides the flag for this stage alone
      evaluate: {max_new_tokens: 64}

A flag goes to the stages that it concerns and to no other, so that another threshold does not train the reference
again. Rejected: a nested configuration with a schema of its own, in which every flag of TRL would have a second name.
"""

from __future__ import annotations

import dataclasses
import difflib
from dataclasses import dataclass, field
from typing import Any

import yaml
from trl import DatasetMixtureConfig, ModelConfig, ScriptArguments, SFTConfig

from ..config import SelectiveSFTConfig
from ..data.foreign import with_format
from ..data.loading import parse_columns
from ..errors import InputError
from ..evaluation.settings import EvaluateArguments
from ..recipes import find_recipe
from ..scoring.settings import ScoreArguments
from ..secrets import to_environment
from .arms import KINDS, Arm, parse_arms
from .split import SplitSettings

STAGES = ("world", "split", "check", "reference", "score", "select", "train", "evaluate")
_RESERVED = {*STAGES, "base", "triage"}  # names that no arm can have


def _names(*types: Any) -> set[str]:
    return {item.name for each in types for item in dataclasses.fields(each)}


SFT = _names(SFTConfig)
DATA = _names(ScriptArguments, DatasetMixtureConfig) | {"columns", "format"}
MODEL = _names(ModelConfig)
OWN = _names(SelectiveSFTConfig) - SFT
FORGET = {name for name in OWN if name.startswith("forget_")}
# What a scoring pass computes, besides the models
JUDGING = {"judged", "judged_test", "judged_group", "target_precision", "probe_clean", "probe_corruptions"}
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


@dataclass
class RunSettings:
    """Flags of the run itself.

    Args:
        arms: what is trained and compared (`pipeline.arms`).
        seeds: trainings of each arm; the first has the seed of the recipe.
        only_score: whether the run ends with the table of scored rows, and trains nothing.
        headline: measure that the verdict is about; by default what the held-out rows allow (docs/pipeline.md).
    """

    arms: Any = None
    seeds: int = 1
    only_score: bool = False
    headline: str | None = None

    def __post_init__(self):
        if not isinstance(self.seeds, int) or self.seeds < 1:
            raise InputError(f"seeds={self.seeds!r} must be a number of trainings, at least 1")
        if not isinstance(self.only_score, bool):
            raise InputError(f"only_score={self.only_score!r} must be true or false")


@dataclass
class Recipe:
    """Attributes:
    name: of the file, without its suffix.
    common: flags of all stages.
    stages: what single stages do otherwise.
    own: what single arms do otherwise, from the command line.
    """

    name: str
    common: dict[str, Any]
    stages: dict[str, dict[str, Any]] = field(default_factory=dict)
    own: dict[str, dict[str, Any]] = field(default_factory=dict)

    def flags(self, stage: str) -> dict[str, Any]:
        """The flags of a stage: the common ones that concern it, and its own."""
        return {k: v for k, v in self.common.items() if _concerns(stage, k)} | self.stages.get(stage, {})

    def get(self, flag: str, default: Any = None, stage: str | None = None) -> Any:
        return self.stages.get(stage or "", {}).get(flag, self.common.get(flag, default))

    @property
    def score(self) -> str:
        return self.get("score", "influence", "select")

    @property
    def run(self) -> RunSettings:
        return RunSettings(**{name: self.common[name] for name in _names(RunSettings) if name in self.common})

    @property
    def arms(self) -> list[Arm]:
        """The arms; of self-evolving selection, which trains part after part, the recipe's own alone."""
        forgets = self.get("forget_weight", stage="train") != 0
        given = self.run.arms
        if self.split.parts > 1:
            if given is not None:
                raise InputError(
                    f"arms={given!r} with split.parts={self.split.parts}: parts train one model, leave it out"
                )
            given = [KINDS[2] if forgets else KINDS[1]]
        arms = parse_arms(given, self.own, forgets)
        for arm in arms:
            if arm.name in _RESERVED:
                raise InputError(f"arms: {arm.name!r} is the name of a stage or model: choose another")
            if unknown := sorted(set(arm.changes) - OWN - SFT - MODEL):
                raise InputError(
                    f"arms: {arm.name}.{unknown[0]} is no flag of `selsft train`{_close(unknown[0], OWN)}"
                )
            if arm.kind == KINDS[2] and arm.changes.get("forget_weight", 1 if forgets else 0) == 0:
                raise InputError(f"arms: {arm.name!r} with forget_weight=0 is the arm 'ignore': set forget_weight")
        return arms

    @property
    def split(self) -> SplitSettings:
        settings = dict(self.stages.get("split", {}))
        if self.score not in REFERENCED and settings.get("parts", 1) == 1:
            settings |= {"reference_size": 0, "reference_dataset": None}
        elif self.get("reference_model", stage="score"):
            settings.setdefault("reference_size", 0)
        return SplitSettings(**settings)


def _concerns(stage: str, flag: str) -> bool:
    known = DATA | MODEL | SFT | OWN | _names(EvaluateArguments, ScoreArguments, RunSettings)
    launch = flag not in known and flag != "env"  # of `accelerate launch`
    match stage:
        case "reference":
            return flag in DATA | MODEL | SFT | {"env"} or launch
        case "check":
            return flag in ROWS | {"packing", "model_name_or_path", "model_revision"}
        case "score":
            return flag in DATA | (MODEL - PEFT) | ROWS | SCORING | {"env"} or launch or flag in _names(ScoreArguments)
        case "select":
            return flag in SELECTION
        case "train":
            return flag in DATA | MODEL | SFT | OWN | {"env"} or launch
        case "evaluate":
            return flag in DATA | (MODEL - PEFT) | ROWS | _names(EvaluateArguments) | {"env"}
    return False


def load_recipe(source: str, overrides: list[str]) -> Recipe:
    """Read a recipe by path, or by the name of one that ships with selsft.

    Args:
        overrides: `--flag value` for all stages, `--STAGE.flag value` for one.

    Raises:
        `InputError` for a file that is not there or is no recipe, and for misspelt stages and flags.
    """
    path = find_recipe(source, f"recipe {source!r}")
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"recipe {source!r} is not a YAML file: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"recipe {source!r} must be a mapping of flags, not {type(content).__name__}")
    stages = content.pop("stages", None) or {}
    if not isinstance(stages, dict) or not all(isinstance(each, dict | None) for each in stages.values()):
        raise InputError(f"stages of recipe {source!r} must map a stage to its flags")
    recipe = Recipe(path.stem, content, {name: dict(flags or {}) for name, flags in stages.items()})
    given = _pairs(overrides)
    _make_way(recipe, [flag for flag, value in given if value is not None])
    for flag, value in given:
        place, dot, name = flag.rpartition(".")
        if not dot:
            recipe.common[name] = value
        else:
            group = recipe.stages if place in STAGES else recipe.own
            group.setdefault(place, {})[name] = value
    for flags in (recipe.common, *recipe.stages.values()):
        to_environment(flags)
    if form := recipe.common.pop("format", None):
        recipe.common["dataset_name"] = with_format(recipe.common.get("dataset_name"), form)
    _check(recipe)
    return recipe


def _make_way(recipe: Recipe, given: list[str]) -> None:
    """Of rules that exclude each other, the one on the command line replaces the recipe's. `target_precision` may
    stay where a threshold is given: it belongs to the scores, which another threshold must leave alone."""
    chosen = {flag.rpartition(".")[2] for flag in given} & set(RULES)
    for flags in (recipe.common, *recipe.stages.values()):
        for rule in RULES[:2]:
            if chosen and rule not in chosen:
                flags.pop(rule, None)


def _pairs(arguments: list[str]) -> list[tuple[str, Any]]:
    """`--flag value` and `--flag=value`, the value read as YAML reads it."""
    found: list[tuple[str, Any]] = []
    rest = list(arguments)
    while rest:
        part = rest.pop(0)
        if not part.startswith("--"):
            raise InputError(f"unexpected argument {part!r}: every value needs a --flag before it")
        name, equals, text = part[2:].partition("=")
        if not equals:
            if not rest or rest[0].startswith("--"):
                raise InputError(f"--{name} needs a value")
            text = rest.pop(0)
        found.append((name, yaml.safe_load(text) if text else text))
    return found


def _check(recipe: Recipe) -> None:
    split_flags = _names(SplitSettings)
    for stage, flags in recipe.stages.items():
        if stage not in STAGES:
            raise InputError(f"stages.{stage} is unknown: the stages are {', '.join(STAGES[1:])}")
        known = {
            "check": ROWS,
            "world": {"seed", "countries", "epochs"},
            "split": split_flags,
            "evaluate": _names(EvaluateArguments) | DATA | MODEL | SFT,
            "score": _names(ScoreArguments) | DATA | MODEL | SFT | OWN,
            "select": SELECTION,
        }.get(stage, DATA | MODEL | SFT | OWN)
        for flag in flags:
            if flag not in known:
                hint = _close(flag, known) or f": it is no flag of this stage: {', '.join(sorted(known)[:8])} ..."
                raise InputError(f"stages.{stage}.{flag} is unknown{hint}")
    arms = {arm.name for arm in recipe.arms}
    for name in recipe.own:
        if name not in arms:
            raise InputError(
                f"--{name}.{next(iter(recipe.own[name]))}: {name!r} is neither a stage ({', '.join(STAGES[1:])}) nor "
                f"an arm ({', '.join(sorted(arms))})"
            )
    parse_columns(recipe.get("columns"))
    for flag in recipe.common:
        if flag in split_flags - SFT:
            raise InputError(f"{flag} belongs under `stages: split:`")
    if recipe.get("dataset_streaming") or recipe.get("streaming"):
        raise InputError("dataset_streaming=True: a run splits its data, which a stream cannot be: leave it out")
    if "world" in recipe.stages:
        return
    if not recipe.get("model_name_or_path"):
        raise InputError("model_name_or_path is missing: set it in the recipe or give --model_name_or_path")
    if not (recipe.get("dataset_name") or recipe.get("datasets")):
        raise InputError("dataset_name is missing: set it in the recipe or give --dataset_name NAME, FILE or FOLDER")


def _close(flag: str, known: set[str]) -> str:
    close = difflib.get_close_matches(flag, sorted(known), n=1)
    return f": did you mean {close[0]}?" if close else ""
