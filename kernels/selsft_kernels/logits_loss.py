"""The selective loss over logits that exist already, for heads that cannot be fused.

One read of the logits forwards, which keeps three numbers a row, and one read and one write backwards, in fp32
arithmetic without an fp32 copy. Unlike with the head fused, nothing is gained by making the gradient in the forward
pass: it would need a second [N, V] buffer until the backward pass, or destroy logits that the caller may read.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, checks
from ._ops import add_op_namespace_prefix
from .head import without_ignored
from .linear_loss import SelectiveLossOutput, new_stats
from .objectives import Objective
from .rows import Targets, Transform


class _Settings(NamedTuple):
    """The arguments of `logits_loss_op` that are not tensors."""

    positive: str
    forget: str
    beta: float
    floor: float | None
    entropy_gate: float | None
    anchor: float | None
    z_loss: float | None
    softcap: float | None
    logit_scale: float
    entropy: bool
    is_top1: bool
    ignore_index: int


# The names and defaults are those of `selective_cross_entropy`; tensors are flattened to N rows.
@torch.library.custom_op(add_op_namespace_prefix("logits_loss"), mutates_args=())
def logits_loss_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    reference: Tensor | None,
    positive: str,
    forget: str,
    beta: float,
    floor: float | None,
    entropy_gate: float | None,
    anchor: float | None,
    z_loss: float | None,
    softcap: float | None,
    logit_scale: float,
    entropy: bool,
    is_top1: bool,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, logprob, entropy, is_top1, lse, target_logit, grad, others)`; the last four [N] are for backward.

    target_logit is the raw one; grad and others are as in `rows.RowStats`, NaN for a row whose logits are not finite.
    """
    vocab, device = logits.shape[1], logits.device
    checks.contents(target, None, vocab, ignore_index)
    target, weight = without_ignored(target, token_weight, ignore_index)
    inside = (target >= 0) & (target < vocab)
    z_y = logits.gather(1, target.clamp(0, vocab - 1).unsqueeze(1)).squeeze(1).float()
    reference = None if reference is None else reference.contiguous()
    targets = Targets(target, z_y.masked_fill_(~inside, torch.nan), weight, reference)
    transform = Transform(None, logit_scale, softcap)
    objective = Objective(positive, forget, beta, floor, entropy_gate, anchor, z_loss)
    stats = new_stats(target.shape[0], device, entropy, is_top1)._replace(
        lse=torch.empty_like(weight), grad=torch.empty_like(weight), others=torch.empty_like(weight)
    )
    with backend.computing_on(device):
        backend.implementation("rows", device).loss_rows(logits, targets, transform, objective, stats, want_grad=False)
    assert stats.loss is not None and stats.logprob is not None
    assert stats.lse is not None and stats.grad is not None and stats.others is not None
    entropies = logits.new_empty(0, dtype=torch.float32) if stats.entropy is None else stats.entropy
    top1 = logits.new_empty(0, dtype=torch.bool) if stats.is_top1 is None else stats.is_top1
    return stats.loss.sum(), stats.logprob, entropies, top1, stats.lse, z_y, stats.grad, stats.others


@logits_loss_op.register_fake
def _(
    logits, target, token_weight, reference, positive, forget, beta, floor, entropy_gate, anchor, z_loss, softcap,
    logit_scale, entropy, is_top1, ignore_index,
):  # fmt: skip
    def new(n):
        return logits.new_empty(n, dtype=torch.float32)

    n = target.shape[0]
    top1 = logits.new_empty(n if is_top1 else 0, dtype=torch.bool)
    return new(()), new(n), new(n if entropy else 0), top1, new(n), new(n), new(n), new(n)


