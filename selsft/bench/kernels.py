"""`selsft bench`: measures the fused loss against other implementations on this machine.

Writes a CSV, a Markdown table and a plot, each named after the GPU. Without a GPU it says so and runs the CPU path at
a small size, which shows that everything works and nothing about a GPU.
"""

import argparse
import gc
import sys
from pathlib import Path

import torch

from ..records import replaced, resumable
from . import cases, peers, records, report
from .cases import Case
from .measure import copy_bandwidth, measure
from .peers import FORWARD, IMPLEMENTATIONS, TRAINING, Unavailable
from .records import Environment, Record

PASSES = ((FORWARD, False), (TRAINING, False), (TRAINING, True))


def main(argv: list[str] | None = None) -> int:
    """Runs the benchmark; returns the exit status."""
    arguments = parser().parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() and not arguments.cpu else "cpu")
    if device.type == "cpu":
        torch.set_num_threads(arguments.threads)
        print("No GPU is used: this runs the CPU path at a small size. Its figures say nothing about a GPU.")
    rows, shapes, ignored = sizes(arguments, device)
    with resumable(arguments.output_dir, "output_dir", "nothing is kept of what is not finished, start it again"):
        return _measure(arguments, rows, shapes, ignored, device)


def _measure(
    arguments: argparse.Namespace,
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    ignored: tuple[int, ...],
    device: torch.device,
) -> int:
    found, notes = run(rows, shapes, ignored, arguments.implementations, device, arguments.seconds)
    if not found:
        print("selsft bench: error: none of the implementations could run", file=sys.stderr)
        return 1
    stem = arguments.output_dir / records.file_stem(device)
    records.write(found, stem.with_suffix(".csv"))
    text = report.markdown(found, notes)
    with replaced(stem.with_suffix(".md")) as file:
        file.write(text.encode())
    print("\n" + text)
    bandwidth = copy_bandwidth(device, mib=1024 if device.type == "cuda" else 64)
    plotted = save_plot(found, bandwidth, stem.with_suffix(".png"))
    print(f"Wrote {stem.with_suffix('.csv')}, {stem.with_suffix('.md')}{plotted}")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog="selsft bench", description=__doc__, allow_abbrev=False)
    p.add_argument("--rows", type=_positive, nargs="+", metavar="N", help=f"rows; default {cases.ROWS}")
    p.add_argument(
        "--shapes", type=_shape, nargs="+", metavar="HxV", help="hidden size and vocabulary, as 4096x128256"
    )
    p.add_argument("--ignored", type=_percent, nargs="+", metavar="PERCENT", help=f"default {cases.IGNORED}")
    p.add_argument(
        "--implementations",
        nargs="+",
        choices=list(IMPLEMENTATIONS),
        default=list(IMPLEMENTATIONS),
        metavar="NAME",
        help=f"default: all of {', '.join(IMPLEMENTATIONS)}",
    )
    p.add_argument("--seconds", type=float, default=1.0, help="time to spend on each measurement (default: 1)")
    p.add_argument("--main", action="store_true", help="only the shape and the rows that the bars are about")
    p.add_argument("--cpu", action="store_true", help="use the CPU although there is a GPU")
    p.add_argument("--threads", type=_positive, default=1, help="threads on a CPU (default: 1)")
    p.add_argument("--output_dir", type=Path, default=Path("benchmarks/results"))
    return p


def sizes(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[tuple[int, ...], tuple[tuple[int, int], ...], tuple[int, ...]]:
    rows: tuple[int, ...] = cases.ROWS
    shapes: tuple[tuple[int, int], ...] = cases.SHAPES
    if device.type == "cpu":
        rows, shapes = cases.CPU_ROWS, cases.CPU_SHAPES
    elif arguments.main:
        rows, shapes = (cases.MAIN_ROWS, 32768), (cases.MAIN_SHAPE,)
    return (
        tuple(arguments.rows or rows),
        tuple(arguments.shapes or shapes),
        tuple(cases.IGNORED if arguments.ignored is None else arguments.ignored),
    )


def run(
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    ignored: tuple[int, ...],
    implementations: list[str],
    device: torch.device,
    seconds: float,
) -> tuple[list[Record], list[str]]:
    """`(records, notes)`, a note for every implementation that did not run. The bare products always run, first."""
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = records.environment(device)
    found: list[Record] = []
    notes: dict[str, None] = {}
    todo = [(n, h, v, i) for h, v in shapes for n in rows for i in ignored]
    names = ["gemm", *(name for name in implementations if name != "gemm")]
    for number, (n, h, v, percent) in enumerate(todo, 1):
        case = cases.make_case(n, h, v, percent, device, dtype)
        for pass_, trained in PASSES:
            floor = None
            for name in names:
                if sys.stdout.isatty():
                    print(
                        f"\r\033[K[{number}/{len(todo)}] N={n} H={h} V={v} ignored={percent}% {pass_} "
                        f"{'trained' if trained else 'frozen'} {name}",
                        end="",
                        flush=True,
                    )
                try:
                    record = one(case, name, pass_, trained, where, floor, seconds)
                except Unavailable as error:
                    notes[f"{name}: {error}"] = None
                except torch.OutOfMemoryError:
                    notes[f"{name}: out of memory at N={n} H={h} V={v}, {pass_}"] = None
                else:
                    floor = record.ms_median if name == "gemm" else floor
                    found.append(record)
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    if sys.stdout.isatty():
        print("\r\033[K", end="")
    return found, list(notes)


def one(
    case: Case, name: str, pass_: str, trained: bool, where: Environment, floor: float | None, seconds: float
) -> Record:
    """Measures one implementation; `floor` is the time of the bare products in ms, None while that is measured."""
    result = measure(IMPLEMENTATIONS[name](case, pass_, trained), case.device, seconds)
    n, h, v = case.size
    return Record(
        *where,
        implementation=name,
        pass_=pass_,
        head="trained" if trained else "frozen",
        n=n,
        h=h,
        v=v,
        ignored=case.ignored,
        **result._asdict(),
        tflops=case.flops(peers.products(pass_, trained)) / (result.ms_median * 1e9),
        ratio_to_gemm=result.ms_median / (floor or result.ms_median),
    )


def save_plot(found: list[Record], bandwidth: float, path: Path) -> str:
    """Draws the plot; returns what to add to the list of files."""
    try:
        from . import plot
    except ImportError:
        return "; no plot, since matplotlib is not installed (pip install 'selsft[bench]')"
    plot.save(found, bandwidth, path)
    return f", {path}"


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} must be at least 1")
    return value


def _percent(text: str) -> int:
    value = int(text)
    if not 0 <= value < 100:
        raise argparse.ArgumentTypeError(f"{text} must be a percentage from 0 to 99")
    return value


def _shape(text: str) -> tuple[int, int]:
    try:
        hidden, vocab = (int(part) for part in text.split("x"))
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} must be HIDDENxVOCABULARY, for example 4096x128256") from error
    return hidden, vocab
