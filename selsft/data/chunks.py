"""Token columns of a data set as flat arrays, a chunk of rows at a time, and columns written back the same way.

A data set of 1e8 tokens is memory-mapped from Arrow files. Code that works on its tokens sees about a million of them
at a time, so that memory does not grow with the data and no Python loop runs over rows. Rejected:
`with_format("numpy")`, which makes one array per row, and `Dataset.map`, which hashes the function and its settings
for a cache that would outlive them.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, List, Value, concatenate_datasets
from datasets.fingerprint import get_temporary_cache_files_directory
from datasets.table import InMemoryTable

from .columns import WEIGHTS

logger = logging.getLogger(__name__)

TOKENS_PER_CHUNK = 2**20
_ROWS_PER_READ = 512  # read ahead of the current chunk


@dataclass
class TokenChunk:
    """Consecutive rows: `lengths` is `(rows,)` int64, every column `(tokens,)` with the rows one after another.

    `documents` holds the lengths of the documents that packed rows consist of, `(documents,)` int64, else `None`.
    """

    first_row: int
    lengths: np.ndarray
    columns: dict[str, np.ndarray]
    documents: np.ndarray | None

    @property
    def size(self) -> int:
        return int(self.lengths.sum())

    def row_of(self, token: int) -> int:
        """Row of the data set that flat token `token` of this chunk belongs to."""
        return self.first_row + int(np.searchsorted(np.cumsum(self.lengths), token, side="right"))


def token_chunks(
    dataset: Dataset | IterableDataset, names: Sequence[str], tokens: int | None = None, documents: bool = False
) -> Iterator[TokenChunk]:
    """The rows of `dataset` in order, in chunks of at most `tokens` tokens (or one longer row).

    A chunk ends where the next row would not fit, however the rows are stored, so that the same rows always make the
    same chunks. Memory holds one chunk and the rows read ahead.

    Args:
        dataset: memory-mapped or streamed.
        names: list columns with one value per token.
        tokens: `TOKENS_PER_CHUNK` by default.
        documents: whether the documents of packed rows count as rows.

    Raises:
        `ValueError` for a row whose columns differ in length, and for document lengths that do not add up to the row.
    """
    limit = tokens or TOKENS_PER_CHUNK
    waiting: list[TokenChunk] = []
    size = first = 0
    for chunk in (_mapped if isinstance(dataset, Dataset) else _streamed)(dataset, names):
        if documents:
            lengths = chunk.lengths if chunk.documents is None else chunk.documents
            chunk, first = TokenChunk(first, lengths, chunk.columns, None), first + len(lengths)
        while len(chunk.lengths):
            fits = int(np.searchsorted(np.cumsum(chunk.lengths), limit - size, side="right"))
            if not waiting and not fits:
                fits = 1  # a row longer than a chunk
            if fits:
                head, chunk = _cut(chunk, fits)
                waiting.append(head)
                size += head.size
            if len(chunk.lengths):
                yield _join(waiting)
                waiting, size = [], 0
    if waiting:
        yield _join(waiting)


def _mapped(dataset: Dataset, names: Sequence[str]) -> Iterator[TokenChunk]:
    packed = "seq_lengths" in dataset.column_names
    read = [*names, "seq_lengths"] if packed else list(names)
    first = 0
    for table in dataset.select_columns(read).with_format("arrow").iter(batch_size=_ROWS_PER_READ):
        yield _chunk(first, {name: table[name].combine_chunks() for name in read})
        first += len(table)


def _streamed(dataset: IterableDataset, names: Sequence[str]) -> Iterator[TokenChunk]:
    first, kind = 0, pa.list_(pa.int64())  # of streams only token ids, labels and document lengths are read
    for rows in dataset.iter(batch_size=_ROWS_PER_READ):
        read = [name for name in (*names, "seq_lengths") if name in rows]
        columns = {name: pa.array(rows[name], type=kind) for name in read}
        yield _chunk(first, columns)
        first += len(columns[names[0]])


def _chunk(first: int, columns: dict[str, pa.ListArray]) -> TokenChunk:
    documents = columns.pop("seq_lengths", None)
    names = list(columns)
    lengths = _lengths(columns[names[0]])
    for name in names[1:]:
        if (wrong := np.flatnonzero(_lengths(columns[name]) != lengths)).size:
            row = int(wrong[0])
            raise ValueError(
                f"row {first + row}: column {name!r} has {_lengths(columns[name])[row]} values, {names[0]!r} "
                f"{lengths[row]}: each needs one value per token"
            )
    flat = {name: _flat(column) for name, column in columns.items()}
    return TokenChunk(
        first, lengths, flat, None if documents is None else _document_lengths(documents, lengths, first)
    )


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


def _lengths(column: pa.Array) -> np.ndarray:
    return pc.list_value_length(column).to_numpy(zero_copy_only=False).astype(np.int64)


def _flat(column: pa.Array) -> np.ndarray:
    return column.flatten().to_numpy(zero_copy_only=False)


def _document_lengths(column: pa.Array, lengths: np.ndarray, first: int) -> np.ndarray:
    documents, counts = _flat(column).astype(np.int64), _lengths(column)
    sums = np.diff(np.concatenate([[0], np.cumsum(documents)])[np.concatenate([[0], np.cumsum(counts)])])
    if (wrong := np.flatnonzero(sums != lengths)).size:
        row = int(wrong[0])
        raise ValueError(
            f"row {first + row}: seq_lengths add up to {sums[row]}, but the row has {lengths[row]} tokens"
        )
    return documents


def supervised_mask(chunk: TokenChunk, padding_free: bool) -> np.ndarray:
    """Which tokens keep their label in the collator and have a past to be predicted from: `(tokens,)` bool.

    Args:
        chunk: with the column `labels`.
        padding_free: whether documents of a packed row are kept apart, so that the first token of each has no past.
    """
    mask = chunk.columns["labels"] != -100
    lengths = chunk.documents if padding_free and chunk.documents is not None else chunk.lengths
    starts = np.cumsum(lengths) - lengths
    mask[starts[lengths > 0]] = False
    return mask


def class_counts(dataset: Dataset) -> dict[str, int]:
    """Supervised tokens of rows with `token_weights`, by the sign of the weight: `positive`, `neutral`, `negative`."""
    counts = dict.fromkeys(("positive", "neutral", "negative"), 0)
    for chunk in token_chunks(dataset, ["input_ids", "labels", WEIGHTS]):
        weights = chunk.columns[WEIGHTS][supervised_mask(chunk, padding_free=False)]
        for name, there in (("positive", weights > 0), ("neutral", weights == 0), ("negative", weights < 0)):
            counts[name] += int(there.sum())
    return counts


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the rows' token ids, labels and document lengths, in order."""
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    for chunk in token_chunks(dataset, names):
        digest.update(chunk_sha256(chunk, names).encode())
    return digest.hexdigest()


