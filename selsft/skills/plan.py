"""What a study consists of: its stages, and everything that decides what comes out of each of them.

Two stages with the same inputs are the same stage, so the inputs are what a finished stage is compared by. Rejected:
comparing the whole configuration, with which one more method would make every finished stage old.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ..evaluation.examples import SPLITS
from ..records import json_sha256
from .config import StudyConfig, is_random_labels
from .scoring import Identity
from .table import ALL_TASKS
from .tasks import SkillTask

VERSION = 1  # of what a stage computes; a change makes finished stages old


@dataclass(frozen=True)
class Stage:
    """One model of the study.

    Args:
        kind: `"base"`, `"finetuned"` or `"forgotten"`.
        label_task: what it was trained on; `"*"` for all tasks, empty for the base.
        parent: name of the stage that it starts from, empty for the base.
    """

    kind: str
    seed: int
    label_task: str = ""
    method: str = ""
    parent: str = ""
    variant: str = ""

    @property
    def name(self) -> str:
        """Also its folder name."""
        task = "all" if self.label_task == ALL_TASKS else self.label_task
        seed = "" if self.kind == "base" else f"seed{self.seed}"
        return "-".join(part for part in (self.kind, self.variant, task, seed) if part)

    @property
    def identity(self) -> Identity:
        run = "-".join(part for part in (self.variant or self.kind, f"seed{self.seed}") if part)
        return Identity(run, self.seed, self.kind, self.method, self.label_task)


def plan(config: StudyConfig) -> list[Stage]:
    """The stages in the order of computation; a parent comes before its children."""
    kind = "lora" if config.use_peft else "full"
    redraw = "-per_epoch" if config.redraw == "per_epoch" else ""
    retain = "-retain" if config.retain_tasks else ""
    stages = [Stage("base", config.seed)]
    for seed in range(config.seed, config.seed + config.seeds):
        references: dict[str, Stage] = {}
        for task in config.task_list:
            shared = config.reference == "shared"
            reference = Stage("finetuned", seed, ALL_TASKS if shared else task, parent="base")
            if reference not in references.values():
                stages.append(reference)
            references[task] = reference
            if task not in config.label_task_names:
                continue
            for method in config.method_names:
                variant = f"{method}-{kind}{redraw if is_random_labels(method) else ''}{retain}"
                stages.append(Stage("forgotten", seed, task, method, reference.name, variant))
    return stages


class Plan:
    """The stages of a study and their inputs.

    Args:
        tasks: prepared.
        base_hash: of the base model's weights; empty while only counting (`dry_run`).
    """

    def __init__(self, config: StudyConfig, tasks: Mapping[str, SkillTask], base_hash: str = ""):
        self.config, self.tasks, self.base_hash = config, tasks, base_hash
        self.stages = plan(config)
        self._by_name = {stage.name: stage for stage in self.stages}
        self.fingerprints = {name: task.fingerprint() for name, task in tasks.items()}

    def parent(self, stage: Stage) -> Stage:
        return self._by_name[stage.parent]

    def is_parent(self, stage: Stage) -> bool:
        return any(other.parent == stage.name for other in self.stages)

    def schedule(self, stage: Stage) -> tuple[float, float]:
        """Epochs and learning rate."""
        config = self.config
        if stage.kind == "forgotten":
            return config.forget_num_train_epochs, config.forget_learning_rate
        return config.num_train_epochs, config.learning_rate

    def trained_tasks(self, stage: Stage) -> list[str]:
        if stage.kind == "base":
            return []
        return list(self.tasks) if stage.label_task == ALL_TASKS else [stage.label_task]

    def keeps_states(self, stage: Stage, name: str) -> bool:
        wanted = self.config.hidden_states
        return wanted == "all" or (wanted == "own" and (stage.kind == "base" or name in self.trained_tasks(stage)))

    def evaluations(self, stage: Stage) -> list[tuple[str, str, bool]]:
        """What a stage is scored on: task, split, and whether hidden states are kept."""
        with_train = list(self.tasks)
        if stage.kind != "base" and self.config.score_train == "own":
            with_train = self.trained_tasks(stage)
        return [
            (name, split, self.keeps_states(stage, name))
            for name in self.tasks
            for split in SPLITS
            if split == "test" or name in with_train
        ]

    def training_inputs(self, stage: Stage) -> dict[str, Any]:
        """Everything that decides the weights of a stage's model."""
        if stage.kind == "base":
            return {"version": VERSION, "model_sha256": self.base_hash}
        config = self.config
        epochs, learning_rate = self.schedule(stage)
        common = (
            "per_device_train_batch_size", "gradient_accumulation_steps", "max_length", "use_peft", "dtype", "bf16",
            "training_kwargs",
        )  # fmt: skip
        adapter = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules") if config.use_peft else ()
        names = [*common, *adapter]
        tasks = set(self.trained_tasks(stage))
        if stage.kind == "forgotten":
            if is_random_labels(stage.method):
                names += ["redraw"]
            else:
                names += ["forget_weight", "forget_beta", "forget_floor"]
            if config.retain_tasks:
                names += ["retain_tasks", "retain_ratio"]
                tasks |= set(config.retain_task_names)
        return {
            "parent": json_sha256(self.training_inputs(self.parent(stage))),
            "seed": stage.seed,
            "method": stage.method,
            "label_task": stage.label_task,
            "epochs": epochs,
            "learning_rate": learning_rate,
            **{name: getattr(config, name) for name in names},
            "data": {name: self.fingerprints[name] for name in sorted(tasks)},
        }

    def inputs(self, stage: Stage) -> dict[str, Any]:
        """The training's, and everything that decides the scores of the model."""
        config = self.config
        scoring: dict[str, Any] = {
            "data": dict(self.fingerprints),
            "hidden_states": config.hidden_states,
            "hidden_layer": None if config.hidden_states == "none" else config.hidden_layer,
            "max_length": config.max_length,
        }
        if stage.kind != "base":
            scoring |= {"score_train": config.score_train, "score_steps": config.score_steps}
        return {"training": self.training_inputs(stage), "scoring": scoring}
