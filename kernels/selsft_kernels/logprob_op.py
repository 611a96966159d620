"""The scoring pass as one operator that `torch.compile` does not look into: logits tile by tile, folded at once."""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from . import backend, checks, chunking, rows
from .gemm import product_fp32
from .linear_op import Head, Work, make_head, raw_logits, select_rows, spread, target_logit
from .rows import Transform

if backend.HAS_TRITON:
    from . import fold_triton


class FoldState(NamedTuple):
    """Running statistics of each row over the tiles seen so far, without the target; [n] fp32, None = not wanted.

    `largest` starts at the lowest finite number and not at -inf, whose difference with itself is NaN.
    """

    largest: Tensor  # max z_j
    total: Tensor  # sum exp(z_j - largest)
    weighted: Tensor | None  # sum exp(z_j - largest) (z_j - largest)
    before: Tensor | None  # max over the rounded z_j with j < y
    own: Tensor | None  # the target's rounded logit

    @classmethod
    def start(cls, n: int, device: torch.device, *, entropy: bool, is_top1: bool) -> "FoldState":
        def full(value: float) -> Tensor:
            return torch.full((n,), value, device=device, dtype=torch.float32)

        lowest = torch.finfo(torch.float32).min
        return cls(
            full(lowest),
            full(0.0),
            full(0.0) if entropy else None,
            full(lowest) if is_top1 else None,
            full(torch.nan) if is_top1 else None,
        )

    def part(self, start: int, end: int) -> "FoldState":
        return FoldState(*(None if t is None else t[start:end] for t in self))  # type: ignore[arg-type]


# The names and defaults are those of `linear_logprob`; tensors are flattened to N rows.
@torch.library.custom_op("selsft::linear_logprob", mutates_args=())
def linear_logprob_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    active_rows: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    entropy: bool,
    is_top1: bool,
    chunk_size: int | None,
    compute_dtype: torch.dtype,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """`(logprob, entropy, is_top1)`, each [N]; [0] where not wanted."""
    checks.contents(target, active_rows, weight.shape[0], ignore_index)
    with backend.computing_on(input.device):
        head = make_head(weight, bias, lora_a, lora_b, softcap, logit_scale, lora_scale, compute_dtype)
        # The same rule as in training, with weight 1 for every row.
        work = select_rows(target, torch.ones_like(target, dtype=torch.float32), None, active_rows, ignore_index)
        state = FoldState.start(work.size, input.device, entropy=entropy, is_top1=is_top1)
        z_y = tile_loop(input, head, work, state, chunk_size)
        results = finish(state, rows.transform(z_y, head.transform, with_bias=False), work.weight == 0)
        logprob, entropies, top1 = (spread(t, work.rows, target) for t in results)
    return logprob, entropies, top1


@linear_logprob_op.register_fake
def _(
    input, weight, bias, lora_a, lora_b, target, active_rows, softcap, logit_scale, lora_scale, entropy, is_top1,
    chunk_size, compute_dtype, ignore_index,
):  # fmt: skip
    n = target.shape
    return (
        input.new_empty(n, dtype=torch.float32),
        input.new_empty(n if entropy else 0, dtype=torch.float32),
        input.new_empty(n if is_top1 else 0, dtype=torch.bool),
    )


def tile_loop(input: Tensor, head: Head, work: Work, state: FoldState, chunk_size: int | None) -> Tensor:
    """Runs every tile of [rows, columns] through the head and folds it; returns the raw target logits [M] fp32."""
    vocab = head.weight.shape[0]
    dtype, device = head.weight.dtype, input.device
    height, width = chunking.scoring_tile(work.size, vocab, dtype.itemsize, device)
    width = min(chunk_size or width, vocab)
    buffer = torch.empty(height, chunking.padded(width), device=device, dtype=dtype)
    fold = fold_triton.fold if backend.use_triton(device) else fold_tile
    z_y = torch.empty(work.size, device=device, dtype=torch.float32)
    for start in range(0, work.size, height):
        end = min(start + height, work.size)
        x = (input[start:end] if work.rows is None else input[work.rows[start:end]]).to(dtype)
        lora_hidden = None if head.lora is None else product_fp32(x, head.lora.a.t())
        target = work.target[start:end]
        z_y[start:end] = target_logit(x, head, target, lora_hidden)
        for left in range(0, vocab, width):
            columns = slice(left, min(left + width, vocab))
            raw = raw_logits(buffer[: end - start, : columns.stop - left], x, head, lora_hidden, columns)
            bias = None if head.transform.bias is None else head.transform.bias[columns]
            padding = chunking.padded(raw.shape[1]) - raw.shape[1]
            fold(raw, target - left, head.transform._replace(bias=bias), state.part(start, end), padding)
    return z_y


def fold_tile(raw: Tensor, column: Tensor, t: Transform, state: FoldState, padding: int = 0) -> None:
    """Folds raw logits [n, width] into the state; `column` [n] is the target's place in the tile or outside of it.

    The twin of `fold_triton.fold`; overwrites `raw` if it is fp32. `padding` is as in `rows.loss_rows`.
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


def finish(state: FoldState, z_y: Tensor, skip: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """`(logprob, entropy, is_top1)` [n] from the folded rows and the fp32 target logits; zeros where `skip`."""
    log_total = state.total.log()
    m = rows.log_odds(z_y, state.largest + log_total)
    logprob = (-F.softplus(-m)).masked_fill_(skip, 0.0)
    entropy, top1 = None, None
    if state.weighted is not None:
        entropy = rows.entropy_from(m, log_total - state.weighted / state.total).masked_fill_(skip, 0.0)
    if state.own is not None and state.before is not None:
        top1 = (state.own >= state.largest) & (state.own > state.before) & ~skip
    return logprob, entropy, top1
