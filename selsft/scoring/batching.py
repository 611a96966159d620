"""Batches under a token budget, and shards of consecutive rows.

A batch of rows of like length wastes next to nothing on padding, whatever the lengths of the data are. So rows are
sorted by length within a shard, and a batch takes as many as the budget allows. Shards are cut by the same rule
everywhere (the trainer's own scoring, `selsft score`): a row always meets the same neighbours, and its score is the
same to the last bit. Rejected: sorting the whole data set, which needs all lengths at once and spreads a finished
piece of work over all rows; bucket samplers of fixed lengths, which pad to the bucket.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset, IterableDataset

from .._compat import uses_flash_attention
from ..config import SelectiveSFTConfig
from ..data.chunks import TokenBlock, token_blocks

TOKENS_PER_SHARD = 2**20
_ALIKE, _LEAST = 0.9, 8
_STREAMED_ROWS = 512  # gathered before they become arrays
_DEFAULT_LENGTH = 1024  # of a row where `max_length` is not set: TRL's own default of `max_length`


@dataclass(frozen=True)
class BatchBudget:
    """How many rows go through the model at once.

    Args:
        tokens: most tokens of a batch, padding included; a longer row has a batch of its own.
        rows: a fixed number of rows instead, whatever their length.
        padding_free: whether the rows of a batch are concatenated, which needs a kernel that keeps them apart at no
            cost (flash attention). With others, attention over a concatenated batch costs the square of its length.
    """

    tokens: int
    rows: int | None = None
    padding_free: bool = False

    @classmethod
    def of(cls, args: SelectiveSFTConfig, *models: Any) -> BatchBudget:
        """The budget of `args`: `scoring_batch_size` rows, or `scoring_batch_tokens` tokens, by default as many as a
        full batch of evaluation has, `per_device_eval_batch_size * max_length`.

        Args:
            models: those that the batches are for; padding-free if all of them use flash attention.
        """
        tokens = args.per_device_eval_batch_size * (args.max_length or _DEFAULT_LENGTH)
        flash = bool(models) and all(uses_flash_attention(model) for model in models)
        return cls(args.scoring_batch_tokens or tokens, args.scoring_batch_size, flash)

    def batches(self, lengths: np.ndarray) -> list[np.ndarray]:
        """Indices of the rows of each batch, longest rows first, so that running out of memory shows at once.

        Args:
            lengths: `(rows,)` int64.
        """
        order = np.argsort(-lengths, kind="stable")
        if self.rows is not None:
            return [order[start : start + self.rows] for start in range(0, len(order), self.rows)]
        batches, start = [], 0
        ends = np.cumsum(lengths[order])
        while start < len(order):
            if self.padding_free:
                done = ends[start - 1] if start else 0
                count = int(np.searchsorted(ends, done + self.tokens, side="right")) - start
            else:
                count = self._padded(lengths[order[start:]])
            stop = start + max(count, 1)
            batches.append(order[start:stop])
            start = stop
        return batches

    def _padded(self, lengths: np.ndarray) -> int:
        """How many of the rows, longest first, make a padded batch. In a small data set rows of like length are few:
        there a batch of an eighth of the budget ends where rows are shorter than 0.9 of the longest."""
        longest = max(int(lengths[0]), 1)
        most = self.tokens // longest
        alike = int(np.searchsorted(-lengths[:most], -_ALIKE * longest, side="right"))
        return min(most, max(alike, -(-self.tokens // (_LEAST * longest))))


def shards(
    dataset: Dataset | IterableDataset, names: list[str], tokens: int = TOKENS_PER_SHARD, documents: bool = False
) -> Iterator[TokenBlock]:
    """Consecutive rows of at most `tokens` tokens together (or one longer row), in order.

    Args:
        dataset: memory-mapped or streamed; one shard at a time is in memory.
        names: the columns to read, one value per token.
        documents: whether the documents of packed rows count as rows.
    """
    blocks = token_blocks(dataset, names) if isinstance(dataset, Dataset) else _streamed(dataset, names)
    if documents:
        blocks = _as_rows(blocks)
    waiting: list[TokenBlock] = []
    size = 0
    for block in blocks:
        while len(block.lengths):
            ends = np.cumsum(block.lengths)
            fits = int(np.searchsorted(ends, tokens - size, side="right"))
            if not waiting and not fits:
                fits = 1  # a row longer than a shard
            if fits:
                part, block = _cut(block, fits)
                waiting.append(part)
                size += part.size
            if len(block.lengths):
                yield _join(waiting)
                waiting, size = [], 0
    if waiting:
        yield _join(waiting)


def _streamed(dataset: IterableDataset, names: list[str]) -> Iterator[TokenBlock]:
    first, rows = 0, []
    for row in dataset:
        rows.append(row)
        if len(rows) == _STREAMED_ROWS:
            yield _block(rows, names, first)
            first, rows = first + len(rows), []
    if rows:
        yield _block(rows, names, first)


def _block(rows: list[Mapping[str, Any]], names: list[str], first: int) -> TokenBlock:
    lengths = np.array([len(row[names[0]]) for row in rows], np.int64)
    for index, row in enumerate(rows):
        for name in names:
            if len(row[name]) != lengths[index]:
                raise ValueError(
                    f"row {first + index}: column {name!r} has {len(row[name])} values, {names[0]!r} "
                    f"{lengths[index]}: each needs one value per token"
                )
    columns = {name: _concatenated([row[name] for row in rows]) for name in names}
    packed = "seq_lengths" in rows[0]
    return TokenBlock(first, lengths, columns, _concatenated([r["seq_lengths"] for r in rows]) if packed else None)


def _concatenated(parts: Iterable[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _as_rows(blocks: Iterable[TokenBlock]) -> Iterator[TokenBlock]:
    first = 0
    for block in blocks:
        lengths = block.lengths if block.documents is None else block.documents
        yield TokenBlock(first, lengths, block.columns, None)
        first += len(lengths)


def _cut(block: TokenBlock, rows: int) -> tuple[TokenBlock, TokenBlock]:
    """The first `rows` rows, and the rest."""
    tokens = int(block.lengths[:rows].sum())
    inner: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if block.documents is not None:
        split = int(np.searchsorted(np.cumsum(block.documents), tokens, side="right"))
        inner = block.documents[:split], block.documents[split:]
    heads = {name: values[:tokens] for name, values in block.columns.items()}
    tails = {name: values[tokens:] for name, values in block.columns.items()}
    return (
        TokenBlock(block.first_row, block.lengths[:rows], heads, inner[0]),
        TokenBlock(block.first_row + rows, block.lengths[rows:], tails, inner[1]),
    )


def _join(blocks: list[TokenBlock]) -> TokenBlock:
    first = blocks[0]
    if len(blocks) == 1:
        return first
    columns = {name: np.concatenate([block.columns[name] for block in blocks]) for name in first.columns}
    documents = [block.documents for block in blocks if block.documents is not None]
    lengths = np.concatenate([block.lengths for block in blocks])
    return TokenBlock(first.first_row, lengths, columns, np.concatenate(documents) if documents else None)
