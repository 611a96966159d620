"""The rows that go through the head, and the raw logit of each of their targets in fp32, in torch.

A chunk needs its hidden states side by side, and the hidden row times the target's row of the head: `N H`
multiplications, nothing against the `N V H` of the logits. Rejected: reading that logit from the chunk of logits, a
value that was rounded to bf16, and that rounding is most of the error of the log-probability.
"""

import torch
from torch import Tensor

from .head import Head, Work, without_ignored


def used_rows(target: Tensor, token_weight: Tensor, index: Tensor | None, ignore_index: int) -> Tensor | None:
    """`index`, or the rows that count, for which the host waits on a GPU; None = all of them in order."""
    if index is not None:
        return index.contiguous()
    index = ((token_weight != 0) & (target != ignore_index)).nonzero().squeeze(1)
    return None if index.shape[0] == target.shape[0] else index


def select_rows(
    target: Tensor, token_weight: Tensor, reference: Tensor | None, index: Tensor | None, ignore_index: int
) -> Work:
    """The rows to compute, with what is known of each."""
    rows = used_rows(target, token_weight, index, ignore_index)
    if rows is not None:
        # Of small tensors, `index_select` costs a third of what indexing does.
        target, token_weight = target.index_select(0, rows), token_weight.index_select(0, rows)
        reference = None if reference is None else reference.index_select(0, rows)
    elif reference is not None:
        reference = reference.contiguous()
    target, token_weight = without_ignored(target, token_weight, ignore_index)
    return Work(rows, target.shape[0], target, token_weight, reference)


def take_rows(input: Tensor, work: Work, start: int, end: int, head: Head) -> tuple[Tensor, Tensor]:
    """`(x, logit)` of the rows [start, end) of `work`.

    x: [n, H] in the dtype of the products; zeros where a caller lists a row of weight 0. Its logits' gradient is zero,
        but in the product for the head's gradient a NaN in such a row would still count.
    logit: [n] fp32, `x W[y] + bias[y]`, without LoRA; NaN for a target outside the vocabulary.
    """
    weight, bias = head.weight, head.transform.bias
    if work.rows is None:
        x = input[start:end]
    else:
        x, skip = input.index_select(0, work.rows[start:end]), work.weight[start:end] == 0
        # Looking is cheaper than a pass over x.
        x = x.masked_fill_(skip.unsqueeze(1), 0.0) if skip.any() else x
    x = x.to(weight.dtype)
    given = work.target[start:end]
    target = given.clamp(0, weight.shape[0] - 1)
    logit = (x.float() * weight.index_select(0, target).float()).sum(-1)
    if bias is not None:
        logit.add_(bias.index_select(0, target))
    return x, logit.masked_fill_(given != target, torch.nan)
