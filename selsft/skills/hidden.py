"""Hidden states that a study stored, one safetensors file per model, task and split.

`hidden/<stage>/<eval_task>-<split>.safetensors` holds `question` (n, d) float32, the states at the questions' last
tokens, and `options` (sum of options, d) float32, those at the options' last tokens; the JSON beside it names the
model, the layer and the examples.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open

from .table import Model


@dataclass(frozen=True)
class Hidden:
    """The states of one model on one task and split.

    Attributes:
        example_ids: n names, in the order of the rows.
        option_counts: (n,) int.
        gold: (n,) int, the gold option of each question.
        layer: index into `hidden_states`; as stored, negative from the end.
    """

    path: Path
    model: Model
    eval_task: str
    split: str
    example_ids: list[str]
    option_counts: np.ndarray
    gold: np.ndarray
    layer: int

    def question(self) -> np.ndarray:
        """(n, d) float64."""
        return self._tensor("question", len(self.example_ids))

    def options(self) -> np.ndarray:
        """(sum of option_counts, d) float64."""
        return self._tensor("options", int(self.option_counts.sum()))

    def is_gold(self) -> np.ndarray:
        """(sum of option_counts,) bool."""
        first = np.cumsum(self.option_counts) - self.option_counts
        flags = np.zeros(int(self.option_counts.sum()), dtype=bool)
        flags[first + self.gold] = True
        return flags

    def _tensor(self, name: str, rows: int) -> np.ndarray:
        try:
            with safe_open(self.path, framework="numpy") as file:
                tensor = np.asarray(file.get_tensor(name), dtype=np.float64)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{self.path}: tensor {name} is not readable ({error}); delete the file and resume"
            ) from error
        if tensor.ndim != 2 or len(tensor) != rows or not np.isfinite(tensor).all():
            raise ValueError(
                f"{self.path}: {name} must be ({rows}, d) and finite, got {tensor.shape}; resume the study"
            )
        return tensor


def read_hidden(folder: Path) -> Iterator[Hidden]:
    """All stored states of a study folder, sorted by path; the tensors are read when asked for."""
    for path in sorted((Path(folder) / "hidden").glob("*/*.safetensors")):
        eval_task, dash, split = path.stem.rpartition("-")
        notes = path.with_suffix(".json")
        try:
            found = json.loads(notes.read_text(encoding="utf-8"))
            model = Model(*(found[name] for name in ("run", "seed", "stage", "method", "label_task")))
            counts, gold = np.array(found["option_counts"], dtype=int), np.array(found["gold"], dtype=int)
            ids, layer = [str(name) for name in found["example_ids"]], int(found["layer"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{notes}: not the description of {path.name} ({error!r}); delete both and resume"
            ) from error
        if not dash or not len(ids) == len(counts) == len(gold) or (gold < 0).any() or (gold >= counts).any():
            raise ValueError(f"{notes}: example_ids, option_counts and gold do not fit; delete both files and resume")
        yield Hidden(path, model, eval_task, split, ids, counts, gold, layer)
