"""Selective supervised fine-tuning: learn the useful tokens, forget the misleading ones, in place of `SFTTrainer`."""

from importlib.metadata import version

from . import _compat as _compat  # refuses unsupported versions before anything else is imported
from .collator import DataCollatorForSelectiveSFT
from .config import PAPER_2508_04329, SelectiveSFTConfig
from .trainer import SelectiveSFTTrainer

__version__ = version("selsft")
__all__ = ["PAPER_2508_04329", "DataCollatorForSelectiveSFT", "SelectiveSFTConfig", "SelectiveSFTTrainer"]
