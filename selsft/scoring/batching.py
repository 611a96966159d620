"""Batches under a token budget.

A batch of rows of similar length wastes almost nothing on padding, whatever the lengths in the data. So rows are
sorted by length within a chunk, and a batch takes as many as the budget allows. Chunks are cut by the same rule
everywhere (`token_chunks`): a row always meets the same neighbours, and its score is the same to the last bit.
Rejected: sorting the whole data set, which needs all lengths at once and spreads a finished shard over all
rows; bucket samplers of fixed lengths, which pad to the bucket.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from .._compat import uses_flash_attention
from ..config import SelectiveSFTConfig

_ALIKE, _LEAST = 0.9, 8
_DEFAULT_LENGTH = 1024  # of a row where `max_length` is not set: TRL's own default of `max_length`


@dataclass(frozen=True)
class BatchBudget:
    """How many rows go through the model at once.

    Args:
        tokens: most tokens of a batch, padding included; a longer row has a batch of its own. `None` sets no limit.
        rows: most rows of a batch, whatever their length; `None` sets no limit.
        padding_free: whether the rows of a batch are concatenated, which needs a kernel that keeps them apart at no
            cost (flash attention). With others, attention over a concatenated batch costs the square of its length.
    """

    tokens: int | None
    rows: int | None = None
    padding_free: bool = False

    @classmethod
    def of(cls, args: SelectiveSFTConfig, *models: Any) -> BatchBudget:
        """The budget of `args`: `scoring_batch_size` rows, or `scoring_batch_tokens` tokens, by default as many as a
        full batch of evaluation has, `per_device_eval_batch_size * max_length`.

        Args:
            models: those that run the batches; padding-free if all of them use flash attention.
        """
        tokens = args.scoring_batch_tokens or args.per_device_eval_batch_size * (args.max_length or _DEFAULT_LENGTH)
        flash = bool(models) and all(uses_flash_attention(model) for model in models)
        return cls(None if args.scoring_batch_size else tokens, args.scoring_batch_size, flash)

    def halved(self) -> BatchBudget:
        """The budget for batches whose rows are all computed twice."""
        return self if self.tokens is None else dataclasses.replace(self, tokens=max(self.tokens // 2, 1))

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Indices of the rows of each batch, longest rows first, so that running out of memory shows at once.

        Args:
            lengths: `(rows,)` int64.
        """
        order = np.argsort(-lengths, kind="stable")
        most = self.rows or self.tokens or max(len(order), 1)
        batches, start = [], 0
        while start < len(order):
            count = max(self._fitting(lengths[order[start : start + most]]), 1)
            batches.append(order[start : start + count])
            start += count
        return batches

    def _fitting(self, lengths: np.ndarray) -> int:
        """How many of the rows, longest first, make a batch. A padded batch ends where rows are shorter than 0.9 of
        the longest, once it fills an eighth of the budget: in a small data set few rows are of similar length."""
        if self.tokens is None:
            return len(lengths)
        if self.padding_free:
            return int(np.searchsorted(np.cumsum(lengths), self.tokens, side="right"))
        longest = max(int(lengths[0]), 1)
        most = min(self.tokens // longest, len(lengths))
        alike = int(np.searchsorted(-lengths[:most], -_ALIKE * longest, side="right"))
        return min(most, max(alike, -(-self.tokens // (_LEAST * longest))))
