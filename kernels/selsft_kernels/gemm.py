"""Matrix products into preallocated buffers, with fp32 accumulation where it matters.

The vendor's GEMM (cuBLAS, rocBLAS, oneDNN) and not a Triton one: it reaches the peak for every alignment and dtype.
"""

from functools import lru_cache

import torch
from torch import Tensor

# Without a mixed-precision product, fp32 copies of this many rows of an operand exist at a time.
_FALLBACK_ROWS = 8192


@lru_cache(maxsize=8)
def _has_fp32_out(device_type: str, dtype: torch.dtype) -> bool:
    """Whether addmm takes `dtype` operands and writes fp32; tried once, because builds differ (ROCm, XPU)."""
    if device_type != "cuda" or dtype == torch.float32:
        return False
    a = torch.zeros(16, 16, device=device_type, dtype=dtype)
    out = torch.zeros(16, 16, device=device_type)
    try:
        torch.addmm(out, a, a, out_dtype=torch.float32, out=out)
    except (RuntimeError, TypeError, NotImplementedError):
        return False
    return True


def accumulate(acc: Tensor, a: Tensor, b: Tensor, *, first: bool, alpha: float = 1.0) -> None:
    """`acc = [0 if first else acc] + alpha a @ b`; acc [p, q] fp32 or the operands' dtype, a [p, k], b [k, q].

    `first` spares the reading of `acc`, which may be uninitialised: BLAS ignores it when beta is 0. An fp32 `acc` gets
    the product without a rounding to the operands' dtype in between, which would bias long sums of chunks.
    """
    beta = 0.0 if first else 1.0
    if acc.dtype == a.dtype:
        torch.addmm(acc, a, b, beta=beta, alpha=alpha, out=acc)
    elif _has_fp32_out(acc.device.type, a.dtype):
        torch.addmm(acc, a, b, out_dtype=torch.float32, beta=beta, alpha=alpha, out=acc)
    else:
        b = b.float()
        for start in range(0, acc.shape[0], _FALLBACK_ROWS):
            part = acc[start : start + _FALLBACK_ROWS]
            torch.addmm(part, a[start : start + _FALLBACK_ROWS].float(), b, beta=beta, alpha=alpha, out=part)


def product_fp32(a: Tensor, b: Tensor) -> Tensor:
    """`a @ b` in fp32, for small results; a [p, k], b [k, q]."""
    out = torch.empty(a.shape[0], b.shape[1], device=a.device, dtype=torch.float32)
    accumulate(out, a, b, first=True)
    return out
