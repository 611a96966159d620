"""Products of 16-bit operands into fp32: a way is taken only if its values are right."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from selsft_kernels import gemm
from selsft_kernels.gemm import accumulate, product_is_right

REAL_ADDMM, REAL_MM = torch.addmm, torch.mm


def right_addmm(addend: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    if options.pop("out_dtype", None) is not None:
        a, b = a.float(), b.float()
    return REAL_ADDMM(addend.clone(), a, b, **options)


def rounded_addmm(addend: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """Accepts the fp32 output and rounds the product on the way to it."""
    target = options.pop("out", torch.empty_like(addend))
    return target.copy_(options.get("beta", 1.0) * addend + options.get("alpha", 1.0) * REAL_MM(a, b).float())


def forgetful_addmm(addend: torch.Tensor, a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    """Drops the addend."""
    return options["out"].copy_(options.get("alpha", 1.0) * REAL_MM(a.float(), b.float()))


def right_mm(a: torch.Tensor, b: torch.Tensor, **options: Any) -> torch.Tensor:
    return REAL_MM(a.float(), b.float()) if "out_dtype" in options else REAL_MM(a, b, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("addmm", "right"), [(right_addmm, True), (rounded_addmm, False), (forgetful_addmm, False), (REAL_ADDMM, False)]
)
def test_the_value_decides(addmm: Callable, right: bool, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """`REAL_ADDMM` stands for a build without the product, as the CPU's."""
    monkeypatch.setattr(torch, "addmm", addmm)
    assert product_is_right("addmm", "cpu", dtype) == right


@pytest.mark.parametrize("way", ["addmm", "mm", "copies"])
@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("alpha", [1.0, -0.5])
def test_every_way_gives_the_same(way: str, first: bool, alpha: float, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "addmm", right_addmm)
    monkeypatch.setattr(torch, "mm", right_mm)
    monkeypatch.setattr(gemm, "mixed_product", lambda device_type, dtype: way)
    monkeypatch.setattr(gemm, "_FALLBACK_ROWS", 5)
    a, b = torch.randn(13, 7).bfloat16(), torch.randn(7, 9).bfloat16()
    acc = torch.full((13, 9), torch.nan) if first else torch.randn(13, 9)
    expected = alpha * (a.double() @ b.double()) + (0.0 if first else acc.double())
    accumulate(acc, a, b, first=first, alpha=alpha)
    assert torch.allclose(acc.double(), expected, atol=1e-5)
