"""The objectives of `objectives.py` for Triton: scalar in, `(value, derivative)` out.

Selected by a string that is known at compile time, so that a kernel holds the code of two objectives and no branch.
The interpreter has no libdevice, so log1p is made from log; it is exact to fp32 (Kahan's form), which
`log(1 + e)` is not: it gives 0 for a token with log p = -1e-9.
"""

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def log1p(e):
    """`log(1 + e)` for e in [0, 1]: `log(u) / (u - 1)` is smooth at u = 1, and carries u's rounding in both parts."""
    u = 1.0 + e
    return tl.where(u == 1.0, e, tl.log(u) * (e / tl.where(u == 1.0, 1.0, u - 1.0)))


@triton.jit
def softplus(x):
    """`log(1 + exp(x))` without overflow; NaN for NaN."""
    return tl.where(x > 0.0, x, 0.0) + log1p(tl.exp(-tl.abs(x)))


@triton.jit
def positive_loss(m, OBJECTIVE: tl.constexpr):
    p_not = sigmoid(-m)
    value = softplus(-m)
    grad = -p_not
    if OBJECTIVE == "dft":
        p = sigmoid(m)
        value = p * value
        grad = p * grad
    return value, grad


@triton.jit
def forget_loss(m, reference, beta, OBJECTIVE: tl.constexpr):
    p_not = sigmoid(-m)
    if OBJECTIVE == "unlikelihood":
        value = softplus(m)
        grad = sigmoid(m)
    elif OBJECTIVE == "probability":
        value = sigmoid(m)
        grad = value * p_not
    elif OBJECTIVE == "npo":
        x = beta * (-softplus(-m) - reference)
        value = 2.0 / beta * softplus(x)
        grad = 2.0 * sigmoid(x) * p_not
    elif OBJECTIVE == "wga":
        p_beta = tl.exp(-beta * softplus(-m))
        value = p_beta / beta
        grad = p_beta * p_not
    else:
        tl.static_assert(OBJECTIVE == "gradient_ascent", "unknown forget objective")
        value = -softplus(-m)
        grad = p_not
    return value, grad


@triton.jit
def anchored(value, grad, m, reference, anchor):
    """See the twin; a NaN of the reference stays."""
    log_q = tl.where(reference > 0.0, 0.0, reference)
    q = tl.exp(log_q)
    rest = 1.0 - q
    # As log1p above: the rounding of q is in the divisor too, so that it drops out.
    rest = tl.where(q > 0.5, tl.where(q == 1.0, -log_q, rest * (log_q / tl.log(tl.where(q == 1.0, 0.5, q)))), rest)
    entropy = q * log_q + tl.where(rest > 0.0, rest * tl.log(tl.where(rest > 0.0, rest, 1.0)), 0.0)
    divergence = entropy + q * softplus(-m) + rest * softplus(m)
    slope = tl.where(m > 0.0, rest - sigmoid(-m), sigmoid(m) - q)
    return value + anchor * divergence, grad + anchor * slope


@triton.jit
def normalised(value, grad, m, lse, z_loss):
    """See the twin."""
    total = lse + softplus(m)
    push = 2.0 * z_loss * total
    return value + z_loss * total * total, grad + push * sigmoid(m), grad - push * sigmoid(-m)


@triton.jit
def token_loss(m, weight, reference, beta, floor, POSITIVE: tl.constexpr, FORGET: tl.constexpr):
    """`(|w| L(m), |w| dL/dm)`; `floor` in log-odds, -inf without one. Comparisons, not min or max, keep a NaN."""
    keep, keep_grad = positive_loss(m, POSITIVE)
    below = m < floor
    drop, drop_grad = forget_loss(tl.where(below, floor, m), reference, beta, FORGET)
    drop_grad = tl.where(below, 0.0, drop_grad)
    size = tl.abs(weight)
    return size * tl.where(weight > 0.0, keep, drop), size * tl.where(weight > 0.0, keep_grad, drop_grad)
