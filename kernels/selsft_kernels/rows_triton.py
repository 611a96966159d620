"""The row functions of `rows.py` in Triton: one program a row.

Pass 1 reads the row for the log-sum-exp without the target, then everything that is a number per row follows in
registers, and pass 2 reads the row again, from the L2 cache, and writes the gradient over it. The target's own entry
is one store at the end. `blocks_triton.py` says what a tile is, and why no loop compares columns.

How many rows are in flight is bounded by registers: 1024 threads of 40 fill a multiprocessor so far that no second
program fits, and 132 rows of 128,256 logits in bf16, 34 MB, stay in the L2 cache between the passes. Rejected: as many
rows as fit, which is twice that. Rejected: programs that take row after row; what the compiler keeps in registers from
row to row makes it spill. Rejected: online softmax in one pass with stored tiles; a row fits neither the registers nor
the shared memory of a multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import backend
from .blocks_triton import (
    LN2,
    LOG2E,
    LOWEST,
    coefficients,
    fold_tile,
    increasing,
    join_lanes,
    load_tile,
    slope,
    tile_columns,
    transform,
    without_target,
)
from .objectives import Objective
from .objectives_triton import anchored, normalised, sigmoid, softplus, token_loss
from .rows import RowStats, Targets, Transform

_MAX_LANES = 2048
_ROW_BYTES = 192  # of a thread, so that the rows in flight on 132 multiprocessors take about 40 MB


@triton.jit
def statistics(
    row_ptr,
    bias_ptr,
    target,
    vocab,
    readable,
    a,
    k,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    ENTROPY: tl.constexpr,
    MASKED: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pass 1: `(largest, total, weighted)` of a row without its target."""
    tile = tile_columns(LANES, VEC, ALIGNED)
    largest = tl.full((LANES,), LOWEST, tl.float32)
    total = tl.zeros((LANES,), tl.float32)
    weighted = tl.zeros((LANES,), tl.float32)
    whole = vocab // (LANES * VEC) * (LANES * VEC)
    for start in range(0, whole, LANES * VEC):
        y = load_tile(
            row_ptr, bias_ptr, start + tile, vocab, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, False,
            "evict_last",
        )  # fmt: skip
        if MASKED:
            y = tl.where(start + tile == target, float("-inf"), y)
        largest, total, weighted = fold_tile(y, a, largest, total, weighted, ENTROPY)
    if whole < vocab:
        y = load_tile(
            row_ptr, bias_ptr, whole + tile, vocab, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, True,
            "evict_last",
        )  # fmt: skip
        if MASKED:
            y = tl.where(whole + tile == target, float("-inf"), y)
        largest, total, weighted = fold_tile(y, a, largest, total, weighted, ENTROPY)
    top, total_sum, weighted_sum = join_lanes(a, largest, total, weighted, ENTROPY)
    if not MASKED:
        inside = (target >= 0) & (target < vocab)
        total_sum, weighted_sum = without_target(a, top, total_sum, weighted_sum, inside, HAS_SOFTCAP)
    return top, total_sum, weighted_sum


