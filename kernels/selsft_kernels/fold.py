"""Folding tiles of logits into the log-sum-exp of their rows, in torch: the twin of `fold_triton.py`.

The running maximum and sum of Milakov and Gimelshein (arXiv 1805.02867), with the target left out; entropy and arg-max
on request.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import rows
from .rows import Transform


class FoldState(NamedTuple):
    """Running statistics of each row over the tiles seen so far, without the target; [n] fp32, None = not wanted.

    `y` is the logit or, in `fold_triton`, a number that grows with it; only `natural` and `fold` look inside.
    `largest` starts at a low number and not at -inf, whose difference with itself is NaN.
    """

    largest: Tensor  # max y_j
    total: Tensor  # sum exp(z_j - z of the largest)
    weighted: Tensor | None  # sum exp(z_j - z of the largest) (z_j - z of the largest), in the implementation's units
    before: Tensor | None  # max over the rounded y_j to the left of the target
    own: Tensor | None  # y of the target's rounded logit

    @classmethod
    def start(cls, n: int, device: torch.device, *, entropy: bool, is_top1: bool) -> "FoldState":
        def full(value: float) -> Tensor:
            return torch.full((n,), value, device=device, dtype=torch.float32)

        lowest = -1e30
        return cls(
            full(lowest),
            full(0.0),
            full(0.0) if entropy else None,
            full(lowest) if is_top1 else None,
            full(torch.nan) if is_top1 else None,
        )

    def part(self, start: int, end: int) -> "FoldState":
        return FoldState(*(None if t is None else t[start:end] for t in self))  # type: ignore[arg-type]


def fold(raw: Tensor, column: Tensor, t: Transform, state: FoldState, padding: int = 0) -> None:
    """Folds raw logits [n, width] into the state; `column` [n] is the target's place in the tile or outside of it.

    Overwrites `raw` if it is fp32. `padding` is as in `rows.loss_rows`.
    """
    for start, end in rows.row_blocks(raw):
        _fold_tile(raw[start:end], column[start:end], t, state.part(start, end))


def _fold_tile(raw: Tensor, column: Tensor, t: Transform, state: FoldState) -> None:
    width = raw.shape[1]
    z = rows.transform(raw if raw.dtype == torch.float32 else raw.float(), t, with_bias=True)
    inside = (column >= 0) & (column < width)
    place = column.clamp(0, width - 1).unsqueeze(1)
    own = z.gather(1, place)
    if state.before is not None and state.own is not None:
        later = torch.arange(width, device=z.device) >= column.unsqueeze(1)
        state.before.copy_(torch.maximum(state.before, z.masked_fill(later, -torch.inf).amax(1)))
        state.own.copy_(torch.where(inside, own.squeeze(1), state.own))
    z.scatter_(1, place, own.masked_fill(inside.unsqueeze(1), -torch.inf))

    largest = torch.maximum(state.largest, z.amax(1))
    drop = state.largest - largest
    rescale = drop.exp()
    z.sub_(largest.unsqueeze(1))
    if state.weighted is None:
        e = z.exp_()
    else:
        e = z.exp()
        # Moving the reference from the old maximum to the new one shifts every z_j - largest by `drop`.
        state.weighted.add_(torch.where(state.total > 0, state.total * drop, 0.0)).mul_(rescale)
        state.weighted.add_(z.masked_fill_(e == 0, 0.0).mul_(e).sum(1))
    state.total.mul_(rescale).add_(e.sum(1))
    state.largest.copy_(largest)


def natural(state: FoldState, t: Transform) -> tuple[Tensor, Tensor, Tensor | None]:
    """`(largest, total, weighted)` of the state in natural units: the largest logit, and sums relative to it."""
    return state.largest, state.total, state.weighted


def finish(
    state: FoldState, largest: Tensor, total: Tensor, weighted: Tensor | None, z_y: Tensor, skip: Tensor
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(logprob, entropy, is_top1)` [n] from the folded rows and the fp32 target logits; zeros where `skip`.

    largest, total, weighted: as `natural` returns them.
    """
    log_total = total.log()
    m = rows.log_odds(z_y, largest + log_total)
    logprob = (-F.softplus(-m)).masked_fill_(skip, 0.0)
    entropy, top1 = None, None
    if weighted is not None:
        entropy = rows.entropy_from(m, log_total - weighted / total).masked_fill_(skip, 0.0)
    if state.own is not None and state.before is not None:
        top1 = (state.own >= state.largest) & (state.own > state.before) & ~skip
    return logprob, entropy, top1
