"""`fold.fold` in Triton: one program a row folds a tile of logits into the running statistics.

A tile of logits is read once and a row of it is short, so small programs, of which many fit a multiprocessor, hide the
latency of each other. The program itself puts -inf in the place of the target, see `blocks_triton.py`.

`largest` is the largest y of `blocks_triton.py` and `weighted` is in log2 units, so that nothing is rounded between
tiles; `natural` turns them into what `fold.finish` takes.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks_triton import LN2, LOWEST, coefficients, increasing, load_tile, tile_columns
from .fold import FoldState
from .rows import Transform
from .rows_triton import constants, statistics

_MAX_LANES = 256  # of 128 threads


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
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    ENTROPY: tl.constexpr,
    IS_TOP1: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + row * raw_stride
    column = tl.load(column_ptr + row)
    inside = (column >= 0) & (column < width)
    a, _, k = coefficients(scale, softcap, HAS_SOFTCAP)
    own = 0.0
    if inside:
        # All threads have read the target's logit before one overwrites it, and see the new one afterwards.
        own = tl.load(row_ptr + column).to(tl.float32)
        if HAS_BIAS:
            own += tl.load(bias_ptr + column)
        tl.debug_barrier()
        out = tl.full((), float("inf") if FLIP else float("-inf"), tl.float32)
        tl.store(row_ptr + column, out.to(raw_ptr.dtype.element_ty))
        tl.debug_barrier()
    tile_largest, tile_total, tile_weighted = statistics(
        row_ptr, bias_ptr, column, width, readable, a, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, ENTROPY, False, LANES,
        VEC, True,
    )  # fmt: skip

    old = tl.load(largest_ptr + row)
    new = tl.maximum(old, tile_largest)
    drop, tile_drop = a * (old - new), a * (tile_largest - new)
    rescale, tile_rescale = tl.exp2(drop), tl.exp2(tile_drop)
    total = tl.load(total_ptr + row)
    if ENTROPY:
        weighted = (tl.load(weighted_ptr + row) + total * drop) * rescale
        tl.store(weighted_ptr + row, weighted + (tile_weighted + tile_total * tile_drop) * tile_rescale)
    tl.store(largest_ptr + row, new)
    tl.store(total_ptr + row, total * rescale + tile_total * tile_rescale)
    if IS_TOP1:
        before = tile_largest
        if inside:
            tl.store(own_ptr + row, increasing(own, k, HAS_SOFTCAP, FLIP, NVIDIA))
            # In the target's own tile, only the columns to its left count.
            tile = tile_columns(LANES, VEC, True)
            lanes = tl.full((LANES,), LOWEST, tl.float32)
            end = column.to(tl.int32)
            for start in range(0, end, LANES * VEC):
                y = load_tile(
                    row_ptr, bias_ptr, start + tile, end, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, True,
                    "evict_first",
                )  # fmt: skip
                lanes = tl.maximum(lanes, tl.max(y, axis=1))
            before = tl.max(lanes, axis=0)
        if column >= 0:
            tl.store(before_ptr + row, tl.maximum(tl.load(before_ptr + row), before))


def fold(raw: Tensor, column: Tensor, t: Transform, state: FoldState, padding: int = 0) -> None:
    """See the twin."""
    rows, width = raw.shape
    if rows == 0:
        return
    lanes, vec, num_warps = launch_shape(width, raw.element_size())
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
        ENTROPY=state.weighted is not None,
        IS_TOP1=state.own is not None,
        LANES=lanes,
        VEC=vec,
        num_warps=num_warps,
        **constants(t),
    )


def natural(state: FoldState, t: Transform) -> tuple[Tensor, Tensor, Tensor | None]:
    """See the twin."""
    ln2 = LN2.value
    if t.softcap is None:
        largest = state.largest * abs(t.logit_scale)
    else:
        largest = state.largest * (2.0 * t.softcap) - t.softcap
    return largest, state.total, None if state.weighted is None else state.weighted * ln2


def launch_shape(columns: int, itemsize: int) -> tuple[int, int, int]:
    """`(LANES, VEC, num_warps)`: as in `rows_triton`, but at most 128 threads."""
    vec = 16 // itemsize
    lanes = min(_MAX_LANES, max(1, triton.next_power_of_2(triton.cdiv(columns, vec))))
    warp = 64 if torch.version.hip else 32
    return lanes, vec, max(1, min(128 // warp, lanes // (2 * warp)))
