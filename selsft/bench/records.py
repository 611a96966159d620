"""The kernel measurements as lines of a result file, and what they have in common."""

import dataclasses
import datetime
import importlib
import importlib.util
import platform
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch


class Environment(NamedTuple):
    """The columns that are the same in a whole run, the first ones of a `Record`."""

    gpu: str
    driver: str
    torch: str
    triton: str
    sha: str
    date: str


@dataclass(frozen=True)
class Record:
    """Time and memory of one implementation in one case, where and with what.

    `pass_` is `pass` in the file. `data` says whose hidden states these were. `tflops` counts the least arithmetic of
    the pass on the used rows, so that it compares implementations and not how much they recompute. `ratio_to_gemm` is
    the time over that of the bare products, measured in the same process.
    """

    gpu: str
    driver: str
    torch: str
    triton: str
    sha: str
    date: str
    implementation: str
    data: str
    pass_: str
    head: str
    n: int
    h: int
    v: int
    ignored: int
    ms_median: float
    ms_p20: float
    ms_p80: float
    peak_mib: float
    tflops: float
    ratio_to_gemm: float

    @property
    def case(self) -> tuple:
        return self.data, self.pass_, self.head, self.n, self.h, self.v, self.ignored

    @property
    def key(self) -> tuple:
        """What makes two lines measurements of the same thing."""
        return self.gpu, self.implementation, *self.case

    def line(self) -> dict[str, Any]:
        values = {name.rstrip("_"): value for name, value in dataclasses.asdict(self).items()}
        return {"kind": KERNEL} | {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in values.items()}


KERNEL = "kernel"  # the kind of line that a Record is


def kernel_records(lines: list[dict[str, Any]]) -> list[Record]:
    """The kernel measurements among lines, the last one of each."""
    names = {field.name.rstrip("_"): field.name for field in dataclasses.fields(Record)}
    made = (Record(**{names[k]: v for k, v in line.items() if k in names}) for line in lines if line["kind"] == KERNEL)
    return list({record.key: record for record in made}.values())


def environment(device: torch.device) -> Environment:
    cuda = device.type == "cuda"
    return Environment(
        gpu=torch.cuda.get_device_name(device) if cuda else f"CPU {_cpu_name()}, {torch.get_num_threads()} thread(s)",
        driver=_output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if cuda else "",
        torch=torch.__version__,
        triton=importlib.import_module("triton").__version__ if importlib.util.find_spec("triton") else "",
        sha=_sha(),
        date=datetime.date.today().isoformat(),
    )


def file_stem(device: torch.device) -> str:
    """`kernels-<gpu>`, for example `kernels-nvidia-h100-80gb-hbm3`, or `kernels-cpu`."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    return "kernels-" + re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    text = info.read_text() if info.exists() else ""
    found = re.search(r"model name\s*:\s*(.+)", text)
    return found.group(1).strip() if found else platform.processor() or platform.machine()


def _sha() -> str:
    here = Path(__file__).parent
    sha = _output("git", "-C", str(here), "rev-parse", "--short", "HEAD")
    kernels = here.parents[1] / "kernels"
    changed = sha and _output("git", "-C", str(here), "status", "--porcelain", "--", str(kernels))
    return f"{sha}+changes" if changed else sha


def _output(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().splitlines()[0] if done.stdout.strip() else ""
