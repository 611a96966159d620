"""The selective loss fused with the LM head: chunks of rows, gradient made in the forward pass.

For each chunk of rows: logits by one matrix product, one row function that turns them into the loss and, in place,
into their gradient, and the products for the gradients of the hidden states and of the head. That works because the
signed weights are arguments of the forward pass: nothing of the gradient but a common factor is unknown. Two large
products with a frozen head, three with a trained one. The alternative, a differentiable log-probability per token
with every objective on top of it, has to compute the logits once more in the backward pass; `linear_logprob` does so.

Rows of weight 0 or with an ignored target are left out before the first product.

The chunk loop is one operator of `torch.library` that `torch.compile` does not look into. As plain Python under a
compiler, the number of rows to compute, which depends on the data, would break the graph or make its shapes symbolic.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from . import backend, checks, chunking
from ._ops import add_op_namespace_prefix
from .gemm import accumulate, product_fp32
from .head import Head, Work, add_lora, make_head, raw_logits, spread
from .objectives import Objective
from .rows import RowStats, Targets

# Of the rows of a chunk: with more of them alive, all go through the products.
_LIVING_SHARE = 0.75


class SelectiveLossOutput(NamedTuple):
    """What the selective losses return.

    loss: `sum_i |w_i| L(m_i)`, fp32 scalar, differentiable. NaN if a used row of logits is not finite.
    logprob: log-probability of each target, fp32, shaped like the target, detached; 0 at skipped rows.
    entropy: entropy of each row's distribution in nats, likewise.
    is_top1: whether the target has the largest logit, bool, likewise; False at skipped rows.

    The last three are None where `outputs` does not name them.
    """

    loss: Tensor
    logprob: Tensor | None
    entropy: Tensor | None
    is_top1: Tensor | None


class _Settings(NamedTuple):
    """The arguments of `linear_loss_op` that are not tensors."""

    positive: str
    forget: str
    beta: float
    floor: float | None
    entropy_gate: float | None
    anchor: float | None
    z_loss: float | None
    softcap: float | None
    logit_scale: float
    lora_scale: float
    entropy: bool
    is_top1: bool
    chunk_size: int | None
    dead_below: float | None
    compute_dtype: torch.dtype
    weight_grad_dtype: torch.dtype
    ignore_index: int


# The names and defaults are those of `linear_selective_cross_entropy`; tensors are flattened to N rows.
@torch.library.custom_op(add_op_namespace_prefix("linear_loss"), mutates_args=())
def linear_loss_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    target: Tensor,
    token_weight: Tensor,
    reference: Tensor | None,
    active_rows: Tensor | None,
    positive: str,
    forget: str,
    beta: float,
    floor: float | None,
    entropy_gate: float | None,
    anchor: float | None,
    z_loss: float | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    entropy: bool,
    is_top1: bool,
    chunk_size: int | None,
    dead_below: float | None,
    compute_dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    ignore_index: int,
    needs: list[bool],  # gradients of input, weight, bias, lora_a, lora_b
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, logprob, entropy, is_top1, d_input, d_weight, d_bias, d_lora_a, d_lora_b)`; [0] where not wanted.

    d_input has the rows of `active_rows` in their order, if these are given, otherwise all; see `spread_scaled`.
    """
    checks.contents(target, active_rows, weight.shape[0], ignore_index)
    with backend.computing_on(input.device):
        head = make_head(weight, bias, lora_a, lora_b, softcap, logit_scale, lora_scale, compute_dtype)
        gather = backend.implementation("gather", input.device)
        work = gather.select_rows(target, token_weight, reference, active_rows, ignore_index)
        objective = Objective(positive, forget, beta, floor, entropy_gate, anchor, z_loss)
        listed = active_rows is not None
        grads = allocate(input[: work.size] if listed else input, head, work, needs, weight_grad_dtype, listed=listed)
        stats = new_stats(work.size, input.device, entropy, is_top1)
        chunk_loop(input, head, work, objective, stats, grads, chunk_size, dead_below, listed=listed)
        assert stats.loss is not None
        outputs = [spread(t, work.rows, target) for t in (stats.logprob, stats.entropy, stats.is_top1)]
        loss = stats.loss.sum()
    # Outputs of an operator must not share memory, so each one that is not wanted is an empty tensor of its own.
    return (loss, *outputs, *(input.new_empty(0) if g is None else g for g in grads))  # type: ignore[return-value]


