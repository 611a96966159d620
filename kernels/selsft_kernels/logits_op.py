"""Loss and gradient over logits that exist already, as operators that `torch.compile` does not look into.

The forward pass reads the logits once and keeps three numbers a row; the backward pass makes the gradient from them,
on request over the logits themselves. Unlike with the head fused, nothing is gained by making the gradient in the
forward pass: it would need a second [N, V] buffer until the backward pass, or destroy logits that the caller may read.
"""

import torch
from torch import Tensor

from . import backend, checks, rows
from .linear_op import new_stats
from .objectives import Objective
from .rows import Targets, Transform

if backend.HAS_TRITON:
    from . import rows_triton


# The names and defaults are those of `selective_cross_entropy`; tensors are flattened to N rows.
@torch.library.custom_op("selsft::logits_loss", mutates_args=())
def logits_loss_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    reference: Tensor | None,
    positive: str,
    forget: str,
    beta: float,
    floor: float | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    is_top1: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, logprob, entropy, is_top1, lse, target_logit, grad)`; the last three [N] are for the backward pass.

    target_logit is the raw one, and grad is `|w| dL/dm`, NaN for a row whose logits are not finite.
    """
    vocab, device = logits.shape[1], logits.device
    checks.contents(target, None, vocab, ignore_index)
    target, weight = usable(target, token_weight, ignore_index)
    inside = (target >= 0) & (target < vocab)
    z_y = logits.gather(1, target.clamp(0, vocab - 1).unsqueeze(1)).squeeze(1).float()
    targets = Targets(target, z_y.masked_fill_(~inside, torch.nan), weight, reference)
    transform = Transform(None, logit_scale, softcap)
    objective = Objective(positive, forget, beta, floor)
    stats = new_stats(target.shape[0], device, entropy, is_top1)._replace(
        lse=torch.empty_like(weight), grad=torch.empty_like(weight)
    )
    if backend.use_triton(device):
        with backend.computing_on(device):
            rows_triton.loss_rows(logits, targets, transform, objective, stats, want_grad=False)
    else:
        for start, end in rows.row_blocks(logits):
            part = Targets(*(None if t is None else t[start:end] for t in targets))  # type: ignore[arg-type]
            copy = logits[start:end].to(torch.float32, copy=True)
            rows.loss_rows(copy, part, transform, objective, stats.part(start, end), want_grad=False)
    assert stats.loss is not None and stats.logprob is not None and stats.lse is not None and stats.grad is not None
    entropies = logits.new_empty(0, dtype=torch.float32) if stats.entropy is None else stats.entropy
    top1 = logits.new_empty(0, dtype=torch.bool) if stats.is_top1 is None else stats.is_top1
    return stats.loss.sum(), stats.logprob, entropies, top1, stats.lse, z_y, stats.grad


@logits_loss_op.register_fake
def _(
    logits, target, token_weight, reference, positive, forget, beta, floor, softcap, logit_scale, entropy, is_top1,
    ignore_index,
):  # fmt: skip
    def new(n):
        return logits.new_empty(n, dtype=torch.float32)

    n = target.shape[0]
    top1 = logits.new_empty(n if is_top1 else 0, dtype=torch.bool)
    return new(()), new(n), new(n if entropy else 0), top1, new(n), new(n), new(n)


def usable(target: Tensor, token_weight: Tensor, ignore_index: int) -> tuple[Tensor, Tensor]:
    """Target and weight with ignored rows at weight 0."""
    ignored = target == ignore_index
    return target.masked_fill(ignored, 0), token_weight.masked_fill(ignored, 0.0)


def write_grad(
    out: Tensor,  # [N, V], may be `logits`
    logits: Tensor,  # [N, V]
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    factor: Tensor,  # [] fp32, the incoming gradient, on the device
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """Writes `factor` times the gradient with respect to the logits into `out`; the rest is as in `logits_loss_op`."""
    target, weight = usable(target, token_weight, ignore_index)
    transform = Transform(None, logit_scale, softcap)
    targets = Targets(target, target_logit, weight, None)
    grad = grad * factor
    if backend.use_triton(logits.device):
        with backend.computing_on(logits.device):
            rows_triton.grad_rows(out, logits, targets, transform, lse, grad)
        return
    for start, end in rows.row_blocks(logits):
        part = Targets(*(None if t is None else t[start:end] for t in targets))  # type: ignore[arg-type]
        z = rows.transform(logits[start:end].to(torch.float32, copy=True), transform, with_bias=False)
        slope = None if softcap is None else z.div(softcap).square_().neg_().add_(1.0)
        z_y = rows.transform(part.logit.clone(), transform, with_bias=False)
        e = z.sub_(lse[start:end].unsqueeze(1)).exp_()
        rows.grad_in_place(e, torch.ones_like(z_y), part, transform, grad[start:end], z_y, slope)
        out[start:end].copy_(e)


@torch.library.custom_op("selsft::logits_grad", mutates_args=())
def logits_grad_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    factor: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    """The gradient in a new tensor; see `write_grad`."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    write_grad(out, logits, target, token_weight, lse, target_logit, grad, factor, softcap, logit_scale, ignore_index)
    return out


@logits_grad_op.register_fake
def _(logits, target, token_weight, lse, target_logit, grad, factor, softcap, logit_scale, ignore_index):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op("selsft::logits_grad_", mutates_args=("logits",))
def logits_grad_inplace_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    factor: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """The gradient over the logits; see `write_grad`."""
    write_grad(
        logits, logits, target, token_weight, lse, target_logit, grad, factor, softcap, logit_scale, ignore_index
    )


@logits_grad_inplace_op.register_fake
def _(logits, target, token_weight, lse, target_logit, grad, factor, softcap, logit_scale, ignore_index):
    return None
