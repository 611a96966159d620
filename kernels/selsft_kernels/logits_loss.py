"""The selective loss over logits that exist already, for heads that cannot be fused.

One read of the logits forwards, one read and one write backwards, in fp32 arithmetic without an fp32 copy.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import checks
from .linear_loss import SelectiveLossOutput
from .logits_op import logits_grad_inplace_op, logits_grad_op, logits_loss_op


class _Settings(NamedTuple):
    """The arguments of the operator that are not tensors; see `logits_op.logits_loss_op`."""

    positive: str
    forget: str
    beta: float
    floor: float | None
    softcap: float | None
    logit_scale: float
    entropy: bool
    is_top1: bool
    ignore_index: int


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
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprob",),
    inplace_backward: bool = False,
) -> SelectiveLossOutput:
    """`linear_selective_cross_entropy` for logits that exist: `sum_i |w_i| L(m_i)`, not normalised.

    Args:
        logits: `[..., V]`, float32, bfloat16 or float16; before `logit_scale` and `softcap`, if those are given.
        target, token_weight, reference_logprob, positive, forget, beta, floor, softcap, logit_scale, ignore_index,
            outputs: As in `linear_selective_cross_entropy`.
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
    checks.objective(positive, forget, beta, floor, reference_logprob)
    checks.head_options(softcap, logit_scale)
    wanted = checks.output_names(outputs)
    if inplace_backward and not logits.is_contiguous():
        raise ValueError("logits is not contiguous; inplace_backward=True needs logits.contiguous()")

    settings = _Settings(
        positive,
        forget,
        float(beta),
        floor,
        softcap,
        float(logit_scale),
        "entropy" in wanted,
        "is_top1" in wanted,
        ignore_index,
    )
    flat = logits.reshape(-1, logits.shape[-1])
    per_row = (target.reshape(-1), token_weight.detach().reshape(-1), reference_logprob)
    if torch.is_grad_enabled() and logits.requires_grad:
        loss, *per_token = _LogitsLoss.apply(settings, inplace_backward, flat, *per_row)
    else:
        loss, *per_token, _, _, _ = logits_loss_op(flat, *per_row, *settings)
    values = [
        t.view(target.shape) if name in wanted else None for t, name in zip(per_token, checks.OUTPUTS, strict=True)
    ]
    return SelectiveLossOutput(loss, *values)
