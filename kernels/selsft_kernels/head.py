"""The LM head as the fused functions see it: which rows go through it, and the products of a chunk of them."""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend
from .rows import Transform


class Lora(NamedTuple):
    """LoRA on the head, in the dtype of the products."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class Head(NamedTuple):
    """The head in the dtype of the products."""

    weight: Tensor  # [V, H]
    lora: Lora | None
    transform: Transform


class Work(NamedTuple):
    """The rows to compute: `rows` [M] into the flattened input, None = all of them in order.

    The numbers per row lie side by side, whatever the caller's strides: kernels go along them with step 1.
    """

    rows: Tensor | None
    size: int
    target: Tensor  # [M]
    weight: Tensor  # [M]
    reference: Tensor | None  # [M]


def make_head(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    dtype: torch.dtype,
) -> Head:
    lora = None
    if lora_a is not None and lora_b is not None:
        lora = Lora(lora_a.to(dtype), lora_b.to(dtype), lora_scale)
    bias = None if bias is None else bias.float().contiguous()
    return Head(weight.to(dtype), lora, Transform(bias, logit_scale, softcap))


def select_rows(
    target: Tensor, token_weight: Tensor, reference: Tensor | None, index: Tensor | None, ignore_index: int
) -> Work:
    """The rows to compute. Without `index` they are looked up, for which the host waits on a GPU."""
    if index is None:
        index = ((token_weight != 0) & (target != ignore_index)).nonzero().squeeze(1)
        if index.shape[0] == target.shape[0]:
            index = None
    count = target.shape[0]
    if index is not None:
        count = index.shape[0]
        target, token_weight = target[index], token_weight[index]
        reference = None if reference is None else reference[index]
    elif reference is not None:
        reference = reference.contiguous()
    target, token_weight = without_ignored(target, token_weight, ignore_index)
    return Work(index, count, target, token_weight, reference)


def without_ignored(target: Tensor, token_weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Target and weight [n] with ignored rows at weight 0, compact in memory."""
    ignored = target == ignore_index
    return target.masked_fill(ignored, 0).contiguous(), token_weight.masked_fill(ignored, 0.0).contiguous()


def spread(values: Tensor | None, index: Tensor | None, target: Tensor) -> Tensor:
    """`values` [M] at their rows, zeros at the others, shaped like `target` [N]; [0] for None."""
    if values is None:
        return torch.empty(0, device=target.device)
    if index is None:
        return values
    return values.new_zeros(target.shape).index_copy_(0, index, values)


def hidden_rows(input: Tensor, index: Tensor | None, weight: Tensor, rows: slice) -> Tensor:
    """The hidden states of a chunk; zeros where a caller lists a row of weight 0.

    Its logits' gradient is zero, but in the product for the head's gradient a NaN in such a row would still count.
    """
    if index is None:
        return input[rows]
    x, skip = input[index], weight == 0
    # On a CPU, looking is cheaper than a pass over x; on a GPU, the host would wait.
    if skip.device.type == "cpu" and not skip.any():
        return x
    return x.masked_fill_(skip.unsqueeze(1), 0.0)


def raw_logits(out: Tensor, x: Tensor, head: Head, lora_hidden: Tensor | None, columns: slice = slice(None)) -> Tensor:
    """`x W^T` plus the LoRA term, without bias, into `out` [n, columns]."""
    torch.mm(x, head.weight[columns].t(), out=out)
    if head.lora is not None and lora_hidden is not None:
        torch.addmm(out, lora_hidden.to(x.dtype), head.lora.b[columns].t(), alpha=head.lora.scale, out=out)
    return out


def target_logits(
    x: Tensor, head: Head, target: Tensor, lora_hidden: Tensor | None, raw: Tensor | None = None
) -> tuple[Tensor, Tensor | None]:
    """`(logit, own)` of each target, see `target_dot.target_logits`; takes the targets out of `raw`, if given."""
    b, scale = (None, 0.0) if head.lora is None else (head.lora.b, head.lora.scale)
    dot = backend.implementation("target_dot", x.device)
    flip = head.transform.logit_scale < 0
    return dot.target_logits(x, head.weight, target, head.transform.bias, lora_hidden, b, scale, raw, flip)
