"""The trainer's own scores: a folder for each pair of rows and weights, read and completed shard by shard.

The folders are those of `selsft score`, with one column of scores, under a name made of the content of the rows, the
hash of the weights and the precision: a threshold, an objective or a learning rate can change without another forward
pass, and nothing else can change unnoticed. A killed run loses only its current shard. The fingerprint of
`datasets` was rejected as a key: it is random after a transform that cannot be pickled, and covers columns that no
score depends on.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets.config
import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from datasets import Dataset

from ..data.chunks import ColumnWriter, TokenChunk, token_chunks
from ..data.scored_folder import ScoredFolder
from ..records import json_sha256, now, versions
from .logprobs import ROW_COLUMNS

logger = logging.getLogger(__name__)

Score = Callable[..., dict[str, np.ndarray]]


def cache_folder(folder: str | Path | None) -> Path:
    """`folder`, or the folder `selsft` beside the cache of `datasets`."""
    return Path(folder) if folder else Path(datasets.config.HF_DATASETS_CACHE).parent / "selsft"


def cached_column(
    dataset: Dataset,
    column: str,
    score: Score,
    accelerator: Accelerator,
    *,
    folder: str | Path | None,
    identity: dict[str, Any],
    name: str,
    documents: bool,
) -> Dataset:
    """One score of all rows, read where these rows were scored with these weights before, else computed and cached.

    A full disk costs the cache, not the scores: the run continues with a warning.

    Args:
        score: `score(chunk, progress=...)` gives the columns of a chunk; called in all processes together.
        folder: `scoring_cache_dir`.
        identity: all that decides the scores, the rows included.
        name: of the model, for the manifest.
        documents: whether the documents of packed rows are kept apart.

    Returns:
        a data set of the one column, float32 lists of the rows' lengths, mapped into memory.

    Raises:
        `ValueError` for a folder that cannot be written to, before anything is scored.
    """
    store = ScoredFolder(cache_folder(folder) / json_sha256(identity)[:32], identity)
    keeps = accelerator.is_local_main_process  # machines may or may not share the folder
    made = False
    writer, count = ColumnWriter(column, "float32"), 0
    total = sum(chunk.size for chunk in token_chunks(dataset, ["input_ids"]))
    quiet = bool(os.environ.get("TQDM_DISABLE"))
    with tqdm(total=total, desc=f"Scoring ({column})", unit="token", unit_scale=True, disable=quiet) as bar:
        for index, chunk in enumerate(token_chunks(dataset.with_format(None), ROW_COLUMNS)):
            if not documents:
                chunk.documents = None  # the collator of training does not keep them apart either
            values = _cached(store, index, chunk, column)
            # A shard that one process cannot read is scored by all of them together
            if not _everywhere(values is not None, accelerator) or values is None:
                if not made and keeps:
                    keeps = _begin(store, {"column": column, "model": name, "created": now(), "versions": versions()})
                made = True
                values = score(chunk, progress=bar.update)[column]
                keeps = keeps and _written(store, index, chunk, {column: values})
            else:
                bar.update(chunk.size)
            writer.write(values, chunk.lengths)
            count = index + 1
    if made and keeps:
        try:
            store.finish(count, idle=3600)
        except (OSError, ValueError) as error:
            logger.warning(f"The manifest of {store.path} could not be written ({error}).")
    accelerator.wait_for_everyone()
    return writer.dataset()


def _cached(store: ScoredFolder, index: int, chunk: TokenChunk, column: str) -> np.ndarray | None:
    try:
        return store.read(index)[column] if store.finished(index, chunk) else None
    except (ValueError, KeyError) as error:
        logger.warning(f"Cached scores do not match, these rows are computed again: {error}")
        return None


def _begin(store: ScoredFolder, facts: dict[str, Any]) -> bool:
    """Whether shards can be kept. Raises before hours of scoring, not after them, when they cannot be written."""
    try:
        store.path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=store.path):
            pass
    except OSError as error:
        raise ValueError(
            f"scoring_cache_dir={str(store.path.parent)!r} cannot be written to ({error.strerror}): choose another "
            "folder"
        ) from error
    try:
        try:
            store.open(facts)
        except ValueError as error:
            logger.warning(f"Cached scores do not match, all are computed again: {error}")
            store.open(facts, rescore=True)
    except OSError as error:
        return _not_kept(store, error)
    return True


def _written(store: ScoredFolder, index: int, chunk: TokenChunk, scores: dict[str, np.ndarray]) -> bool:
    try:
        store.write(index, chunk, scores)
    except OSError as error:
        return _not_kept(store, error)
    return True


def _not_kept(store: ScoredFolder, error: OSError) -> bool:
    logger.warning(f"The scores could not be cached in {store.path} ({error}); the run continues with them.")
    return False


def _everywhere(holds: bool, accelerator: Accelerator) -> bool:
    """Whether something holds in all processes."""
    count = torch.tensor([holds], device=accelerator.device, dtype=torch.float32)
    return float(accelerator.reduce(count, reduction="sum")) == accelerator.num_processes
