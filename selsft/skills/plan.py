"""What a study consists of: its models, and all that decides each of them.

A model is one stage of the run; its key covers the settings that matter to it and no others. Rejected: the whole
configuration in every key, since adding a method would invalidate every finished stage.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.examples import SPLITS
from ..records import json_sha256
from .config import StudyConfig
from .table import ALL_TASKS, RANDOM_LABELS, Model

VERSION = 2  # of what a stage computes; a change invalidates finished stages


@dataclass(frozen=True)
class StudyModel:
    """One model of the study.

    Args:
        kind: `"base"`, `"finetuned"` or `"forgotten"`.
        label_task: what it was trained on; `"*"` for all tasks, empty for the base.
        parent: the model that its training starts from; `None` for the base.
        tasks: the tasks behind `label_task`.
        epochs, learning_rate: of its training.
    """

    kind: str
    seed: int
    label_task: str = ""
    method: str = ""
    parent: StudyModel | None = None
    variant: str = ""
    tasks: tuple[str, ...] = ()
    epochs: float = 0.0
    learning_rate: float = 0.0

    @property
    def name(self) -> str:
        """Also the name of its stage."""
        task = "all" if self.label_task == ALL_TASKS else self.label_task
        seed = "" if self.kind == "base" else f"seed{self.seed}"
        return "-".join(part for part in (self.kind, self.variant, task, seed) if part)

    @property
    def identity(self) -> Model:
        run = "-".join(part for part in (self.variant or self.kind, f"seed{self.seed}") if part)
        return Model(run, self.seed, self.kind, self.method, self.label_task)


def study_models(config: StudyConfig) -> list[StudyModel]:
    """The models in the order of computation; a parent comes before its children."""
    kind = "lora" if config.use_peft else "full"
    redraw = "-per_epoch" if config.redraw == "per_epoch" else ""
    retain = "-retain" if config.retain_tasks else ""
    tasks, shared = config.task_list, config.reference == "shared"
    first = config.num_train_epochs, config.learning_rate
    later = config.forget_num_train_epochs, config.forget_learning_rate
    base = StudyModel("base", config.seed)
    models = [base]
    for seed in range(config.seed, config.seed + config.seeds):
        for task in tasks:
            label, own = (ALL_TASKS, tuple(tasks)) if shared else (task, (task,))
            reference = StudyModel("finetuned", seed, label, "", base, "", own, *first)
            if reference not in models:
                models.append(reference)
            for method in config.method_names if task in config.label_task_names else []:
                variant = f"{method}-{kind}{redraw if method in RANDOM_LABELS else ''}{retain}"
                models.append(StudyModel("forgotten", seed, task, method, reference, variant, (task,), *later))
    return models


def keeps_states(config: StudyConfig, model: StudyModel, task: str) -> bool:
    """Whether a model's hidden states on a task are kept."""
    wanted = config.hidden_states
    return wanted == "all" or (wanted == "own" and (model.kind == "base" or task in model.tasks))


def evaluations(config: StudyConfig, model: StudyModel) -> list[tuple[str, str, bool]]:
    """What a model is scored on: task, split, and whether hidden states are kept."""
    with_train = model.tasks if model.kind != "base" and config.score_train == "own" else config.task_list
    return [
        (name, split, keeps_states(config, model, name))
        for name in config.task_list
        for split in SPLITS
        if split == "test" or name in with_train
    ]


def training_settings(config: StudyConfig, model: StudyModel, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Everything besides the base model that decides the weights of a model.

    Args:
        fingerprints: of the prepared tasks.
    """
    if model.parent is None:
        return {"version": VERSION, "dtype": config.dtype}
    names = [
        "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "use_peft", "bf16",
        "training_kwargs",
    ]  # fmt: skip
    if config.use_peft:
        names += ["lora_r", "lora_alpha", "lora_dropout", "lora_target_modules"]
    tasks = set(model.tasks)
    if model.kind == "forgotten":
        names += ["redraw"] if model.method in RANDOM_LABELS else ["forget_weight", "forget_beta", "forget_floor"]
        if config.retain_tasks:
            names += ["retain_tasks", "retain_ratio"]
            tasks |= set(config.retain_task_names)
    return {
        "parent": json_sha256(training_settings(config, model.parent, fingerprints)),
        **{name: getattr(model, name) for name in ("seed", "method", "label_task", "epochs", "learning_rate")},
        **{name: getattr(config, name) for name in names},
        "data": {name: fingerprints[name] for name in sorted(tasks)},
    }


def scoring_settings(config: StudyConfig, model: StudyModel, fingerprints: Mapping[str, str]) -> dict[str, Any]:
    """Everything that decides the scores of a trained model."""
    settings: dict[str, Any] = {
        "data": dict(fingerprints),
        "hidden_states": config.hidden_states,
        "hidden_layer": None if config.hidden_states == "none" else config.hidden_layer,
        "max_length": config.max_length,
    }
    if model.parent is not None:
        settings |= {"score_train": config.score_train, "score_steps": config.score_steps}
    return settings
