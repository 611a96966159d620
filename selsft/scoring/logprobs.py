"""Per-token log-probabilities of a data set under a frozen model, computed once and cached on disk.

Scores are computed on the *final* rows, after TRL has tokenised, truncated and packed them, and through the collator
that training uses, so that column index t belongs to token t in every packing mode. The documents of a packed row see
nothing of each other, so they are scored as rows of their own, in batches under a token budget (`batching`). Scoring
the raw examples and carrying the columns through preparation was rejected: truncation and packing would have to treat
them alike, and the model would see another context than in training.
"""

from __future__ import annotations

import copy
import importlib.metadata
import os
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from datasets import Dataset
from transformers import DataCollator

from ..data.chunks import TokenChunk
from ..records import now
from ..training.head import SelectiveHead
from .batching import BatchBudget, shard_chunks
from .cache import LogpCache, data_fingerprint

# Forward pass of one batch: log-probabilities of `(batch, seq_len)`, 0 where the label is -100, one tensor per model
Forward = Callable[[dict], Sequence[torch.Tensor]]
ROW_COLUMNS = ["input_ids", "labels"]


def forward_logps(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Log-probability of every label under `model`, in the shape of the labels.

    Args:
        inputs: a batch of the collator, on the model's device; token columns are ignored.

    Returns:
        `(batch, seq_len)` float32, nats; column t is the log-probability of token t given the tokens before it, 0 for
        the first token and where the label is -100.
    """
    skipped = ("token_weights", "base_logps", "ref_logps", "active_rows")
    inputs = {key: value for key, value in inputs.items() if key not in skipped}
    logps = model(**inputs, selective_head=SelectiveHead()).log_probs
    width = inputs["input_ids"].size(1)
    # Virtual tokens of prompt learning come first and carry no label
    return torch.nn.functional.pad(logps[:, logps.size(1) - (width - 1) :], (1, 0)).float()


def score_chunk(
    chunk: TokenChunk,
    forward: Forward,
    collator: DataCollator,
    accelerator: Accelerator,
    budget: BatchBudget,
    *,
    models: int = 1,
    joint: bool = False,
    progress: Callable[[int], object] | None = None,
) -> list[np.ndarray]:
    """Log-probabilities of consecutive rows: one flat `(tokens,)` float32 array per model, 0 where nothing is trained.

    Rows without a label never meet the model.

    Args:
        chunk: with the columns `input_ids` and `labels`; packed rows with `documents` are scored document by document.
        models: how many tensors `forward` returns.
        joint: whether all processes score this chunk together: each takes every `num_processes`-th batch, runs as many
            forward passes as the others (sharded weights need all of them) and gets all results.
        progress: told the number of tokens of each batch.
    """
    ids, labels = (np.asarray(chunk.columns[name], np.int64) for name in ROW_COLUMNS)
    lengths = chunk.lengths if chunk.documents is None else chunk.documents
    ends = np.cumsum(lengths)
    starts = ends - lengths
    counted = np.concatenate([[0], np.cumsum(labels != -100)])
    after_first = np.minimum(starts + 1, ends)
    wanted = np.flatnonzero(counted[ends] > counted[after_first])
    batches = [wanted[batch] for batch in budget.batches(lengths[wanted])]
    collator = _like(collator, budget.padding_free)
    world, rank = (accelerator.num_processes, accelerator.process_index) if joint else (1, 0)
    flat = [np.zeros(len(ids), np.float32) for _ in range(models)]
    for step in range(-(-len(batches) // world)):
        mine = step * world + rank
        chosen = batches[min(mine, len(batches) - 1)]  # the last round repeats a batch where one is short
        rows = [{"input_ids": ids[starts[i] : ends[i]], "labels": labels[starts[i] : ends[i]]} for i in chosen]
        inputs = {
            key: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value
            for key, value in collator(rows).items()
        }
        found = forward(inputs)
        if mine < len(batches):
            for values, logps in zip(flat, found, strict=True):
                _spread(values, logps.cpu().numpy(), starts[chosen], lengths[chosen])
        if progress is not None:
            progress(int(lengths[chosen].sum()))
    if world == 1:
        return flat
    return [accelerator.reduce(torch.from_numpy(f).to(accelerator.device), "sum").cpu().numpy() for f in flat]


def _like(collator: DataCollator, padding_free: bool) -> DataCollator:
    """The collator of training, with or without padding."""
    made = copy.copy(collator)
    made.padding_free = padding_free  # type: ignore[attr-defined]
    return made


def _spread(flat: np.ndarray, logps: np.ndarray, starts: np.ndarray, lengths: np.ndarray) -> None:
    """Undo the collator, into the rows of `flat`: `logps` is `(batch, seq_len)` padded, or `(1, total)`."""
    if len(lengths) > 1 and logps.shape[0] == 1:
        parts = np.split(logps[0, : lengths.sum()], np.cumsum(lengths)[:-1])
    else:
        parts = [row[:length] for row, length in zip(logps, lengths, strict=True)]
    for start, part in zip(starts, parts, strict=True):
        flat[start : start + len(part)] = part


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Number of tokens of each row, `(rows,)` int64."""
    parts = [
        np.asarray(batch["input_ids"].combine_chunks().value_lengths(), dtype=np.int64)
        for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def cached_logps(
    dataset: Dataset,
    forward: Callable[[dict], torch.Tensor],
    collator: DataCollator,
    accelerator: Accelerator,
    *,
    budget: BatchBudget,
    cache: LogpCache,
    model_hash: str,
    model_name: str,
    description: str,
) -> Dataset:
    """Log-probabilities of all rows, from the cache when these rows were scored with these weights before.

    Returns:
        a data set of the one column `logps`, float32 lists of the rows' lengths, mapped into memory.
    """
    fingerprint, precision = data_fingerprint(dataset), str(accelerator.mixed_precision)
    key, lengths = cache.key(fingerprint, model_hash, precision), row_lengths(dataset)
    # One process decides, so that all of them score or none does
    rows = cache.read(key, lengths)
    if _everywhere(rows is not None, accelerator) and rows is not None:
        return rows
    writes = accelerator.is_local_main_process  # machines may or may not share the folder
    if writes:
        cache.check_writable()
    start = time.perf_counter()
    split = getattr(collator, "padding_free", False)
    bar = tqdm(total=int(lengths.sum()), desc=description, unit="token", unit_scale=True, disable=_quiet())

    def chunks() -> Iterator[tuple[np.ndarray, np.ndarray]]:
        for chunk in shard_chunks(dataset.with_format(None), ROW_COLUMNS):
            if not split:
                chunk.documents = None  # the collator of training does not keep them apart either
            (flat,) = score_chunk(
                chunk, lambda x: [forward(x)], collator, accelerator, budget, joint=True, progress=bar.update
            )
            yield flat, chunk.lengths

    def manifest() -> dict:
        return {
            "model": model_name,
            "model_sha256": model_hash,
            "data_sha256": fingerprint,
            "rows": len(lengths),
            "tokens": int(lengths.sum()),
            "mixed_precision": precision,
            "seconds": round(time.perf_counter() - start, 3),
            "created": now(),
            "versions": {
                name: importlib.metadata.version(name) for name in ("selsft", "torch", "transformers", "trl", "peft")
            },
        }

    with bar:
        if writes:
            rows = cache.write(key, chunks(), manifest)
        else:
            for _ in chunks():  # takes part in every forward pass
                pass
    accelerator.wait_for_everyone()
    if rows is None or not writes:
        rows = cache.read(key, lengths)
    if not _everywhere(rows is not None, accelerator) or rows is None:
        raise ValueError(
            f"scoring_cache_dir={str(cache.folder)!r}: another process cannot read the scores that were written "
            "there: choose a folder with free space that all processes of a machine see"
        )
    return rows


def _everywhere(holds: bool, accelerator: Accelerator) -> bool:
    """Whether something holds in all processes."""
    count = torch.tensor([holds], device=accelerator.device, dtype=torch.float32)
    return float(accelerator.reduce(count, reduction="sum")) == accelerator.num_processes


def _quiet() -> bool:
    return bool(os.environ.get("TQDM_DISABLE"))
