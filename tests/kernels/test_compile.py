"""`torch.compile(fullgraph=True)` accepts every function, forwards and backwards, and changes no result."""

import pytest
import torch

from selsft_kernels import linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_oracle import problem


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize("function", ["linear_loss", "logprob", "logits", "logits_inplace"])
def test_fullgraph(function: str, backend: str) -> None:
    p = problem(rows=9, bias=True, lora=True, softcap=4.0)

    def step(hidden, weight, bias, a, b):  # type: ignore[no-untyped-def]
        extra = {"linear_bias": bias, "lora_a": a, "lora_b": b, "softcap": 4.0, "outputs": ("logprob", "entropy")}
        if function == "linear_loss":
            out = linear_selective_cross_entropy(hidden * 2, weight, p.target, p.token_weight, **extra)
            return out.loss / 3, out.entropy
        if function == "logprob":
            scores = linear_logprob(hidden * 2, weight, p.target, **extra)
            return scores.logprob.sum() / 3, scores.entropy
        z = hidden * 2 @ weight.T + bias
        found = selective_cross_entropy(
            z, p.target, p.token_weight, outputs=("entropy",), inplace_backward=function == "logits_inplace"
        )
        return found.loss / 3, found.entropy

    def run(f):  # type: ignore[no-untyped-def]
        leaves = [t.detach().clone().requires_grad_() for t in p.parameters().values()]
        loss, entropy = f(*leaves)
        grads = torch.autograd.grad(loss, leaves[:3])
        return loss.detach(), entropy, *grads

    torch._dynamo.reset()
    plain, compiled = run(step), run(torch.compile(step, fullgraph=True, backend=backend))
    for expected, actual in zip(plain, compiled, strict=True):
        assert torch.allclose(actual, expected, atol=1e-6)


def test_no_grad_compiles() -> None:
    p = problem(rows=5)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def score(hidden, weight):  # type: ignore[no-untyped-def]
        return linear_logprob(hidden, weight, p.target).logprob

    with torch.no_grad():
        assert torch.allclose(score(p.input, p.weight), linear_logprob(p.input, p.weight, p.target).logprob)
