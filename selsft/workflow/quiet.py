"""Silences the libraries while many small models train, since their bars and remarks would bury our own output."""

from __future__ import annotations

import contextlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

import datasets
from accelerate.utils import tqdm
from transformers import PrinterCallback, Trainer, TrainerCallback
from transformers.utils import logging

QUIET: dict[str, Any] = {
    "report_to": "none",
    "disable_tqdm": True,
    "logging_strategy": "no",
    "save_strategy": "no",
}
"""Settings of a trainer that leaves nothing behind but its model."""


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, warnings and log lines of datasets and transformers inside; afterwards all is as before."""
    verbosity = logging.get_verbosity()
    bars, model_bars = datasets.is_progress_bar_enabled(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    datasets.disable_progress_bars()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)
            if model_bars:
                logging.enable_progress_bar()
            if bars:
                datasets.enable_progress_bars()


def train_quietly(trainer: Trainer, description: str, checkpoint: str | None = None) -> None:
    """Train behind one bar, which is cleared at the end.

    Args:
        checkpoint: to resume from.
    """
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(_Bar(description))
    trainer.train(resume_from_checkpoint=checkpoint)


class _Bar(TrainerCallback):
    def __init__(self, description: str):
        self.description = description

    def on_train_begin(self, args, state, control, **kwargs):
        hidden = bool(os.environ.get("TQDM_DISABLE"))
        self.bar = tqdm(
            total=state.max_steps, initial=state.global_step, desc=self.description, leave=False, disable=hidden
        )

    def on_step_end(self, args, state, control, **kwargs):
        self.bar.update()

    def on_train_end(self, args, state, control, **kwargs):
        self.bar.close()
