"""The Triton kernels compile to machine code for NVIDIA and AMD GPUs, which needs no GPU.

The interpreter of `tests/triton` runs the arithmetic but not the compiler's type rules. This is the other half of what
can be known without a device; how good the code is, `test_sass.py` asks.
"""

import pytest

from selsft_kernels import FORGET_OBJECTIVES, POSITIVE_OBJECTIVES, backend
from selsft_kernels.objectives import FORGET

if not backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if backend.INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from triton.backends.compiler import GPUTarget

from selsft_kernels import gather_triton, rows_triton, scale_triton
from tests.support.kernel_build import (
    AMPERE,
    EVERYTHING,
    HOPPER,
    MI300,
    STATISTICS,
    build,
    fold_kernel,
    row_constants,
    row_kernel,
)


@pytest.mark.parametrize("target", [HOPPER, AMPERE, MI300], ids=["sm90", "sm80", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_row_kernel(target: GPUTarget, dtype: str) -> None:
    for constants in (row_constants(), EVERYTHING):
        assert row_kernel(128256, constants, dtype, target).asm


@pytest.mark.parametrize(
    ("positive", "forget"),
    [(p, "unlikelihood") for p in POSITIVE_OBJECTIVES] + [("nll", f) for f in FORGET_OBJECTIVES[1:]],
)
def test_objectives(positive: str, forget: str) -> None:
    constants = row_constants(POSITIVE=positive, FORGET=forget, HAS_REFERENCE=FORGET[forget].needs_reference)
    assert row_kernel(1024, constants).asm


@pytest.mark.parametrize("target", [HOPPER, MI300], ids=["sm90", "gfx942"])
def test_other_kernels(target: GPUTarget) -> None:
    assert fold_kernel(4096, extras=True, target=target, HAS_BIAS=True, HAS_SOFTCAP=True).asm
    logits = {**STATISTICS, "MASKED": True, "WRITE_GRAD": False, "KEEP": True, "ALIGNED": False}
    assert row_kernel(50257, logits, target=target).asm
    transform = {"HAS_BIAS": True, "HAS_SOFTCAP": True, "FLIP": True, "NVIDIA": target.backend == "cuda"}
    tile = {"LANES": 512, "VEC": 8, "ALIGNED": True}
    strides = {"out_stride": 4096, "raw_stride": 4096, "vocab": 4096}
    assert build(rows_triton.grad_rows_kernel, target, "bf16", {"num_warps": 4}, strides, **transform, **tile).asm
    sizes = dict.fromkeys(("input_stride", "weight_stride_v", "hidden", "vocab"), 4096)
    sizes |= {"input_stride_h": 1, "weight_stride_h": 1, "first": 0, "ignore_index": -100}
    gather = {"HAS_ROWS": True, "HAS_REFERENCE": True, "HAS_BIAS": True, "COPY": True, "BLOCK": 2048}
    assert build(gather_triton.gather_kernel, target, "bf16", {"num_warps": 4}, sizes, **gather).asm
    width = {"hidden": 4096}
    assert build(scale_triton.scale_rows_kernel, target, "bf16", {"num_warps": 4}, width, BLOCK=2048).asm
