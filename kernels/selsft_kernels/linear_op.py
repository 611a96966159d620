"""The chunk loop behind the fused loss, as one operator that `torch.compile` does not look into.

An operator of `torch.library` rather than plain Python under a compiler: the number of rows to compute depends on the
data, and would break the graph or make its shapes symbolic. Inside, memory is planned by hand.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from . import backend, checks, chunking, rows
from .gemm import accumulate, product_fp32
from .objectives import Objective
from .rows import RowStats, Targets, Transform
from .target_dot import target_logits

if backend.HAS_TRITON:
    from . import rows_triton, target_dot_triton


class Lora(NamedTuple):
    """LoRA on the head, in the dtype of the products."""

    a: Tensor  # [r, H]
    b: Tensor  # [V, r]
    scale: float


class Head(NamedTuple):
    """The head in the dtype of the products."""

    weight: Tensor  # [V, H]
    lora: Lora | None
    transform: Transform


class Gradients(NamedTuple):
    """Buffers of the gradients, None where not needed. All but `input` are sums over chunks."""

    input: Tensor | None  # [N, H]
    weight: Tensor | None  # [V, H] fp32 or the dtype of the products
    bias: Tensor | None  # [V] fp32
    lora_a: Tensor | None  # [r, H] fp32
    lora_b: Tensor | None  # [V, r] fp32


class Work(NamedTuple):
    """The rows to compute: `rows` [M] into the flattened input, None = all of them in order."""

    rows: Tensor | None
    size: int
    target: Tensor  # [M]
    weight: Tensor  # [M]
    reference: Tensor | None  # [M]


# The names and defaults are those of `linear_selective_cross_entropy`; tensors are flattened to N rows.
@torch.library.custom_op("selsft::linear_loss", mutates_args=())
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
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    entropy: bool,
    is_top1: bool,
    chunk_size: int | None,
    compute_dtype: torch.dtype,
    weight_grad_dtype: torch.dtype,
    ignore_index: int,
    needs: list[bool],  # gradients of input, weight, bias, lora_a, lora_b
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`(loss, logprob, entropy, is_top1, d_input, d_weight, d_bias, d_lora_a, d_lora_b)`; [0] where not wanted."""
    checks.contents(target, active_rows, weight.shape[0], ignore_index)
    with backend.computing_on(input.device):
        head = make_head(weight, bias, lora_a, lora_b, softcap, logit_scale, lora_scale, compute_dtype)
        work = select_rows(target, token_weight, reference, active_rows, ignore_index)
        objective = Objective(positive, forget, beta, floor)
        grads = allocate(input, head, work, needs, weight_grad_dtype)
        stats = new_stats(work.size, input.device, entropy, is_top1)
        chunk_loop(input, head, work, objective, stats, grads, chunk_size)
        assert stats.loss is not None
        outputs = [spread(t, work.rows, target) for t in (stats.logprob, stats.entropy, stats.is_top1)]
        loss = stats.loss.sum()
    # Outputs of an operator must not share memory, so each one that is not wanted is an empty tensor of its own.
    return (loss, *outputs, *(input.new_empty(0) if g is None else g for g in grads))  # type: ignore[return-value]


@linear_loss_op.register_fake
def _(
    input, weight, bias, lora_a, lora_b, target, token_weight, reference, active_rows, positive, forget, beta, floor,
    softcap, logit_scale, lora_scale, entropy, is_top1, chunk_size, compute_dtype, weight_grad_dtype, ignore_index,
    needs,
):  # fmt: skip
    f32 = torch.float32
    n = target.shape
    return (
        input.new_empty((), dtype=f32),
        input.new_empty(n, dtype=f32),
        input.new_empty(n if entropy else 0, dtype=f32),
        input.new_empty(n if is_top1 else 0, dtype=torch.bool),
        input.new_empty(input.shape, dtype=compute_dtype) if needs[0] else input.new_empty(0),
        input.new_empty(weight.shape, dtype=weight_grad_dtype) if needs[1] else input.new_empty(0),
        input.new_empty(bias.shape, dtype=f32) if needs[2] else input.new_empty(0),
        input.new_empty(lora_a.shape, dtype=f32) if needs[3] else input.new_empty(0),
        input.new_empty(lora_b.shape, dtype=f32) if needs[4] else input.new_empty(0),
    )


def make_head(
    weight: Tensor,
    bias: Tensor | None,
    lora_a: Tensor | None,
    lora_b: Tensor | None,
    softcap: float | None,
    logit_scale: float,
    lora_scale: float,
    dtype: torch.dtype,
) -> Head:
    lora = None
    if lora_a is not None and lora_b is not None:
        lora = Lora(lora_a.to(dtype), lora_b.to(dtype), lora_scale)
    bias = None if bias is None else bias.float()
    return Head(weight.to(dtype), lora, Transform(bias, logit_scale, softcap))


def select_rows(
    target: Tensor, token_weight: Tensor, reference: Tensor | None, index: Tensor | None, ignore_index: int
) -> Work:
    """The rows to compute. Without `index` they are looked up, for which the host waits on a GPU."""
    if index is None:
        index = ((token_weight != 0) & (target != ignore_index)).nonzero().squeeze(1)
        if index.shape[0] == target.shape[0]:
            index = None
    count = target.shape[0]
    if index is not None:
        count = index.shape[0]
        target, token_weight = target[index], token_weight[index]
        reference = None if reference is None else reference[index]
    ignored = target == ignore_index
    return Work(index, count, target.masked_fill(ignored, 0), token_weight.masked_fill(ignored, 0.0), reference)


