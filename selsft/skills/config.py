"""Settings of a skill study: the flags of `selsft skills`, checked.

Names are those of TRL and transformers where there is one, with `forget_` in front where the forgetting stage has its
own value. Rejected: the 250 flags of `SelectiveSFTConfig`, once per stage; `training_kwargs` sets any of them.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from .suite import task_names
from .table import METHODS
from .tasks import TaskSettings

# Not open to training_kwargs: the study sets them, or their meaning here
_OWN = (
    "output_dir", "seed", "data_seed", "max_steps", "num_train_epochs", "learning_rate", "max_length", "packing",
    "padding_free", "resume_from_checkpoint", "train_sampling_strategy", "per_device_train_batch_size",
    "gradient_accumulation_steps", "use_cpu", "bf16", "forget_objective", "reference_model", "completion_only_loss",
    "dataset_text_field", "report_to", "save_strategy", "eval_strategy",
)  # fmt: skip


def _flag(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass
class StudyConfig:
    """Every setting of a study; the help texts say what each one means.

    Raises:
        `ValueError` naming the field, the value and the remedy.
    """

    # What is studied
    tasks: str = _flag("", "Tasks, with commas between them; 'skills21' stands for the suite of 21.")
    tasks_dir: str | None = _flag(
        None, "Folder with NAME.jsonl or NAME/task.json (BIG-bench). Default: lm-evaluation-harness (needs its extra)."
    )
    model_name_or_path: str = _flag("", "The model that learns and forgets: id on the Hub or folder.")
    output_dir: str = _flag("", "Folder of the study. An interrupted study resumes where it stopped.")
    methods: str = _flag(
        "uniform",
        "Ways of forgetting, with commas between them. Random labels: uniform, flip, uniform_wrong, shuffle. Token "
        "objectives on the gold answers: unlikelihood, npo, wga, probability, gradient_ascent.",
    )
    label_tasks: str | None = _flag(None, "The tasks to forget. Default: all; all are evaluated in any case.")
    seeds: int = _flag(3, "Number of seeds: of the label draws and of the training order.")
    seed: int = _flag(0, "The first seed.")
    reference: str = _flag(
        "per_task",
        "Where forgetting starts: 'per_task', a model that was fine-tuned on the task to be forgotten, or 'shared', "
        "one that was fine-tuned on all tasks.",
        choices=["per_task", "shared"],
    )
    redraw: str = _flag(
        "fixed", "Whether random labels are drawn once or anew for each epoch.", choices=["fixed", "per_epoch"]
    )
    retain_tasks: str | None = _flag(
        None, "Tasks whose right answers are trained on while forgetting; 'others' for all but the forgotten one."
    )
    retain_ratio: float = _flag(1.0, "Retained rows for each row that is forgotten.")

    # Data
    options: str = _flag(
        "binary", "'binary': the true option and one random distractor. 'all': all options.", choices=["binary", "all"]
    )
    max_train: int = _flag(1000, "Most training questions of a task.")
    max_test: int = _flag(500, "Most test questions of a task.")
    balance: bool = _flag(True, "Whether each label of a yes/no task is the right one equally often.")
    strict: bool = _flag(False, "Whether overlap between train and test is an error instead of being dropped.")
    test_fraction: float = _flag(0.4, "Share of the questions for the test, in tasks without splits of their own.")
    data_seed: int = _flag(0, "Seed of splits, sizes and distractors: the same questions for every --seed.")

    # Training
    learning_rate: float = _flag(5e-5, "Learning rate of the fine-tuning.")
    num_train_epochs: float = _flag(3.0, "Epochs of the fine-tuning.")
    forget_learning_rate: float = _flag(1e-4, "Learning rate of the forgetting.")
    forget_num_train_epochs: float = _flag(3.0, "Epochs of the forgetting.")
    per_device_train_batch_size: int = _flag(16, "Rows in a training step.")
    gradient_accumulation_steps: int = _flag(1, "Batches in an optimizer step.")
    max_length: int | None = _flag(None, "Tokens of a row, in training and scoring. Default: what the model takes.")
    use_peft: bool = _flag(False, "Whether to train a LoRA adapter; forgetting continues with the same one.")
    lora_r: int = _flag(16, "Rank of the adapter.")
    lora_alpha: int = _flag(32, "Scale of the adapter.")
    lora_dropout: float = _flag(0.0, "Dropout of the adapter.")
    lora_target_modules: str = _flag("all-linear", "Modules with an adapter, with commas between them.")
    forget_weight: float = _flag(1.0, "Weight of a token objective.")
    forget_beta: float = _flag(1.0, "beta of npo and wga.")
    forget_floor: float | None = _flag(None, "Log-probability below which an answer token is no longer forgotten.")
    dtype: str = _flag("float32", "Type of the weights.", choices=["float32", "bfloat16", "float16"])
    bf16: bool = _flag(False, "Whether to train in mixed precision. Scores are computed in the type of the weights.")
    use_cpu: bool = _flag(False, "Whether to train on the CPU although there is an accelerator.")
    trust_remote_code: bool = _flag(False, "Whether code of the model's repository may run.")
    training_kwargs: str | None = _flag(
        None, 'More settings of SelectiveSFTConfig for both stages, as JSON: \'{"optim": "adafactor"}\'.'
    )

    # Measuring
    score_train: str = _flag(
        "own",
        "Training questions that are scored: of the task that was trained on, or of all tasks. The base model is "
        "always scored on all.",
        choices=["own", "all"],
    )
    score_steps: int = _flag(0, "Score the training questions every this many steps, for learning curves. 0: never.")
    hidden_states: str = _flag(
        "own",
        "Hidden states that are kept: none, those of the base model and of the task that was trained on, or all.",
        choices=["none", "own", "all"],
    )
    hidden_layer: int = _flag(-5, "Index into the model's hidden states; -5 is 'fifth to last'.")
    batch_tokens: int = _flag(8192, "Tokens in a forward pass while scoring.")

    # The run
    keep_models: bool = _flag(False, "Whether to keep every model; else fine-tuned ones go when nothing needs them.")
    recompute: bool = _flag(
        False, "Whether stages whose settings have changed are computed beside the old ones instead of refused."
    )
    dry_run: bool = _flag(False, "Show the stages and their tokens, and do nothing.")

    def __post_init__(self):
        for name in ("tasks", "model_name_or_path", "output_dir"):
            if not getattr(self, name):
                raise ValueError(f"{name} is missing: give --{name}")
        for name in ("reference", "redraw", "options", "score_train", "hidden_states", "dtype"):
            choices = type(self).__dataclass_fields__[name].metadata["choices"]
            if getattr(self, name) not in choices:
                raise ValueError(f"{name}={getattr(self, name)!r} is unknown: use one of {', '.join(choices)}")
        for name, least in (
            ("seeds", 1), ("max_train", 2), ("max_test", 2), ("per_device_train_batch_size", 1), ("lora_r", 1),
            ("gradient_accumulation_steps", 1), ("score_steps", 0), ("batch_tokens", 1), ("retain_ratio", 0),
            ("forget_weight", 0),
        ):  # fmt: skip
            if getattr(self, name) < least:
                raise ValueError(f"{name}={getattr(self, name)} must be at least {least}")
        for name in ("learning_rate", "num_train_epochs", "forget_learning_rate", "forget_num_train_epochs"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} must be positive")
        if self.redraw == "per_epoch" and self.forget_num_train_epochs != int(self.forget_num_train_epochs):
            raise ValueError(
                f"forget_num_train_epochs={self.forget_num_train_epochs} must be whole with redraw='per_epoch'"
            )
        unknown = [name for name in self.method_names if name not in METHODS]
        if unknown or not self.method_names:
            raise ValueError(f"methods={self.methods!r}: use one or more of {', '.join(METHODS)}")
        for name, chosen in (("label_tasks", self.label_task_names), ("retain_tasks", self.retain_task_names)):
            if missing := [task for task in chosen if task not in self.task_list]:
                raise ValueError(f"{name}: {missing[0]!r} is not among the tasks of the study ({self.tasks})")
        reserved = [name for name in self.training_settings if name in _OWN]
        if reserved:
            raise ValueError(f"training_kwargs: {reserved[0]!r} is set by the study: use its flag, if it has one")
        self.task_settings()

    @property
    def task_list(self) -> list[str]:
        return task_names(self.tasks)

    @property
    def label_task_names(self) -> list[str]:
        return task_names(self.label_tasks) if self.label_tasks else self.task_list

    @property
    def retain_task_names(self) -> list[str]:
        if not self.retain_tasks:
            return []
        return self.task_list if self.retain_tasks == "others" else task_names(self.retain_tasks)

    @property
    def method_names(self) -> list[str]:
        return list(dict.fromkeys(part.strip() for part in self.methods.split(",") if part.strip()))

    @property
    def training_settings(self) -> dict[str, Any]:
        """`training_kwargs` as a dict."""
        try:
            settings = json.loads(self.training_kwargs or "{}")
        except json.JSONDecodeError as error:
            raise ValueError(f"training_kwargs={self.training_kwargs!r} is not JSON: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"training_kwargs={self.training_kwargs!r} must be a JSON object")
        return settings

    def task_settings(self) -> TaskSettings:
        return TaskSettings(
            self.options, self.max_train, self.max_test, balance=self.balance, strict=self.strict, seed=self.data_seed
        )
