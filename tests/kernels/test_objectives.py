"""The table of objectives: every derivative is that of its value, and what the table says of each one is true."""

import math

import pytest
import torch

from selsft_kernels import FORGET_OBJECTIVES, POSITIVE_OBJECTIVES
from selsft_kernels.objectives import FORGET, POSITIVE, Formula, Objective, gated
from tests.kernels.test_linear_loss import OBJECTIVES

ALL = {**POSITIVE, **FORGET}
M = torch.linspace(-30.0, 30.0, 61, dtype=torch.float64)
REFERENCE = torch.full_like(M, -1.5)


def test_names() -> None:
    assert POSITIVE_OBJECTIVES == ("nll", "dft")
    assert FORGET_OBJECTIVES == ("unlikelihood", "probability", "npo", "wga", "gradient_ascent")


def test_the_tests_against_fp64_go_through_all() -> None:
    assert {o.get("positive", "nll") for o in OBJECTIVES} == set(POSITIVE_OBJECTIVES)
    assert {o["forget"] for o in OBJECTIVES} == set(FORGET_OBJECTIVES)


@pytest.mark.parametrize("name", [n for n in ALL if n != "dft"])  # its probability is held fixed
def test_the_derivative_is_that_of_the_value(name: str) -> None:
    m = M.clone().requires_grad_()
    value, grad = ALL[name].loss(m, REFERENCE, 0.7)
    (expected,) = torch.autograd.grad(value.sum(), m)
    assert torch.allclose(grad, expected, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ALL)
def test_flags(name: str) -> None:
    formula: Formula = ALL[name]
    plain = formula.loss(M, REFERENCE, 1.0)
    assert formula.needs_beta != all(map(torch.equal, formula.loss(M, REFERENCE, 2.0), plain))
    assert formula.needs_reference != all(map(torch.equal, formula.loss(M, REFERENCE - 1, 1.0), plain))
    far, _ = formula.loss(torch.tensor([-1e6]), torch.tensor([-1.5]), 1.0)
    assert formula.bounded == (far.item() > -math.e) or name in POSITIVE


def test_the_gate() -> None:
    """Rounding may leave an entropy below 0, which must not turn a positive token into a negative one."""
    weight, entropy = torch.tensor([2.0, 2.0, 2.0, -1.0, -1.0]), torch.tensor([-1e-7, 1.0, 9.0, 1.0, 9.0])
    assert gated(weight, entropy, Objective(entropy_gate=4.0)).tolist() == [0.0, 0.5, 2.0, -1.0, -1.0]
    assert gated(weight, entropy, Objective()) is weight
