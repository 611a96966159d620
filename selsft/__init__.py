"""Selective supervised fine-tuning: learn the useful tokens, forget the misleading ones, in place of `SFTTrainer`.

The names are imported when they are first used: torch and TRL take seconds, which `selsft --help` need not wait for.
"""

from importlib import import_module
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PAPER_2508_04329, RHO_1_2404_07965, TOKEN_CLEANING_2502_01968, SelectiveSFTConfig
    from .data.scored_folder import load_scores
    from .score import score_dataset
    from .trainer import SelectiveSFTTrainer
    from .training.collator import DataCollatorForSelectiveSFT

__version__ = version("selsft")
__all__ = [
    "PAPER_2508_04329",
    "RHO_1_2404_07965",
    "TOKEN_CLEANING_2502_01968",
    "DataCollatorForSelectiveSFT",
    "SelectiveSFTConfig",
    "SelectiveSFTTrainer",
    "load_scores",
    "score_dataset",
]
_MODULES = {
    "DataCollatorForSelectiveSFT": "training.collator",
    "PAPER_2508_04329": "config",
    "RHO_1_2404_07965": "config",
    "SelectiveSFTConfig": "config",
    "SelectiveSFTTrainer": "trainer",
    "TOKEN_CLEANING_2502_01968": "config",
    "load_scores": "data.scored_folder",
    "score_dataset": "score",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("._compat", __name__)  # refuses unsupported versions before anything else is imported
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
