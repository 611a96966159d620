"""Half precision, bounded by the error that plain PyTorch in the same dtype makes against fp64; autocast."""

import pytest
import torch
import torch.nn.functional as F

from selsft_kernels import linear_logprob, linear_loss, linear_selective_cross_entropy
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem, problem, relative


def naive(p: Problem) -> dict[str, torch.Tensor]:
    """What a user would write: logits in the dtype of the model, loss in fp32, autograd."""
    leaves = {name: t.detach().clone().requires_grad_() for name, t in p.parameters().items()}
    z = F.linear(leaves["input"], leaves["weight"], leaves.get("bias"))
    if "lora_a" in leaves:
        z = z + F.linear(F.linear(leaves["input"], leaves["lora_a"]), leaves["lora_b"])
    z = oracle.head_transform(z.float(), p.options)
    lp, l1mp = oracle.log_probabilities(z, p.target)
    loss = oracle.token_losses(lp, l1mp, p).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    result = {"loss": loss.detach(), "logprob": torch.where(oracle.used(p), lp.detach(), 0.0)}
    return result | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.double() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("features", [{}, {"bias": True, "lora": True, "softcap": 8.0}], ids=["plain", "all"])
def test_error_is_at_most_that_of_plain_pytorch(dtype: torch.dtype, features: dict) -> None:
    p = problem(rows=96, hidden=64, vocab=300, dtype=dtype, spread=2.0, **features)
    expected, plain, ours = oracle.selective(p), naive(p), call.linear(p, chunk_size=40)
    for name in plain:
        assert ours[name].dtype == plain[name].dtype, name
        if name != "loss":  # one number: its error is chance
            assert rms(ours[name], expected[name]) < 1.5 * rms(plain[name], expected[name]), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_head_gradient_is_accumulated_in_fp32(dtype: torch.dtype) -> None:
    """Over many chunks, an accumulator of the head's dtype rounds every time; the default one does not."""
    p = problem(rows=96, hidden=16, vocab=50, dtype=dtype)
    expected = oracle.selective(p)["d_weight"]
    wide = rms(call.linear(p, chunk_size=2)["d_weight"], expected)
    narrow = rms(call.linear(p, chunk_size=2, weight_grad_dtype=dtype)["d_weight"], expected)
    whole = rms(call.linear(p, chunk_size=96)["d_weight"], expected)
    assert wide < 1.5 * whole
    assert narrow > 2 * wide


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "chunks"), [(32, 1), (33, 0)])
def test_few_rows_write_the_head_gradient_once(
    dtype: torch.dtype, rows: int, chunks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Up to 2 H rows, their logits are smaller than an fp32 sum of the head's size: one chunk, in the head's dtype."""
    dtypes: list[torch.dtype] = []
    real = linear_loss.accumulate
    monkeypatch.setattr(linear_loss, "accumulate", lambda acc, *a, **k: dtypes.append(acc.dtype) or real(acc, *a, **k))
    p = problem(rows=rows, hidden=16, vocab=50, dtype=dtype)
    p.target.clamp_(min=0)
    p.token_weight.copy_(torch.randn(rows, generator=torch.Generator().manual_seed(1)))
    expected, plain, ours = oracle.selective(p), naive(p), call.linear(p, factor=1 / 3)
    assert dtypes == [dtype] if chunks else set(dtypes) == {torch.float32}
    error = rms(ours["d_weight"] * 3, expected["d_weight"])
    assert error < 1.5 * rms(plain["d_weight"], expected["d_weight"])


def test_a_given_chunk_size_or_an_fp32_head_keeps_the_fp32_sum(monkeypatch: pytest.MonkeyPatch) -> None:
    dtypes: list[torch.dtype] = []
    real = linear_loss.accumulate
    monkeypatch.setattr(linear_loss, "accumulate", lambda acc, *a, **k: dtypes.append(acc.dtype) or real(acc, *a, **k))
    p = problem(rows=20, hidden=16, vocab=50, dtype=torch.bfloat16)
    call.linear(p, chunk_size=5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        call.linear(problem(rows=20, hidden=16, vocab=50))
    assert set(dtypes) == {torch.float32}


def test_the_factor_is_not_rounded_to_the_dtype_of_the_gradient() -> None:
    """1/3 is between two bf16 numbers; rounded first, every entry would be off by the same 0.2 %."""
    p = problem(rows=20, dtype=torch.bfloat16)
    grad = call.linear(p)["d_input"].double()
    scaled = call.linear(p, factor=1 / 3)["d_input"].double()
    some = grad != 0
    assert ((scaled[some] * 3 / grad[some]).mean() - 1).abs() < 5e-4


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16])
def test_autocast_casts_the_operands_as_linear_would(hidden_dtype: torch.dtype) -> None:
    p = problem(rows=20)
    half = problem(rows=20, dtype=torch.bfloat16)
    hidden = half.input.detach().to(hidden_dtype).requires_grad_()
    weight = half.weight.detach().float().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight)
        score = linear_logprob(hidden, weight, p.target)
    out.loss.backward()
    expected = call.linear(half)
    assert torch.equal(out.loss.detach(), expected["loss"])
    assert hidden.grad is not None and hidden.grad.dtype == hidden_dtype
    assert weight.grad is not None and weight.grad.dtype == torch.float32
    assert torch.equal(hidden.grad.bfloat16(), expected["d_input"])
    # The sum over rows was fp32 all along, so it is not rounded on the way to an fp32 weight.
    assert relative(weight.grad, oracle.selective(half)["d_weight"]) < relative(
        expected["d_weight"], oracle.selective(half)["d_weight"]
    )
    assert score.logprob is not None
    used = p.token_weight != 0
    assert torch.allclose(score.logprob[used], expected["logprob"][used], rtol=1e-6, atol=1e-6)


def test_fp16_gradients_of_a_large_batch_do_not_vanish() -> None:
    """1/N goes on outside, so the rows are at unit scale inside; with 1/N inside, fp16 would lose the small ones."""
    p = problem(rows=8, vocab=400, dtype=torch.float16)
    scaled = call.linear(p, factor=2.0**-8)["d_weight"]
    expected = oracle.selective(p)["d_weight"] * 2.0**-8
    assert relative(scaled, expected) < 2e-3
