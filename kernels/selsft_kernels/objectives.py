"""Per-token objectives: what a token adds to the loss, as a scalar function of its log-odds, and the derivative.

With `p` the probability of the target, `m = log p - log(1 - p)` are its log-odds. Every objective is a function `L(m)`
and returns `(L, dL/dm)`, so that the two cannot drift apart. Log-odds and not log-probabilities, because
`log(1 - p)` needs a clamp when it is made from a rounded `log p`: near `p = 1` in fp32 that gives -inf, and the clamp
hides the gradient of exactly the tokens that are memorised best. `log p = -softplus(-m)` and
`log(1 - p) = -softplus(m)` are exact on both sides.

The tables at the end of the formulas are the only list of objectives: names, checks and command lines come from them.
To add an objective, write its formula here and enter it in a table, write its twin in `objectives_triton.py`, and add
its plain form to the oracle of the tests.

Rejected: autograd through the values instead of handwritten derivatives; it cannot give them inside a forward pass,
where the fused loss needs them.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def nll(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`-log p`, the likelihood."""
    return F.softplus(-m), -torch.sigmoid(-m)


def dft(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`-sg(p) log p` (Dynamic Fine-Tuning, arXiv 2508.05629); `sg` stops the gradient, so dL/dm = -p (1 - p)."""
    p = torch.sigmoid(m)
    return p * F.softplus(-m), -p * torch.sigmoid(-m)


def unlikelihood(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`-log(1 - p)` (arXiv 1908.04319). Its gradient fades with p."""
    return F.softplus(m), torch.sigmoid(m)


def probability(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`p`: value and gradient are bounded."""
    p = torch.sigmoid(m)
    return p, p * torch.sigmoid(-m)


def npo(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`(2 / beta) softplus(beta (log p - reference))` (arXiv 2404.05868), token by token."""
    assert reference is not None  # `checks.objective` has made sure
    x = beta * (-F.softplus(-m) - reference)
    return (2 / beta) * F.softplus(x), 2 * torch.sigmoid(x) * torch.sigmoid(-m)


def wga(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`sg(p^beta) log p` (weighted gradient ascent, arXiv 2502.19301), reported as `p^beta / beta`.

    The surrogate has the same gradient, `p^beta (1 - p)`, and is bounded; `sg(p^beta) log p` itself has its minimum
    at a middle p, which would make a falling curve of it look like learning.
    """
    p_beta = torch.exp(-beta * F.softplus(-m))
    return p_beta / beta, p_beta * torch.sigmoid(-m)


def gradient_ascent(m: Tensor, reference: Tensor | None, beta: float) -> tuple[Tensor, Tensor]:
    """`log p`. Unbounded below: its gradient grows as the token is forgotten. Kept to reproduce published runs."""
    return -F.softplus(-m), torch.sigmoid(-m)


class Formula(NamedTuple):
    """An objective: its function of the log-odds, the arguments that it looks at, and whether its value has a bound.

    loss: `(m [n], reference [n] or None, beta) -> (L [n], dL/dm [n])`, all tensors fp32.
    bounded: whether forgetting, which lowers the value, stops somewhere. A positive objective is bounded below by 0.
    """

    loss: Callable[[Tensor, Tensor | None, float], tuple[Tensor, Tensor]]
    needs_reference: bool = False
    needs_beta: bool = False
    bounded: bool = True


POSITIVE = {"nll": Formula(nll), "dft": Formula(dft)}
FORGET = {
    "unlikelihood": Formula(unlikelihood),
    "probability": Formula(probability),
    "npo": Formula(npo, needs_reference=True, needs_beta=True),
    "wga": Formula(wga, needs_beta=True),
    "gradient_ascent": Formula(gradient_ascent, bounded=False),
}

POSITIVE_OBJECTIVES: tuple[str, ...] = tuple(POSITIVE)
FORGET_OBJECTIVES: tuple[str, ...] = tuple(FORGET)


class Objective(NamedTuple):
    """Which function positive and negative tokens take, with its constants.

    `floor` is a log-probability. A negative token below it has nothing left to forget: its loss is `L` at the floor
    and its gradient is zero, that is, the loss is `L(max(m, m_floor))` for every forget objective.

    `entropy_gate` is an entropy in nats, see `gated`; `anchor` and `z_loss` are weights, see `anchored` and
    `normalised`.
    """

    positive: str = "nll"
    forget: str = "unlikelihood"
    beta: float = 1.0
    floor: float | None = None
    entropy_gate: float | None = None
    anchor: float | None = None
    z_loss: float | None = None

    @property
    def floor_log_odds(self) -> float:
        """The floor in log-odds; -inf without a floor."""
        if self.floor is None:
            return -math.inf
        return self.floor - math.log(-math.expm1(self.floor))


def gated(weight: Tensor, entropy: Tensor, objective: Objective) -> Tensor:
    """The weights [n], those of positive tokens times `min(1, entropy / entropy_gate)`; entropy [n] of each row, nats.

    Entropy-adaptive fine-tuning (arXiv 2601.02151) learns little from a token about which the model is sure, whether
    it agrees with it or not. The paper takes the entropy of the 20 likeliest tokens over ln 20, its largest value; the
    exact entropy costs nothing more here. The two agree where these tokens hold nearly all of the probability. The
    exact one is not bounded by ln 20, hence the minimum.
    """
    if objective.entropy_gate is None:
        return weight
    # Rounding may leave an entropy just below 0, which must not turn a positive token into a negative one.
    share = (entropy / objective.entropy_gate).clamp(0.0, 1.0)
    return torch.where(weight > 0, weight * share, weight)


def anchored(
    value: Tensor, grad: Tensor, m: Tensor, reference: Tensor | None, objective: Objective
) -> tuple[Tensor, Tensor]:
    """`(value, grad)` [n] of `token_loss` plus `anchor` times the divergence from a reference that knows log q.

    `KL(q || p) = q log(q / p) + (1 - q) log((1 - q) / (1 - p))`, of the target against all other tokens together: what
    is known of the whole divergence where only the target's log-probability was stored, and never more than it (data
    processing). Its derivative `p - q` in the log-odds is bounded, where that of the estimator `r - log r - 1` with
    `r = q / p` grows as 1 / p. Not multiplied by the weight of the token.
    """
    if objective.anchor is None:
        return value, grad
    assert reference is not None  # `checks.objective` has made sure
    log_q = reference.clamp(max=0.0)
    q, rest = log_q.exp(), -torch.expm1(log_q)
    entropy = q * log_q + torch.xlogy(rest, rest)
    divergence = entropy + q * F.softplus(-m) + rest * F.softplus(m)
    # Both forms of p - q are exact where p and q are on the same side.
    slope = torch.where(m > 0, rest - torch.sigmoid(-m), torch.sigmoid(m) - q)
    return value + objective.anchor * divergence, grad + objective.anchor * slope


def normalised(
    value: Tensor, grad: Tensor, m: Tensor, lse: Tensor, objective: Objective
) -> tuple[Tensor, Tensor, Tensor]:
    """`(value, grad, others)` [n] with `z_loss` times the square of the log-sum-exp Z of *all* logits.

    The z-loss of PaLM (arXiv 2204.02311) keeps logits from drifting, which no function of the log-odds can: they stay
    when all logits move together. So the gradient no longer adds up to 0 over a row: `2 z_loss Z p_j` is added to each
    entry. With `lse` [n] that of the logits without the target, `Z = lse + softplus(m)`, the target's entry is `grad`,
    and `-others exp(z_j - lse)` are the others'. Not multiplied by the weight of the token.
    """
    if objective.z_loss is None:
        return value, grad, grad
    total = lse + F.softplus(m)
    push = 2 * objective.z_loss * total
    penalty = objective.z_loss * total.square()
    return value + penalty, grad + push * torch.sigmoid(m), grad - push * torch.sigmoid(-m)


def token_loss(
    m: Tensor,  # [n] fp32 log-odds
    weight: Tensor,  # [n] fp32, signed
    reference: Tensor | None,  # [n] fp32 log-probabilities, for npo
    objective: Objective,
) -> tuple[Tensor, Tensor]:
    """`(|w| L(m), |w| dL/dm)` of each token, both [n]; exactly 0 where the weight is 0, whatever `m` is."""
    keep, keep_grad = POSITIVE[objective.positive].loss(m, reference, objective.beta)
    # `clamp` keeps a NaN, which has to reach the loss.
    lifted = m.clamp(min=objective.floor_log_odds)
    drop, drop_grad = FORGET[objective.forget].loss(lifted, reference, objective.beta)
    drop_grad = drop_grad.masked_fill(m < objective.floor_log_odds, 0.0)
    value = torch.where(weight > 0, keep, drop) * weight.abs()
    grad = torch.where(weight > 0, keep_grad, drop_grad) * weight.abs()
    skip = weight == 0
    return value.masked_fill(skip, 0.0), grad.masked_fill(skip, 0.0)
