"""The implementations that are measured against each other, each as a maker of one step.

Peers are imported when they are asked for; one that is not installed, or not made for the device, says so. Every step
does what its library would do in training: rows are left out where the library leaves them out. Where a library cannot
express the forgetting loss without giving up its fast path, it runs plain mean NLL on the used rows instead, which is
the easier task, and is marked (`NLL_ONLY`).
"""

import importlib
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from selsft_kernels import linear_logprob, linear_selective_cross_entropy

from .cases import Case
from .measure import Step

FORWARD, TRAINING = "forward", "forward+backward"
NLL_ONLY = frozenset({"torch", "liger", "liger-large-chunk"})


class Unavailable(Exception):
    """An implementation cannot run here; the message says why."""


def products(pass_: str, trained: bool) -> int:
    """Least number of products with the head."""
    return 1 if pass_ == FORWARD else 3 if trained else 2


def leaves(case: Case, trained: bool) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Hidden states, weight, and those of them that want a gradient."""
    hidden = case.hidden.detach().requires_grad_()
    weight = case.weight.detach().requires_grad_(trained)
    return hidden, weight, [hidden, weight] if trained else [hidden]


def differentiated(case: Case, trained: bool, loss_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    hidden, weight, wanted = leaves(case, trained)
    return lambda: torch.autograd.grad(loss_of(hidden, weight), wanted)


def scored(case: Case, logprob_of: Callable[[Tensor, Tensor], Any]) -> Step:
    def step() -> None:
        with torch.no_grad():
            logprob_of(case.hidden, case.weight)

    return step


def per_token(case: Case, pass_: str, trained: bool, logprob_of: Callable[[Tensor, Tensor], Tensor]) -> Step:
    """From a differentiable log-probability per row, 0 where ignored: the selective loss on top of it, in fp32."""
    if pass_ == FORWARD:
        return scored(case, logprob_of)

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        lp = logprob_of(hidden, weight).float().clamp(max=-1e-6)
        value = torch.where(case.token_weight > 0, -lp, -torch.log(-torch.expm1(lp)))
        return (value * case.token_weight.abs()).sum() / case.rows.numel()

    return differentiated(case, trained, loss)


def selsft(case: Case, pass_: str, trained: bool) -> Step:
    if pass_ == FORWARD:
        return scored(case, lambda x, w: linear_logprob(x, w, case.target, active_rows=case.rows))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_selective_cross_entropy(hidden, weight, case.target, case.token_weight, active_rows=case.rows)
        return out.loss / case.rows.numel()

    return differentiated(case, trained, loss)


def selsft_statistics(case: Case, pass_: str, trained: bool) -> Step:
    """With entropy and arg-max of every row, which the trainer logs."""
    outputs = ("logprob", "entropy", "is_top1")
    if pass_ == FORWARD:
        return scored(case, lambda x, w: linear_logprob(x, w, case.target, active_rows=case.rows, outputs=outputs))

    def loss(hidden: Tensor, weight: Tensor) -> Tensor:
        out = linear_selective_cross_entropy(
            hidden, weight, case.target, case.token_weight, active_rows=case.rows, outputs=outputs
        )
        return out.loss / case.rows.numel()

    return differentiated(case, trained, loss)


def gemm(case: Case, pass_: str, trained: bool) -> Step:
    """The bare products of the used rows into buffers that exist already: the floor of every implementation here."""
    x, weight = case.hidden[case.rows], case.weight
    logits = torch.empty(x.shape[0], weight.shape[0], device=x.device, dtype=x.dtype)
    d_x, d_weight = torch.empty_like(x), torch.empty_like(weight) if trained else None

    def step() -> None:
        torch.mm(x, weight.t(), out=logits)
        if pass_ == TRAINING:
            torch.mm(logits, weight, out=d_x)
            if d_weight is not None:
                torch.mm(logits.t(), x, out=d_weight)

    return step


def _naive_logprob(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    logits = F.linear(hidden, weight).float()
    return -F.cross_entropy(logits, target, reduction="none", ignore_index=-100)


def naive(case: Case, pass_: str, trained: bool) -> Step:
    return per_token(case, pass_, trained, lambda x, w: _naive_logprob(x, w, case.target))


def compiled(case: Case, pass_: str, trained: bool) -> Step:
    torch._dynamo.reset()
    function = torch.compile(_naive_logprob)
    return per_token(case, pass_, trained, lambda x, w: function(x, w, case.target))


def torch_linear(case: Case, pass_: str, trained: bool) -> Step:
    function = getattr(F, "linear_cross_entropy", None)
    options = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise Unavailable(f"torch {torch.__version__} has no chunked F.linear_cross_entropy")

    def loss(x: Tensor, w: Tensor) -> Tensor:
        return function(x, w, case.target, ignore_index=-100, options=options())

    return scored(case, loss) if pass_ == FORWARD else differentiated(case, trained, loss)


def trl(case: Case, pass_: str, trained: bool) -> Step:
    """As `trl.trainer.utils.add_fused_lm_head` calls it; it selects the rows on devices that have Triton only."""
    module = _import("trl.kernels.chunked_logprob", "trl>=1.16")
    mask = case.target != -100
    compact = module._use_triton(case.device)

    def logprob(x: Tensor, w: Tensor) -> Tensor:
        rows = x[mask] if compact else x
        target = case.target[mask] if compact else case.target.clamp(min=0)
        lp = module.ChunkedLogProbFunction.apply(rows, w, None, target, 1.0, 32768, None, 1.0, ())[0]
        return lp.new_zeros(mask.shape).masked_scatter(mask, lp) if compact else lp.masked_fill(~mask, 0.0)

    return per_token(case, pass_, trained, logprob)


def _liger(case: Case, pass_: str, trained: bool, **options: Any) -> Step:
    if case.device.type not in ("cuda", "xpu"):
        raise Unavailable("Liger's kernels need a GPU")
    module = _import("liger_kernel.ops.fused_linear_cross_entropy", "liger-kernel")
    function = module.LigerFusedLinearCrossEntropyFunction

    def loss(x: Tensor, w: Tensor) -> Tensor:
        defaults = (None, None, -100, 0.0, 0.0, "mean", None, False, None, False, False, False, None, None)
        result = function.apply(x, w, case.target, *defaults, *options.values())
        return result[0] if isinstance(result, tuple) else result

    return scored(case, loss) if pass_ == FORWARD else differentiated(case, trained, loss)


def liger(case: Case, pass_: str, trained: bool) -> Step:
    return _liger(case, pass_, trained)


def liger_large_chunk(case: Case, pass_: str, trained: bool) -> Step:
    """With the budget for transient logits 16 times its default."""
    return _liger(case, pass_, trained, chunk_mem_const=16)


def _cce(case: Case, pass_: str, trained: bool, impl: str) -> Step:
    if case.device.type != "cuda":
        raise Unavailable("cut-cross-entropy's kernels need a CUDA device")
    function = _import("cut_cross_entropy", "cut-cross-entropy").linear_cross_entropy
    return per_token(
        case,
        pass_,
        trained,
        lambda x, w: -function(x, w, case.target, ignore_index=-100, reduction="none", impl=impl),
    )


def cce(case: Case, pass_: str, trained: bool) -> Step:
    return _cce(case, pass_, trained, "cce")


def cce_exact(case: Case, pass_: str, trained: bool) -> Step:
    return _cce(case, pass_, trained, "cce_exact")


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise Unavailable(f"not installed (pip install '{package}')") from error


IMPLEMENTATIONS: dict[str, Callable[[Case, str, bool], Step]] = {
    "gemm": gemm,
    "selsft": selsft,
    "selsft-statistics": selsft_statistics,
    "naive": naive,
    "compiled": compiled,
    "torch": torch_linear,
    "trl": trl,
    "liger": liger,
    "liger-large-chunk": liger_large_chunk,
    "cce": cce,
    "cce-exact": cce_exact,
}
