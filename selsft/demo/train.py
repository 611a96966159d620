"""Training in the demo: `SFTTrainer` for the base and the reference, `SelectiveSFTTrainer` for the three arms.

The demo goes through the public trainers and not through a loop of its own, so that what it shows is what a user gets.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback, TrainerCallback
from trl import SFTConfig, SFTTrainer

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from selsft.demo.model import clone

Advance = Callable[[], None]


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    epochs: float
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 32

    def steps(self, rows: int) -> int:
        return max(1, int(self.epochs * -(-rows // self.batch_size)))


class _Tick(TrainerCallback):
    """Moves the progress bar; the trainer's own bar and its log lines would tear the table."""

    def __init__(self, advance: Advance):
        self.advance = advance

    def on_step_end(self, args, state, control, **kwargs):
        self.advance()


def _arguments(recipe: Recipe, rows: int, folder: str, seed: int) -> dict:
    return {
        "output_dir": folder,
        "max_steps": recipe.steps(rows),
        "per_device_train_batch_size": recipe.batch_size,
        "per_device_eval_batch_size": 128,
        "learning_rate": recipe.learning_rate,
        "weight_decay": recipe.weight_decay,
        "warmup_steps": 0.05,
        "lr_scheduler_type": "linear",
        "seed": seed,
        "data_seed": seed,
        "max_length": None,
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "logging_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
    }


def _run(trainer: SFTTrainer, advance: Advance) -> LlamaForCausalLM:
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Tick(advance))
    trainer.train()
    return cast(LlamaForCausalLM, trainer.model)


def train_plain(
    start: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    recipe: Recipe,
    seed: int,
    folder: str,
    advance: Advance,
) -> LlamaForCausalLM:
    """A copy of `start`, trained on all response tokens of `rows` by TRL's own trainer."""
    args = SFTConfig(**_arguments(recipe, len(rows), folder, seed))
    trainer = SFTTrainer(clone(start), args, train_dataset=rows, processing_class=tokenizer)
    return _run(trainer, advance)


def selective_trainer(
    start: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    rows: Dataset,
    recipe: Recipe,
    seed: int,
    folder: str,
    reference: LlamaForCausalLM,
    forget_weight: float,
) -> SelectiveSFTTrainer:
    """The trainer of one arm, with the tokens of `rows` scored and selected (cached in `folder`, so only once).

    Every setting of the selection is selsft's default, except for the weight of the forgetting term.
    """
    args = SelectiveSFTConfig(
        **_arguments(recipe, len(rows), folder, seed),
        forget_weight=forget_weight,
        scoring_cache_dir=f"{folder}/scores",
    )
    return SelectiveSFTTrainer(
        clone(start), args, train_dataset=rows, processing_class=tokenizer, reference_model=reference
    )


def train_selective(trainer: SelectiveSFTTrainer, advance: Advance) -> LlamaForCausalLM:
    return _run(trainer, advance)
