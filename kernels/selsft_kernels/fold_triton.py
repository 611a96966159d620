"""`fold.fold` in Triton: one program a row folds a tile of logits into the running statistics."""

import triton
import triton.language as tl
from torch import Tensor

from .blocks_triton import LN2, LOG2E, LOWEST, fold_block, load_logit, load_logits
from .fold import FoldState
from .rows import Transform
from .rows_triton import last_stride_one, launch_shape


@triton.jit
def fold_kernel(
    raw_ptr,
    raw_stride,
    column_ptr,
    bias_ptr,
    largest_ptr,
    total_ptr,
    weighted_ptr,
    before_ptr,
    own_ptr,
    width,
    readable,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    IS_TOP1: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + row * raw_stride
    column = tl.load(column_ptr + row)
    lane = tl.arange(0, BLOCK)
    # The state is in natural units, and one number a row: it starts in lane 0.
    largest = tl.maximum(tl.load(largest_ptr + row) * LOG2E, LOWEST)
    total = tl.where(lane == 0, tl.load(total_ptr + row), 0.0)
    weighted = tl.zeros((BLOCK,), tl.float32)
    if ENTROPY:
        weighted = tl.where(lane == 0, tl.load(weighted_ptr + row) * LOG2E, 0.0)
    before = tl.full((BLOCK,), LOWEST, tl.float32)
    for start in range(0, width, BLOCK):
        offsets = start + lane
        mask = offsets < width
        z = load_logits(
            row_ptr, bias_ptr, offsets, width, readable, scale, softcap, HAS_BIAS, HAS_SOFTCAP, "evict_first"
        )
        if IS_TOP1:
            before = tl.maximum(before, tl.where(mask & (offsets < column), z, LOWEST))
        largest, total, weighted = fold_block(z, mask & (offsets != column), largest, total, weighted, ENTROPY)
    tl.store(largest_ptr + row, largest * LN2)
    tl.store(total_ptr + row, tl.sum(total, axis=0))
    if ENTROPY:
        tl.store(weighted_ptr + row, tl.sum(weighted, axis=0) * LN2)
    if IS_TOP1:
        tl.store(before_ptr + row, tl.maximum(tl.load(before_ptr + row), tl.max(before, axis=0)))
        if (column >= 0) & (column < width):
            own = load_logit(row_ptr, bias_ptr, column, width, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            tl.store(own_ptr + row, own)


def fold(raw: Tensor, column: Tensor, t: Transform, state: FoldState, padding: int = 0) -> None:
    """See the twin. Leaves `raw` alone."""
    rows, width = raw.shape
    raw = last_stride_one(raw)
    block, num_warps = launch_shape(width, extras=state.weighted is not None or state.own is not None)
    fold_kernel[(rows,)](
        raw,
        raw.stride(0),
        column,
        t.bias,
        state.largest,
        state.total,
        state.weighted,
        state.before,
        state.own,
        width,
        width + padding,
        t.logit_scale,
        1.0 if t.softcap is None else t.softcap,
        HAS_BIAS=t.bias is not None,
        HAS_SOFTCAP=t.softcap is not None,
        ENTROPY=state.weighted is not None,
        IS_TOP1=state.own is not None,
        BLOCK=block,
        num_warps=num_warps,
    )
