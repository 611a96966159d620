"""Training of the demo's base and reference, by TRL's own trainer; the arms are `workflow.arms`.

The demo uses the public trainers and no loop of its own, so that it shows what a user gets.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from selsft.workflow.quiet import QUIET, train_quietly


@dataclass(frozen=True)
class Recipe:
    """How one model is trained."""

    epochs: float
    learning_rate: float
    weight_decay: float = 0.0
    batch_size: int = 32

    def settings(self, rows: int) -> dict[str, Any]:
        """Fields of `SFTConfig` for this many rows."""
        return {
            "max_steps": max(1, int(self.epochs * -(-rows // self.batch_size))),
            "per_device_train_batch_size": self.batch_size,
            "per_device_eval_batch_size": 128,
            "learning_rate": self.learning_rate,
            "weight_decay": self.weight_decay,
            "warmup_steps": 0.05,
            "lr_scheduler_type": "linear",
            "max_length": None,
            "use_cpu": True,
            "bf16": False,
            "gradient_checkpointing": False,
            "dataloader_pin_memory": False,
        }


def train_model(
    start: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, rows: Dataset, recipe: Recipe, seed: int, folder: Path
) -> None:
    """Train `start` on all response tokens of `rows`, and save it with its tokenizer in `folder`."""
    settings = {**recipe.settings(len(rows)), **QUIET, "seed": seed, "data_seed": seed}
    args = SFTConfig(output_dir=str(folder), **settings)
    trainer = SFTTrainer(start, args, train_dataset=rows, processing_class=tokenizer)
    train_quietly(trainer, folder.parent.name)
    start.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
