"""Training of a stage: rows of questions and labels, through `SelectiveSFTTrainer`.

Both stages are plain prompt-completion fine-tuning with the loss on the answer alone; a token objective is the same
with weight -1 on the tokens of the right answers. So all forgetting is done by the trainer. Rejected: a
training loop of its own, which would be smaller and prove nothing about the trainer that users have.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from datasets import Dataset
from peft import LoraConfig, PeftModel, TaskType
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    TrainerCallback,
)

from selsft_kernels.objectives import FORGET

from ..config import SelectiveSFTConfig
from ..evaluation.examples import MultipleChoiceExample, training_data, training_row
from ..evaluation.options import OptionScores
from ..trainer import SelectiveSFTTrainer
from ..training.model import Model
from ..workflow.quiet import QUIET, quiet, train_quietly
from .config import StudyConfig
from .randomize import assign_labels, match_rate
from .table import RANDOM_LABELS
from .tasks import SkillTask, rng

Rows = list[dict[str, list]]


def load_tokenizer(config: StudyConfig) -> PreTrainedTokenizerBase:
    tokenizer = AutoTokenizer.from_pretrained(config.model_name_or_path, trust_remote_code=config.trust_remote_code)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_model(config: StudyConfig, folder: Path | None = None) -> Model:
    """The base model, or the one that a stage has left in `folder`, in evaluation mode on the device of the study."""
    adapter = folder is not None and config.use_peft
    source: str | Path = config.model_name_or_path if folder is None or adapter else folder
    with quiet():
        model: Model = AutoModelForCausalLM.from_pretrained(
            source, dtype=getattr(torch, config.dtype), trust_remote_code=config.trust_remote_code
        )
        if adapter:
            model = PeftModel.from_pretrained(cast(PreTrainedModel, model), str(folder), is_trainable=True)
    model.to(str(device(config)))  # type: ignore[arg-type]  # their own annotation
    return model.eval()


def device(config: StudyConfig) -> torch.device:
    found = None if config.use_cpu else torch.accelerator.current_accelerator(check_available=True)
    return found or torch.device("cpu")


def answer_rows(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MultipleChoiceExample],
    labels: Sequence[int] | None = None,
    weight: float | None = None,
    max_length: int | None = None,
) -> Rows:
    """Training rows of `examples` with their right answers, or with `labels`."""
    chosen = [example.gold for example in examples] if labels is None else labels
    return [
        training_row(tokenizer, example, int(label), weight=weight, max_length=max_length)
        for example, label in zip(examples, chosen, strict=True)
    ]


def retained(config: StudyConfig, tasks: Mapping[str, SkillTask], label_task: str, seed: int) -> list:
    """Training questions of the retained tasks, `retain_ratio` for each question that is forgotten."""
    pool = [e for name in config.retain_task_names if name != label_task for e in tasks[name].train]
    wanted = round(config.retain_ratio * len(tasks[label_task].train))
    return rng("retain", seed, label_task).sample(pool, min(wanted, len(pool)))


def forgetting_rows(
    config: StudyConfig,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Mapping[str, SkillTask],
    label_task: str,
    method: str,
    seed: int,
    max_length: int | None,
) -> tuple[Rows, list[int] | None, dict[str, Any]]:
    """What the forgetting stage trains on.

    Returns:
        rows (of all epochs, in their order, with `redraw="per_epoch"`, else of one), the labels of the training
        questions (`None` where there are none or no fixed ones), and notes: the realised match rate, of each epoch.
    """
    examples = tasks[label_task].train
    kept = retained(config, tasks, label_task, seed)
    if method not in RANDOM_LABELS:
        rows = answer_rows(tokenizer, examples, None, -1.0, max_length)
        return [*rows, *answer_rows(tokenizer, kept, None, 1.0, max_length)], None, {"retained": len(kept)}
    rates: list[float] = []
    rows = []
    fixed = config.redraw == "fixed"
    for epoch in [None] if fixed else range(int(config.forget_num_train_epochs)):
        labels = assign_labels(examples, method, seed, epoch)
        rates.append(match_rate(examples, labels))
        drawn = answer_rows(tokenizer, examples, labels.tolist(), None, max_length)
        drawn += answer_rows(tokenizer, kept, None, None, max_length)
        if not fixed:
            rng("order", seed, epoch).shuffle(drawn)
        rows += drawn
    return rows, labels.tolist() if fixed else None, {"match_rate": rates, "retained": len(kept)}


def train(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    rows: Rows,
    config: StudyConfig,
    *,
    learning_rate: float,
    epochs: float,
    seed: int,
    method: str = "",
    in_order: bool = False,
    description: str = "Training",
    callbacks: Sequence[TrainerCallback] = (),
) -> Model:
    """Train on `rows` and return the model, which is `model` or, with `use_peft`, an adapter on it.

    Args:
        method: a token objective for rows with weights; anything else for plain fine-tuning.
        in_order: whether to go through the rows once, as they are.
    """
    data: Dataset = training_data(rows)
    with quiet(), tempfile.TemporaryDirectory(prefix="selsft-skills-") as folder:
        args = _arguments(config, folder, learning_rate, 1 if in_order else epochs, seed, method, in_order)
        adapter = None
        if config.use_peft and not isinstance(model, PeftModel):
            adapter = _lora(config)
        trainer = SelectiveSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer, peft_config=adapter)
        for callback in callbacks:
            trainer.add_callback(callback)
        train_quietly(trainer, description)
        return trainer.model.eval()


def steps(rows: int, epochs: float, config: StudyConfig) -> int:
    """Optimizer steps of a stage."""
    batches = math.ceil(rows / config.per_device_train_batch_size)
    return math.ceil(math.ceil(batches / config.gradient_accumulation_steps) * epochs)


def _lora(config: StudyConfig) -> LoraConfig:
    names = [part.strip() for part in config.lora_target_modules.split(",")]
    return LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=names[0] if len(names) == 1 else names,
        task_type=TaskType.CAUSAL_LM,
    )


def _arguments(
    config: StudyConfig, folder: str, learning_rate: float, epochs: float, seed: int, method: str, in_order: bool
) -> SelectiveSFTConfig:
    settings: dict[str, Any] = {
        "output_dir": folder,
        "learning_rate": learning_rate,
        "num_train_epochs": epochs,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "linear",
        "seed": seed,
        "data_seed": seed,
        "train_sampling_strategy": "sequential" if in_order else "random",
        "max_length": None,  # rows are cut where they are made, at the side where the scorer cuts
        "packing": False,
        "use_cpu": config.use_cpu,
        "bf16": config.bf16,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        **QUIET,
        "scoring_cache_dir": f"{folder}/scores",
    }
    if method and method not in RANDOM_LABELS:
        settings |= {
            "forget_objective": method,
            "forget_weight": config.forget_weight,
            "forget_schedule": "constant",
            **({"forget_beta": config.forget_beta} if FORGET[method].needs_beta else {}),
            "forget_floor": config.forget_floor,
        }
    return SelectiveSFTConfig(**{**settings, **config.training_settings})


class CurveCallback(TrainerCallback):
    """Scores `examples` before the first step and every `every` steps, in the middle of training: `curve` maps a step
    to its scores. The scorer draws no random numbers and restores the mode of every module, so that training is the
    same with and without it."""

    def __init__(self, score: Callable[[Model], OptionScores], every: int):
        self.score, self.every = score, every
        self.curve: dict[int, OptionScores] = {}

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.curve[0] = self.score(model)

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step % self.every == 0:
            self.curve[state.global_step] = self.score(model)
