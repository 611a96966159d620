"""The Triton path on arguments that do not lie compactly in memory; see `tests/kernels/test_strides.py`."""

import pytest
import torch

from tests.support.kernel_strides import FUNCTIONS, check

pytestmark = pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning")  # NumPy, inside the interpreter


@pytest.mark.parametrize("seed", range(15))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_layout_gives_the_same(function: str, seed: int, device: torch.device) -> None:
    check(seed, function, device)
