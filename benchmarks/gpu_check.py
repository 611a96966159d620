"""Everything that needs a GPU, in parts of at most ten minutes, none of which can cost the others their results.

    python benchmarks/gpu_check.py                          # all parts, in this order
    python benchmarks/gpu_check.py --only main long --resume --budget-seconds 540
    python benchmarks/gpu_check.py --report                 # tables of what was measured so far

    tests     bandwidth and matrix products of the device; the GPU tests; memcheck of one small call
    main      N = 8192, H = 4096, V = 128256, the shape of the bars: all peers, all passes; errors; real hidden states
    profile   time of every kernel of a step, chunk lengths, Nsight Compute of the row and fold kernels
    long      N = 32768
    step      training steps of a 1.2B model, packed: LoRA and full, against SFTTrainer
    scoring   tokens a second of `selsft score`
    shapes    the other shapes; an hour in all

A part is a list of jobs, each a process of its own with a limit. Every measurement is one line that its process
appends to `gpu-check.jsonl` and syncs, so what a job measured stays, however it ends; what else it printed is in
`gpu-check.log`. `--resume` leaves out jobs that ended well on this GPU, and within the others what the file has.
`--budget-seconds` ends before a time limit from outside would; what is left is for the next call.

It runs from a source tree, without installation. What it needs beside torch, triton, transformers and pytest,
`wheels.py` fetches where there is a package index. `--hidden_states FILE` (from `hidden_states.py`) adds the
measurements on hidden states of a real model.

This process imports neither torch nor anything else that could fail to: whatever fails, fails in a job. Exits
with 0, or 1 if a job failed, 3 if a bar is missed, 2 without a CUDA device.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

import wheels  # noqa: E402

from selsft.bench.lines import append, read  # noqa: E402

PARTS = ("tests", "main", "profile", "long", "step", "scoring", "shapes")
PART_SECONDS = 570
UNAVAILABLE = 4  # exit status of a job whose library is not installed or not made for this device
PEERS = ("trl", "liger", "liger-large-chunk", "cce", "cce-exact", "compiled", "torch", "naive")
OURS = ("selsft-statistics", "selsft")  # each with the bare products
OTHER_SHAPES = ((2048, 128256), (3584, 152064), (2304, 256000), (576, 49152))
# About the shape of a model of 1.2B parameters
SCORING = ["--layers", "16", "--width", "2048", "--vocab", "128256", "--budget", "16384", "--tokens", "1000000"]


class Job(NamedTuple):
    """A process. It appends its measurements to the file itself, and has failed if its exit status is not 0."""

    part: str
    name: str
    command: list[str]
    seconds: float  # its limit


def jobs(options: argparse.Namespace) -> list[Job]:
    """All jobs, in the order in which their results are missed most."""
    shared = ["--lines", str(options.lines)] + ["--resume"] * options.resume + ["--cpu"] * options.cpu

    def job(part: str, name: str, seconds: float, does: str, **arguments: object) -> Job:
        command = [sys.executable, str(HERE / "gpu_jobs.py"), does, *shared, "--arguments", json.dumps(arguments)]
        return Job(part, name, command, seconds)

    def kernels(
        part: str, seconds: float, prefix: str = "", names: Iterable[str] = OURS + PEERS, **size: object
    ) -> list:
        return [job(part, prefix + name, seconds, "kernels", implementations=[name], **size) for name in names]

    tiny = options.cpu
    shape, vocab = ([16, 200], 200) if tiny else ([4096, 128256], 128256)
    rows, long = (32, 64) if tiny else (8192, 32768)
    found = [
        job("tests", "ceilings", 60, "ceilings"),
        job("tests", "pytest", 240, "tests"),
        job("tests", "memcheck", 120, "memcheck"),
        *kernels("main", 90, rows=[rows], shapes=[shape], ignored=[0, 50]),
        job("main", "errors", 60, "errors", hidden=shape[0], vocab=vocab),
    ]
    if options.hidden_states:
        states = str(options.hidden_states.resolve())
        names = (*OURS, "cce", "cce-exact", "trl", "liger")
        found += kernels("main", 60, "real ", names, rows=[rows], ignored=[0], states=states)
    found += [
        job("profile", "kernels", 90, "profile", rows=rows, hidden=shape[0], vocab=vocab),
        job("profile", "chunks", 150, "chunks", rows=rows, hidden=shape[0], vocab=vocab),
        job("profile", "counters", 180, "counters", rows=1024, hidden=shape[0], vocab=vocab),
        *kernels("long", 90, rows=[long], shapes=[shape], ignored=[0], names=(*OURS, *PEERS[:4])),
    ]
    for tuning, arms in (
        ("lora", ("sft", "precomputed", "liger", "online", "excess")),
        ("full", ("sft", "precomputed", "liger")),
    ):
        for arm in arms:
            case = {"shape": "tiny" if tiny else "1.2B", "tuning": tuning, "layout": "packed", "arm": arm, "cpu": tiny}
            command = [
                sys.executable,
                str(HERE / "gpu_step.py"),
                "--lines",
                str(options.lines),
                "--case",
                json.dumps(case),
            ]
            found.append(Job("step", f"{tuning} {arm}", command, 120))
    output = options.lines.with_name("scoring-gpu.csv")
    scoring = [sys.executable, str(HERE / "scoring.py"), "--output", str(output)]
    found.append(
        Job(
            "scoring",
            "scoring",
            scoring + ([] if tiny else ["--device", "cuda", "--dtype", "bfloat16", *SCORING]),
            540,
        )
    )
    for h, v in OTHER_SHAPES:
        size = {"rows": [2048, 8192], "shapes": [[h, v]], "ignored": [0, 50, 80]}
        found += [] if tiny else kernels("shapes", 180, f"{h}x{v} ", **size)
    return [each for each in found if each.part in options.only]


def run(todo: list[Job], lines: Path, gpu: str, *, resume: bool = False, budget: float = float("inf")) -> list[str]:
    """Runs the jobs one after the other and appends to `lines` how each ended; returns the names of those that failed.

    budget: seconds for all of them. A job that this or the time of its part cut off has not failed.
    """
    done = set()
    if resume:
        done = {
            (d["part"], d["name"])
            for d in read(lines)
            if d.get("kind") == "job" and (d["gpu"], d["status"]) == (gpu, "done")
        }
    end, used, failed = time.monotonic() + budget, dict.fromkeys(PARTS, 0.0), []
    with lines.with_suffix(".log").open("ab") as log:
        for job in todo:
            title = f"{job.part}: {job.name}"
            if job[:2] in done:
                print(f"{title}: done before", flush=True)
                continue
            left = min(end - time.monotonic(), PART_SECONDS - used.get(job.part, 0.0))
            if left < 5:
                print(f"{title}: no time left", flush=True)
                continue
            log.write(f"\n===== {title}\n".encode())
            log.flush()
            start, mark = time.monotonic(), log.seek(0, os.SEEK_END)
            status = child(job.command, min(job.seconds, left), log)
            seconds = time.monotonic() - start
            used[job.part] = used.get(job.part, 0.0) + seconds
            if status == "too long" and left < job.seconds:
                status = "cut off"
            record = {
                "kind": "job",
                "gpu": gpu,
                "part": job.part,
                "name": job.name,
                "status": status,
                "seconds": round(seconds, 1),
            }
            if status not in ("done", "cut off", "not available"):
                failed.append(title)
                record["output"] = tail(lines.with_suffix(".log"), mark)
            append(lines, record)
            print(f"{title}: {status}, {seconds:.0f} s", flush=True)
    return failed


def child(command: list[str], seconds: float, log) -> str:
    """Runs a command in a process group of its own, which ends with it; returns how it ended."""
    with subprocess.Popen(
        command, stdout=log, stderr=log, stdin=subprocess.DEVNULL, env=environment(), start_new_session=True
    ) as process:
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            return "too long"
        finally:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    return {0: "done", UNAVAILABLE: "not available"}.get(code, f"failed with {code}")


def environment() -> dict[str, str]:
    """That of a job: the source tree and the unpacked wheels on the path, and nothing from a network."""
    path = [str(HERE.parent), str(HERE.parent / "kernels"), str(wheels.unpacked())]
    path += filter(None, [os.environ.get("PYTHONPATH")])
    return {
        "HF_HUB_OFFLINE": "1",
        "TQDM_DISABLE": "1",
        "PYTHONUNBUFFERED": "1",
        **os.environ,
        "PYTHONPATH": os.pathsep.join(path),
    }


def tail(path: Path, start: int, size: int = 2000) -> str:
    with path.open("rb") as file:
        file.seek(start)
        return file.read()[-size:].decode(errors="replace")


def device(cpu: bool) -> str | None:
    """Its name, as the lines have it; None if there is no GPU and `cpu` is not asked for."""
    code = (
        "import torch; from selsft.bench.records import environment; "
        f"cpu = {cpu}; found = cpu or torch.cuda.is_available(); "
        "found and print(environment(torch.device('cpu' if cpu else 'cuda')).gpu)"
    )
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, env=environment())
    return done.stdout.strip() or None


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART", help="parts to run")
    p.add_argument("--resume", action="store_true", help="only what the file lacks")
    p.add_argument("--budget-seconds", type=float, default=float("inf"), help="for all parts together")
    p.add_argument("--hidden_states", type=Path, help="file of hidden_states.py")
    p.add_argument("--lines", type=Path, default=HERE / "results" / "gpu-check.jsonl", help="file of the measurements")
    p.add_argument("--report", action="store_true", help="measure nothing")
    p.add_argument(
        "--cpu", action="store_true", help="tiny sizes on the CPU, to try this out: nothing of it is a result"
    )
    return p


def main(argv: list[str]) -> int:
    options = parser().parse_args(argv)
    options.lines.parent.mkdir(parents=True, exist_ok=True)
    failed: list[str] = []
    if not options.report:
        gpu = device(options.cpu)
        if gpu is None:
            print("gpu_check: there is no CUDA device here, so nothing was tested or measured", file=sys.stderr)
            return 2
        # A time limit from outside usually begins with SIGTERM; the job that runs must not outlive this process.
        signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
        failed = run(jobs(options), options.lines, gpu, resume=options.resume, budget=options.budget_seconds)
    report = [sys.executable, str(HERE / "gpu_report.py"), str(options.lines)]
    status = subprocess.run(report, env=environment()).returncode
    for title in failed:
        print(f"gpu_check: {title} failed; {options.lines.with_suffix('.log')} has its output", file=sys.stderr)
    return 1 if failed else status


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
