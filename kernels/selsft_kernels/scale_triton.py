"""`scale` in Triton: programs that look at the factor first, and return if it is 1. The host does not wait for it."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import chunking

_BLOCK = 4096
_ROW_BLOCK = 2048
_PROGRAMS = 8  # a multiprocessor


@triton.jit
def scale_kernel(grad_ptr, factor_ptr, size, BLOCK: tl.constexpr):
    factor = tl.load(factor_ptr)
    if factor != 1.0:
        lane = tl.arange(0, BLOCK)
        step = tl.num_programs(0).to(tl.int64) * BLOCK
        for start in range(tl.program_id(0).to(tl.int64) * BLOCK, size, step):
            place = grad_ptr + start + lane
            mask = start + lane < size
            grad = tl.load(place, mask=mask, other=0.0).to(tl.float32)
            tl.store(place, (grad * factor).to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def scale_rows_kernel(out_ptr, rows_ptr, x_ptr, factor_ptr, hidden, BLOCK: tl.constexpr):
    place = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + place)
    factor = tl.load(factor_ptr)
    for start in range(0, hidden, BLOCK):
        offsets = start + tl.arange(0, BLOCK)
        mask = offsets < hidden
        x = tl.load(x_ptr + place * hidden + offsets, mask=mask, other=0.0).to(tl.float32)
        tl.store(out_ptr + row * hidden + offsets, (x * factor).to(out_ptr.dtype.element_ty), mask=mask)


def scale_in_place(grad: Tensor, factor: Tensor) -> None:
    """See the twin."""
    if grad.numel() == 0:
        return
    programs = min(triton.cdiv(grad.numel(), _BLOCK), int(_PROGRAMS * chunking.processors(grad.device)))
    scale_kernel[(programs,)](grad, factor.to(torch.float32), grad.numel(), BLOCK=_BLOCK, num_warps=8)


def scale_into(out: Tensor, rows: Tensor, grad: Tensor, factor: Tensor) -> None:
    """See the twin."""
    if rows.numel() == 0 or out.shape[1] == 0:
        return
    block = min(_ROW_BLOCK, triton.next_power_of_2(out.shape[1]))
    kernel = scale_rows_kernel[(rows.shape[0],)]
    kernel(out, rows.contiguous(), grad, factor.to(torch.float32), out.shape[1], BLOCK=block, num_warps=4)
