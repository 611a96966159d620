"""Selective supervised fine-tuning: learn the useful tokens, forget the misleading ones, in place of `SFTTrainer`.

The names are imported when they are first used: torch and TRL take seconds, which `selsft --help` need not wait for.
"""

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .config import PAPER_2508_04329, RHO_1_2404_07965, TOKEN_CLEANING_2502_01968, SelectiveSFTConfig
    from .data.foreign import load_marked
    from .data.judged import JudgedRows, judged_rows
    from .data.scored_folder import load_scores
    from .evaluation.evaluate import Evaluation, evaluate
    from .score import score_dataset
    from .selection.chosen import use_folder
    from .selection.select import select_tokens
    from .trainer import SelectiveSFTTrainer
    from .training.collator import DataCollatorForSelectiveSFT
    from .workflow.arms import ArmComparison, compare_arms

try:
    __version__ = version("selsft")
except PackageNotFoundError:  # a source tree that is not installed
    __version__ = "0+source"
__all__ = [
    "PAPER_2508_04329",
    "RHO_1_2404_07965",
    "TOKEN_CLEANING_2502_01968",
    "ArmComparison",
    "DataCollatorForSelectiveSFT",
    "Evaluation",
    "JudgedRows",
    "SelectiveSFTConfig",
    "SelectiveSFTTrainer",
    "compare_arms",
    "evaluate",
    "judged_rows",
    "load_marked",
    "load_scores",
    "score_dataset",
    "select_tokens",
    "use_folder",
]
_MODULES = {
    "ArmComparison": "workflow.arms",
    "DataCollatorForSelectiveSFT": "training.collator",
    "Evaluation": "evaluation.evaluate",
    "JudgedRows": "data.judged",
    "PAPER_2508_04329": "config",
    "RHO_1_2404_07965": "config",
    "SelectiveSFTConfig": "config",
    "SelectiveSFTTrainer": "trainer",
    "TOKEN_CLEANING_2502_01968": "config",
    "compare_arms": "workflow.arms",
    "evaluate": "evaluation.evaluate",
    "judged_rows": "data.judged",
    "load_marked": "data.foreign",
    "load_scores": "data.scored_folder",
    "score_dataset": "score",
    "select_tokens": "selection.select",
    "use_folder": "selection.chosen",
}


def __getattr__(name: str) -> Any:
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import_module("._compat", __name__)  # refuses unsupported versions before anything else is imported
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)
