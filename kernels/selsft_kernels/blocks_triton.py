"""What the row kernels and the fold share: tiles of logits, and one step of the running log-sum-exp.

A tile is [LANES, VEC]: a thread loads VEC neighbours in one 16-byte access and keeps them to itself. Every lane has
a maximum and a sum of its own, which are joined once at the end of a row. So the loop along a row has no barrier and
no shuffle, and costs 1 + 1 / VEC exponentials a logit. Rejected: one maximum for the whole tile, which spares the
1 / VEC and waits for all threads in every step.

Lanes compare `y`, which grows with the logit z, and not z itself. In units of log2, which is what the hardware's
exponential takes,

    z log2(e) = a y + b,      y = raw,                  a = s log2(e),      b = 0                 without softcap
                              y = sigmoid(2 s raw / c), a = 2 c log2(e),    b = -c log2(e)        with softcap c

because `c tanh(x) = c (2 sigmoid(2 x) - 1)`, and raw includes the bias. So the transform costs nothing in the first
case, two hardware functions in the second, and `dz/draw` is `s` or `4 s y (1 - y)`. Rejected: the hardware's tanh, one
function instead of two: its error of 2^-11 is harmless in z beside a logit in bf16, but not in `1 - tanh^2`, of which
it is several percent where logits are close to the cap. A negative s flips the sign of y and of a in the first case.

The target is kept out of a row by a value in its place whose exponential is 0, not by a comparison for every element:
raw = -inf (+inf for a negative s). Under a softcap it has y = 0, the least that there is, and `without_target` takes
its exponential back out of the sum.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite: -inf minus -inf would be NaN for a lane that holds nothing but the target.
# Far enough from the end of fp32 that `a` times it does not overflow.
LOWEST = tl.constexpr(-1e30)


@triton.jit
def tile_columns(LANES: tl.constexpr, VEC: tl.constexpr, ALIGNED: tl.constexpr):
    """Columns of a tile [LANES, VEC]. Rows that do not start at 16 bytes (ALIGNED is False) are read 1 logit at a time
    by neighbouring threads; a lane still stays within its thread.
    """
    if ALIGNED:
        return tl.arange(0, LANES)[:, None] * VEC + tl.arange(0, VEC)[None, :]
    else:
        return tl.arange(0, LANES)[:, None] + tl.arange(0, VEC)[None, :] * LANES


@triton.jit
def reciprocal(x, NVIDIA: tl.constexpr):
    """`1 / x` for x >= 1. Division handles the whole range of fp32, which takes 5 instructions instead of 1."""
    if NVIDIA:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return 1.0 / x


@triton.jit
def transform(raw, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """The logit of a raw logit (bias included), fp32; for single numbers."""
    # torch.compile may pass Python floats as fp64.
    z = raw * tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)
    return z


@triton.jit
def slope(z, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """`dz/draw` at the logit z, for single numbers."""
    d = tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        t = z / tl.cast(softcap, tl.float32)
        d = d * (1.0 - t * t)
    return d


@triton.jit
def coefficients(scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """`(a, b, k)`: a and b as above, `y = 1 / (1 + 2^(k raw))` under a softcap."""
    s = tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        return cap * (2.0 * LOG2E), cap * -LOG2E, s * (-2.0 * LOG2E) / cap
    else:
        return tl.abs(s) * LOG2E, 0.0, 0.0


@triton.jit
def increasing(raw, k, HAS_SOFTCAP: tl.constexpr, FLIP: tl.constexpr, NVIDIA: tl.constexpr):
    """`y` of a raw logit (bias included). FLIP: the scale is negative."""
    if HAS_SOFTCAP:
        return reciprocal(1.0 + tl.exp2(raw * k), NVIDIA)
    elif FLIP:
        return -raw
    else:
        return raw


@triton.jit
def load_tile(
    row_ptr,
    bias_ptr,
    offsets,
    vocab,
    readable,  # columns that may be read, at least `vocab`
    k,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    FLIP: tl.constexpr,
    NVIDIA: tl.constexpr,
    MASK: tl.constexpr,  # the tile may go beyond the row
    EVICT: tl.constexpr,
):
    """A tile of `y`; -inf beyond the vocabulary.

    A load masked at a multiple of 16 columns is done 16 bytes a thread; masked at an odd vocabulary, 2 bytes.
    """
    if MASK:
        raw = tl.load(row_ptr + offsets, mask=offsets < readable, other=0.0, eviction_policy=EVICT).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offsets, mask=offsets < vocab, other=0.0)
        return tl.where(offsets < vocab, increasing(raw, k, HAS_SOFTCAP, FLIP, NVIDIA), float("-inf"))
    else:
        raw = tl.load(row_ptr + offsets, eviction_policy=EVICT).to(tl.float32)
        if HAS_BIAS:
            raw += tl.load(bias_ptr + offsets)
        return increasing(raw, k, HAS_SOFTCAP, FLIP, NVIDIA)


@triton.jit
def fold_tile(y, a, largest, total, weighted, ENTROPY: tl.constexpr):
    """Folds a tile into the lanes.

    largest [LANES]: max y. total, weighted [LANES]: sum of 2^d, and of d 2^d, with `d = a (y - largest)`.
    """
    new = tl.maximum(largest, tl.max(y, axis=1))
    drop = a * (largest - new)
    rescale = tl.exp2(drop)
    d = a * y - (a * new)[:, None]
    e = tl.exp2(d)
    if ENTROPY:
        # 0 times a d of -inf would be NaN; below -300, e is 0 anyway. A NaN is in e as well, and stays.
        weighted = (weighted + total * drop) * rescale + tl.sum(e * tl.maximum(d, -300.0), axis=1)
    total = total * rescale + tl.sum(e, axis=1)
    return new, total, weighted


@triton.jit
def join_lanes(a, largest, total, weighted, ENTROPY: tl.constexpr):
    """`(largest, total, weighted)` of the row from those of its lanes."""
    top = tl.max(largest, axis=0)
    drop = a * (largest - top)
    rescale = tl.exp2(drop)
    weighted_sum = 0.0
    if ENTROPY:
        weighted_sum = tl.sum((weighted + total * drop) * rescale, axis=0)
    return top, tl.sum(total * rescale, axis=0), weighted_sum


@triton.jit
def without_target(a, largest, total, weighted, inside, HAS_SOFTCAP: tl.constexpr):
    """Takes out what the -inf in the target's place (if `inside` of these columns) adds under a softcap.

    It is at most every other term of the sum, so nothing of the sum's precision is lost.
    """
    if HAS_SOFTCAP:
        d = -a * largest
        e = tl.where(inside, tl.exp2(d), 0.0)
        total = total - e
        weighted = weighted - e * tl.maximum(d, -300.0)
    return total, weighted
