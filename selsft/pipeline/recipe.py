"""A recipe: the flags of `train` in a flat YAML file, as for `trl sft`, and what single stages do otherwise.

    model_name_or_path: HuggingFaceTB/SmolLM2-135M-Instruct
    dataset_name: messy.jsonl
    use_peft: true
    learning_rate: 1.0e-4
    stages:
      split: {reference_size: 0.2, eval_size: 0.05}
      reference: {learning_rate: 5.0e-5}     # overrides the flag for this stage alone
      evaluate: {max_new_tokens: 64}

A flag goes to the stages that it concerns and to no other (`pipeline.flags`). Rejected: a nested configuration with a
schema of its own, in which every flag of TRL would have a second name.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import yaml

from ..data.foreign import with_format
from ..errors import InputError
from ..recipes import find_recipe
from ..secrets import to_environment
from .arms import KINDS, Arm, parse_arms
from .flags import (
    MODEL,
    OF_STAGE,
    OF_TRAINING,
    OWN,
    REFERENCED,
    RULES,
    RUN,
    SFT,
    SPLIT,
    close_to,
    concerns,
)

_EXPONENT = re.compile(r"[+-]?\d+[eE][+-]?\d+")
STAGES = ("world", "split", "check", "reference", "score", "select", "train", "evaluate")
_RESERVED = {*STAGES, "base", "triage"}  # names that no arm can have


@dataclass
class RunSettings:
    """Flags of the run itself.

    Args:
        arms: what is trained and compared (`pipeline.arms`).
        seeds: trainings of each arm; the first has the seed of the recipe.
        only_score: whether the run ends with the table of scored rows, and trains nothing.
        headline: measure that the verdict is about; by default what the held-out rows allow (docs/pipeline.md).
        keep_models: whether whole models of all arms and seeds are kept. By default the weights of all but the
            first seed of the method are removed when they have been evaluated; adapters are always kept.
    """

    arms: Any = None
    seeds: int = 1
    only_score: bool = False
    headline: str | None = None
    keep_models: bool = False

    def __post_init__(self):
        if not isinstance(self.seeds, int) or self.seeds < 1:
            raise InputError(f"seeds={self.seeds!r} must be a number of trainings, at least 1")
        for name in ("only_score", "keep_models"):
            if not isinstance(getattr(self, name), bool):
                raise InputError(f"{name}={getattr(self, name)!r} must be true or false")


@dataclass
class SplitSettings:
    """Flags of the stage `split`.

    Args:
        reference_size: rows for the reference, as a share (below 1) or a number. 0 when a reference is given.
        reference_dataset: rows of your own for the reference, ones that you trust, instead of a share of the data.
        eval_size: rows for evaluation, likewise.
        eval_dataset: rows of your own for evaluation.
        replay_dataset: rows that the base already knows, mixed into the reference's, since a reference that forgets
            calls truths negative.
        replay_share: share of these among all rows of the reference.
        judged_fraction: rows with marks (docs/spans.md) that are kept as a judged sample, likewise, where no file of
            `judged` rows is given.
        judged_test_size: rows of the judged sample that nothing is fitted on, likewise.
        parts: parts of the rows to clean, for self-evolving selection.
        group_column: rows with the same value stay together; by default those with the same prompt.
        seed: decides which group falls where.
    """

    reference_size: float = 0.2
    reference_dataset: str | None = None
    eval_size: float = 0.05
    eval_dataset: str | None = None
    replay_dataset: str | None = None
    replay_share: float = 0.2
    judged_fraction: float = 0.0
    judged_test_size: float = 0.33
    parts: int = 1
    group_column: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("reference_size", "eval_size", "judged_fraction", "judged_test_size"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (value > 1 and value != int(value)):
                raise InputError(f"split.{name}={value!r} must be a share in [0, 1) or a number of rows")
        if not _is_number(self.replay_share) or not 0 <= self.replay_share < 1:
            raise InputError(f"split.replay_share={self.replay_share!r} must be in [0, 1)")
        for name, least in (("parts", 1), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                raise InputError(f"split.{name}={value!r} must be a whole number{'' if least is None else ' from 1'}")
        for name in ("reference_dataset", "eval_dataset", "replay_dataset", "group_column"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"split.{name}={getattr(self, name)!r} must be text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


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
        return {k: v for k, v in self.common.items() if concerns(stage, k)} | self.stages.get(stage, {})

    def get(self, flag: str, default: Any = None, stage: str | None = None) -> Any:
        return self.stages.get(stage or "", {}).get(flag, self.common.get(flag, default))

    @property
    def score(self) -> str:
        return self.get("score", "influence", "select")

    @property
    def columns(self) -> dict[str, str]:
        """New name -> name in the data."""
        given = self.get("columns")
        if given is None:
            return {}
        from ..data.loading import parse_columns  # seconds, for whoever renames columns

        return parse_columns(given)

    @property
    def run(self) -> RunSettings:
        return RunSettings(**{name: self.common[name] for name in RUN if name in self.common})

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
                    f"arms: {arm.name}.{unknown[0]} is no flag of `selsft train`{close_to(unknown[0], OWN)}"
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
    recipe = Recipe(path.stem, _numbers(content), {name: _numbers(flags or {}) for name, flags in stages.items()})
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
    """Of rules that exclude each other, the one on the command line replaces the recipe's."""
    chosen = {flag.rpartition(".")[2] for flag in given} & set(RULES)
    for flags in (recipe.common, *recipe.stages.values()):
        for rule in RULES:
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
    return list(_numbers(dict(found)).items())


def _numbers(flags: dict[str, Any]) -> dict[str, Any]:
    """Flags with `1e-4` as a number, which YAML takes for text without a dot in it."""
    return {
        key: float(value) if isinstance(value, str) and _EXPONENT.fullmatch(value) else value
        for key, value in flags.items()
    }


def _check(recipe: Recipe) -> None:
    for stage, flags in recipe.stages.items():
        if stage not in STAGES:
            raise InputError(f"stages.{stage} is unknown: the stages are {', '.join(STAGES[1:])}")
        known = OF_STAGE.get(stage, OF_TRAINING)
        for flag in flags:
            if flag not in known:
                hint = close_to(flag, known) or f": it is no flag of this stage: {', '.join(sorted(known)[:8])} ..."
                raise InputError(f"stages.{stage}.{flag} is unknown{hint}")
    arms = {arm.name for arm in recipe.arms}
    for name in recipe.own:
        if name not in arms:
            raise InputError(
                f"--{name}.{next(iter(recipe.own[name]))}: {name!r} is neither a stage ({', '.join(STAGES[1:])}) nor "
                f"an arm ({', '.join(sorted(arms))})"
            )
    _ = recipe.columns
    for flag in recipe.common:
        if flag in SPLIT - SFT:
            raise InputError(f"{flag} belongs under `stages: split:`")
    if recipe.get("dataset_streaming") or recipe.get("streaming"):
        raise InputError("dataset_streaming=True: a run splits its data, which a stream cannot be: leave it out")
    if "world" in recipe.stages:
        return
    if not recipe.get("model_name_or_path"):
        raise InputError("model_name_or_path is missing: set it in the recipe or give --model_name_or_path")
    if not (recipe.get("dataset_name") or recipe.get("datasets")):
        raise InputError("dataset_name is missing: set it in the recipe or give --dataset_name NAME, FILE or FOLDER")
