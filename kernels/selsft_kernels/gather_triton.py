"""`gather` in Triton: a program copies a row, multiplies it with its target's, and takes along what is known of it.

So a chunk of rows is one launch instead of a gather of each of four tensors, masks for two of them, and the dot.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .gather import used_rows
from .head import Given, Head, Work

_MAX_BLOCK = 2048


@triton.jit
def gather_kernel(
    x_ptr,
    logit_ptr,
    target_out_ptr,
    token_weight_out_ptr,
    reference_out_ptr,
    input_ptr,
    input_stride,
    input_stride_h,
    rows_ptr,
    first,  # where there is no index: the first of the rows
    target_ptr,
    token_weight_ptr,
    reference_ptr,
    weight_ptr,
    weight_stride_v,
    weight_stride_h,
    bias_ptr,
    ignore_index,
    hidden,
    vocab,
    HAS_ROWS: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    COPY: tl.constexpr,
    BLOCK: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    row = place + first
    if HAS_ROWS:
        row = tl.load(rows_ptr + place)
    target = tl.load(target_ptr + row)
    weight = tl.load(token_weight_ptr + row)
    weight = tl.where(target == ignore_index, 0.0, weight)
    target = tl.where(target == ignore_index, 0, target)
    tl.store(target_out_ptr + place, target)
    tl.store(token_weight_out_ptr + place, weight)
    if HAS_REFERENCE:
        tl.store(reference_out_ptr + place, tl.load(reference_ptr + row))

    inside = (target >= 0) & (target < vocab)
    column = tl.where(inside, target, 0).to(tl.int64)
    x_row, w_row = input_ptr + row * input_stride, weight_ptr + column * weight_stride_v
    readable = tl.where(weight != 0.0, hidden, 0)  # a row of weight 0 may hold NaN
    acc = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, hidden, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < hidden
        x = tl.load(x_row + offsets.to(tl.int64) * input_stride_h, mask=offsets < readable, other=0.0)
        x = x.to(weight_ptr.dtype.element_ty)
        if COPY:
            tl.store(x_ptr + place * hidden + offsets, x, mask=mask)
        w = tl.load(w_row + offsets.to(tl.int64) * weight_stride_h, mask=mask, other=0.0)
        acc += x.to(tl.float32) * w.to(tl.float32)
    logit = tl.sum(acc, axis=0)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + column)
    # A target outside the vocabulary reads row 0 and makes the loss NaN.
    tl.store(logit_ptr + place, tl.where(inside, logit, float("nan")))


def select_rows(
    target: Tensor, token_weight: Tensor, reference: Tensor | None, index: Tensor | None, ignore_index: int
) -> Work:
    """See the twin; `take_rows` fills in what is known of the rows of each chunk."""
    rows = used_rows(target, token_weight, index, ignore_index)
    count = target.shape[0] if rows is None else rows.shape[0]
    known = Given(
        target.contiguous(),
        token_weight.contiguous(),
        None if reference is None else reference.contiguous(),
        ignore_index,
    )
    return Work(
        rows,
        count,
        torch.empty(count, device=target.device, dtype=torch.int64),
        torch.empty(count, device=target.device, dtype=torch.float32),
        None if reference is None else torch.empty(count, device=target.device, dtype=torch.float32),
        known,
    )


def take_rows(input: Tensor, work: Work, start: int, end: int, head: Head) -> tuple[Tensor, Tensor]:
    """See the twin."""
    weight, bias, known = head.weight, head.transform.bias, work.given
    assert known is not None
    hidden = weight.shape[1]
    copy = work.rows is not None or input.dtype != weight.dtype
    x = input[start:end]
    if copy:
        x = torch.empty(end - start, hidden, device=input.device, dtype=weight.dtype)
    logit = torch.empty(end - start, device=input.device, dtype=torch.float32)
    reference = None if work.reference is None else work.reference[start:end]
    gather_kernel[(end - start,)](
        x,
        logit,
        work.target[start:end],
        work.weight[start:end],
        reference,
        input,
        input.stride(0),
        input.stride(1),
        None if work.rows is None else work.rows[start:end],
        start,
        known.target,
        known.weight,
        known.reference,
        weight,
        weight.stride(0),
        weight.stride(1),
        bias,
        known.ignore_index,
        hidden,
        weight.shape[0],
        HAS_ROWS=work.rows is not None,
        HAS_REFERENCE=reference is not None,
        HAS_BIAS=bias is not None,
        COPY=copy,
        BLOCK=min(_MAX_BLOCK, triton.next_power_of_2(hidden)),
        num_warps=4,
    )
    return x, logit
