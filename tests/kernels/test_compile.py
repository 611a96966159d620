"""`torch.compile(fullgraph=True)` accepts every function, forwards and backwards, and changes no result."""

import pytest
import torch

from selsft_kernels import linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_oracle import problem

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    "function", ["linear_loss", "linear_loss listed", "logprob", "logprob listed", "logits", "logits_inplace"]
)
def test_fullgraph(function: str, backend: str) -> None:
    p = problem(rows=9, bias=True, lora=True, softcap=4.0)
    function, *listed = function.split()
    rows = torch.tensor([7, 0, 3, 4]) if listed else None

    def step(hidden, weight, bias, a, b):  # type: ignore[no-untyped-def]
        extra = {"linear_bias": bias, "lora_a": a, "lora_b": b, "softcap": 4.0, "outputs": ("logprob", "entropy")}
        extra |= {"active_rows": rows}
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


@pytest.mark.parametrize("function", ["linear_loss", "logprob", "logits"])
def test_dynamic_shapes_and_numbers(function: str) -> None:
    """Rows, vocabulary and every number change from call to call; other shapes alone need no other graph."""
    torch._dynamo.reset()

    def step(hidden, weight, target, token_weight, reference, beta, floor, softcap, scale):  # type: ignore[no-untyped-def]
        objective = {"reference_logprob": reference, "forget": "npo", "beta": beta, "floor": floor}
        transform = {"softcap": softcap, "logit_scale": scale}
        if function == "linear_loss":
            return linear_selective_cross_entropy(
                hidden * 2, weight, target, token_weight, **objective, **transform
            ).loss
        if function == "logprob":
            return linear_logprob(hidden * 2, weight, target, **transform).logprob.sum()
        return selective_cross_entropy(hidden * 2 @ weight.T, target, token_weight, **objective, **transform).loss

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(step, fullgraph=True, dynamic=True, backend=counter)
    graphs = []
    for rows, vocab, numbers in [
        (9, 37, (1.0, -2.0, 4.0, 1.5)),
        (5, 64, (1.0, -2.0, 4.0, 1.5)),
        (12, 21, (1.0, -2.0, 4.0, 1.5)),
        (12, 21, (0.5, -3.0, 7.0, -0.5)),
    ]:
        p = problem(rows=rows, vocab=vocab)
        given = (p.input, p.weight, p.target, p.token_weight, p.reference, *numbers)
        actual, expected = compiled(*given), step(*given)
        graphs.append(counter.frame_count)
        assert torch.allclose(actual, expected, atol=1e-5)
        for a, b in zip(*(torch.autograd.grad(x, (p.input, p.weight)) for x in (actual, expected)), strict=True):
            assert torch.allclose(a, b, atol=1e-5)
    assert graphs[0] == graphs[2]


@pytest.mark.parametrize("numbers", [{"beta": 0.0}, {"floor": 1.0}, {"softcap": float("nan")}])
def test_bad_numbers_are_refused_under_the_compiler_too(numbers: dict) -> None:
    p = problem(rows=3)
    torch._dynamo.reset()

    @torch.compile(dynamic=True, backend="eager")
    def step(hidden, weight):  # type: ignore[no-untyped-def]
        return linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight, **numbers).loss

    with pytest.raises(ValueError, match=next(iter(numbers))):
        step(p.input, p.weight)
