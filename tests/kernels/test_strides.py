"""Arguments that do not lie compactly in memory: strided, sliced, permuted, expanded, unaligned."""

import pytest
import torch

from tests.support.kernel_strides import FUNCTIONS, check


@pytest.mark.parametrize("seed", range(40))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_any_layout_gives_the_same(function: str, seed: int) -> None:
    check(seed, function, torch.device("cpu"))
