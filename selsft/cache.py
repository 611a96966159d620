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
from pathlib import Path

import datasets.config
import numpy as np
import pyarrow as pa
from datasets import Dataset

logger = logging.getLogger(__name__)


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

    Files appear by a rename, so a file that exists is whole, and two runs may share the folder.

    Args:
        folder: created on first use; `None` for the folder `selsft` beside the cache of `datasets`.
    """

    def __init__(self, folder: str | None):
        self.folder = Path(folder) if folder else Path(datasets.config.HF_DATASETS_CACHE).parent / "selsft"

    @staticmethod
    def key(fingerprint: str, model_hash: str, precision: str) -> str:
        """Name of the file for these rows under this model; `precision` is the mixed precision of the forward pass."""
        return hashlib.sha256(f"selsft-1 {fingerprint} {model_hash} {precision}".encode()).hexdigest()[:32]

    def read(self, key: str, lengths: np.ndarray) -> list[np.ndarray] | None:
        """The cached rows, or `None`. A file that does not fit the rows is reported and not used."""
        path = self.folder / f"{key}.arrow"
        if not path.is_file():
            return None
        try:
            with pa.memory_map(str(path)) as source:
                column = pa.ipc.open_stream(source).read_all()["logps"].combine_chunks()
                flat = np.array(column.flatten(), dtype=np.float32)  # a copy: the file may be replaced
                found = np.asarray(column.value_lengths(), dtype=np.int64)
        except (pa.ArrowException, OSError, KeyError) as error:
            logger.warning(f"Cached scores {path} cannot be read ({error}): they are computed again.")
            return None
        if not np.array_equal(found, lengths):
            logger.warning(f"Cached scores {path} do not fit the rows of the dataset: they are computed again.")
            return None
        return np.split(flat, np.cumsum(lengths)[:-1]) if len(lengths) else []

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

    def write(self, key: str, rows: list[np.ndarray], manifest: dict) -> None:
        """Write rows and manifest. A full disk costs the cache, not the scores: training goes on with a warning."""
        flat = np.concatenate(rows) if rows else np.zeros(0, np.float32)
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
        column = pa.LargeListArray.from_arrays(pa.array(offsets), pa.array(flat, type=pa.float32()))
        table = pa.table({"logps": column})
        try:
            with self._replace(f"{key}.json") as handle:
                handle.write(json.dumps(manifest, indent=2).encode())
            with self._replace(f"{key}.arrow") as handle, pa.ipc.new_stream(handle, table.schema) as writer:
                writer.write_table(table)
        except OSError as error:
            logger.warning(f"The scores could not be cached in {self.folder} ({error}); training goes on with them.")

    @contextlib.contextmanager
    def _replace(self, name: str):
        """A file that gets its name only when it is complete."""
        handle = tempfile.NamedTemporaryFile(dir=self.folder, prefix=f".{name}.", delete=False)
        try:
            with handle:
                yield handle
                handle.flush()
                os.fsync(handle.fileno())
            os.replace(handle.name, self.folder / name)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(handle.name)
            raise
