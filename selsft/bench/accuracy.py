"""Errors against fp64, next to those of others on the same tensors."""

import torch
import torch.nn.functional as F
from torch import Tensor

from selsft_kernels import linear_logprob, linear_selective_cross_entropy

from . import cases
from .peers import Unavailable, _import

ROWS = 512


def measure_errors(device: torch.device, h: int, v: int, dtype: torch.dtype) -> dict[str, float]:
    """`gradient_ratio`: rms error of the hidden states' gradient over that of plain PyTorch in `dtype`.
    `logprob_ratio`: rms error of the log-probabilities over TRL's; missing without TRL."""
    case = cases.make_case(ROWS, h, v, 0, device, dtype)
    hidden, weight = case.hidden.requires_grad_(), case.weight

    def loss_of(logits: Tensor) -> tuple[Tensor, Tensor]:
        column = case.target.unsqueeze(1)
        total = logits.logsumexp(1)
        lp = logits.gather(1, column).squeeze(1) - total
        others = logits.scatter(1, column, -torch.inf).logsumexp(1) - total
        return torch.where(case.token_weight > 0, -lp, -others).sum(), lp.detach()

    exact_hidden = hidden.detach().double().requires_grad_()
    exact_loss, exact_logprob = loss_of(exact_hidden @ weight.double().t())
    (exact,) = torch.autograd.grad(exact_loss, exact_hidden)
    (plain,) = torch.autograd.grad(loss_of(F.linear(hidden, weight).float())[0], hidden)
    ours = linear_selective_cross_entropy(hidden, weight, case.target, case.token_weight).loss
    (actual,) = torch.autograd.grad(ours, hidden)
    result = {"gradient_ratio": rms(actual, exact) / rms(plain, exact)}
    with torch.no_grad():
        logprob = linear_logprob(hidden, weight, case.target).logprob
    assert logprob is not None
    try:
        function = _import("trl.kernels.chunked_logprob", "trl>=1.16").ChunkedLogProbFunction
    except Unavailable:
        return result
    with torch.no_grad():
        theirs = function.apply(hidden, weight, None, case.target, 1.0, 32768, None, 1.0, ())[0]
    return result | {"logprob_ratio": rms(logprob, exact_logprob) / rms(theirs, exact_logprob)}


def rms(actual: Tensor, expected: Tensor) -> float:
    return (actual.double() - expected).square().mean().sqrt().item()