@linear_loss_op.register_fake
def _(
    input, weight, bias, lora_a, lora_b, target, token_weight, reference, active_rows, positive, forget, beta, floor,
    entropy_gate, anchor, z_loss, softcap, logit_scale, lora_scale, entropy, is_top1, chunk_size, dead_below,
    compute_dtype, weight_grad_dtype, ignore_index, needs,
):  # fmt: skip
    f32 = torch.float32
    n = target.shape
    rows = target.shape[0] if active_rows is None else active_rows.shape[0]
    return (
        input.new_empty((), dtype=f32),
        input.new_empty(n, dtype=f32),
        input.new_empty(n if entropy else 0, dtype=f32),
        input.new_empty(n if is_top1 else 0, dtype=torch.bool),
        input.new_empty((rows, input.shape[1]), dtype=compute_dtype) if needs[0] else input.new_empty(0),
        input.new_empty(weight.shape, dtype=weight_grad_dtype) if needs[1] else input.new_empty(0),
        input.new_empty(bias.shape, dtype=f32) if needs[2] else input.new_empty(0),
        input.new_empty(lora_a.shape, dtype=f32) if needs[3] else input.new_empty(0),
        input.new_empty(lora_b.shape, dtype=f32) if needs[4] else input.new_empty(0),
    )


class Gradients(NamedTuple):
    """Buffers of the gradients, None where not needed. All but `input` are sums over chunks."""

    input: Tensor | None  # [N, H], or [M, H]: the listed rows
    weight: Tensor | None  # [V, H] fp32 or the dtype of the products
    bias: Tensor | None  # [V] fp32
    lora_a: Tensor | None  # [r, H] fp32
    lora_b: Tensor | None  # [V, r] fp32


def allocate(
    input: Tensor, head: Head, work: Work, needs: list[bool], weight_grad_dtype: torch.dtype, *, listed: bool
) -> Gradients:
    """Gradient buffers; zeros where the chunks do not write every element. The first is shaped like `input`."""
    f32 = torch.float32
    bias, lora = head.transform.bias, head.lora
    # The first chunk overwrites the sums, so that only an empty batch needs zeros.
    new = torch.empty_like if work.size else torch.zeros_like
    d_input = None
    if needs[0]:
        new_input = torch.empty if listed or work.rows is None else torch.zeros
        d_input = new_input(input.shape, device=input.device, dtype=head.weight.dtype)
    d_weight = None
    if needs[1]:
        d_weight = new(head.weight, dtype=weight_grad_dtype, memory_format=torch.contiguous_format)
        d_weight = backend.in_large_pages(d_weight)
    return Gradients(
        d_input,
        d_weight,
        torch.zeros_like(bias, dtype=f32) if needs[2] and bias is not None else None,
        new(lora.a, dtype=f32, memory_format=torch.contiguous_format) if needs[3] and lora is not None else None,
        new(lora.b, dtype=f32, memory_format=torch.contiguous_format) if needs[4] and lora is not None else None,
    )


