"""Per-token columns of rows under a frozen model: log-probabilities, and whatever else one forward pass gives.

Scores are computed on the *final* rows, after TRL has tokenised, truncated and packed them, and through the collator
that training uses, so that column index t belongs to token t in every packing mode. Documents of a packed row do not
see each other, so they are scored as separate rows, in batches under a token budget (`batching`). Scoring
the raw examples and carrying the columns through preparation was rejected: truncation and packing would have to treat
them alike, and the model would see another context than in training.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn
from transformers import DataCollator

from ..data.chunks import TokenChunk
from ..data.columns import ACTIVE_ROWS, TOKEN_COLUMNS
from ..training.head import SelectiveHead
from ..training.model import Model, base_model
from .batching import BatchBudget

# Forward pass of one batch: column -> `(batch, seq_len)`, 0 where the label is -100
Forward = Callable[[dict], Mapping[str, torch.Tensor]]
ROW_COLUMNS = ["input_ids", "labels"]


def forward_logps(model: torch.nn.Module, inputs: dict) -> torch.Tensor:
    """Log-probability of every label under `model`, in the shape of the labels.

    Args:
        inputs: a batch of the collator, on the model's device; token columns are ignored.

    Returns:
        `(batch, seq_len)` float32, nats; column t is the log-probability of token t given the tokens before it, 0 for
        the first token and where the label is -100.
    """
    inputs = {key: value for key, value in inputs.items() if key not in (*TOKEN_COLUMNS, ACTIVE_ROWS)}
    logps = model(**inputs, selective_head=SelectiveHead()).log_probs
    width = inputs["input_ids"].size(1)
    # Virtual tokens of prompt learning come first and carry no label
    return torch.nn.functional.pad(logps[:, logps.size(1) - (width - 1) :], (1, 0)).float()


@contextlib.contextmanager
def hidden_states(model: Model, layers: Sequence[int]) -> Iterator[dict[int, torch.Tensor]]:
    """Some hidden states of each forward pass inside; the next pass replaces them. `output_hidden_states` would keep
    those of all layers until the pass ends.

    Args:
        layers: as `output_hidden_states` counts: 0 for the embeddings, i for the output of layer i, before the final
            norm.

    Yields:
        layer -> `(batch, seq_len, hidden)`, filled by a forward pass; virtual tokens of prompt learning come first.

    Raises:
        `ValueError` for a layer that the model does not have.
    """
    backbone = base_model(model).base_model
    depth = base_model(model).config.get_text_config().num_hidden_layers
    stack = next(m for m in backbone.modules() if isinstance(m, nn.ModuleList) and len(m) == depth)
    found: dict[int, torch.Tensor] = {}
    if wrong := [layer for layer in layers if not 0 <= layer <= depth]:
        raise ValueError(f"layers={wrong}: the model has the layers 0 (embeddings) to {depth}")

    def keep(layer: int, module: nn.Module, args: tuple, output: torch.Tensor | tuple) -> None:
        found[layer] = output if isinstance(output, torch.Tensor) else output[0]

    def keep_input(module: nn.Module, args: tuple, kwargs: dict) -> None:
        found[0] = args[0] if args else kwargs["hidden_states"]

    hooks = [stack[layer - 1].register_forward_hook(functools.partial(keep, layer)) for layer in layers if layer]
    if 0 in layers:
        hooks.append(stack[0].register_forward_pre_hook(keep_input, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def score_chunk(
    chunk: TokenChunk,
    names: Sequence[str],
    forward: Forward,
    collator: DataCollator,
    accelerator: Accelerator,
    budget: BatchBudget,
    *,
    joint: bool = False,
    progress: Callable[[int], object] | None = None,
) -> dict[str, np.ndarray]:
    """Columns of consecutive rows, flat `(tokens,)` float32, 0 for unsupervised tokens.

    Rows without a label are not run.

    Args:
        chunk: with the columns `input_ids` and `labels`; packed rows with `documents` are scored document by document.
        names: the columns that `forward` gives.
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
    flat = {name: np.zeros(len(ids), np.float32) for name in names}
    for step in range(-(-len(batches) // world)):
        mine = step * world + rank
        chosen = batches[min(mine, len(batches) - 1)]  # the last round repeats a batch where one is short
        rows = [{"input_ids": ids[starts[i] : ends[i]], "labels": labels[starts[i] : ends[i]]} for i in chosen]
        columns = forward(send_to_device(collator(rows), accelerator.device))
        if mine < len(batches):
            for name, values in flat.items():
                _spread(values, columns[name].float().cpu().numpy(), starts[chosen], lengths[chosen])
        if progress is not None:
            progress(int(lengths[chosen].sum()))
    if world == 1:
        return flat
    sums = {name: accelerator.reduce(torch.from_numpy(f).to(accelerator.device), "sum") for name, f in flat.items()}
    return {name: cast(torch.Tensor, values).cpu().numpy() for name, values in sums.items()}


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
