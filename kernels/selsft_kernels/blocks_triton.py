"""What the row kernels and the fold share: a block of logits, and one step of the running log-sum-exp.

Sums are kept per lane and reduced once at the end of a row; only the maximum is reduced in every step. That is one
exponential an element, where a maximum per lane as well would need two. Exponentials are base 2, which is what the
hardware computes; logits are turned into log2 units first.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Where a running maximum starts. Finite: -inf minus -inf would be NaN for a block that holds nothing but the target.
LOWEST = tl.constexpr(-3.4028234663852886e38)


@triton.jit
def transform(raw, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """Logits from raw logits (bias included), fp32."""
    # torch.compile may pass Python floats as fp64.
    z = raw * tl.cast(scale, tl.float32)
    if HAS_SOFTCAP:
        cap = tl.cast(softcap, tl.float32)
        # tanh(x) = 2 sigmoid(2 x) - 1
        z = cap * (2.0 / (1.0 + tl.exp(-2.0 * z / cap)) - 1.0)
    return z


@triton.jit
def load_logits(
    row_ptr,
    bias_ptr,
    offsets,
    vocab,
    readable,  # columns that may be read, at least `vocab`
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    EVICT: tl.constexpr,
):
    """A block of logits in fp32; what lies beyond the vocabulary is arbitrary.

    A load masked at a multiple of 16 columns is done 16 bytes a thread; masked at an odd vocabulary, 2 bytes.
    """
    raw = tl.load(row_ptr + offsets, mask=offsets < readable, other=0.0, eviction_policy=EVICT).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + offsets, mask=offsets < vocab, other=0.0).to(tl.float32)
    return transform(raw, scale, softcap, HAS_SOFTCAP)


@triton.jit
def load_logit(row_ptr, bias_ptr, column, size, scale, softcap, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr):
    """One logit in fp32; LOWEST if the column is outside of the `size` columns here."""
    inside = (column >= 0) & (column < size)
    raw = tl.load(row_ptr + column, mask=inside, other=0.0).to(tl.float32)
    if HAS_BIAS:
        raw += tl.load(bias_ptr + column, mask=inside, other=0.0).to(tl.float32)
    return tl.where(inside, transform(raw, scale, softcap, HAS_SOFTCAP), LOWEST)


@triton.jit
def fold_block(z, others, largest, total, weighted, ENTROPY: tl.constexpr):
    """Folds logits z where `others` holds (in the row, not the target) into the running statistics, all in log2 units.

    largest: scalar, max z. total, weighted [BLOCK]: sums per lane of 2^(z - largest), and of that times z - largest.
    """
    z2 = tl.where(others, z * LOG2E, float("-inf"))
    new = tl.maximum(largest, tl.max(z2, axis=0))
    drop = largest - new
    rescale = tl.exp2(drop)
    e = tl.exp2(z2 - new)
    if ENTROPY:
        # The first step has total = 0, and 0 times its drop of -3e38 is 0.
        weighted = (weighted + total * drop) * rescale + tl.where(e > 0.0, e * (z2 - new), 0.0)
    total = total * rescale + e
    return new, total, weighted