def new_stats(count: int, device: torch.device, entropy: bool, is_top1: bool) -> RowStats:
    def new(dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.empty(count, device=device, dtype=dtype)

    return RowStats(
        loss=new(),
        logprob=new(),
        entropy=new() if entropy else None,
        is_top1=new(torch.bool) if is_top1 else None,
    )


def chunk_loop(
    input: Tensor,
    head: Head,
    work: Work,
    objective: Objective,
    stats: RowStats,
    grads: Gradients,
    chunk_size: int | None,
    dead_below: float | None,
    *,
    listed: bool,
) -> None:
    """Runs every chunk through the head; fills `stats` and `grads`.

    listed: `grads.input` has the rows in the order of `work`, and not at their places in the input.
    """
    vocab, hidden = head.weight.shape
    dtype, device = head.weight.dtype, input.device
    narrow = grads.weight is not None and grads.weight.dtype == dtype
    if chunk_size is None and narrow and chunking.one_chunk(work.size, hidden, dtype.itemsize):
        chunk_size = work.size
    chunk = chunk_size or chunking.training_rows(
        work.size, hidden, vocab, dtype.itemsize, device, trained_head=grads.weight is not None
    )
    chunk = max(1, min(chunk, work.size))
    buffer = backend.scratch((chunk, chunking.padded(vocab)), dtype, device)
    want_grad = any(g is not None for g in grads)
    gather, rows = backend.implementation("gather", device), backend.implementation("rows", device)
    for start in range(0, work.size, chunk):
        end = min(start + chunk, work.size)
        index = None if listed or work.rows is None else work.rows[start:end]
        x, logit = gather.take_rows(input, work, start, end, head)
        lora_hidden = None if head.lora is None else product_fp32(x, head.lora.a.t())
        raw = raw_logits(buffer[: end - start, :vocab], x, head, lora_hidden)
        add_lora(logit, head, work.target[start:end], lora_hidden)
        targets = Targets(
            work.target[start:end],
            logit,
            work.weight[start:end],
            None if work.reference is None else work.reference[start:end],
        )
        filled = stats.part(start, end)
        if want_grad and dead_below is not None:
            filled = filled._replace(lse=torch.empty_like(logit), grad=torch.empty_like(logit))
            filled = filled._replace(others=torch.empty_like(logit))
        factor = rows.loss_rows(
            raw,
            targets,
            head.transform,
            objective,
            filled,
            want_grad=want_grad,
            padding=buffer.shape[1] - vocab,
        )
        if want_grad:
            place = slice(start, end) if index is None else index
            alive = living_rows(end - start, factor, filled, dead_below)
            if alive is not None:
                if grads.input is not None:
                    grads.input[place] = 0.0
                place = alive + start if index is None else index[alive]
                raw, factor, x = raw[alive], None if factor is None else factor[alive], x[alive]
                lora_hidden = None if lora_hidden is None else lora_hidden[alive]
            add_gradients(grads, raw, factor, x, head, lora_hidden, place, first=start == 0)


def living_rows(rows: int, factor: Tensor | None, stats: RowStats, dead_below: float | None) -> Tensor | None:
    """Those of the `rows` rows of a chunk whose gradient counts, int64; None if too few others can be left out.

    The others are negative tokens below the floor, or forgotten so far that nothing of their gradient is left. Taking
    the living together costs a fifth of a product. On a GPU the host has to wait to know how many there are, so there
    it is done only where `dead_below` asks for it.
    """
    if dead_below is not None and stats.grad is not None and stats.others is not None:
        # A comparison with NaN is false, so that such a row is alive.
        dead = (stats.grad.abs() <= dead_below) & (stats.others.abs() <= dead_below)
        alive = dead.logical_not_().nonzero().squeeze(1)
    elif factor is not None and factor.device.type == "cpu":
        alive = factor.nonzero().squeeze(1)
    else:
        return None
    return alive if alive.numel() <= _LIVING_SHARE * rows else None


def add_gradients(
    grads: Gradients,
    d_raw: Tensor,  # [n, V] gradient with respect to the raw logits, without `factor`
    factor: Tensor | None,  # [n] fp32, of the rows of d_raw; None = 1
    x: Tensor,  # [n, H]
    head: Head,
    lora_hidden: Tensor | None,  # [n, r] fp32: x A^T
    place: slice | Tensor,  # the rows of the chunk in the input
    *,
    first: bool,
) -> None:
    """Adds a chunk to the gradients. With raw = x W^T + s (x A^T) B^T, u = d_raw B, and f the factors of the rows:

    dx = f (d_raw W + s u A),  dW += d_raw^T (f x),  dA += s u^T (f x),  dB += s d_raw^T (f x A^T),  db += d_raw^T f.
    """
    lora = head.lora
    column = None if factor is None else factor.unsqueeze(1)
    u = None
    if lora is not None and (grads.input is not None or grads.lora_a is not None):
        u = product_fp32(d_raw, lora.b).to(x.dtype)
    if grads.input is not None:
        d_x = grads.input[place] if isinstance(place, slice) else torch.empty_like(x)
        torch.mm(d_raw, head.weight, out=d_x)
        if u is not None and lora is not None:
            torch.addmm(d_x, u, lora.a, alpha=lora.scale, out=d_x)
        if column is not None:
            d_x.mul_(column)
        if not isinstance(place, slice):
            grads.input.index_copy_(0, place, d_x)
    if grads.bias is not None:
        grads.bias.add_(d_raw.sum(0, dtype=torch.float32) if factor is None else torch.mv(d_raw.t(), factor))
    if grads.weight is not None or grads.lora_a is not None:
        scaled_x = x if column is None else x * column
        if grads.weight is not None:
            accumulate(grads.weight, d_raw.t(), scaled_x, first=first)
        if lora is not None and grads.lora_a is not None and u is not None:
            accumulate(grads.lora_a, u.t(), scaled_x, first=first, alpha=lora.scale)
    if lora is not None and grads.lora_b is not None and lora_hidden is not None:
        scaled_hidden = lora_hidden if column is None else lora_hidden * column
        accumulate(grads.lora_b, d_raw.t(), scaled_hidden.to(x.dtype), first=first, alpha=lora.scale)


class _LinearLoss(torch.autograd.Function):
    """Keeps the gradients that the forward pass made and multiplies them by the incoming scalar."""

    @staticmethod
    def forward(ctx, settings, needs, input, weight, bias, lora_a, lora_b, target, token_weight, reference, rows):
        result = linear_loss_op(
            input, weight, bias, lora_a, lora_b, target, token_weight, reference, rows, *settings, list(needs)
        )
        loss, logprob, entropy, is_top1, *grads = result
        ctx.needs = needs
        ctx.dtypes = [None if t is None else t.dtype for t in (input, weight, bias, lora_a, lora_b)]
        ctx.shape = input.shape
        ctx.save_for_backward(rows, *grads)
        ctx.mark_non_differentiable(logprob, entropy, is_top1)
        return loss, logprob, entropy, is_top1

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output, *_):
        rows, d_input, *made = ctx.saved_tensors
        first, *rest = zip(ctx.needs, ctx.dtypes, strict=True)
        d_input = spread_scaled(d_input, rows, grad_output, first[1], ctx.shape) if first[0] else None
        grads = [
            scaled(grad, grad_output, dtype) if needed else None
            for grad, (needed, dtype) in zip(made, rest, strict=True)
        ]
        return None, None, d_input, *grads, None, None, None, None


