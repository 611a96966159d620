"""Silence for the libraries where many small models are trained, whose bars and remarks would bury our own output."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator

import datasets
from transformers.utils import logging


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """No bars, warnings and log lines of datasets and transformers inside; afterwards as it was."""
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