def allocate(input: Tensor, head: Head, work: Work, needs: list[bool], weight_grad_dtype: torch.dtype) -> Gradients:
    """Gradient buffers; zeros where the chunks do not write every element."""
    f32 = torch.float32
    bias, lora = head.transform.bias, head.lora
    # The first chunk overwrites the sums, so that only an empty batch needs zeros.
    new = torch.empty_like if work.size else torch.zeros_like
    d_input = None
    if needs[0]:
        new_input = torch.empty if work.rows is None else torch.zeros
        d_input = new_input(input.shape, device=input.device, dtype=head.weight.dtype)
    return Gradients(
        d_input,
        new(head.weight, dtype=weight_grad_dtype, memory_format=torch.contiguous_format) if needs[1] else None,
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


def spread(values: Tensor | None, index: Tensor | None, target: Tensor) -> Tensor:
    """`values` [M] at their rows, zeros at the others, shaped like `target` [N]; [0] for None."""
    if values is None:
        return torch.empty(0, device=target.device)
    if index is None:
        return values
    return values.new_zeros(target.shape).index_copy_(0, index, values)


def chunk_loop(
    input: Tensor,
    head: Head,
    work: Work,
    objective: Objective,
    stats: RowStats,
    grads: Gradients,
    chunk_size: int | None,
) -> None:
    """Runs every chunk through the head; fills `stats` and `grads`."""
    vocab, hidden = head.weight.shape
    dtype, device = head.weight.dtype, input.device
    chunk = chunk_size or chunking.training_rows(
        work.size, hidden, vocab, dtype.itemsize, device, trained_head=grads.weight is not None
    )
    chunk = max(1, min(chunk, work.size))
    buffer = torch.empty(chunk, chunking.padded(vocab), device=device, dtype=dtype)
    want_grad = any(g is not None for g in grads)
    for start in range(0, work.size, chunk):
        end = min(start + chunk, work.size)
        index = None if work.rows is None else work.rows[start:end]
        x = hidden_rows(input, index, work.weight[start:end], slice(start, end)).to(dtype)
        lora_hidden = None if head.lora is None else product_fp32(x, head.lora.a.t())
        raw = raw_logits(buffer[: end - start, :vocab], x, head, lora_hidden)
        targets = Targets(
            work.target[start:end],
            target_logit(x, head, work.target[start:end], lora_hidden),
            work.weight[start:end],
            None if work.reference is None else work.reference[start:end],
        )
        loss_rows = rows_triton.loss_rows if backend.use_triton(device) else rows.loss_rows
        loss_rows(
            raw,
            targets,
            head.transform,
            objective,
            stats.part(start, end),
            want_grad=want_grad,
            padding=buffer.shape[1] - vocab,
        )
        if want_grad:
            place = slice(start, end) if index is None else index
            add_gradients(grads, raw, x, head, lora_hidden, place, first=start == 0)


def hidden_rows(input: Tensor, index: Tensor | None, weight: Tensor, rows: slice) -> Tensor:
    """The hidden states of a chunk; zeros where a caller lists a row of weight 0.

    Its logits' gradient is zero, but in the product for the head's gradient a NaN in such a row would still count.
    """
    if index is None:
        return input[rows]
    return input[index].masked_fill_((weight == 0).unsqueeze(1), 0.0)


def raw_logits(out: Tensor, x: Tensor, head: Head, lora_hidden: Tensor | None, columns: slice = slice(None)) -> Tensor:
    """`x W^T` plus the LoRA term, without bias, into `out` [n, columns]."""
    torch.mm(x, head.weight[columns].t(), out=out)
    if head.lora is not None and lora_hidden is not None:
        torch.addmm(out, lora_hidden.to(x.dtype), head.lora.b[columns].t(), alpha=head.lora.scale, out=out)
    return out


def target_logit(x: Tensor, head: Head, target: Tensor, lora_hidden: Tensor | None) -> Tensor:
    dot = target_dot_triton.target_logits if backend.use_triton(x.device) else target_logits
    b, scale = (None, 0.0) if head.lora is None else (head.lora.b, head.lora.scale)
    return dot(x, head.weight, target, head.transform.bias, lora_hidden, b, scale)


def add_gradients(
    grads: Gradients,
    d_raw: Tensor,  # [n, V] gradient with respect to the raw logits
    x: Tensor,  # [n, H]
    head: Head,
    lora_hidden: Tensor | None,  # [n, r] fp32: x A^T
    place: slice | Tensor,  # the rows of the chunk in the input
    *,
    first: bool,
) -> None:
    """Adds a chunk to the gradients. With raw = x W^T + s (x A^T) B^T and u = d_raw B:

    dx = d_raw W + s u A,  dW += d_raw^T x,  dA += s u^T x,  dB += s d_raw^T (x A^T).
    """
    lora = head.lora
    u = None
    if lora is not None and (grads.input is not None or grads.lora_a is not None):
        u = product_fp32(d_raw, lora.b).to(x.dtype)
    if grads.input is not None:
        d_x = grads.input[place] if isinstance(place, slice) else torch.empty_like(x)
        torch.mm(d_raw, head.weight, out=d_x)
        if u is not None and lora is not None:
            torch.addmm(d_x, u, lora.a, alpha=lora.scale, out=d_x)
        if not isinstance(place, slice):
            grads.input.index_copy_(0, place, d_x)
    if grads.weight is not None:
        accumulate(grads.weight, d_raw.t(), x, first=first)
    if grads.bias is not None:
        grads.bias.add_(d_raw.sum(0, dtype=torch.float32))
    if lora is not None and grads.lora_a is not None and u is not None:
        accumulate(grads.lora_a, u.t(), x, first=first, alpha=lora.scale)
    if lora is not None and grads.lora_b is not None and lora_hidden is not None:
        accumulate(grads.lora_b, d_raw.t(), lora_hidden.to(x.dtype), first=first, alpha=lora.scale)