def write_grad(
    out: Tensor,  # [N, V], may be `logits`
    logits: Tensor,  # [N, V]
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    others: Tensor,
    factor: Tensor,  # [] fp32, the incoming gradient, on the device
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """Writes `factor` times the gradient with respect to the logits into `out`; the rest is as in `logits_loss_op`."""
    target, weight = without_ignored(target, token_weight, ignore_index)
    transform = Transform(None, logit_scale, softcap)
    targets = Targets(target, target_logit, weight, None)
    grad, others = grad * factor, others * factor
    with backend.computing_on(logits.device):
        module = backend.implementation("rows", logits.device)
        module.grad_rows(out, logits, targets, transform, lse, grad, others)


@torch.library.custom_op(add_op_namespace_prefix("logits_grad"), mutates_args=())
def logits_grad_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    others: Tensor,
    factor: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> Tensor:
    """The gradient in a new tensor; see `write_grad`."""
    out = torch.empty_like(logits, memory_format=torch.contiguous_format)
    write_grad(
        out, logits, target, token_weight, lse, target_logit, grad, others, factor, softcap, logit_scale, ignore_index
    )
    return out


@logits_grad_op.register_fake
def _(logits, target, token_weight, lse, target_logit, grad, others, factor, softcap, logit_scale, ignore_index):
    return torch.empty_like(logits, memory_format=torch.contiguous_format)


@torch.library.custom_op(add_op_namespace_prefix("logits_grad_"), mutates_args=("logits",))
def logits_grad_inplace_op(
    logits: Tensor,
    target: Tensor,
    token_weight: Tensor,
    lse: Tensor,
    target_logit: Tensor,
    grad: Tensor,
    others: Tensor,
    factor: Tensor,
    softcap: float | None,
    logit_scale: float,
    ignore_index: int,
) -> None:
    """The gradient over the logits; see `write_grad`."""
    write_grad(
        logits,
        logits,
        target,
        token_weight,
        lse,
        target_logit,
        grad,
        others,
        factor,
        softcap,
        logit_scale,
        ignore_index,
    )


@logits_grad_inplace_op.register_fake
def _(logits, target, token_weight, lse, target_logit, grad, others, factor, softcap, logit_scale, ignore_index):
    return None


class _LogitsLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, inplace_backward, logits, target, token_weight, reference):
        loss, logprob, entropy, is_top1, *kept = logits_loss_op(logits, target, token_weight, reference, *settings)
        ctx.settings, ctx.inplace_backward = settings, inplace_backward
        ctx.save_for_backward(logits, target, token_weight, *kept)
        ctx.mark_non_differentiable(logprob, entropy, is_top1)
        return loss, logprob, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        s = ctx.settings
        # `saved_tensors` compares versions: a second backward over overwritten logits is an error, not a wrong result.
        logits, *rest = ctx.saved_tensors
        options = (s.softcap, s.logit_scale, s.ignore_index)
        if ctx.inplace_backward:
            logits_grad_inplace_op(logits, *rest, grad_output.float(), *options)
            return None, None, logits, None, None, None
        return None, None, logits_grad_op(logits, *rest, grad_output.float(), *options), None, None, None


def selective_cross_entropy(
    logits: Tensor,  # [..., V]
    target: Tensor,  # [...] int64
    token_weight: Tensor,  # [...] fp32, signed
    *,
    reference_logprob: Tensor | None = None,  # [...] fp32
    positive: str = "nll",
    forget: str = "unlikelihood",
    beta: float = 1.0,
    floor: float | None = None,
    entropy_gate: float | None = None,
    anchor: float | None = None,
    z_loss: float | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprob",),
    inplace_backward: bool = False,
) -> SelectiveLossOutput:
    """`linear_selective_cross_entropy` for logits that exist: `sum_i |w_i| L(m_i)`, not normalised.

    Args:
        logits: `[..., V]`, float32, bfloat16 or float16; before `logit_scale` and `softcap`, if those are given.
        target, token_weight, reference_logprob, positive, forget, beta, floor, entropy_gate, anchor,
            z_loss, softcap, logit_scale, ignore_index, outputs: As in `linear_selective_cross_entropy`.
        inplace_backward: Write the gradient over the logits, which saves a buffer of their size and leaves them
            unusable after the backward pass. The logits must be contiguous rows: `[..., V]` with a last stride of 1.

    Returns:
        A `SelectiveLossOutput`.

    Raises:
        ValueError: Wrong shape, dtype, device, option or, on the CPU, a target out of range. On a GPU a target out of
            range makes the loss NaN.
    """
    if logits.dim() < 1 or logits.dtype not in checks.FLOAT_DTYPES:
        raise ValueError(
            f"logits has dtype {logits.dtype} and shape {tuple(logits.shape)}; pass [..., V] in float32, bfloat16 or "
            "float16"
        )
    checks.vocabulary(logits.shape[-1], "logits")
    checks.per_token("target", target, logits, torch.int64, of="logits")
    checks.per_token("token_weight", token_weight, logits, torch.float32, of="logits")
    if reference_logprob is not None:
        checks.per_token("reference_logprob", reference_logprob, logits, torch.float32, of="logits")
        reference_logprob = reference_logprob.detach().reshape(-1)
    checks.objective(positive, forget, beta, floor, reference_logprob, entropy_gate, anchor, z_loss)
    checks.head_options(softcap, logit_scale)
    wanted = checks.output_names(outputs)
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("logits is not contiguous; inplace_backward=True needs logits.contiguous()")

    settings = _Settings(
        positive,
        forget,
        float(beta),
        floor,
        entropy_gate,
        anchor,
        z_loss,
        softcap,
        float(logit_scale),
        "entropy" in wanted or entropy_gate is not None,
        "is_top1" in wanted,
        ignore_index,
    )
    flat = logits.reshape(-1, logits.shape[-1])
    per_row = (target.reshape(-1), token_weight.detach().reshape(-1), reference_logprob)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, *per_token = _LogitsLoss.apply(settings, inplace_backward, flat, *per_row)
    else:
        loss, *per_token, _, _, _, _ = logits_loss_op(flat, *per_row, *settings)
    values = [
        t.view(target.shape) if name in wanted else None for t, name in zip(per_token, checks.OUTPUTS, strict=True)
    ]
    return SelectiveLossOutput(loss, *values)
