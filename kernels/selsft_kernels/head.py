"""The LM head as the fused functions see it: which rows go through it, and the products of a chunk of them."""

from typing import NamedTuple

import torch
from torch import Tensor

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


class Given(NamedTuple):
    """What the caller gave for each of the N rows."""

    target: Tensor
    weight: Tensor
    reference: Tensor | None
    ignore_index: int


class Work(NamedTuple):
    """The rows to compute: `rows` [M] into the flattened input, None = all of them in order.

    The numbers per row lie side by side, whatever the caller's strides: kernels go along them with step 1.
    """

    rows: Tensor | None
    size: int
    target: Tensor  # [M]
    weight: Tensor  # [M]
    reference: Tensor | None  # [M]
    given: Given | None = None  # what fills the three before, chunk by chunk; None: they are full


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


def raw_logits(out: Tensor, x: Tensor, head: Head, lora_hidden: Tensor | None, columns: slice = slice(None)) -> Tensor:
    """`x W^T` plus the LoRA term, without bias, into `out` [n, columns]."""
    torch.mm(x, head.weight[columns].t(), out=out)
    if head.lora is not None and lora_hidden is not None:
        torch.addmm(out, lora_hidden.to(x.dtype), head.lora.b[columns].t(), alpha=head.lora.scale, out=out)
    return out


def add_lora(logit: Tensor, head: Head, target: Tensor, lora_hidden: Tensor | None) -> None:
    """Adds the LoRA term to the fp32 logits of the targets [n]; lora_hidden [n, r] fp32 is `x A^T`."""
    if head.lora is not None and lora_hidden is not None:
        b = head.lora.b[target.clamp(0, head.lora.b.shape[0] - 1)]
        logit.add_((lora_hidden * b.float()).sum(-1), alpha=head.lora.scale)
