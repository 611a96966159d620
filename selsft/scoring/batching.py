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
from ..data.chunks import TokenChunk, token_chunks

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


def shard_chunks(
    dataset: Dataset | IterableDataset, names: list[str], tokens: int = TOKENS_PER_SHARD, documents: bool = False
) -> Iterator[TokenChunk]:
    """Consecutive rows of at most `tokens` tokens together (or one longer row), in order.

    Args:
        dataset: memory-mapped or streamed; one shard at a time is in memory.
        names: the columns to read, one value per token.
        documents: whether the documents of packed rows count as rows.
    """
    chunks = token_chunks(dataset, names) if isinstance(dataset, Dataset) else _streamed(dataset, names)
    if documents:
        chunks = _as_rows(chunks)
    waiting: list[TokenChunk] = []
    size = 0
    for chunk in chunks:
        while len(chunk.lengths):
            ends = np.cumsum(chunk.lengths)
            fits = int(np.searchsorted(ends, tokens - size, side="right"))
            if not waiting and not fits:
                fits = 1  # a row longer than a shard
            if fits:
                part, chunk = _cut(chunk, fits)
                waiting.append(part)
                size += part.size
            if len(chunk.lengths):
                yield _join(waiting)
                waiting, size = [], 0
    if waiting:
        yield _join(waiting)


def _streamed(dataset: IterableDataset, names: list[str]) -> Iterator[TokenChunk]:
    first, rows = 0, []
    for row in dataset:
        rows.append(row)
        if len(rows) == _STREAMED_ROWS:
            yield _chunk(rows, names, first)
            first, rows = first + len(rows), []
    if rows:
        yield _chunk(rows, names, first)


def _chunk(rows: list[Mapping[str, Any]], names: list[str], first: int) -> TokenChunk:
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
    return TokenChunk(first, lengths, columns, _concatenated([r["seq_lengths"] for r in rows]) if packed else None)


def _concatenated(parts: Iterable[list[int]]) -> np.ndarray:
    return np.concatenate([np.asarray(part, np.int64) for part in parts])


def _as_rows(chunks: Iterable[TokenChunk]) -> Iterator[TokenChunk]:
    first = 0
    for chunk in chunks:
        lengths = chunk.lengths if chunk.documents is None else chunk.documents
        yield TokenChunk(first, lengths, chunk.columns, None)
        first += len(lengths)


def _cut(chunk: TokenChunk, rows: int) -> tuple[TokenChunk, TokenChunk]:
    """The first `rows` rows, and the rest."""
    tokens = int(chunk.lengths[:rows].sum())
    inner: tuple[np.ndarray | None, np.ndarray | None] = (None, None)
    if chunk.documents is not None:
        split = int(np.searchsorted(np.cumsum(chunk.documents), tokens, side="right"))
        inner = chunk.documents[:split], chunk.documents[split:]
    heads = {name: values[:tokens] for name, values in chunk.columns.items()}
    tails = {name: values[tokens:] for name, values in chunk.columns.items()}
    return (
        TokenChunk(chunk.first_row, chunk.lengths[:rows], heads, inner[0]),
        TokenChunk(chunk.first_row + rows, chunk.lengths[rows:], tails, inner[1]),
    )


def _join(chunks: list[TokenChunk]) -> TokenChunk:
    first = chunks[0]
    if len(chunks) == 1:
        return first
    columns = {name: np.concatenate([chunk.columns[name] for chunk in chunks]) for name in first.columns}
    documents = [chunk.documents for chunk in chunks if chunk.documents is not None]
    lengths = np.concatenate([chunk.lengths for chunk in chunks])
    return TokenChunk(first.first_row, lengths, columns, np.concatenate(documents) if documents else None)
