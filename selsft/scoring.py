"""Per-token log-probabilities of a data set under a frozen model, computed once and cached on disk.

Scores are computed on the *final* rows, after TRL has tokenised, truncated and packed them, and through the collator
that training uses, so that column index t belongs to token t in every packing mode. Scoring the raw examples and
carrying the columns through preparation was rejected: truncation and packing would have to treat them alike, and the
model would see another context than in training.
"""

from __future__ import annotations

import importlib.metadata
import itertools
import os
import time
from collections.abc import Callable

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import tqdm
from datasets import Dataset
from transformers import DataCollator

from .cache import LogpCache, data_fingerprint
from .head import SelectiveHead

# Forward pass of one batch: `(batch, seq_len - 1)` log-probabilities, 0 where the label is -100
Forward = Callable[[dict], torch.Tensor]


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


def score_rows(
    dataset: Dataset,
    forward: Forward,
    collator: DataCollator,
    accelerator: Accelerator,
    batch_size: int,
    description: str,
) -> list[np.ndarray]:
    """Log-probabilities of all rows: one `(row length,)` float32 array per row, in the order of the data set.

    Rows are visited longest first, so that a batch holds rows of like length (less padding) and running out of memory
    shows in the first batch. Every process takes each `num_processes`-th batch and gets all results.
    """
    columns = [name for name in ("input_ids", "labels", "seq_lengths") if name in dataset.column_names]
    dataset = dataset.select_columns(columns).with_format(None)
    lengths = row_lengths(dataset)
    order = np.argsort(-lengths, kind="stable")
    batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
    world, rank = accelerator.num_processes, accelerator.process_index
    results: list[np.ndarray] = [np.zeros(0, np.float32)] * len(lengths)
    rounds = -(-len(batches) // world)
    for step in tqdm(range(rounds), desc=description, disable=bool(os.environ.get("TQDM_DISABLE"))):
        # Sharded models need all processes in every forward pass, so the last round repeats a batch where one is short
        indices = batches[min(step * world + rank, len(batches) - 1)]
        rows = [dataset[int(index)] for index in indices]
        inputs = {
            key: value.to(accelerator.device) if isinstance(value, torch.Tensor) else value
            for key, value in collator(rows).items()
        }
        logps = forward(inputs).cpu().numpy()
        for index, values in zip(indices, _rows_of(logps, lengths[indices]), strict=True):
            results[index] = values
    return _share(results, lengths, batches, accelerator)


def _rows_of(logps: np.ndarray, lengths: np.ndarray) -> list[np.ndarray]:
    """Undo the collator: `(batch, seq_len)` padded, or `(1, total)` concatenated, into one array per row."""
    if logps.shape[0] == len(lengths):
        return [row[:length].copy() for row, length in zip(logps, lengths, strict=True)]
    ends = np.cumsum(lengths)
    return [part.copy() for part in np.split(logps[0, : ends[-1]], ends[:-1])]


def _share(results, lengths, batches, accelerator: Accelerator) -> list[np.ndarray]:
    """Give every process the rows that the others have scored."""
    world = accelerator.num_processes
    if world == 1:
        return results
    flat = torch.zeros(int(lengths.sum()), device=accelerator.device)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    for batch in batches[accelerator.process_index :: world]:
        for index in batch:
            flat[starts[index] : starts[index + 1]] = torch.from_numpy(results[index]).to(flat.device)
    flat = accelerator.reduce(flat, reduction="sum").cpu()
    return [flat[start:end].numpy() for start, end in itertools.pairwise(starts)]


def row_lengths(dataset: Dataset) -> np.ndarray:
    """Number of tokens of each row, `(rows,)` int64."""
    parts = [
        np.asarray(batch["input_ids"].combine_chunks().value_lengths(), dtype=np.int64)
        for batch in dataset.select_columns(["input_ids"]).with_format("arrow").iter(batch_size=10_000)
    ]
    return np.concatenate(parts) if parts else np.zeros(0, np.int64)


def trained_tokens(dataset: Dataset, padding_free: bool) -> list[np.ndarray]:
    """Which tokens of each row the collator leaves a label and a past to be predicted from: one bool array per row."""
    masks = []
    for row in dataset.select_columns([c for c in ("labels", "seq_lengths") if c in dataset.column_names]):
        mask = np.asarray(row["labels"]) != -100
        if mask.size:
            mask[0] = False
        if padding_free and "seq_lengths" in row:  # the first token of a document has no past
            mask[np.cumsum(row["seq_lengths"])[:-1]] = False
        masks.append(mask)
    return masks


def cached_logps(
    dataset: Dataset,
    forward: Forward,
    collator: DataCollator,
    accelerator: Accelerator,
    *,
    batch_size: int,
    cache: LogpCache,
    model_hash: str,
    model_name: str,
    description: str,
) -> list[np.ndarray]:
    """Log-probabilities of all rows, from the cache when these rows were scored with these weights before."""
    fingerprint, precision = data_fingerprint(dataset), str(accelerator.mixed_precision)
    key, lengths = cache.key(fingerprint, model_hash, precision), row_lengths(dataset)
    # One process decides, so that all of them score or none does
    rows = cache.read(key, lengths)
    found = torch.tensor([rows is not None], device=accelerator.device, dtype=torch.float32)
    if float(accelerator.reduce(found, reduction="sum")) == accelerator.num_processes and rows is not None:
        return rows
    if accelerator.is_main_process:
        cache.check_writable()
    start = time.perf_counter()
    rows = score_rows(dataset, forward, collator, accelerator, batch_size, description)
    if accelerator.is_main_process:
        manifest = {
            "model": model_name,
            "model_sha256": model_hash,
            "data_sha256": fingerprint,
            "rows": len(rows),
            "tokens": int(lengths.sum()),
            "mixed_precision": precision,
            "seconds": round(time.perf_counter() - start, 3),
            "created": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "versions": {
                name: importlib.metadata.version(name) for name in ("selsft", "torch", "transformers", "trl", "peft")
            },
        }
        cache.write(key, rows, manifest)
    accelerator.wait_for_everyone()
    return rows
