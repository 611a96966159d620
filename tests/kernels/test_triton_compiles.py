"""The Triton kernels compile to machine code for NVIDIA and AMD GPUs, which needs no GPU; and without register spills.

The interpreter of `tests/triton` runs the arithmetic but not the compiler's type rules. This is the other half of what
can be known without a device.
"""

import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest

from selsft_kernels import FORGET_OBJECTIVES, POSITIVE_OBJECTIVES, backend

if not backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if backend.INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selsft_kernels import fold_triton, rows_triton, target_dot_triton

HOPPER, AMPERE, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)
POINTERS = {
    "target_ptr": "*i64",
    "column_ptr": "*i64",
    "is_top1_ptr": "*i1",
}
FLOATS = {"scale", "softcap", "beta", "floor", "lora_scale"}
LONG = {"raw_stride", "out_stride", "x_stride", "weight_stride_v", "lora_b_stride"}
DATA = {"raw_ptr", "out_ptr", "x_ptr", "weight_ptr", "lora_b_ptr"}


def build(kernel: Any, target: GPUTarget, dtype: str, num_warps: int, **constants: Any) -> Any:
    def type_of(name: str) -> str:
        if name in constants:
            return "constexpr"
        if name in FLOATS:
            return "fp32"
        if name.endswith("_ptr"):
            return POINTERS.get(name) or (f"*{dtype}" if name in data else "*fp32")
        return "i64" if name in LONG else "i32"

    names = kernel.arg_names
    # `weight_ptr` is the head in the dot, and the token weights elsewhere; `out_ptr` of the dot is fp32.
    data = DATA - ({"out_ptr"} if kernel is target_dot_triton.target_dot_kernel else {"weight_ptr"})
    places = {(names.index(name),): value for name, value in constants.items()}
    aligned = ("raw_ptr", "raw_stride", "readable", "x_ptr", "x_stride", "weight_ptr", "weight_stride_v", "hidden")
    hints = {(names.index(n),): [["tt.divisibility", 16]] for n in aligned if n in names and n not in constants}
    source = ASTSource(kernel, {name: type_of(name) for name in names}, places, hints)
    return triton.compile(source, target=target, options={"num_warps": num_warps})


def row_constants(**changes: Any) -> dict[str, Any]:
    names = ("HAS_REFERENCE", "HAS_BIAS", "HAS_SOFTCAP", "ENTROPY", "IS_TOP1", "KEEP")
    return {"POSITIVE": "nll", "FORGET": "unlikelihood", **dict.fromkeys(names, False), "WRITE_GRAD": True} | changes


EVERYTHING = row_constants(HAS_REFERENCE=True, HAS_BIAS=True, HAS_SOFTCAP=True, ENTROPY=True, IS_TOP1=True, KEEP=True)


@pytest.mark.parametrize("target", [HOPPER, AMPERE, MI300], ids=["sm90", "sm80", "gfx942"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_row_kernel(target: GPUTarget, dtype: str) -> None:
    num_warps = 32 if target.warp_size == 32 else 16
    for constants in (row_constants(), EVERYTHING):
        extras = constants["ENTROPY"]
        block, _ = rows_triton.launch_shape(128256, extras=extras)
        assert build(rows_triton.loss_rows_kernel, target, dtype, num_warps, BLOCK=block, **constants).asm


@pytest.mark.parametrize(
    ("positive", "forget"),
    [(p, "unlikelihood") for p in POSITIVE_OBJECTIVES] + [("nll", f) for f in FORGET_OBJECTIVES[1:]],
)
def test_objectives(positive: str, forget: str) -> None:
    constants = row_constants(POSITIVE=positive, FORGET=forget, HAS_REFERENCE=forget == "npo")
    assert build(rows_triton.loss_rows_kernel, HOPPER, "bf16", 8, BLOCK=1024, **constants).asm


@pytest.mark.parametrize("target", [HOPPER, MI300], ids=["sm90", "gfx942"])
def test_other_kernels(target: GPUTarget) -> None:
    features = {"HAS_BIAS": True, "HAS_SOFTCAP": True}
    fold = {"ENTROPY": True, "IS_TOP1": True, "BLOCK": 8192}
    assert build(fold_triton.fold_kernel, target, "bf16", 16, **features, **fold).asm
    assert build(rows_triton.grad_rows_kernel, target, "bf16", 8, **features, BLOCK=4096).asm
    dot = {"HAS_BIAS": True, "HAS_LORA": True, "BLOCK": 2048, "RANK_BLOCK": 16, "weight_stride_h": 1}
    assert build(target_dot_triton.target_dot_kernel, target, "bf16", 4, **dot).asm


@pytest.mark.parametrize("extras", [False, True])
def test_wide_loads_and_no_spills_on_hopper(extras: bool, tmp_path: Path) -> None:
    """As launched: 16 bytes a thread also for a vocabulary that is not a multiple of 16, and all in registers."""
    tools = Path(triton.__file__).parent / "backends/nvidia/bin"
    if not shutil.which("cuobjdump", path=str(tools)):
        pytest.skip("this Triton has no cuobjdump")
    block, num_warps = rows_triton.launch_shape(50257, extras=extras)
    constants = row_constants(ENTROPY=extras, IS_TOP1=extras, HAS_SOFTCAP=extras)
    compiled = build(rows_triton.loss_rows_kernel, HOPPER, "bf16", num_warps, BLOCK=block, **constants)
    binary = tmp_path / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def read(tool: str, option: str) -> str:
        return subprocess.run([tools / tool, option, binary], capture_output=True, text=True, check=True).stdout

    assert re.search(r"STACK:0\b", read("cuobjdump", "--dump-resource-usage"))
    code = read("nvdisasm", "-c")
    assert "STL" not in code
    loads = re.findall(r"LDG\.E(?:\.\w+)*", code)
    assert sum(".128" in load for load in loads) >= 2
    # 2 bytes are loaded once, for the target's own logit in the arg-max.
    assert sum("U16" in load for load in loads) == int(extras)
