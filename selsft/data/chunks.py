"""Token columns of a data set as flat arrays, a chunk of rows at a time, and columns written back the same way.

A data set of 1e8 tokens lies in memory-mapped Arrow files; what works on its tokens sees views of about a million of
them, so that memory does not grow with the data and no Python loop runs over rows. Rejected: `with_format("numpy")`,
which makes one array per row, and `Dataset.map`, which hashes the function and its settings for a cache that would
outlive them.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value, concatenate_datasets
from datasets.fingerprint import get_temporary_cache_files_directory

TOKENS_PER_CHUNK = 2**20
_ROWS_PER_READ = 4096


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


def token_chunks(dataset: Dataset, names: Sequence[str]) -> Iterator[TokenChunk]:
    """The rows of `dataset` in order, in chunks of at most `TOKENS_PER_CHUNK` tokens (or one longer row).

    Args:
        names: list columns with one value per token.

    Raises:
        `ValueError` for a row whose columns differ in length, and for document lengths that do not add up to the row.
    """
    packed = "seq_lengths" in dataset.column_names
    read = [*names, "seq_lengths"] if packed else list(names)
    first = 0
    for table in dataset.select_columns(read).with_format("arrow").iter(batch_size=_ROWS_PER_READ):
        columns = {name: table[name].combine_chunks() for name in read}
        lengths = _lengths(columns[names[0]])
        for name in names[1:]:
            if (wrong := np.flatnonzero(_lengths(columns[name]) != lengths)).size:
                row = int(wrong[0])
                raise ValueError(
                    f"row {first + row}: column {name!r} has {_lengths(columns[name])[row]} values, {names[0]!r} "
                    f"{lengths[row]}: each needs one value per token"
                )
        ends = np.cumsum(lengths)
        start = 0
        while start < len(lengths):
            done = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, done + TOKENS_PER_CHUNK, side="right")))
            part = {name: column.slice(start, stop - start) for name, column in columns.items()}
            documents = part.pop("seq_lengths", None)
            chunk = TokenChunk(
                first + start,
                lengths[start:stop],
                {name: _flat(column) for name, column in part.items()},
                None if documents is None else _document_lengths(documents, lengths[start:stop], first + start),
            )
            yield chunk
            start = stop
        first += len(lengths)


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
    """Which tokens the collator leaves a label and a past to be predicted from: `(tokens,)` bool.

    Args:
        chunk: with the column `labels`.
        padding_free: whether documents of a packed row are kept apart, so that the first token of each has no past.
    """
    mask = chunk.columns["labels"] != -100
    lengths = chunk.documents if padding_free and chunk.documents is not None else chunk.lengths
    starts = np.cumsum(lengths) - lengths
    mask[starts[lengths > 0]] = False
    return mask


class ColumnWriter:
    """Writes one list column to a temporary Arrow file, chunk by chunk; `dataset` maps it into memory.

    The file lies in the temporary folder of `datasets`, which is removed when the process ends.
    """

    def __init__(self, name: str, dtype: str):
        self._name = name
        self._features = Features({name: List(Value(dtype))})
        handle, self._path = tempfile.mkstemp(dir=get_temporary_cache_files_directory(), suffix=".arrow")
        os.close(handle)
        self._schema = self._features.arrow_schema
        self._values = self._schema.field(name).type.value_type
        self._stream = pa.ipc.new_stream(self._path, self._schema)

    def write(self, flat: np.ndarray, lengths: np.ndarray) -> None:
        """Append `len(lengths)` rows that share out `flat`."""
        offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
        column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(flat, type=self._values))
        self._stream.write_batch(pa.record_batch([column], schema=self._schema))

    def dataset(self) -> Dataset:
        """The written rows as a data set of one column."""
        self._stream.close()
        return Dataset.from_file(self._path)


def with_column(dataset: Dataset, name: str, rows: Dataset | Iterable[np.ndarray]) -> Dataset:
    """`dataset` with one more column; a column of that name is replaced.

    Args:
        rows: a data set with the one list column, or one float array per row.
    """
    if name in dataset.column_names:
        dataset = dataset.remove_columns(name)
    if not isinstance(rows, Dataset):
        rows = Dataset.from_dict({name: list(rows)}, features=Features({name: List(Value("float32"))}))
    elif rows.column_names != [name]:
        rows = rows.rename_column(rows.column_names[0], name)
    return concatenate_datasets([dataset, rows], axis=1)
