"""`linear_logprob` against fp64: values, gradients by recompute, statistics, tiles of the vocabulary."""

import pytest
import torch

from selsft_kernels import linear_logprob
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem, problem, relative

TOLERANCE = 2e-5


def expected_of(p: Problem, upstream: torch.Tensor) -> dict[str, torch.Tensor]:
    z, leaves = oracle.forward(p)
    keep = oracle.used(p, weighted=False)
    lp = oracle.log_probabilities(z, p.target)[0]
    loss = (lp * upstream.double())[keep].sum()
    grads = torch.autograd.grad(loss, list(leaves.values()))
    result = oracle.statistics(z.detach(), lp.detach(), p.target, keep)
    return result | {f"d_{name}": g for name, g in zip(leaves, grads, strict=True)}


def check(p: Problem, **overrides: object) -> None:
    upstream = torch.randn(p.target.shape[0], generator=torch.Generator().manual_seed(9))
    upstream[0] = 0.0
    actual, expected = call.logprob(p, upstream, **overrides), expected_of(p, upstream)
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in expected.items():
        assert relative(actual[name], value) < TOLERANCE, name


@pytest.mark.parametrize("vocab", [2, 7, 257, 500])
@pytest.mark.parametrize("rows", [1, 3, 63])
@pytest.mark.parametrize("chunk_size", [None, 64])
def test_shapes(rows: int, vocab: int, chunk_size: int | None) -> None:
    check(problem(rows=rows, vocab=vocab, seed=rows + vocab), chunk_size=chunk_size)


@pytest.mark.parametrize(
    "features",
    [
        {"bias": True},
        {"softcap": 3.0},
        {"logit_scale": -0.7},
        {"lora": True, "lora_scale": 0.5},
        {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "lora": True, "lora_scale": 2.0},
    ],
    ids=lambda f: "+".join(f),
)
def test_features(features: dict) -> None:
    check(problem(spread=3.0, **features), chunk_size=10)


def test_a_tile_of_one_column() -> None:
    """Every tile that holds a target holds nothing else, so the running maximum has nothing to start from."""
    check(problem(vocab=5, bias=True), chunk_size=1)


def test_growing_logits_rescale_the_sums() -> None:
    """Each tile's maximum is far above the one before; entropy and sum follow it."""
    p = problem(rows=4, hidden=2, vocab=40)
    with torch.no_grad():
        p.input[:, 0] = 1.0
        p.weight[:, 0] = torch.arange(40.0) * 2
    p.target.copy_(torch.tensor([0, 20, 38, 39]))
    check(p, chunk_size=4)
    check(p)


def test_top1_is_the_first_of_equal_logits() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    hidden, target = torch.ones(4, 1), torch.tensor([0, 1, 2, 3])
    for chunk_size in (1, 2, 4):
        out = linear_logprob(hidden, weight, target, outputs=("is_top1",), chunk_size=chunk_size)
        assert out.is_top1 is not None and out.is_top1.tolist() == [False, True, False, False]


def test_active_rows() -> None:
    p = problem(rows=9, vocab=11)
    full = linear_logprob(p.input, p.weight, p.target).logprob
    rows = torch.tensor([7, 0, 4])
    some = linear_logprob(p.input, p.weight, p.target, active_rows=rows).logprob
    assert full is not None and some is not None
    others = torch.ones(9, dtype=torch.bool)
    others[rows] = False
    assert torch.equal(some[rows], full[rows]) and not some[others].any()
    (grad,) = torch.autograd.grad(some.sum(), p.input)
    assert not grad[others].any() and grad[4].any()


def test_all_ignored_is_connected() -> None:
    p = problem(rows=3, bias=True, lora=True)
    p.target.fill_(-100)
    result = call.logprob(p, torch.ones(3))
    assert not result["logprob"].any()
    for name in p.parameters():
        assert not result[f"d_{name}"].any(), name


def test_hidden_states_that_are_not_finite_give_nan() -> None:
    p = problem(rows=3)
    p.target.fill_(1)
    with torch.no_grad():
        p.input[0, 0], p.input[2, 0] = torch.inf, torch.nan
    logprob = linear_logprob(p.input, p.weight, p.target).logprob
    assert logprob is not None and logprob.isnan().tolist() == [True, False, True]


def test_the_large_logit_of_the_target_is_not_rounded() -> None:
    """In bf16, the error of log p is not that of a bf16 logit: the target's logit comes from an fp32 dot."""
    g = torch.Generator().manual_seed(3)
    hidden = torch.randn(64, 48, generator=g).bfloat16()
    weight = 0.1 * torch.randn(300, 48, generator=g)
    weight[:64] = 0.1 * hidden
    weight = weight.bfloat16()
    raw = hidden.double() @ weight.double().T
    target = torch.arange(64)
    exact = oracle.log_probabilities(raw, target)[0]
    ours = linear_logprob(hidden, weight, target).logprob
    rounded = oracle.log_probabilities((hidden @ weight.T).double(), target)[0]
    assert ours is not None
    error, naive = ((x.double() - exact).square().mean().sqrt() for x in (ours, rounded))
    assert error < naive / 5
