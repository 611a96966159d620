"""Matrix products into preallocated buffers, with fp32 accumulation where it matters.

The vendor's GEMM (cuBLAS, rocBLAS, oneDNN) and not a Triton one: it reaches the peak for every alignment and dtype.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Without a mixed-precision sum, copies or products of this many rows exist in fp32 at a time.
_FALLBACK_ROWS = 8192


def accumulate(acc: Tensor, a: Tensor, b: Tensor, *, first: bool, alpha: float = 1.0) -> None:
    """`acc = [0 if first else acc] + alpha a @ b`; acc [p, q] fp32 or the operands' dtype, a [p, k], b [k, q].

    `first` spares the reading of `acc`, which may be uninitialised: BLAS ignores it when beta is 0. An fp32 `acc` gets
    the product without a rounding to the operands' dtype in between, which would bias long sums of chunks.
    """
    beta = 0.0 if first else 1.0
    if acc.dtype == a.dtype:
        torch.addmm(acc, a, b, beta=beta, alpha=alpha, out=acc)
        return
    way = mixed_product(acc.device.type, a.dtype)
    if way == "addmm":
        torch.addmm(acc, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=acc)
        return
    wide = b if way == "mm" else b.float()
    for start in range(0, acc.shape[0], _FALLBACK_ROWS):
        part, rows = acc[start : start + _FALLBACK_ROWS], a[start : start + _FALLBACK_ROWS]
        if way == "mm":
            product = torch.mm(rows, wide, out_dtype=torch.float32)
            torch.mul(product, alpha, out=part) if first else part.add_(product, alpha=alpha)
        else:
            torch.addmm(part, rows.float(), wide, beta=beta, alpha=alpha, out=part)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, for small results; a [p, k], b [k, q]."""
    out = torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=torch.float32)
    accumulate(out, a, b, first=True)
    return out


@lru_cache(maxsize=8)
def mixed_product(device_type: str, dtype: torch.dtype) -> str:
    """How `dtype` operands are multiplied into fp32: `"addmm"`, `"mm"` (the sum apart), or `"copies"` of them in fp32.

    Tried once, because builds differ: torch takes an fp32 addend only since the end of 2025, and not on every backend.
    A product that does not raise need not be right, so the values are compared too.
    """
    if device_type == "cpu" or dtype == torch.float32:  # oneDNN has no such product
        return "copies"
    return next((way for way in ("addmm", "mm") if product_is_right(way, device_type, dtype)), "copies")


def product_is_right(way: str, device_type: str, dtype: torch.dtype) -> bool:
    """Whether `3 + 2 a @ b` comes out exactly. Integers below 256 are exact in 16 bits, their sums only in fp32."""
    numbers = torch.arange(256, dtype=torch.float32, device=device_type).reshape(16, 16)
    a, b = numbers, numbers.remainder(127) - 63
    expected = 3 + 2 * (a.unsqueeze(2) * b.unsqueeze(0)).sum(1)
    out = torch.full_like(expected, 3)
    try:
        if way == "addmm":
            torch.addmm(out, a.to(dtype), b.to(dtype), out_dtype=torch.float32, alpha=2.0, out=out)
        else:
            out.add_(torch.mm(a.to(dtype), b.to(dtype), out_dtype=torch.float32), alpha=2.0)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return torch.equal(out, expected)
