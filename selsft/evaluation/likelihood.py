"""Likelihood of held-out answers, perplexity of neutral text, and how far the next-token distribution has moved.

Three questions that exact match leaves open: does the model find the right answers more likely (NLL), has it lost
something that nobody asked it to lose (perplexity), and how far is it from where it started (KL to the base).
Rejected: `Trainer.evaluate`, which keeps one mean per batch; without a value per row there is no interval.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from accelerate.utils import send_to_device
from transformers import PreTrainedTokenizerBase

from ..scoring.batching import BatchBudget
from ..scoring.logprobs import forward_logps
from ..training.head import add_selective_head
from ..training.model import Model, base_model, frozen
from .kept import Kept
from .rows import HeldOut

# Elements of the two logit tensors that the KL divergence holds at once
_KL_ELEMENTS = 2**26


def answer_logps(held: HeldOut, batch_tokens: int = 8192, kept: Kept | None = None) -> list[np.ndarray]:
    """Log-probability of every token of each row, `(row length,)` float64 in nats; NaN where nothing is predicted or
    the token has no label."""
    trainer, model = held.trainer, held.trainer.model
    add_selective_head(base_model(model))
    rows = [[row["input_ids"], row.get("labels")] for row in held.prepared]
    lengths = [len(ids) for ids, _ in rows]

    def work(indices) -> list[list[float]]:
        inputs = send_to_device(
            trainer.data_collator([held.prepared[int(i)] for i in indices]), trainer.accelerator.device
        )
        with trainer.compute_loss_context_manager():
            logps = forward_logps(model, inputs)
        values = logps.double().masked_fill(inputs["labels"] == -100, torch.nan).cpu().numpy()
        # Padding-free: one row that holds all, whose documents' first labels are -100 already
        size = [lengths[i] for i in indices]
        parts = values if len(values) == len(indices) else np.split(values[0][: sum(size)], np.cumsum(size)[:-1])
        return [[np.nan, *part[1:count].tolist()] for part, count in zip(parts, size, strict=True)]

    batches = BatchBudget(batch_tokens).batches(np.array(lengths))
    with frozen(model):
        found = (kept or Kept()).rows("nll", "Held-out likelihood", rows, batches, work)
    return [np.array(row) for row in found]


def answer_nll(held: HeldOut, batch_tokens: int = 8192, kept: Kept | None = None) -> list[tuple[float, int]]:
    """Negative log-likelihood of the labels of each row: `(sum in nats, number of tokens)`."""
    return [(-float(np.nansum(row)), int((~np.isnan(row)).sum())) for row in answer_logps(held, batch_tokens, kept)]


def text_perplexity(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    block: int,
    batch_size: int = 8,
    kept: Kept | None = None,
) -> dict[str, float]:
    """Perplexity of running text, cut into blocks.

    The texts are joined by blank lines, tokenised without special tokens and cut into blocks of `block` tokens; all
    tokens but the first of each block are predicted, so the figure depends on `block` and compares only with itself.

    Returns:
        `perplexity`, `nats_per_token`, `bits_per_byte` (comparable across tokenizers), `tokens`.
    """
    text = "\n\n".join(texts)
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    if ids.numel() < 2:
        raise ValueError(f"the neutral text has {ids.numel()} tokens: it needs at least 2")
    device = next(model.parameters()).device
    blocks = [part for part in ids.split(block) if part.numel() > 1]
    batches = [blocks[i : i + batch_size] for i in range(0, len(blocks), batch_size)]

    def work(batch: list[torch.Tensor]) -> tuple[float, int, int]:
        total, count, covered = 0.0, 0, 0
        # Only the last block is shorter, and it is alone in its width
        for width in sorted({len(part) for part in batch}):
            rows = torch.stack([part for part in batch if len(part) == width]).to(device)
            logits = model(input_ids=rows).logits[:, :-1].float()
            logps = logits.log_softmax(-1).gather(-1, rows[:, 1:, None])
            total -= float(logps.double().sum())
            count += rows[:, 1:].numel()
            covered += sum(len(str(tokenizer.decode(row)).encode()) for row in rows[:, 1:])
        return total, count, covered

    with frozen(model):
        title, content = "Perplexity of neutral text", [ids.tolist(), block, batch_size]
        parts = list((kept or Kept()).each("text", title, content, batches, work))
    total, count, covered = (sum(part[i] for part in parts) for i in range(3))
    mean = total / count
    return {
        "perplexity": math.exp(mean) if mean < 700 else math.inf,
        "nats_per_token": mean,
        "bits_per_byte": total / math.log(2) / max(covered, 1),
        "tokens": count,
    }


def kl_to_base(
    model: Model, base: Model, rows: Sequence[Sequence[int]], batch_tokens: int = 8192, kept: Kept | None = None
) -> list[float]:
    """KL(base || model) of the next-token distributions, for each row the mean over its positions, nats.

    Args:
        model, base: two models with the same vocabulary; `base` may be a context-free view of the same weights.
        rows: token ids of the held-out prompts.

    This direction weighs what the base would say and the model no longer does. It is 0 exactly when nothing has
    changed.
    """
    device = next(model.parameters()).device
    vocabulary = cast(torch.nn.Embedding, model.get_input_embeddings()).num_embeddings
    budget = BatchBudget(max(1, min(batch_tokens, _KL_ELEMENTS // (2 * vocabulary))))

    def work(indices) -> list[float]:
        ids, mask = left_aligned([rows[i] for i in indices], device)
        ours = model(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        theirs = base(input_ids=ids, attention_mask=mask).logits.float().log_softmax(-1)
        divergence = (theirs.exp() * (theirs - ours)).sum(-1) * mask
        return (divergence.double().sum(1) / mask.sum(1)).tolist()

    batches = budget.batches(np.array([len(row) for row in rows]))
    with frozen(model), frozen(base):
        return (kept or Kept()).rows("kl", "KL to the base", rows, batches, work)


def left_aligned(rows: Sequence[Sequence[int]], device) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and attention mask, `(rows, longest)` int64, padded on the right with 0."""
    width = max(len(row) for row in rows)
    ids = torch.zeros(len(rows), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)], mask[i, : len(row)] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)
