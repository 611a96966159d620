"""Log-probabilities of the targets without the logits of the batch: the scoring pass, differentiable by recompute.

Only the log-sum-exp of a row is wanted, so its logits are folded tile by tile over the vocabulary into a running
maximum and sum; a tile is small enough to stay in the cache between the matrix product and the fold. One product
forwards. The backward pass is the fused loss itself: for a gradient `u` of the log-probability, `sum u log p` is the
loss with weights `-u`, `nll` where -u > 0 and `gradient_ascent` where -u < 0. It makes the logits again (three more
products with a trained head, two with a frozen one), which is the price of not knowing `u` in the forward pass.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, checks, chunking, rows
from ._ops import add_op_namespace_prefix
from .fold import FoldState, finish
from .gemm import product_fp32
from .head import Head, Work, add_lora, make_head, raw_logits, spread
from .linear_loss import linear_loss_op, spread_scaled


class LogprobOutput(NamedTuple):
    """What `linear_logprob` returns, each shaped like the target; None where `outputs` does not name it.

    logprob: fp32 log-probability of each target, differentiable; 0 at ignored rows. NaN if the logits are not finite.
    entropy: fp32 entropy of each row's distribution in nats, detached.
    is_top1: whether the target has the largest logit, bool; False at ignored rows.
    """

    logprob: Tensor | None
    entropy: Tensor | None
    is_top1: Tensor | None


class _Settings(NamedTuple):
    """The arguments of `linear_logprob_op` that are not tensors."""

    softcap: float | None
    logit_scale: float
    lora_scale: float
    entropy: bool
    is_top1: bool
    chunk_size: int | None
    compute_dtype: torch.dtype
    ignore_index: int


# The names and defaults are those of `linear_logprob`; tensors are flattened to N rows.
@torch.library.custom_op(add_op_namespace_prefix("linear_logprob"), mutates_args=())
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
        weights = torch.ones_like(target, dtype=torch.float32)
        gather = backend.implementation("gather", input.device)
        work = gather.select_rows(target, weights, None, active_rows, ignore_index)
        state = FoldState.start(work.size, input.device, entropy=entropy, is_top1=is_top1)
        z_y = tile_loop(input, head, work, state, chunk_size)
        z_y = rows.transform(z_y, head.transform, with_bias=False)
        largest, total, weighted = backend.implementation("fold", input.device).natural(state, head.transform)
        results = finish(state, largest, total, weighted, z_y, work.weight == 0)
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
    buffer = backend.scratch((height, chunking.padded(width)), dtype, device)
    gather, fold = backend.implementation("gather", device), backend.implementation("fold", device).fold
    z_y = torch.empty(work.size, device=device, dtype=torch.float32)
    for start in range(0, work.size, height):
        end = min(start + height, work.size)
        x, z_y[start:end] = gather.take_rows(input, work, start, end, head)
        lora_hidden = None if head.lora is None else product_fp32(x, head.lora.a.t())
        target = work.target[start:end]
        add_lora(z_y[start:end], head, target, lora_hidden)
        for left in range(0, vocab, width):
            columns = slice(left, min(left + width, vocab))
            raw = raw_logits(buffer[: end - start, : columns.stop - left], x, head, lora_hidden, columns)
            bias = None if head.transform.bias is None else head.transform.bias[columns]
            padding = chunking.padded(raw.shape[1]) - raw.shape[1]
            fold(raw, target - left, head.transform._replace(bias=bias), state.part(start, end), padding)
    return z_y


class _LinearLogprob(torch.autograd.Function):
    @staticmethod
    def forward(ctx, settings, needs, input, weight, bias, lora_a, lora_b, target, rows):
        logprob, entropy, is_top1 = linear_logprob_op(input, weight, bias, lora_a, lora_b, target, rows, *settings)
        ctx.settings, ctx.needs = settings, needs
        ctx.save_for_backward(input, weight, bias, lora_a, lora_b, target, rows)
        ctx.mark_non_differentiable(entropy, is_top1)
        return logprob, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_logprob, *_):
        *parameters, target, rows = ctx.saved_tensors
        s = ctx.settings
        *_, d_input, d_weight, d_bias, d_lora_a, d_lora_b = linear_loss_op(
            *parameters,
            target,
            -grad_logprob.float(),
            None,
            rows,
            positive="nll",
            forget="gradient_ascent",
            beta=1.0,
            floor=None,
            entropy_gate=None,
            anchor=None,
            z_loss=None,
            softcap=s.softcap,
            logit_scale=s.logit_scale,
            lora_scale=s.lora_scale,
            entropy=False,
            is_top1=False,
            chunk_size=None,
            dead_below=None,
            compute_dtype=s.compute_dtype,
            weight_grad_dtype=torch.float32,
            ignore_index=s.ignore_index,
            needs=list(ctx.needs),
        )
        if ctx.needs[0]:
            one = torch.ones((), device=d_input.device)
            d_input = spread_scaled(d_input, rows, one, parameters[0].dtype, parameters[0].shape)
        made = zip((d_input, d_weight, d_bias, d_lora_a, d_lora_b), parameters, ctx.needs, strict=True)
        grads = [grad.to(of.dtype) if needed else None for grad, of, needed in made]
        return None, None, *grads, None, None


def linear_logprob(
    input: Tensor,  # [..., H]
    linear_weight: Tensor,  # [V, H]
    target: Tensor,  # [...] int64
    *,
    linear_bias: Tensor | None = None,  # [V]
    softcap: float | None = None,
    logit_scale: float = 1.0,
    lora_a: Tensor | None = None,  # [r, H]
    lora_b: Tensor | None = None,  # [V, r]
    lora_scale: float = 1.0,
    active_rows: Tensor | None = None,  # [M] int64
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprob",),
    chunk_size: int | None = None,
) -> LogprobOutput:
    """Log-probability of each target under the head, without the logits of the batch.

    Args:
        input, linear_weight, target, linear_bias, softcap, logit_scale, lora_a, lora_b, lora_scale, ignore_index:
            As in `linear_selective_cross_entropy`.
        active_rows: int64 `[M]`, the rows of the flattened input to compute, each once; the others get 0. With it
            nothing waits for the device.
        outputs: Any of `"logprob"`, `"entropy"`, `"is_top1"`.
        chunk_size: Columns of the vocabulary at a time; None chooses (`chunking.scoring_tile`).

    Returns:
        A `LogprobOutput`. Only `logprob` is differentiable, once, with respect to the floating arguments.

    Raises:
        ValueError: As `linear_selective_cross_entropy`. On a GPU a target out of range gives NaN.

    Source: the online log-sum-exp is that of Milakov and Gimelshein, arXiv 1805.02867.
    """
    compute_dtype = checks.operands(input, linear_weight)
    checks.per_token("target", target, input, torch.int64)
    checks.bias_vector(linear_bias, linear_weight)
    checks.lora(lora_a, lora_b, linear_weight)
    checks.head_options(softcap, logit_scale)
    wanted = checks.output_names(outputs)
    checks.row_indices(active_rows, input)
    checks.size_option("chunk_size", chunk_size)

    settings = _Settings(
        softcap,
        float(logit_scale),
        float(lora_scale),
        "entropy" in wanted,
        "is_top1" in wanted,
        chunk_size,
        compute_dtype,
        ignore_index,
    )
    parameters = (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, lora_a, lora_b)
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in parameters)
    if any(needs):
        result = _LinearLogprob.apply(settings, needs, *parameters, target.reshape(-1), active_rows)
    else:
        result = linear_logprob_op(*parameters, target.reshape(-1), active_rows, *settings)
    values = [t.view(target.shape) if name in wanted else None for t, name in zip(result, checks.OUTPUTS, strict=True)]
    return LogprobOutput(*values)
