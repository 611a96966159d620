"""Bars for the machine code of the kernels on Hopper (sm_90), which Triton and its assembler make without a GPU.

The row kernel is bound by instructions before it is bound by memory: at 15 instructions a logit, four schedulers a
multiprocessor at 1.755 GHz issue 1.05e9 logits (N = 8192, V = 128256) in 0.53 ms, and at 44 in 1.56 ms, which is as
long as the memory takes for them. `docs/kernel-log.md` has the arithmetic.
"""

import shutil
from pathlib import Path
from typing import Any

import pytest

from selsft_kernels import backend

if not backend.HAS_TRITON:
    pytest.skip("Triton is not installed", allow_module_level=True)
if backend.INTERPRETED:
    pytest.skip("the interpreter replaces the compiler", allow_module_level=True)

from selsft_kernels import fold_triton, rows_triton
from tests.support.kernel_build import (
    EVERYTHING,
    STATISTICS,
    TOOLS,
    Code,
    disassemble,
    fold_kernel,
    row_constants,
    row_kernel,
)

pytestmark = pytest.mark.slow

if not all(shutil.which(tool, path=str(TOOLS)) for tool in ("ptxas", "cuobjdump", "nvdisasm")):
    pytest.skip("this Triton comes without NVIDIA's binary tools", allow_module_level=True)

SOFTCAP = {**STATISTICS, "HAS_SOFTCAP": True}
VOCABULARIES = [128256, 152064]


def per_logit(code: Code, columns: int) -> tuple[float, float]:
    """Instructions a logit of pass 1, the first loop, and of pass 2, the loop with exponentials and stores."""
    lanes, vec, num_warps = rows_triton.launch_shape(columns, 2)
    logits = lanes * vec / (32 * num_warps)
    write = [loop for loop in code.loops if loop.families["STG"] and loop.families["MUFU"]]
    assert len(write) == 1 and code.loops[0].families["MUFU"]
    for loop in (code.loops[0], write[0]):
        assert loop.families["BAR"] == loop.families["SHFL"] == 0
        assert loop.memory and all(name.endswith(".128") for name in loop.memory), loop.memory
    return code.loops[0].length / logits, write[0].length / logits


@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(
    ("constants", "most"),
    [(row_constants(), 15), (STATISTICS, 18), (row_constants(HAS_SOFTCAP=True), 26), (SOFTCAP, 26)],
    ids=["plain", "statistics", "softcap", "softcap+statistics"],
)
def test_row_kernel_sass(constants: dict[str, Any], most: int, vocab: int, tmp_path: Path) -> None:
    code = disassemble(row_kernel(vocab, constants), tmp_path)
    assert sum(per_logit(code, vocab)) <= most
    # 1024 threads of more than 32 registers: no second row on a multiprocessor, whose rows would not stay in the cache
    assert rows_triton.launch_shape(vocab, 2)[2] == 32 and 32 < code.registers <= 40
    assert code.local_bytes == code.families["STL"] == code.families["LDL"] == 0


def test_exponentials_sass(tmp_path: Path) -> None:
    """One a logit, and one a lane of 8 logits for its maximum; the hardware makes a quarter as many as additions."""
    code = disassemble(row_kernel(128256, STATISTICS), tmp_path)
    first, *_ = code.loops
    assert first.families["MUFU"] == 18 and first.instructions["LDG.E.EL.128"] == 2


@pytest.mark.parametrize("vocab", [49152, 50257, 32000, 256000])
@pytest.mark.parametrize("constants", [row_constants(), STATISTICS], ids=["plain", "statistics"])
def test_other_vocabularies_sass(constants: dict[str, Any], vocab: int, tmp_path: Path) -> None:
    """No spills, and wide accesses also where the vocabulary is odd, since the rows of the buffer are padded."""
    code = disassemble(row_kernel(vocab, constants), tmp_path)
    assert sum(per_logit(code, vocab)) <= 18
    assert code.local_bytes == 0


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
def test_all_features_sass(dtype: str, tmp_path: Path) -> None:
    code = disassemble(row_kernel(128256, EVERYTHING, dtype), tmp_path)
    assert code.local_bytes == 0


@pytest.mark.parametrize(("extras", "most"), [(False, 8), (True, 11)])
def test_fold_kernel_sass(extras: bool, most: int, tmp_path: Path) -> None:
    """Scoring: short programs of 128 threads, 12 or more of which fit a multiprocessor."""
    code = disassemble(fold_kernel(4096, extras=extras), tmp_path)
    lanes, vec, num_warps = fold_triton.launch_shape(4096, 2)
    first = code.loops[0]
    assert num_warps == 4 and first.length / (lanes * vec / 128) <= most
    assert first.families["BAR"] == 0 and first.memory == {"LDG.E.EL.128"}
    assert code.registers <= 40 and code.local_bytes == 0


@pytest.mark.parametrize(("vocab", "aligned"), [(128256, True), (50257, False)])
def test_logits_kernel_sass(vocab: int, aligned: bool, tmp_path: Path) -> None:
    """Logits that exist already hold their target, so columns are compared; still no shuffle and no barrier."""
    constants = {**STATISTICS, "MASKED": True, "WRITE_GRAD": False, "KEEP": True, "ALIGNED": aligned}
    code = disassemble(row_kernel(vocab, constants), tmp_path)
    lanes, vec, num_warps = rows_triton.launch_shape(8192, 2)
    first = code.loops[0]
    assert first.length / (lanes * vec / (32 * num_warps)) <= 17
    assert first.families["BAR"] == first.families["SHFL"] == 0
    assert code.local_bytes == 0
