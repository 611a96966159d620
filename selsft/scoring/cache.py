"""Log-probabilities on disk: one Arrow file per pair of rows and weights, never half-written, never unpickled.

The key is made of the content of the rows and the hash of the weights: a threshold, an objective or a learning rate
can change without another forward pass, and nothing else can change unnoticed. The fingerprint of `datasets` was
rejected as a key: it is random after a transform that cannot be pickled, and covers columns that no score depends on.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, List, Value
from datasets.table import InMemoryTable

from ..records import replaced

logger = logging.getLogger(__name__)

COLUMN = "logps"
_FEATURES = Features({COLUMN: List(Value("float32"))})


def data_fingerprint(dataset: Dataset) -> str:
    """SHA-256 of the rows' token ids, labels and document lengths, in order."""
    digest = hashlib.sha256()
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    for batch in dataset.select_columns(columns).with_format("arrow").iter(batch_size=10_000):
        for name in columns:
            column = batch[name].combine_chunks()
            digest.update(np.asarray(column.value_lengths(), dtype=np.int64).tobytes())
            digest.update(np.asarray(column.flatten(), dtype=np.int64).tobytes())
    return digest.hexdigest()


class LogpCache:
    """Folder of cached log-probabilities: `<key>.arrow` (one float32 list per row) and `<key>.json` (what made it).

    Files appear by a rename, so a file that exists is whole, and two runs may share the folder. What is read is mapped
    into memory, not loaded.

    Args:
        folder: created on first use; `None` for the folder `selsft` beside the cache of `datasets`.
    """

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder else Path(datasets.config.HF_DATASETS_CACHE).parent / "selsft"

    @staticmethod
    def key(fingerprint: str, model_hash: str, precision: str) -> str:
        """Name of the file for these rows under this model; `precision` is the mixed precision of the forward pass."""
        return hashlib.sha256(f"selsft-2 {fingerprint} {model_hash} {precision}".encode()).hexdigest()[:32]

    def read(self, key: str, lengths: np.ndarray) -> Dataset | None:
        """The cached rows as a data set of the column `logps`, or `None`. A file that does not fit the rows is
        reported and not used.

        Args:
            lengths: `(rows,)` int64, number of tokens of each row.
        """
        path = self.folder / f"{key}.arrow"
        if not path.is_file():
            return None
        try:
            rows = Dataset.from_file(str(path))
            found = [pc.list_value_length(chunk).to_numpy() for chunk in rows.data.column(COLUMN).chunks]
        except (pa.ArrowException, OSError, KeyError) as error:
            logger.warning(f"Cached scores {path} cannot be read ({error}): they are computed again.")
            return None
        if not np.array_equal(np.concatenate(found) if found else [], lengths) or rows.features != _FEATURES:
            logger.warning(f"Cached scores {path} do not fit the rows of the dataset: they are computed again.")
            return None
        return rows

    def check_writable(self) -> None:
        """Raise before hours of scoring, not after them, when the folder cannot be written to."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=self.folder):
                pass
        except OSError as error:
            raise ValueError(
                f"scoring_cache_dir={str(self.folder)!r} cannot be written to ({error.strerror}): choose another "
                "folder"
            ) from error

    def write(
        self, key: str, blocks: Iterable[tuple[np.ndarray, np.ndarray]], manifest: Callable[[], dict[str, Any]]
    ) -> Dataset:
        """Write rows as they are made, then the manifest; returns the rows.

        Args:
            blocks: flat `(tokens,)` float32 values and `(rows,)` lengths, a block of rows at a time.
            manifest: called when all blocks are written.

        A full disk costs the cache, not the scores: training goes on with a warning, and with 4 bytes a token in
        memory.
        """
        source, schema, path = iter(blocks), _FEATURES.arrow_schema, self.folder / f"{key}.arrow"
        temporary, done, waiting = "", 0, []
        try:
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{path.name}.", delete=False) as handle:
                temporary = handle.name
                with pa.ipc.new_stream(handle, schema) as writer:
                    for flat, lengths in source:
                        waiting = [_record_batch(flat, lengths, schema)]
                        writer.write_batch(waiting[0])
                        handle.flush()
                        done, waiting = done + 1, []
                handle.flush()
                os.fsync(handle.fileno())
            with replaced(self.folder / f"{key}.json") as text:
                text.write(json.dumps(manifest(), indent=2).encode())
            os.replace(temporary, path)
            return Dataset.from_file(str(path))
        except OSError as error:
            logger.warning(f"The scores could not be cached in {self.folder} ({error}); training goes on with them.")
            kept = [*_readable(temporary)[:done], *waiting]
            kept += [_record_batch(flat, lengths, schema) for flat, lengths in source]
            return Dataset(InMemoryTable(pa.Table.from_batches(kept, schema=schema)))
        finally:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def _record_batch(flat: np.ndarray, lengths: np.ndarray, schema: pa.Schema) -> pa.RecordBatch:
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32))
    column = pa.ListArray.from_arrays(offsets, pa.array(flat, type=pa.float32()))
    return pa.record_batch([column], schema=schema)


def _readable(path: str) -> list[pa.RecordBatch]:
    """The whole record batches of a file that ends somewhere."""
    found = []
    with contextlib.suppress(pa.ArrowException, OSError), pa.OSFile(path) as source:
        for batch in pa.ipc.open_stream(source):
            found.append(batch)
    return found
