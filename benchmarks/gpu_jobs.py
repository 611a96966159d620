"""The jobs of `gpu_check.py`: `gpu_jobs.py NAME --lines FILE --arguments JSON`. Each appends what it measures to the
file, a line for each figure.

`--cpu` runs them on the CPU, to try them out; nothing of that is a result.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from gpu_check import UNAVAILABLE

from selsft.bench import accuracy, cases, kernels, lines, peers, records
from selsft.bench.measure import copy_bandwidth, measure
from selsft_kernels import linear_logprob, linear_selective_cross_entropy

ROOT = Path(__file__).resolve().parents[1]
STATISTICS = ("logprob", "entropy", "is_top1")
# Nsight Compute's counters: time, bytes through memory, instructions, and what bounds the kernel.
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "dram__bytes_read.sum": "read",
    "dram__bytes_write.sum": "written",
    "smsp__inst_executed.sum": "instructions",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "processors busy",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory busy",
}


class Jobs:
    """One method a job; what it returns is whether something failed."""

    def __init__(self, path: Path, resume: bool, cpu: bool):
        self.path, self.resume = path, resume
        self.device = torch.device("cpu" if cpu else "cuda")
        self.dtype = torch.float32 if cpu else torch.bfloat16
        self.seconds = 0.0 if cpu else 1.0
        self.where = records.environment(self.device)._asdict()

    def add(self, kind: str, name: str, value: float | str | None, **more: Any) -> None:
        lines.append(self.path, {"kind": kind, **self.where, "name": name, "value": value, **more})

    def case(self, rows: int, hidden: int, vocab: int) -> cases.Case:
        return cases.make_case(rows, hidden, vocab, 0, self.device, self.dtype)

    def ceilings(self) -> bool:
        """What the device can do at all: bytes copied a second, and products of the shapes of the bars."""
        gpu = self.device.type == "cuda"
        self.add("ceiling", "copy, TB/s", copy_bandwidth(self.device, 4096 if gpu else 16) / 1e12)
        for n, k, m in ((8192, 8192, 8192), (8192, 4096, 128256), (1024, 4096, 128256)) if gpu else ((64, 64, 64),):
            a = torch.randn(n, k, device=self.device, dtype=self.dtype)
            b = torch.randn(m, k, device=self.device, dtype=self.dtype).t()
            out = torch.empty(n, m, device=self.device, dtype=self.dtype)
            ms = measure(lambda a=a, b=b, out=out: torch.mm(a, b, out=out), self.device, self.seconds).ms_median
            self.add("ceiling", f"product {n} x {k} x {m}, TFLOP/s", 2e-9 * n * k * m / ms)
        return False

    def tests(self) -> bool:
        """The GPU tests in one process; in a new one from where it ended too early; then each that failed alone.

        An illegal memory access breaks all later tests of its process, and a hanging one keeps them from running.
        """
        passed = set()
        if self.resume:
            passed = {d["name"] for d in lines.read(self.path, "test") if d["value"] in ("passed", "skipped")}
        files = ["tests/triton", "tests/training/test_device_step.py"]
        if self.device.type == "cpu":
            files = ["tests/kernels/test_objectives.py"]
        names = [name for name in _collected(files) if name not in passed]
        outcomes: dict[str, str] = {}
        left = names
        while left:
            outcomes |= _pytest(left, self._outcome, 150)
            left = [name for name in left if name not in outcomes]
            if left:  # it ended within the first of these
                outcomes[left[0]] = "did not finish"
                self._outcome(left[0], "did not finish")
        for name in [name for name in names if outcomes[name] == "failed"]:
            outcomes |= _pytest([name], self._outcome, 60)
        return any(outcomes[name] not in ("passed", "skipped") for name in names)

    def _outcome(self, name: str, outcome: str) -> None:
        self.add("test", name, outcome)

    def memcheck(self) -> bool:
        """compute-sanitizer over one small call of each function, where it is installed."""
        tool = shutil.which("compute-sanitizer")
        if tool is None:
            self.add("test", "memcheck", "skipped", reason="compute-sanitizer is not installed")
            return False
        command = [tool, "--tool", "memcheck", "--error-exitcode", "9", *_self("small")]
        code = subprocess.run(command).returncode
        self.add("test", "memcheck", "passed" if code == 0 else "failed")
        return code != 0

    def small(self) -> bool:
        """What memcheck watches: odd sizes, all features, both passes."""
        g = torch.Generator(self.device).manual_seed(0)
        for vocab in (1003, 4096):
            hidden = torch.randn(37, 72, generator=g, device=self.device, dtype=self.dtype).requires_grad_()
            weight = torch.randn(vocab, 72, generator=g, device=self.device, dtype=self.dtype).requires_grad_()
            target = torch.randint(0, vocab, (37,), generator=g, device=self.device)
            token_weight = torch.randn(37, generator=g, device=self.device)
            for softcap in (None, 30.0):
                out = linear_selective_cross_entropy(
                    hidden, weight, target, token_weight, softcap=softcap, outputs=STATISTICS
                )
                out.loss.backward()
                linear_logprob(hidden, weight, target, softcap=softcap, outputs=STATISTICS).logprob.sum().backward()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return False

    def kernels(self, implementations: list[str], rows: list[int], ignored: list[int], **of: Any) -> int:
        shapes = tuple(tuple(shape) for shape in of.get("shapes", ()))
        states = Path(of["states"]) if "states" in of else None
        notes, failed = kernels.run(
            self.path, tuple(rows), shapes, tuple(ignored), implementations, self.device, self.seconds,
            states=states, resume=self.resume,
        )  # fmt: skip
        for note in notes:
            print(note)
            self.add("note", note, None)
        found = records.kernel_records(lines.read(self.path))
        measured = any(r.gpu == self.where["gpu"] and r.implementation in implementations for r in found)
        return 1 if failed else 0 if measured else UNAVAILABLE

    def errors(self, hidden: int, vocab: int) -> bool:
        for name, value in accuracy.measure_errors(self.device, hidden, vocab, self.dtype).items():
            self.add("error", name, value)
        return False

    def profile(self, rows: int, hidden: int, vocab: int) -> bool:
        """Milliseconds of every kernel in a step, as torch's profiler sees them."""
        case = self.case(rows, hidden, vocab)
        kinds = [
            ("scoring", peers.FORWARD, False),
            ("frozen", peers.TRAINING, False),
            ("trained", peers.TRAINING, True),
        ]
        gpu = self.device.type == "cuda"
        activity = torch.profiler.ProfilerActivity.CUDA if gpu else torch.profiler.ProfilerActivity.CPU
        for title, pass_, trained in kinds:
            step = peers.selsft_statistics(case, pass_, trained)
            step(), step()
            with torch.profiler.profile(activities=[activity]) as profile:
                step()
                if gpu:
                    torch.cuda.synchronize()
            events = sorted(profile.key_averages(), key=lambda e: -_microseconds(e, gpu))
            for event in events[:12]:
                ms = _microseconds(event, gpu) / 1000
                self.add("profile", event.key[:100], ms, step=title, calls=event.count, n=rows, h=hidden, v=vocab)
        return False

    def chunks(self, rows: int, hidden: int, vocab: int) -> bool:
        """Milliseconds of a step by the rows of a chunk; None is the choice of `chunking.training_rows`."""
        case = self.case(rows, hidden, vocab)
        for trained in (False, True):
            for size in (None, 512, 1024, 2048, 4096, 8192):

                def loss(x, w, size=size):
                    out = linear_selective_cross_entropy(
                        x,
                        w,
                        case.target,
                        case.token_weight,
                        active_rows=case.rows,
                        outputs=STATISTICS,
                        chunk_size=size,
                    )
                    return out.loss

                ms = measure(peers.differentiated(case, trained, loss), self.device, self.seconds / 2).ms_median
                head = "trained" if trained else "frozen"
                self.add("chunks", f"{head}, {size or 'chosen'} rows", ms, n=rows, h=hidden, v=vocab)
        return False

    def counters(self, rows: int, hidden: int, vocab: int) -> bool:
        """Nsight Compute on one launch of each of our kernels, where it is installed."""
        tool = shutil.which("ncu")
        if tool is None:
            self.add("note", "no counters: ncu is not installed", None)
            return False
        command = [
            tool, "--csv", "--metrics", ",".join(COUNTERS), "--kernel-name", "regex:_kernel$", "--launch-count", "12",
            *_self("once", rows=rows, hidden=hidden, vocab=vocab),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        print(done.stdout, done.stderr)
        table = "".join(row for row in done.stdout.splitlines(keepends=True) if row.startswith('"'))
        found = list(csv.DictReader(io.StringIO(table)))
        for row in found:
            if row["Metric Name"] in COUNTERS:
                name = f"{row['Kernel Name']} {row['ID']}: {COUNTERS[row['Metric Name']]}, {row['Metric Unit']}"
                self.add("counter", name, float(row["Metric Value"].replace(",", "")), n=rows, h=hidden, v=vocab)
        return done.returncode != 0 or not found

    def once(self, rows: int, hidden: int, vocab: int) -> bool:
        """What Nsight Compute watches."""
        case = self.case(rows, hidden, vocab)
        peers.selsft(case, peers.FORWARD, False)()
        peers.selsft_statistics(case, peers.TRAINING, False)()
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return False


def _microseconds(event: Any, gpu: bool) -> float:
    return event.self_device_time_total if gpu else event.self_cpu_time_total


def _self(name: str, **arguments: Any) -> list[str]:
    """This program with another job, whose lines nobody wants."""
    return [sys.executable, __file__, name, "--lines", "/dev/null", "--arguments", json.dumps(arguments)]


def _collected(files: list[str]) -> list[str]:
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", *files]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    print(done.stdout[-2000:], done.stderr[-2000:])
    return [line for line in done.stdout.splitlines() if "::" in line]


def _pytest(names: list[str], keep: Any, seconds: float) -> dict[str, str]:
    """Runs these tests; `keep(name, outcome)` for each as soon as it has one. Returns the outcomes."""
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-rf",
        "--maxfail=100",
        "-p",
        "no:cacheprovider",
        "--tb=short",
        *names,
    ]
    command = ["timeout", "--kill-after=5", str(seconds), *command]
    found: dict[str, str] = {}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            if match := re.match(r"(\S+::.*) (PASSED|FAILED|SKIPPED|ERROR|XFAIL)\b", line):
                name, outcome = match.group(1).strip(), match.group(2).lower()
                if found.get(name) != "failed":  # a teardown may follow
                    found[name] = outcome
                    keep(name, outcome)
    print(Counter(found.values()))
    return found


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=[name for name in vars(Jobs) if not name.startswith("_")])
    parser.add_argument("--lines", type=Path, required=True)
    parser.add_argument("--arguments", type=json.loads, default={})
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--cpu", action="store_true")
    options = parser.parse_args(argv)
    return int(getattr(Jobs(options.lines, options.resume, options.cpu), options.name)(**options.arguments))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