def scaled(grad: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """`grad * factor` in `dtype`, at most one pass, and no wait for the factor (which is on the device).

    In place where nobody needs `grad` again, which for the gradient of a head saves a buffer of its size; a factor of
    1 then costs nothing. A cast to another dtype is the multiplication's.
    """
    factor = factor.reshape(1).float()
    if grad.dtype != dtype or graph_is_kept():
        return torch.mul(grad, factor, out=torch.empty_like(grad, dtype=dtype))
    with backend.computing_on(grad.device):
        backend.implementation("scale", grad.device).scale_in_place(grad, factor)
    return grad


def spread_scaled(grad: Tensor, rows: Tensor | None, factor: Tensor, dtype: torch.dtype, shape: torch.Size) -> Tensor:
    """`scaled` for the gradient of the hidden states: at their places in a tensor of `shape`, zeros elsewhere."""
    if rows is None:
        return scaled(grad, factor, dtype)
    out = torch.zeros(shape, device=grad.device, dtype=dtype)
    if torch.compiler.is_compiling():
        return out.index_copy(0, rows, (grad * factor.reshape(1).float()).to(dtype))
    with backend.computing_on(grad.device):
        backend.implementation("scale", grad.device).scale_into(out, rows, grad, factor.reshape(1).float())
    return out


def graph_is_kept() -> bool:
    """Whether the backward pass that is running may run again (`retain_graph=True`); True where torch cannot tell."""
    query = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return torch.compiler.is_compiling() or query is None or query()


def _apply(
    settings: _Settings, parameters: Sequence[Tensor | None], per_row: Sequence[Tensor | None]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # `needs_input_grad` of a Function ignores the grad mode, and would make gradients under no_grad.
    needs = tuple(torch.is_grad_enabled() and t is not None and t.requires_grad for t in parameters)
    if any(needs):
        return _LinearLoss.apply(settings, needs, *parameters, *per_row)
    loss, logprob, entropy, is_top1, *_ = linear_loss_op(*parameters, *per_row, *settings, list(needs))
    return loss, logprob, entropy, is_top1


def linear_selective_cross_entropy(
    input: Tensor,  # [..., H]
    linear_weight: Tensor,  # [V, H]
    target: Tensor,  # [...] int64
    token_weight: Tensor,  # [...] fp32, signed
    *,
    linear_bias: Tensor | None = None,  # [V]
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
    lora_a: Tensor | None = None,  # [r, H]
    lora_b: Tensor | None = None,  # [V, r]
    lora_scale: float = 1.0,
    active_rows: Tensor | None = None,  # [M] int64
    ignore_index: int = -100,
    outputs: Sequence[str] = ("logprob",),
    chunk_size: int | None = None,
    dead_below: float | None = None,
    weight_grad_dtype: torch.dtype | None = None,
) -> SelectiveLossOutput:
    """Likelihood for positive tokens and a forgetting objective for negative ones, without the logits of the batch.

    The loss is `sum_i |w_i| L(m_i)`, with `m_i` the log-odds of target i under
    `softcap * tanh((input W^T + bias) * logit_scale / softcap)` and `L` the `positive` objective where `w_i > 0` and
    the `forget` objective where `w_i < 0`. It is not normalised: multiply it by `1 / N` outside, which keeps the
    gradients of single rows at unit scale inside (and so out of fp16's subnormals).

    Args:
        input: Hidden states, `[..., H]`, float32, bfloat16 or float16. N rows when flattened.
        linear_weight: The head, `[V, H]`, of the same dtype; under autocast both are cast as `F.linear` would.
        target: int64 `[...]`, in `[0, V)` or `ignore_index`. Already shifted: row i predicts `target[i]`.
        token_weight: float32 `[...]`; above 0 a positive token, below 0 a negative one with that weight, 0 skips
            the row altogether.
        linear_bias: `[V]`, floating.
        reference_logprob: float32 `[...]`, log-probability of each target under a reference; `npo` and `anchor` need
            it.
        positive: `"nll"` or `"dft"`.
        forget: `"unlikelihood"`, `"probability"`, `"npo"`, `"wga"` or `"gradient_ascent"` (unbounded).
        beta: The constant of `npo` and the exponent of `wga`.
        floor: A log-probability. A negative token below it gets no gradient, and the loss that it has at the floor.
        entropy_gate: An entropy in nats. The weight of a positive token is multiplied by `min(1, H / entropy_gate)`, H
            the entropy of its row, detached: entropy-adaptive fine-tuning (arXiv 2601.02151), which takes ln 20.
        anchor: A weight above 0. Adds `anchor * KL(q || p)` for every row with a weight, of the target against all
            other tokens, q from `reference_logprob`: p stays close to what it was. Not multiplied by the weight.
        z_loss: A weight above 0. Adds `z_loss * logsumexp(z)^2` for every row with a weight, of the logits z that the
            model ends with (after bias, scale and softcap). Not multiplied by the weight either.
        softcap, logit_scale: Final logit softcapping and scale of the model; the scale comes first.
        lora_a, lora_b, lora_scale: LoRA on the head: `input W^T + lora_scale * (input A^T) B^T`, A `[r, H]`,
            B `[V, r]`, floating; computed in the dtype of `input`.
        active_rows: int64 `[M]` on the device of `input`: the rows of the flattened input to compute, each once. The
            others count as weight 0. Rows of weight 0 may be listed. With it, nothing waits for the device; without
            it, the rows are found there, which does.
        ignore_index: The target of rows to skip.
        outputs: Any of `"logprob"`, `"entropy"`, `"is_top1"`.
        chunk_size: Rows at a time; None chooses (`chunking.training_rows`).
        dead_below: Rows with `|w| |dL/dm|` of at most this are left out of the products for the gradients, where they
            are a quarter of a chunk or more. What is lost of a row's hidden state's gradient is at most
            `2 dead_below |logit_scale|` times the norm of the longest row of the head, and of the head's gradient
            likewise times that of the hidden state. None: 0 on a CPU, where nothing is lost; no row on a GPU, whose
            host would have to wait for the device to know which.
        weight_grad_dtype: What the gradient of the head is accumulated in over the chunks: float32, or the dtype of
            the head for half of the memory and a rounding per chunk. None chooses: the dtype of a 16-bit head where
            all rows fit one chunk (`chunking.one_chunk`), so that nothing is accumulated; else float32.

    Returns:
        A `SelectiveLossOutput`. With no row to compute, the loss is 0 and still connected: its gradients are zeros.

    Raises:
        ValueError: Wrong shape, dtype, device, option or, on the CPU, a target or row out of range. On a GPU a target
            out of range makes the loss NaN.

    Source: arXiv 2508.04329 for the task; the log-odds form and the single pass are derived in `kernels/README.md`.
    """
    compute_dtype = checks.operands(input, linear_weight)
    checks.per_token("target", target, input, torch.int64)
    checks.per_token("token_weight", token_weight, input, torch.float32)
    if reference_logprob is not None:
        checks.per_token("reference_logprob", reference_logprob, input, torch.float32)
    checks.bias_vector(linear_bias, linear_weight)
    checks.lora(lora_a, lora_b, linear_weight)
    checks.objective(positive, forget, beta, floor, reference_logprob, entropy_gate, anchor, z_loss)
    checks.head_options(softcap, logit_scale)
    wanted = checks.output_names(outputs)
    checks.row_indices(active_rows, input)
    checks.size_option("chunk_size", chunk_size)
    checks.bound("dead_below", dead_below)
    if weight_grad_dtype not in (None, torch.float32, compute_dtype):
        raise ValueError(f"weight_grad_dtype={weight_grad_dtype} must be None, torch.float32 or {compute_dtype}")
    if weight_grad_dtype is None:
        weight_grad_dtype = torch.float32
        rows = target.numel() if active_rows is None else active_rows.shape[0]
        alike = linear_weight.dtype == compute_dtype
        if alike and chunk_size is None and chunking.one_chunk(rows, input.shape[-1], compute_dtype.itemsize):
            weight_grad_dtype = compute_dtype

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
        float(lora_scale),
        "entropy" in wanted or entropy_gate is not None,
        "is_top1" in wanted,
        chunk_size,
        dead_below,
        compute_dtype,
        weight_grad_dtype,
        ignore_index,
    )
    loss, logprob, entropy, is_top1 = _apply(
        settings,
        (input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, lora_a, lora_b),
        (
            target.reshape(-1),
            token_weight.detach().reshape(-1),
            None if reference_logprob is None else reference_logprob.detach().reshape(-1),
            active_rows,
        ),
    )
    shape = target.shape
    return SelectiveLossOutput(
        loss,
        logprob.view(shape) if "logprob" in wanted else None,
        entropy.view(shape) if "entropy" in wanted else None,
        is_top1.view(shape) if "is_top1" in wanted else None,
    )
