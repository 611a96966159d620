"""`selective_cross_entropy` against fp64, and its promise to write over the logits only when asked and only once."""

import pytest
import torch

from selsft_kernels import rows, selective_cross_entropy
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem, problem, relative

TOLERANCE = 2e-5


def check(p: Problem, z: torch.Tensor, **overrides: object) -> None:
    actual = call.logits(p, z, **overrides)
    leaf = z.detach().double().requires_grad_()
    transformed = oracle.head_transform(leaf, p.options)
    lp, l1mp = oracle.log_probabilities(transformed, p.target)
    loss = oracle.token_losses(lp, l1mp, p, transformed).sum()
    (grad,) = torch.autograd.grad(loss, leaf)
    expected = oracle.statistics(transformed.detach(), lp.detach(), p.target, oracle.used(p))
    expected |= {"loss": loss.detach(), "d_logits": grad}
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in expected.items():
        assert relative(actual[name], value) < TOLERANCE, name


def logits_of(p: Problem) -> torch.Tensor:
    return 3 * torch.randn(p.target.shape[0], p.weight.shape[0], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("vocab", [2, 7, 257, 500])
@pytest.mark.parametrize("n", [1, 3, 63])
def test_shapes(n: int, vocab: int, inplace_backward: bool) -> None:
    p = problem(rows=n, vocab=vocab)
    check(p, logits_of(p), inplace_backward=inplace_backward)


@pytest.mark.parametrize("forget", ["unlikelihood", "probability", "npo", "wga", "gradient_ascent"])
def test_objectives(forget: str) -> None:
    p = problem(rows=40, forget=forget, beta=0.7, floor=-4.0, softcap=4.0, logit_scale=1.3)
    check(p, logits_of(p))


def test_several_blocks_of_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rows, "_CACHED_ELEMENTS", 100)
    p = problem(rows=11)
    check(p, logits_of(p))


def test_the_logits_are_left_alone_unless_asked() -> None:
    p = problem()
    z = logits_of(p).requires_grad_()
    before = z.detach().clone()
    for inplace in (False, True):
        scratch = z * 1
        loss = selective_cross_entropy(scratch, p.target, p.token_weight, inplace_backward=inplace).loss
        assert torch.equal(scratch, before)
        loss.backward()
        assert torch.equal(scratch, before) != inplace


def test_a_second_backward_over_overwritten_logits_is_refused() -> None:
    p = problem()
    scratch = logits_of(p).requires_grad_() * 1
    loss = selective_cross_entropy(scratch, p.target, p.token_weight, inplace_backward=True).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_leading_shape_and_nothing_to_compute() -> None:
    p = problem(rows=12, vocab=9)
    z = logits_of(p).view(3, 4, 9).requires_grad_()
    out = selective_cross_entropy(z, p.target.view(3, 4), p.token_weight.view(3, 4))
    assert out.logprob is not None and out.logprob.shape == (3, 4)
    none = selective_cross_entropy(z, p.target.view(3, 4), torch.zeros(3, 4))
    none.loss.backward()
    assert none.loss.item() == 0.0 and z.grad is not None and not z.grad.any()


def test_not_finite_logits_make_the_loss_nan() -> None:
    for value in (torch.nan, torch.inf):
        z = torch.zeros(2, 5)
        z[1, 3] = value
        for target in (3, 0):
            loss = selective_cross_entropy(z, torch.tensor([0, target]), torch.ones(2)).loss
            assert torch.isnan(loss)


def test_a_masked_vocabulary_entry_is_allowed() -> None:
    """-inf at columns other than the target is how generation masks a token; it has probability 0."""
    z = torch.zeros(1, 5)
    z[0, 3] = -torch.inf
    z.requires_grad_()
    loss = selective_cross_entropy(z, torch.tensor([0]), torch.ones(1)).loss
    loss.backward()
    assert loss.item() == pytest.approx(torch.log(torch.tensor(4.0)).item())
    assert z.grad is not None and z.grad[0, 3] == 0.0 and z.grad.isfinite().all()


def test_skipped_rows_may_hold_anything() -> None:
    p = problem(rows=4, vocab=9)
    p.target.copy_(torch.tensor([2, 2, -100, 5]))
    p.token_weight.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    z = torch.randn(4, 9)
    z[1:3] = torch.nan
    result = call.logits(p, z)
    assert result["loss"].isfinite() and result["d_logits"][[0, 3]].isfinite().all()
    for name in ("d_logits", "logprob", "entropy", "is_top1"):
        assert not result[name][1:3].any(), name


def test_anchor_to_the_reference() -> None:
    p = problem(rows=40, anchor=0.7, floor=-4.0)
    check(p, logits_of(p))


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 3.0, "logit_scale": -1.7, "anchor": 0.7}], ids=["plain", "others"]
)
def test_z_loss(options: dict) -> None:
    p = problem(rows=40, z_loss=0.02, floor=-4.0, **options)
    check(p, logits_of(p))


def test_positives_gated_by_entropy() -> None:
    p = problem(rows=40, entropy_gate=2.5, floor=-4.0)
    check(p, logits_of(p))