@triton.jit
def is_before(
    row_ptr,
    bias_ptr,
    y_own,
    end,
    readable,
    k,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Whether one of the columns [0, end) has the value `y_own` too."""
    tile = tile_columns(LANES, VEC, ALIGNED)
    found = tl.full((LANES,), LOWEST, tl.float32)
    for start in range(0, end, LANES * VEC):
        y = load_tile(
            row_ptr, bias_ptr, start + tile, end, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, True, "evict_last",
        )  # fmt: skip
        found = tl.maximum(found, tl.max(y, axis=1))
    return tl.max(found, axis=0) >= y_own


@triton.jit
def grad_tile(y, a, level, coefficient, HAS_SOFTCAP: tl.constexpr):
    """Gradient with respect to the raw logits: `coefficient` times exp(z - lse), and the slope of a softcap.

    level: `b - lse log2(e)`. coefficient: `-g s`, or `-4 g s` with a softcap.
    """
    d = coefficient * tl.exp2(a * y + level)
    if HAS_SOFTCAP:
        d = d * (y - y * y)
    return d


@triton.jit
def write_gradient(
    row_ptr,
    bias_ptr,
    vocab,
    readable,
    a,
    k,
    level,
    coefficient,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Pass 2: the gradient over the row. What it writes in the target's place means nothing."""
    tile = tile_columns(LANES, VEC, ALIGNED)
    dtype = row_ptr.dtype.element_ty
    whole = vocab // (LANES * VEC) * (LANES * VEC)
    for start in range(0, whole, LANES * VEC):
        y = load_tile(
            row_ptr, bias_ptr, start + tile, vocab, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, False,
            "evict_first",
        )  # fmt: skip
        tl.store(row_ptr + start + tile, grad_tile(y, a, level, coefficient, HAS_SOFTCAP).to(dtype))
    if whole < vocab:
        y = load_tile(
            row_ptr, bias_ptr, whole + tile, vocab, readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, True,
            "evict_first",
        )  # fmt: skip
        d = grad_tile(y, a, level, coefficient, HAS_SOFTCAP).to(dtype)
        tl.store(row_ptr + whole + tile, d, mask=whole + tile < readable)


@triton.jit
def write_zeros(row_ptr, readable, LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    tile = tile_columns(LANES, VEC, ALIGNED)
    for start in range(0, readable, LANES * VEC):
        zeros = tl.zeros((LANES, VEC), tl.float32).to(row_ptr.dtype.element_ty)
        tl.store(row_ptr + start + tile, zeros, mask=start + tile < readable)


@triton.jit
def loss_rows_kernel(
    raw_ptr,
    raw_stride,
    target_ptr,
    target_logit_ptr,
    weight_ptr,
    reference_ptr,
    bias_ptr,
    loss_ptr,
    logprob_ptr,
    entropy_ptr,
    is_top1_ptr,
    lse_ptr,
    grad_ptr,
    others_ptr,
    vocab,
    readable,
    scale,
    softcap,
    beta,
    floor,
    gate,  # 1 / entropy_gate
    anchor,
    z_loss,
    POSITIVE: tl.constexpr,
    FORGET: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,  # the scale is negative
    NVIDIA: tl.constexpr,  # its instructions may be used
    ENTROPY: tl.constexpr,
    GATE: tl.constexpr,  # positive tokens count by their entropy; needs ENTROPY
    ANCHOR: tl.constexpr,  # needs HAS_REFERENCE
    ZLOSS: tl.constexpr,
    IS_TOP1: tl.constexpr,
    KEEP: tl.constexpr,  # lse, grad and others are wanted, for a backward pass
    MASKED: tl.constexpr,  # the row is not written to: columns are compared with the target's
    WRITE_GRAD: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    a, b, k = coefficients(scale, softcap, HAS_SOFTCAP)
    row = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + row * raw_stride
    loss = 0.0
    logprob = 0.0
    entropy = 0.0
    top1 = False
    lse = 0.0
    grad = 0.0  # of the target's logit
    others = 0.0  # minus the sum of those of the others
    level = 0.0
    target_grad = 0.0
    # What is known of the row is read where it is used, so that it occupies no register during the passes.
    if tl.load(weight_ptr + row) != 0.0:
        target = tl.load(target_ptr + row)
        inside = (target >= 0) & (target < vocab)
        own = 0.0
        if not MASKED:
            # All threads have read the target's logit before one overwrites it, and see the new one afterwards.
            own = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)
            tl.debug_barrier()
            out = tl.full((), float("inf") if FLIP else float("-inf"), tl.float32)
            tl.store(row_ptr + target, out.to(raw_ptr.dtype.element_ty), mask=inside)
            tl.debug_barrier()
        largest, total, weighted = statistics(
            row_ptr, bias_ptr, target, vocab, readable, a, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, ENTROPY, MASKED,
            LANES, VEC, ALIGNED,
        )  # fmt: skip
        z_y = transform(tl.load(target_logit_ptr + row), scale, softcap, HAS_SOFTCAP)
        lse2 = a * largest + b + tl.log2(total)
        level = b - lse2
        lse = lse2 * LN2
        # A logit that is not finite must reach the loss as NaN.
        finite = (tl.abs(z_y) < float("inf")) & (tl.abs(lse) < float("inf"))
        m = tl.where(finite, z_y - lse, float("nan"))
        reference = 0.0
        if HAS_REFERENCE:
            reference = tl.load(reference_ptr + row)
        if ENTROPY:
            rest = (tl.log2(total) - weighted / total) * LN2
            p_not = sigmoid(-m)
            entropy = sigmoid(m) * softplus(-m) + p_not * softplus(m) + p_not * rest
        weight = tl.load(weight_ptr + row)
        if GATE:
            tl.static_assert(ENTROPY, "the gate is a function of the entropy")
            # An entropy just below 0 must not turn a positive token into a negative one.
            share = tl.minimum(tl.maximum(entropy * tl.cast(gate, tl.float32), 0.0), 1.0)
            weight = tl.where(weight > 0.0, weight * share, weight)
        loss, grad = token_loss(
            m, weight, reference, tl.cast(beta, tl.float32), tl.cast(floor, tl.float32), POSITIVE, FORGET
        )
        if ANCHOR:
            tl.static_assert(HAS_REFERENCE, "the anchor is a function of the reference")
            loss, grad = anchored(loss, grad, m, reference, tl.cast(anchor, tl.float32))
        others = grad
        if ZLOSS:
            loss, grad, others = normalised(loss, grad, m, lse, tl.cast(z_loss, tl.float32))
        target_grad = grad * slope(z_y, scale, softcap, HAS_SOFTCAP)
        logprob = -softplus(-m)
        if IS_TOP1:
            # The rounded logit and not the exact one: among others as rounded, that would decide ties.
            if MASKED:
                own = tl.load(row_ptr + target, mask=inside, other=0.0).to(tl.float32)
            if HAS_BIAS:
                own += tl.load(bias_ptr + target, mask=inside, other=0.0)
            y_own = increasing(own, k, HAS_SOFTCAP, FLIP, NVIDIA)
            top1 = inside & (y_own >= largest)
            if inside & (y_own == largest):
                top1 = not is_before(
                    row_ptr, bias_ptr, y_own, target.to(tl.int32), readable, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA,
                    LANES, VEC, ALIGNED,
                )  # fmt: skip

    tl.store(loss_ptr + row, loss)
    tl.store(logprob_ptr + row, logprob)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if IS_TOP1:
        tl.store(is_top1_ptr + row, top1)
    if KEEP:
        tl.store(lse_ptr + row, lse)
        tl.store(grad_ptr + row, grad)
        tl.store(others_ptr + row, others)
    if WRITE_GRAD:
        tl.static_assert(not MASKED, "-inf is in the place of the target")
        alive = others != 0.0
        if ZLOSS:
            alive = alive | (target_grad != 0.0)
        if alive:
            coefficient = -others * tl.cast(scale, tl.float32) * (4.0 if HAS_SOFTCAP else 1.0)
            write_gradient(
                row_ptr, bias_ptr, vocab, readable, a, k, level, coefficient, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA,
                LANES, VEC, ALIGNED,
            )  # fmt: skip
            # The target's entry comes last, after what the other threads have written there.
            tl.debug_barrier()
            target = tl.load(target_ptr + row)
            inside = (target >= 0) & (target < vocab)
            tl.store(row_ptr + target, tl.cast(target_grad, raw_ptr.dtype.element_ty), mask=inside)
        else:
            write_zeros(row_ptr, readable, LANES, VEC, ALIGNED)


@triton.jit
def grad_rows_kernel(
    out_ptr,
    out_stride,
    raw_ptr,
    raw_stride,
    target_ptr,
    target_logit_ptr,
    weight_ptr,
    lse_ptr,
    grad_ptr,
    others_ptr,
    bias_ptr,
    vocab,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    LANES: tl.constexpr,
    VEC: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    tile = tile_columns(LANES, VEC, ALIGNED)
    offsets = tl.program_id(1) * (LANES * VEC) + tile
    grad = tl.load(grad_ptr + row)
    z_y = transform(tl.load(target_logit_ptr + row), scale, softcap, HAS_SOFTCAP)
    a, b, k = coefficients(scale, softcap, HAS_SOFTCAP)
    row_ptr = raw_ptr + row * raw_stride
    y = load_tile(
        row_ptr, bias_ptr, offsets, vocab, vocab, k, HAS_BIAS, HAS_SOFTCAP, FLIP, NVIDIA, True, "evict_first",
    )  # fmt: skip
    coefficient = -tl.load(others_ptr + row) * tl.cast(scale, tl.float32) * (4.0 if HAS_SOFTCAP else 1.0)
    d = grad_tile(y, a, b - tl.load(lse_ptr + row) * LOG2E, coefficient, HAS_SOFTCAP)
    d = tl.where(offsets == tl.load(target_ptr + row), grad * slope(z_y, scale, softcap, HAS_SOFTCAP), d)
    # A skipped row may hold NaN, and 0 * NaN is not 0.
    d = tl.where(tl.load(weight_ptr + row) == 0.0, 0.0, d)
    tl.store(out_ptr + row * out_stride + offsets, d.to(out_ptr.dtype.element_ty), mask=offsets < vocab)


def loss_rows(
    raw: Tensor,  # [n, V]
    targets: Targets,
    t: Transform,
    objective: Objective,
    stats: RowStats,
    *,
    want_grad: bool,
    padding: int = 0,
) -> Tensor | None:
    """See the twin; the gradient is complete."""
    rows, vocab = raw.shape
    if rows == 0:
        return None
    if raw.stride(1) != 1:
        raw = raw.contiguous()
    # Without a second pass, short programs hide each other's latency, and nothing has to stay in the cache.
    lanes, vec, num_warps = launch_shape(vocab if want_grad else min(vocab, 8192), raw.element_size())
    # Only the compiler for NVIDIA takes a limit.
    options = {"maxnreg": register_limit(vocab)} if want_grad and torch.version.cuda else {}
    loss_rows_kernel[(rows,)](
        raw,
        raw.stride(0),
        targets.column,
        targets.logit,
        targets.weight,
        targets.reference,
        t.bias,
        stats.loss,
        stats.logprob,
        stats.entropy,
        stats.is_top1,
        stats.lse,
        stats.grad,
        stats.others,
        vocab,
        vocab + padding,
        t.logit_scale,
        1.0 if t.softcap is None else t.softcap,
        objective.beta,
        objective.floor_log_odds,
        1.0 if objective.entropy_gate is None else 1.0 / objective.entropy_gate,
        0.0 if objective.anchor is None else objective.anchor,
        0.0 if objective.z_loss is None else objective.z_loss,
        POSITIVE=objective.positive,
        FORGET=objective.forget,
        HAS_REFERENCE=targets.reference is not None,
        ENTROPY=stats.entropy is not None,
        GATE=objective.entropy_gate is not None,
        ANCHOR=objective.anchor is not None,
        ZLOSS=objective.z_loss is not None,
        IS_TOP1=stats.is_top1 is not None,
        KEEP=stats.lse is not None,
        MASKED=not want_grad,
        WRITE_GRAD=want_grad,
        LANES=lanes,
        VEC=vec,
        ALIGNED=aligned(raw),
        num_warps=num_warps,
        **options,
        **constants(t),
    )
    return None


def grad_rows(
    out: Tensor, raw: Tensor, targets: Targets, t: Transform, lse: Tensor, grad: Tensor, others: Tensor
) -> None:
    """See the twin."""
    rows, vocab = raw.shape
    if rows == 0:
        return
    if raw.stride(1) != 1:
        raw = raw.contiguous()
    lanes, vec, num_warps = launch_shape(min(vocab, 4096), raw.element_size())
    grad_rows_kernel[(rows, triton.cdiv(vocab, lanes * vec))](
        out,
        out.stride(0),
        raw,
        raw.stride(0),
        targets.column,
        targets.logit,
        targets.weight,
        lse,
        grad,
        others,
        t.bias,
        vocab,
        t.logit_scale,
        1.0 if t.softcap is None else t.softcap,
        LANES=lanes,
        VEC=vec,
        ALIGNED=aligned(raw),
        num_warps=num_warps,
        **constants(t),
    )


def constants(t: Transform) -> dict[str, bool]:
    """What the kernels know of a transform when they are compiled."""
    return {
        "HAS_BIAS": t.bias is not None,
        "HAS_SOFTCAP": t.softcap is not None,
        "FLIP": t.logit_scale < 0,
        "NVIDIA": torch.version.cuda is not None and not backend.INTERPRETED,
    }


def aligned(raw: Tensor) -> bool:
    """Whether every row starts at a multiple of 16 bytes."""
    return raw.data_ptr() % 16 == 0 and raw.stride(0) * raw.element_size() % 16 == 0


def launch_shape(columns: int, itemsize: int) -> tuple[int, int, int]:
    """`(LANES, VEC, num_warps)` of a kernel that goes along rows of `columns` logits.

    16 bytes a lane and 2 lanes a thread, whose loads in flight hide the memory's latency. Threads by the length of a
    row, see `_ROW_BYTES`: the fewer there are, the more rows are in flight.
    """
    vec = 16 // itemsize
    threads = min(1024, max(128, triton.next_power_of_2(columns * itemsize // _ROW_BYTES)))
    lanes = min(_MAX_LANES, 2 * threads, triton.next_power_of_2(triton.cdiv(columns, vec)))
    warp = 64 if torch.version.hip else 32
    return lanes, vec, max(1, lanes // (2 * warp))


def register_limit(vocab: int) -> int:
    """Registers of a thread, see above; the end of a row of odd length takes some more."""
    return 40 if vocab % 16 == 0 else 48
