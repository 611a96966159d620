"""The row functions of `rows.py` in Triton: one program a row.

Pass 1 reads the row for the log-sum-exp without the target, then everything that is a number per row follows in
registers, and pass 2 reads the row again (from the L2 cache, where about 130 rows in flight fit) and writes the
gradient over it. Online softmax with one pass and stored blocks was the alternative; a row of 128,256 logits does not
fit the registers or the shared memory of one multiprocessor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .blocks_triton import LN2, LOG2E, LOWEST, fold_block, load_logit, load_logits, transform
from .objectives import Objective
from .objectives_triton import sigmoid, softplus, token_loss
from .rows import RowStats, Targets, Transform

_MAX_BLOCK = 16384


@triton.jit
def grad_block(z, offsets, target, lse2, grad, target_grad, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Gradient with respect to a block of raw logits: `-g exp(z - lse)` through the transform, `g` at the target."""
    d = -grad * tl.exp2(z * LOG2E - lse2)
    if HAS_SOFTCAP:
        t = z / tl.cast(softcap, tl.float32)
        d = d * (1.0 - t * t)
    return tl.where(offsets == target, target_grad, d * tl.cast(scale, tl.float32))


@triton.jit
def target_slope(z_y, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Derivative of the transform at the target's logit."""
    slope = tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        t = z_y / tl.cast(softcap, tl.float32)
        slope = slope * (1.0 - t * t)
    return slope


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
    vocab,
    readable,
    scale,
    softcap,
    beta,
    floor,
    POSITIVE: tl.constexpr,
    FORGET: tl.constexpr,
    HAS_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    ENTROPY: tl.constexpr,
    IS_TOP1: tl.constexpr,
    KEEP: tl.constexpr,  # lse and grad are wanted, for a backward pass
    WRITE_GRAD: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = raw_ptr + row * raw_stride
    target = tl.load(target_ptr + row)
    weight = tl.load(weight_ptr + row)
    z_y = transform(tl.load(target_logit_ptr + row), scale, softcap, HAS_SOFTCAP)

    loss = 0.0
    logprob = 0.0
    entropy = 0.0
    top1 = False
    lse = 0.0
    grad = 0.0
    if weight != 0.0:
        largest = LOWEST
        total = tl.zeros((BLOCK,), tl.float32)
        weighted = tl.zeros((BLOCK,), tl.float32)
        before = tl.full((BLOCK,), LOWEST, tl.float32)
        for start in range(0, vocab, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            mask = offsets < vocab
            z = load_logits(
                row_ptr, bias_ptr, offsets, vocab, readable, scale, softcap, HAS_BIAS, HAS_SOFTCAP, "evict_last"
            )
            if IS_TOP1:
                before = tl.maximum(before, tl.where(mask & (offsets < target), z, LOWEST))
            largest, total, weighted = fold_block(z, mask & (offsets != target), largest, total, weighted, ENTROPY)
        total_sum = tl.sum(total, axis=0)
        lse = (largest + tl.log2(total_sum)) * LN2
        # A logit that is not finite must reach the loss as NaN.
        finite = (tl.abs(z_y) < float("inf")) & (tl.abs(lse) < float("inf"))
        m = tl.where(finite, z_y - lse, float("nan"))
        reference = 0.0
        if HAS_REFERENCE:
            reference = tl.load(reference_ptr + row)
        loss, grad = token_loss(
            m, weight, reference, tl.cast(beta, tl.float32), tl.cast(floor, tl.float32), POSITIVE, FORGET
        )
        logprob = -softplus(-m)
        if ENTROPY:
            rest = (tl.log2(total_sum) - tl.sum(weighted, axis=0) / total_sum) * LN2
            p_not = sigmoid(-m)
            entropy = sigmoid(m) * softplus(-m) + p_not * softplus(m) + p_not * rest
        if IS_TOP1:
            own = load_logit(row_ptr, bias_ptr, target, vocab, scale, softcap, HAS_BIAS, HAS_SOFTCAP)
            top1 = (own * LOG2E >= largest) & (own > tl.max(before, axis=0))

    tl.store(loss_ptr + row, loss)
    tl.store(logprob_ptr + row, logprob)
    if ENTROPY:
        tl.store(entropy_ptr + row, entropy)
    if IS_TOP1:
        tl.store(is_top1_ptr + row, top1)
    if KEEP:
        tl.store(lse_ptr + row, lse)
        tl.store(grad_ptr + row, grad)
    if WRITE_GRAD:
        target_grad = grad * target_slope(z_y, scale, softcap, HAS_SOFTCAP)
        for start in range(0, vocab, BLOCK):
            offsets = start + tl.arange(0, BLOCK)
            z = load_logits(
                row_ptr, bias_ptr, offsets, vocab, readable, scale, softcap, HAS_BIAS, HAS_SOFTCAP, "evict_first"
            )
            d = grad_block(z, offsets, target, lse * LOG2E, grad, target_grad, scale, softcap, HAS_SOFTCAP)
            # A skipped row may hold NaN, and 0 * NaN is not 0.
            d = tl.where(weight == 0.0, 0.0, d)
            tl.store(row_ptr + offsets, d.to(raw_ptr.dtype.element_ty), mask=offsets < readable)


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
    bias_ptr,
    vocab,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    offsets = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < vocab
    grad = tl.load(grad_ptr + row)
    z_y = transform(tl.load(target_logit_ptr + row), scale, softcap, HAS_SOFTCAP)
    target_grad = grad * target_slope(z_y, scale, softcap, HAS_SOFTCAP)
    row_ptr = raw_ptr + row * raw_stride
    z = load_logits(row_ptr, bias_ptr, offsets, vocab, vocab, scale, softcap, HAS_BIAS, HAS_SOFTCAP, "evict_first")
    lse2 = tl.load(lse_ptr + row) * LOG2E
    d = grad_block(z, offsets, tl.load(target_ptr + row), lse2, grad, target_grad, scale, softcap, HAS_SOFTCAP)
    d = tl.where(tl.load(weight_ptr + row) == 0.0, 0.0, d)
    tl.store(out_ptr + row * out_stride + offsets, d.to(out_ptr.dtype.element_ty), mask=mask)


def loss_rows(
    raw: Tensor,  # [n, V], last stride 1
    targets: Targets,
    t: Transform,
    objective: Objective,
    stats: RowStats,
    *,
    want_grad: bool,
    padding: int = 0,
) -> None:
    """See the twin. Leaves `raw` alone unless `want_grad`."""
    rows, vocab = raw.shape
    if rows == 0:
        return
    raw = last_stride_one(raw)
    block, num_warps = launch_shape(vocab, extras=stats.entropy is not None or stats.is_top1 is not None)
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
        vocab,
        vocab + padding,
        t.logit_scale,
        1.0 if t.softcap is None else t.softcap,
        objective.beta,
        objective.floor_log_odds,
        POSITIVE=objective.positive,
        FORGET=objective.forget,
        HAS_REFERENCE=targets.reference is not None,
        HAS_BIAS=t.bias is not None,
        HAS_SOFTCAP=t.softcap is not None,
        ENTROPY=stats.entropy is not None,
        IS_TOP1=stats.is_top1 is not None,
        KEEP=stats.lse is not None,
        WRITE_GRAD=want_grad,
        BLOCK=block,
        num_warps=num_warps,
    )


def grad_rows(out: Tensor, raw: Tensor, targets: Targets, t: Transform, lse: Tensor, grad: Tensor) -> None:
    """Gradient of each row from its `lse` and `grad` [n], as `loss_rows` kept them, into `out` (may be `raw`)."""
    rows, vocab = raw.shape
    if rows == 0:
        return
    raw = last_stride_one(raw)
    block, num_warps = min(4096, _MAX_BLOCK, triton.next_power_of_2(vocab)), 8
    grad_rows_kernel[(rows, triton.cdiv(vocab, block))](
        out,
        out.stride(0),
        raw,
        raw.stride(0),
        targets.column,
        targets.logit,
        targets.weight,
        lse,
        grad,
        t.bias,
        vocab,
        t.logit_scale,
        1.0 if t.softcap is None else t.softcap,
        HAS_BIAS=t.bias is not None,
        HAS_SOFTCAP=t.softcap is not None,
        BLOCK=block,
        num_warps=num_warps,
    )


def last_stride_one(raw: Tensor) -> Tensor:
    return raw if raw.stride(1) == 1 else raw.contiguous()


def launch_shape(vocab: int, *, extras: bool) -> tuple[int, int]:
    """`(BLOCK, num_warps)` of a kernel that goes along a row.

    1024 threads leave room for one program on a multiprocessor, so that a long row is still in the L2 cache when pass
    2 comes back for it. 16 logits a thread make wide loads; with entropy or arg-max, which need more registers, 8.
    """
    block = min(_MAX_BLOCK // 2 if extras else _MAX_BLOCK, triton.next_power_of_2(vocab))
    most = 1024 // (64 if torch.version.hip else 32)
    return block, min(most, max(4, block // 256))