def chunk_sha256(chunk: TokenChunk, names: Sequence[str] = ("input_ids", "labels")) -> str:
    """Hash of what decides the scores of consecutive rows: their lengths, columns and documents."""
    digest = hashlib.sha256(np.asarray(chunk.lengths, np.int64).tobytes())
    for column in (*(chunk.columns[name] for name in names), chunk.documents):
        if column is not None:
            digest.update(np.ascontiguousarray(column, np.int64).data)
    return digest.hexdigest()


class ColumnWriter:
    """Writes one list column to a temporary Arrow file, chunk by chunk; `dataset` maps it into memory.

    The file lies in the temporary folder of `datasets`, which is removed when the process ends. When that disk is
    full, the rows stay in memory instead: a column may take hours to compute and costs a few bytes a token.
    """

    def __init__(self, name: str, dtype: str):
        self._schema = Features({name: List(Value(dtype))}).arrow_schema
        self._values = self._schema.field(name).type.value_type
        handle, self._path = tempfile.mkstemp(dir=get_temporary_cache_files_directory(), suffix=".arrow")
        self._file = os.fdopen(handle, "wb")
        self._stream: pa.RecordBatchStreamWriter | None = pa.ipc.new_stream(self._file, self._schema)
        self._done = 0  # batches that are whole in the file
        self._kept: list[pa.RecordBatch] = []

    def write(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        """Append `len(lengths)` rows, with `flat` divided among them."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=self._values))
        batch = pa.record_batch([column], schema=self._schema)
        if self._stream is not None:
            try:
                self._stream.write_batch(batch)
                self._file.flush()
                self._done += 1
                return
            except OSError as error:
                self._keep(error)
        self._kept.append(batch)

    def dataset(self) -> Dataset:
        """The written rows as a data set of one column."""
        if self._stream is not None:
            try:
                self._stream.close()
                self._file.close()
                return Dataset.from_file(self._path)
            except OSError as error:
                self._keep(error)
        return Dataset(InMemoryTable(pa.Table.from_batches(self._kept, schema=self._schema)))

    def _keep(self, error: OSError) -> None:
        logger.warning(f"{self._path} cannot be written ({error}): the column is kept in memory.")
        self._stream = None
        with contextlib.suppress(OSError):
            self._file.close()
        with pa.OSFile(self._path) as source:
            batches = iter(pa.ipc.open_stream(source)) if self._done else iter(())
            self._kept = [next(batches) for _ in range(self._done)]
        os.unlink(self._path)


def with_column(dataset: Dataset, name: str, rows: Dataset) -> Dataset:
    """`dataset` with one more column, the only one of `rows`; a column of that name is replaced."""
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    if rows.column_names != [name]:
        rows = rows.rename_column(rows.column_names[0], name)
    return concatenate_datasets([dataset, rows], axis=1)
