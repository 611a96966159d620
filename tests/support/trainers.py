"""The trainer that most tests make: a tiny Llama on a CPU."""

from __future__ import annotations

from selsft import SelectiveSFTConfig, SelectiveSFTTrainer
from tests.support import tiny


def make(options, data=None, model=None, reference=None, peft_config=None, **changes) -> SelectiveSFTTrainer:
    """A trainer with the fixture `options`, of which `changes` replace some; on `tiny.tokenised_data` by default."""
    return SelectiveSFTTrainer(
        model=model if model is not None else tiny.llama(),
        args=SelectiveSFTConfig(**{**options, **changes}),
        train_dataset=data if data is not None else tiny.tokenised_data(),
        processing_class=tiny.tokenizer(),
        peft_config=peft_config,
        reference_model=reference,
    )
