"""Targets outside of the vocabulary on a device, where the host does not look at them."""

from typing import Any

import pytest
import torch

from selsft_kernels import checks, linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_oracle import problem

OUTSIDE = (-1, 37, 2**40)


def check_outside(bad: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Row 2 is NaN and makes the loss NaN; the other rows are as they were; a row of weight 0 may hold the target."""
    monkeypatch.setattr(checks, "contents", lambda *_: None)  # a CPU tensor would be refused
    p = problem(rows=5, vocab=37, bias=True, device=device)
    p.target.copy_(torch.arange(5))
    p.token_weight.copy_(torch.tensor([1.0, -1.0, 0.5, 1.0, -1.0]))
    z = p.input.detach() @ p.weight.detach().T

    def results() -> dict[str, Any]:
        rows = torch.arange(5, device=device)
        return {
            "linear": linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight, active_rows=rows),
            "logits": selective_cross_entropy(z, p.target, p.token_weight),
            "logprob": linear_logprob(p.input, p.weight, p.target, chunk_size=20),
        }

    good = results()
    p.target[2] = bad
    for name, out in results().items():
        expected = good[name].logprob.detach().clone()
        assert out.logprob.isnan().tolist() == [False, False, True, False, False], name
        expected[2] = torch.nan
        assert torch.equal(out.logprob.nan_to_num(), expected.nan_to_num()), name
        if name != "logprob":
            assert out.loss.isnan(), name
    p.token_weight[2] = 0.0
    for name, out in results().items():
        if name != "logprob":
            assert out.loss.isfinite() and out.logprob[2] == 0.0, name
    (grad,) = torch.autograd.grad(results()["linear"].loss, p.input)
    assert grad.isfinite().all() and not grad[2].any()
