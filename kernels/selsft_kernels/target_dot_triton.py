"""`target_dot` in Triton: one program a row, nothing of size [n, H] in memory."""

import torch
import triton
import triton.language as tl
from torch import Tensor

_MAX_BLOCK = 2048


@triton.jit
def _row_dot(x_ptr, w_ptr, w_stride, size, BLOCK: tl.constexpr):
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < size
        x = tl.load(x_ptr + offsets, mask=mask, other=0.0).to(tl.float32)
        w = tl.load(w_ptr + offsets.to(tl.int64) * w_stride, mask=mask, other=0.0).to(tl.float32)
        acc += x * w
    return tl.sum(acc, axis=0)


@triton.jit
def target_dot_kernel(
    out_ptr,
    own_ptr,
    x_ptr,
    x_stride,
    weight_ptr,
    weight_stride_v,
    weight_stride_h,
    target_ptr,
    bias_ptr,
    lora_hidden_ptr,
    lora_b_ptr,
    lora_b_stride,
    raw_ptr,
    raw_stride,
    lora_scale,
    hidden,
    vocab,
    rank,
    HAS_BIAS: tl.constexpr,
    HAS_LORA: tl.constexpr,
    HAS_RAW: tl.constexpr,  # take the target out of the logits
    FLIP: tl.constexpr,
    BLOCK: tl.constexpr,
    RANK_BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    inside = (target >= 0) & (target < vocab)
    place = tl.where(inside, target, 0).to(tl.int64)
    z = _row_dot(x_ptr + row * x_stride, weight_ptr + place * weight_stride_v, weight_stride_h, hidden, BLOCK)
    if HAS_LORA:
        low = _row_dot(lora_hidden_ptr + row * rank, lora_b_ptr + place * lora_b_stride, 1, rank, RANK_BLOCK)
        z += tl.cast(lora_scale, tl.float32) * low
    bias = 0.0
    if HAS_BIAS:
        bias = tl.load(bias_ptr + place)
        z += bias
    # A target outside the vocabulary reads row 0 and makes the loss NaN.
    tl.store(out_ptr + row, tl.where(inside, z, float("nan")))
    if HAS_RAW:
        cell = raw_ptr + row * raw_stride + place
        tl.store(own_ptr + row, tl.load(cell).to(tl.float32) + bias)
        # All threads have read the logit before one overwrites it.
        tl.debug_barrier()
        out = tl.full((), float("inf") if FLIP else float("-inf"), tl.float32)
        tl.store(cell, out.to(raw_ptr.dtype.element_ty), mask=inside)


def target_logits(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] fp32
    lora_hidden: Tensor | None,  # [n, r] fp32: x A^T
    lora_b: Tensor | None,  # [V, r]
    lora_scale: float,
    raw: Tensor | None = None,  # [n, V], last stride 1
    flip: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """See the twin."""
    out = torch.empty(x.shape[0], device=x.device, dtype=torch.float32)
    own = None if raw is None else torch.empty_like(out)
    x = x if x.stride(1) == 1 else x.contiguous()
    b = None if lora_b is None else lora_b.contiguous()
    rank = 0 if b is None else b.shape[1]
    hidden = weight.shape[1]
    target_dot_kernel[(x.shape[0],)](
        out,
        own,
        x,
        x.stride(0),
        weight,
        weight.stride(0),
        weight.stride(1),
        target,
        bias,
        lora_hidden,
        b,
        0 if b is None else b.stride(0),
        raw,
        0 if raw is None else raw.stride(0),
        lora_scale,
        hidden,
        weight.shape[0],
        rank,
        HAS_BIAS=bias is not None,
        HAS_LORA=b is not None and lora_hidden is not None,
        HAS_RAW=raw is not None,
        FLIP=flip,
        BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(hidden)),
        RANK_BLOCK=max(16, triton.next_power_of_2(rank)),
        num_warps=4,
    )
    return out, own
