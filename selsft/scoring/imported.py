"""Log-probabilities computed elsewhere, for example by an inference server, read from Parquet and checked.

A score belongs to its token only if both sides saw the same token ids, so the ids come with the values and are
compared one by one. Rejected: joining by an id column, which says nothing about how the row was tokenised.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ..data.chunks import TokenChunk, supervised_mask


class ImportedLogps:
    """
    Parquet with one row per document, in the order of the data: `input_ids`, the log-probabilities in nats (0, null or
    anything else on unsupervised tokens), and, if there, `labels`.

    Args:
        path: a file, or a folder whose `*.parquet` files follow each other by name.
        flag: what to call it in errors, such as `base_logps`; also the first choice of the column's name.
        expected: metadata that must agree where the files have it: key -> value (`tokenizer_sha256`, `model_sha256`).

    Attributes:
        rows: number of rows of all files.
        sha256: hash of the files.

    Raises:
        `ValueError` naming the flag and the file, and a row where it is about one.
    """

    def __init__(self, path: str | Path, flag: str, expected: dict[str, str]):
        self._flag, self._path = flag, Path(path)
        files = sorted(self._path.glob("*.parquet")) if self._path.is_dir() else [self._path]
        if not files or not all(file.is_file() for file in files):
            raise ValueError(f"{flag}={str(path)!r} is neither a Parquet file nor a folder of them")
        digest = hashlib.sha256()
        self._groups: list[tuple[Path, int]] = []
        starts = [0]
        for file in files:
            try:
                schema, meta = pq.read_schema(file), pq.read_metadata(file)
            except (pa.ArrowException, OSError) as error:
                raise ValueError(f"{flag}: {str(file)!r} is not Parquet ({str(error).splitlines()[0]})") from error
            self._column = self._choose(schema.names, file)
            self._labels = "labels" in schema.names
            for key, value in expected.items():
                stored = (schema.metadata or {}).get(key.encode(), b"").decode()
                if stored and stored != value:
                    raise ValueError(
                        f"{flag}: {str(file)!r} was made with another {key.removesuffix('_sha256')} ({key} "
                        f"{stored[:12]}, here {value[:12]})"
                    )
            for group in range(meta.num_row_groups):
                self._groups.append((file, group))
                starts.append(starts[-1] + meta.row_group(group).num_rows)
            with file.open("rb") as handle:
                digest.update(hashlib.file_digest(handle, "sha256").digest())
        self._starts = np.array(starts)
        self.rows, self.sha256 = starts[-1], digest.hexdigest()
        self._read: tuple[int, pa.Table] | None = None  # the last row group

    def take(self, chunk: TokenChunk) -> np.ndarray:
        """Flat `(tokens,)` float32 values of the rows of `chunk`, 0 for unsupervised tokens.

        Args:
            chunk: with the columns `input_ids` and `labels`.

        Raises:
            `ValueError` for rows that are not there or have other tokens or labels, for a wrong number of values, and
            for a value that is missing, not finite or positive on a supervised token.
        """
        stop = chunk.first_row + len(chunk.lengths)
        if stop > self.rows:
            raise ValueError(f"{self._where()} has {self.rows} rows, the data has more: it needs one for each row")
        table = self._rows(chunk.first_row, stop)
        ids = self._equal(chunk, table["input_ids"].combine_chunks(), "input_ids", "token")
        if self._labels:
            self._equal(chunk, table["labels"].combine_chunks(), "labels", "label")
        column = table[self._column].combine_chunks()
        self._same_lengths(chunk, column, self._column)
        values = column.flatten().cast(pa.float64()).to_numpy(zero_copy_only=False)
        starts = np.cumsum(chunk.lengths) - chunk.lengths
        supervised = supervised_mask(chunk, padding_free=False)
        with np.errstate(invalid="ignore"):
            broken = np.flatnonzero(supervised & ~(np.isfinite(values) & (values <= 0)))
        if broken.size:
            token = int(broken[0])
            row = chunk.row_of(token)
            position = token - int(starts[row - chunk.first_row])
            raise ValueError(
                f"{self._where()}, row {row}: {self._column}[{position}] is {values[token]}, for token "
                f"{ids[token]}: a log-probability is finite and at most 0"
            )
        return np.where(supervised, values, 0.0).astype(np.float32)

    def check_end(self, rows: int) -> None:
        """Raise `ValueError` unless the data has as many rows."""
        if rows != self.rows:
            raise ValueError(f"{self._where()} has {self.rows} rows, the data has {rows}: it needs one for each row")

    def _choose(self, names: Sequence[str], file: Path) -> str:
        column = next((name for name in (self._flag, "logps") if name in names), None)
        missing = [name for name in ("input_ids", column) if name not in names]
        if missing:
            raise ValueError(
                f"{self._flag}: {str(file)!r} has the columns {', '.join(map(repr, names))}: it needs 'input_ids' and "
                f"{self._flag!r} or 'logps'"
            )
        assert column is not None
        return column

    def _rows(self, start: int, stop: int) -> pa.Table:
        first = int(np.searchsorted(self._starts, start, side="right")) - 1
        parts = []
        for index in range(first, len(self._groups)):
            low = int(self._starts[index])
            if low >= stop:
                break
            if self._read is None or self._read[0] != index:
                file, group = self._groups[index]
                names = ["input_ids", self._column, *(["labels"] if self._labels else [])]
                self._read = (
                    index,
                    pq.ParquetFile(file, page_checksum_verification=True).read_row_group(group, columns=names),
                )
            parts.append(self._read[1].slice(max(start - low, 0), stop - max(start, low)))
        return pa.concat_tables(parts)

    def _same_lengths(self, chunk: TokenChunk, column: pa.Array, name: str) -> None:
        lengths = pc.fill_null(pc.list_value_length(column), -1).to_numpy(zero_copy_only=False)
        if (wrong := np.flatnonzero(lengths != chunk.lengths)).size:
            row = int(wrong[0])
            held = "nothing" if lengths[row] < 0 else f"{lengths[row]} values"
            raise ValueError(
                f"{self._where()}, row {chunk.first_row + row}: {name} has {held}, the row has "
                f"{chunk.lengths[row]} tokens"
            )

    def _equal(self, chunk: TokenChunk, column: pa.Array, name: str, what: str) -> np.ndarray:
        self._same_lengths(chunk, column, name)
        stored, wanted = column.flatten().to_numpy(zero_copy_only=False), np.asarray(chunk.columns[name])
        if (wrong := np.flatnonzero(stored != wanted)).size:
            token = int(wrong[0])
            row = chunk.row_of(token)
            position = token - int(chunk.lengths[: row - chunk.first_row].sum())
            raise ValueError(
                f"{self._where()}, row {row}: {what} {position} is {stored[token]}, in the data {wanted[token]}: it "
                "was made from other rows or with another tokenizer"
            )
        return stored

    def _where(self) -> str:
        return f"{self._flag}={str(self._path)!r}"
