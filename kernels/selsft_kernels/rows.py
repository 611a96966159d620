"""The row functions in torch: from a chunk of raw logits to loss, statistics and gradient.

They are the CPU path and the twins of the Triton kernels in `rows_triton.py`; `backend.py` picks one of the two. The
target is kept out of the normaliser: with `lse = log sum_{j != y} exp(z_j)` and `m = z_y - lse`, the gradient of an
objective with `g = |w| dL/dm` is `dz_y = g` and `dz_j = -g exp(z_j - lse)`. The textbook form `p_j - 1[j = y]` needs
`p_y - 1`, which cancels as p_y goes to 1.

On a CPU, what counts is how often the logits go through the cache, and in how many parallel regions. torch has one
vectorised function that makes exponentials and divides them by their sum in one region over rows, with each row in its
core's cache: `softmax`. So the largest other logit c is put in the place of the target, and after a softmax in place,
with p its entry there,

    sum_{j != y} exp(z_j - c) = (1 - p) / p        exp(z_j - lse) = softmax(z)_j / (1 - p).

p is at most 1/2, so that nothing cancels. The factor `-g / (1 - p)` of a row is left to the products that follow,
where it is a factor of a row of `dx` and of `x`. Rejected: exp, sum and scaling as passes of their own over blocks of
rows that fit the cache; many small parallel regions cost more than they save with two threads, and stall when another
program wants a core. Rejected: a function compiled through Inductor, which needs a C++ compiler wherever it runs.

Raw logits are what the matrix product gives. The logits of the model are `softcap * tanh(z / softcap)` of
`z = (raw + bias) * logit_scale`, scale before cap.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .objectives import Objective, anchored, gated, normalised, token_loss

# 1 MiB of fp32: the level-2 cache of a core.
_CACHED_ELEMENTS = 2**18


class Transform(NamedTuple):
    """From raw logits to logits."""

    bias: Tensor | None = None  # [V]
    logit_scale: float = 1.0
    softcap: float | None = None


class Targets(NamedTuple):
    """What is known of each row before its logits; all [n]."""

    column: Tensor  # int64
    logit: Tensor  # fp32, raw (bias included); NaN where the column is outside of the vocabulary
    weight: Tensor  # fp32, signed, 0 = skip
    reference: Tensor | None  # fp32 log-probabilities

    def part(self, start: int, end: int) -> "Targets":
        return Targets(*(None if t is None else t[start:end] for t in self))  # type: ignore[arg-type]

    def inside(self, vocab: int) -> "Targets":
        """With columns that may be indexed. The NaN logit of a target outside has said that it was one."""
        return self._replace(column=self.column.clamp(0, vocab - 1))


class RowStats(NamedTuple):
    """What a row function fills in; all [n] fp32 but `is_top1`, None = not wanted."""

    loss: Tensor | None = None
    logprob: Tensor | None = None
    entropy: Tensor | None = None  # an objective with an entropy gate needs it
    is_top1: Tensor | None = None  # bool
    lse: Tensor | None = None  # log-sum-exp without the target
    grad: Tensor | None = None  # gradient of the target's logit: |w| dL/dm, but for a z-loss
    others: Tensor | None = None  # minus the sum of those of the other logits; the same without a z-loss

    def part(self, start: int, end: int) -> "RowStats":
        return RowStats(*(None if t is None else t[start:end] for t in self))


def transform(raw: Tensor, t: Transform, *, with_bias: bool) -> Tensor:
    """Logits from raw logits (fp32), in place."""
    if with_bias and t.bias is not None:
        raw.add_(t.bias)
    if t.logit_scale != 1.0:
        raw.mul_(t.logit_scale)
    if t.softcap is not None:
        raw.div_(t.softcap).tanh_().mul_(t.softcap)
    return raw


def log_odds(target_logit: Tensor, lse: Tensor) -> Tensor:
    """`z_y - lse`, NaN where either is not finite, so that an overflow upstream cannot pass as a loss of 0."""
    finite = target_logit.isfinite() & lse.isfinite()
    return torch.where(finite, target_logit - lse, torch.nan)


def entropy_from(m: Tensor, rest: Tensor) -> Tensor:
    """Entropy of softmax(z): that of target against rest, plus `1 - p` times `rest`, the entropy among the others."""
    p, q = torch.sigmoid(m), torch.sigmoid(-m)
    return p * F.softplus(-m) + q * F.softplus(m) + q * rest


def loss_rows(
    raw: Tensor,  # [n, V], any strides; overwritten with the gradient if `want_grad`
    targets: Targets,
    t: Transform,
    objective: Objective,
    stats: RowStats,
    *,
    want_grad: bool,
    padding: int = 0,
) -> Tensor | None:
    """Loss and statistics of each row and, over the raw logits, the gradient with respect to them.

    `padding`: columns to the right of `raw`, in the same memory, that may be read and written; for the Triton kernels.

    Returns:
        [n] fp32, what each row of the gradient is still to be multiplied by; None for 1.
    """
    targets = targets.inside(raw.shape[1])
    in_place = want_grad and raw.dtype == torch.float32
    blocks = row_blocks(raw)
    if in_place and (len(blocks) == 1 or t == Transform()):
        return _loss_rows(raw, targets, t, objective, stats, want_grad)
    factor = torch.empty_like(targets.logit) if in_place else None
    for start, end in blocks:
        block = raw[start:end]
        z = block.to(torch.float32, copy=not want_grad)
        scale = _loss_rows(z, targets.part(start, end), t, objective, stats.part(start, end), want_grad)
        if factor is not None:
            factor[start:end] = scale
        elif want_grad:
            # The factor goes in before the rounding to 16 bits.
            block.copy_(z.mul_(scale.unsqueeze(1)))
    return factor


def row_blocks(raw: Tensor) -> list[tuple[int, int]]:
    """Rows to work on at a time. On a CPU, as many as stay in the caches of its cores from pass to pass."""
    rows, columns = raw.shape
    step = max(1, rows)
    if raw.device.type == "cpu":
        step = max(1, _CACHED_ELEMENTS // columns) * torch.get_num_threads()
    return [(start, min(start + step, rows)) for start in range(0, rows, step)]


def _loss_rows(
    z: Tensor, targets: Targets, t: Transform, objective: Objective, stats: RowStats, want_grad: bool
) -> Tensor:
    """Works in place on fp32 rows z [n, V], and returns the factor of each row of the gradient, [n]."""
    column = targets.column.unsqueeze(1)
    transform(z, t, with_bias=True)
    z_y = transform(targets.logit.clone(), t, with_bias=False)
    slope = z.div(t.softcap).square_().neg_().add_(1.0) if want_grad and t.softcap is not None else None

    own = z.gather(1, column).squeeze(1)
    z.scatter_(1, column, -torch.inf)
    largest = z.amax(1)
    if stats.is_top1 is not None:
        stats.is_top1.copy_(top1(z, own, largest, targets.column))
    z.scatter_(1, column, largest.unsqueeze(1))
    mean = softmax_in_place(z, None if stats.entropy is None else largest)
    p = z.gather(1, column).squeeze(1)
    rest = 1.0 - p
    log_others = (rest / p).log()
    lse = largest + log_others
    m = log_odds(z_y, lse)
    weight, entropy = targets.weight, None
    if mean is not None:
        # The others have log-probabilities z_j - largest - log_others. What stands in the target's place adds 0.
        entropy = entropy_from(m, log_others - mean / rest)
        weight = gated(weight, entropy, objective)
    value, grad = token_loss(m, weight, targets.reference, objective)
    skip = targets.weight == 0
    value, grad = anchored(value, grad, m, targets.reference, objective)
    value, grad, others = normalised(value, grad, m, lse, objective)
    if objective.anchor is not None or objective.z_loss is not None:
        value, grad, others = (each.masked_fill(skip, 0.0) for each in (value, grad, others))
    _store(stats, value, m, lse, grad, others, entropy, skip)

    scale = others * -t.logit_scale / rest
    if want_grad:
        at_target = -rest
        if objective.z_loss is not None:  # no factor is common to a row
            z.mul_(scale.unsqueeze(1))
            at_target, scale = grad * t.logit_scale, torch.ones_like(scale)
        if slope is not None and t.softcap is not None:
            z.mul_(slope)
            at_target = at_target * (1.0 - (z_y / t.softcap).square())
        z.scatter_(1, column, at_target.unsqueeze(1))
        # Rows that a caller lists although their weight is 0; NaN logits must not leak from them through 0 * NaN.
        if skip.device.type != "cpu" or bool(skip.any()):
            z.masked_fill_(skip.unsqueeze(1), 0.0)
            scale = scale.masked_fill(skip, 0.0)
    return scale


def softmax_in_place(z: Tensor, largest: Tensor | None) -> Tensor | None:
    """Softmax p of each row; with `largest` [n], the `sum_j p_j (z_j - largest)` of each."""
    if largest is None:
        torch.softmax(z, 1, out=z)
        return None
    mean = torch.empty_like(largest)
    for start, end in row_blocks(z):
        block = z[start:end]
        distance = block - largest[start:end].unsqueeze(1)
        torch.softmax(block, 1, out=block)
        # 0 times a distance of -inf would be NaN.
        mean[start:end] = distance.clamp_(min=-300.0).mul_(block).sum(1)
    return mean


def _store(
    stats: RowStats,
    value: Tensor,
    m: Tensor,
    lse: Tensor,
    grad: Tensor,
    others: Tensor,
    entropy: Tensor | None,
    skip: Tensor,
) -> None:
    if stats.loss is not None:
        stats.loss.copy_(value)
    if stats.logprob is not None:
        stats.logprob.copy_((-F.softplus(-m)).masked_fill(skip, 0.0))
    if stats.entropy is not None and entropy is not None:
        stats.entropy.copy_(entropy.masked_fill(skip, 0.0))
    if stats.is_top1 is not None:
        stats.is_top1.logical_and_(~skip)
    if stats.lse is not None:
        stats.lse.copy_(lse)
    if stats.grad is not None:
        stats.grad.copy_(grad)
    if stats.others is not None:
        stats.others.copy_(others)


def grad_rows(
    out: Tensor, raw: Tensor, targets: Targets, t: Transform, lse: Tensor, grad: Tensor, others: Tensor
) -> None:
    """Gradient of each row from its `lse`, `grad` and `others` [n], as `loss_rows` kept them, into `out`, which may be
    `raw`."""
    targets = targets.inside(raw.shape[1])
    for start, end in row_blocks(raw):
        part = targets.part(start, end)
        z = transform(raw[start:end].to(torch.float32, copy=True), t, with_bias=True)
        at_target = grad[start:end] * t.logit_scale
        slope = None
        if t.softcap is not None:
            slope = z.div(t.softcap).square_().neg_().add_(1.0)
        d = z.sub_(lse[start:end].unsqueeze(1)).exp_().mul_(others[start:end].mul(-t.logit_scale).unsqueeze(1))
        if slope is not None and t.softcap is not None:
            d.mul_(slope)
            z_y = transform(part.logit.clone(), t, with_bias=False)
            at_target = at_target * (1.0 - (z_y / t.softcap).square())
        d.scatter_(1, part.column.unsqueeze(1), at_target.unsqueeze(1))
        d.masked_fill_((part.weight == 0).unsqueeze(1), 0.0)
        out[start:end].copy_(d)


def top1(others: Tensor, own: Tensor, largest: Tensor, column: Tensor) -> Tensor:
    """Whether the target has the largest logit of its row, the first one on a tie; [n] bool.

    `others` [n, V] are the logits with -inf at the target, `largest` their maxima, and `own` the target's logit,
    rounded as they are: the fp32 one against rounded others would decide ties by the rounding of the others.
    """
    result = own > largest
    tie = own == largest
    if tie.any():
        result[tie] = others[tie].argmax(1) > column[tie]
    return result
