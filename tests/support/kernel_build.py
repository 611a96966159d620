"""Compiles the Triton kernels ahead of time, as they are launched, and reads the machine code; needs no GPU."""

import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from selsft_kernels import fold_triton, gather_triton, rows_triton
from selsft_kernels.chunking import padded

HOPPER, AMPERE, MI300 = GPUTarget("cuda", 90, 32), GPUTarget("cuda", 80, 32), GPUTarget("hip", "gfx942", 64)
TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"
POINTERS = {"is_top1_ptr": "*i1"} | dict.fromkeys(("target_ptr", "target_out_ptr", "column_ptr", "rows_ptr"), "*i64")
FLOATS = {"scale", "softcap", "beta", "floor", "gate", "anchor", "z_loss", "lora_scale"}
DATA = {"raw_ptr", "out_ptr", "x_ptr", "input_ptr", "weight_ptr"}


def build(
    kernel: Any, target: GPUTarget, dtype: str, options: dict[str, int], integers: dict[str, int], **constants: Any
) -> Any:
    """A compiled kernel for pointers at multiples of 16 bytes and these integers, specialised as a launch would."""
    names = kernel.arg_names
    # `weight_ptr` is the head in the gather, and the token weights elsewhere.
    data = DATA - (set() if kernel is gather_triton.gather_kernel else {"weight_ptr"})
    signature, hints = {}, {}
    for place, name in enumerate(names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in FLOATS:
            signature[name] = "fp32"
        elif name.endswith("_ptr"):
            signature[name] = POINTERS.get(name) or (f"*{dtype}" if name in data else "*fp32")
            hints[(place,)] = [["tt.divisibility", 16]]
        else:
            signature[name] = "i32"
            if integers[name] % 16 == 0:
                hints[(place,)] = [["tt.divisibility", 16]]
    places = {(names.index(name),): value for name, value in constants.items()}
    return triton.compile(ASTSource(kernel, signature, places, hints), target=target, options=options)


def row_constants(**changes: Any) -> dict[str, Any]:
    names = (
        "HAS_REFERENCE",
        "HAS_BIAS",
        "HAS_SOFTCAP",
        "FLIP",
        "ENTROPY",
        "GATE",
        "ANCHOR",
        "ZLOSS",
        "IS_TOP1",
        "KEEP",
        "MASKED",
    )
    plain = {"POSITIVE": "nll", "FORGET": "unlikelihood", "NVIDIA": True, "WRITE_GRAD": True, "ALIGNED": True}
    return {**plain, **dict.fromkeys(names, False), **changes}


STATISTICS = row_constants(ENTROPY=True, IS_TOP1=True)
EVERYTHING = row_constants(
    HAS_REFERENCE=True,
    HAS_BIAS=True,
    HAS_SOFTCAP=True,
    FLIP=True,
    ENTROPY=True,
    GATE=True,
    ANCHOR=True,
    ZLOSS=True,
    IS_TOP1=True,
    KEEP=True,
    FORGET="npo",
)


def row_kernel(vocab: int, constants: dict[str, Any], dtype: str = "bf16", target: GPUTarget = HOPPER) -> Any:
    """The row kernel as launched for `vocab` columns."""
    want_grad = constants["WRITE_GRAD"]
    lanes, vec, num_warps = rows_triton.launch_shape(
        vocab if want_grad else min(vocab, 8192), 4 if dtype == "fp32" else 2
    )
    nvidia = target.backend == "cuda"
    options = {"num_warps": min(num_warps, 32 if nvidia else 16)}
    if nvidia and want_grad:
        options["maxnreg"] = rows_triton.register_limit(vocab)
    stride = padded(vocab) if want_grad else vocab
    integers = {"raw_stride": stride, "vocab": vocab, "readable": stride}
    chosen = {**constants, "NVIDIA": nvidia, "LANES": lanes, "VEC": vec}
    return build(rows_triton.loss_rows_kernel, target, dtype, options, integers, **chosen)


def fold_kernel(width: int, *, extras: bool, target: GPUTarget = HOPPER, **changes: Any) -> Any:
    lanes, vec, num_warps = fold_triton.launch_shape(width, 2)
    integers = dict.fromkeys(("raw_stride", "width", "readable"), width)
    constants = {**dict.fromkeys(("HAS_BIAS", "HAS_SOFTCAP", "FLIP"), False), "ENTROPY": extras, "IS_TOP1": extras}
    constants |= {"NVIDIA": target.backend == "cuda", "LANES": lanes, "VEC": vec, **changes}
    return build(fold_triton.fold_kernel, target, "bf16", {"num_warps": num_warps}, integers, **constants)


class Loop(NamedTuple):
    """An innermost loop of the machine code."""

    instructions: Counter  # by name with modifiers, for example LDG.E.128
    families: Counter  # by name without

    @property
    def length(self) -> int:
        return self.families.total()

    @property
    def memory(self) -> set[str]:
        return {name for name in self.instructions if name.startswith(("LDG", "STG"))}


class Code(NamedTuple):
    """What the assembler made of a kernel for NVIDIA."""

    registers: int
    local_bytes: int
    families: Counter
    loops: list[Loop]  # in the order of the program


def disassemble(compiled: Any, folder: Path) -> Code:
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])

    def read(tool: str, option: str) -> str:
        return subprocess.run([TOOLS / tool, option, binary], capture_output=True, text=True, check=True).stdout

    usage = re.search(r"REG:(\d+) STACK:(\d+)", read("cuobjdump", "--dump-resource-usage"))
    assert usage is not None
    names, labels, jumps = [], {}, []
    for line in read("nvdisasm", "-c").splitlines():
        if label := re.match(r"\s*(\.L_x_\d+):", line):
            labels[label.group(1)] = len(names)
        elif found := re.search(r"/\*[0-9a-f]+\*/\s+(?:@!?U?P\d+\s+)?([A-Z0-9_.]+)", line):
            if jump := re.search(r"BRA.*`\((\.L_x_\d+)\)", line):
                jumps.append((jump.group(1), len(names)))
            names.append(found.group(1))
    spans = [(labels[label], end) for label, end in jumps if labels.get(label, end) < end]
    inner = [s for s in spans if not any(o != s and s[0] <= o[0] and o[1] <= s[1] for o in spans)]
    loops = []
    for start, end in sorted(inner):
        body = names[start : end + 1]
        loops.append(Loop(Counter(body), Counter(name.split(".")[0] for name in body)))
    families = Counter(name.split(".")[0] for name in names)
    return Code(int(usage.group(1)), int(usage.group(2)), families, loops)
