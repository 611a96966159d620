"""`selsft bench`: measures the fused loss against other implementations on this machine.

Appends every measurement to a file of JSON lines, and makes a Markdown table and a plot of all that the file has. All
three are named after the GPU. Without a GPU it says so and runs the CPU path at a small size, which shows that
everything works and nothing about a GPU.
"""

import argparse
import gc
import itertools
import sys
from pathlib import Path

import torch

from . import cases, lines, peers, records, report
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
    stem = arguments.output_dir / records.file_stem(device)
    path = stem.with_suffix(".jsonl")
    notes, _ = run(path, rows, shapes, ignored, arguments.implementations, device, arguments.seconds)
    found = records.kernel_records(lines.read(path))
    if not found:
        print("selsft bench: error: none of the implementations could run", file=sys.stderr)
        return 1
    text = report.markdown(found, notes)
    stem.with_suffix(".md").write_text(text)
    print("\n" + text)
    bandwidth = copy_bandwidth(device, mib=1024 if device.type == "cuda" else 64)
    plotted = save_plot(found, bandwidth, stem.with_suffix(".png"))
    print(f"Wrote {path}, {stem.with_suffix('.md')}{plotted}")
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
    path: Path,
    rows: tuple[int, ...],
    shapes: tuple[tuple[int, int], ...],
    ignored: tuple[int, ...],
    implementations: list[str],
    device: torch.device,
    seconds: float,
    *,
    states: Path | None = None,
    resume: bool = False,
) -> tuple[list[str], bool]:
    """Measures and appends to `path`. The bare products of a case always run, first.

    states: hidden states of a model (`cases.load_case`), in place of `shapes`.
    resume: leave out what the file has.

    Returns:
        `(notes, failed)`: a note for everything that did not run, and whether one of them is an error, and not a
        missing library or too little memory.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    where = records.environment(device)
    have = {record.key for record in records.kernel_records(lines.read(path))} if resume else set()
    notes: dict[str, None] = {}
    failed = False
    names = ["gemm", *(name for name in implementations if name != "gemm")]
    for (h, v), n, percent in itertools.product(shapes if states is None else [(0, 0)], rows, ignored):
        if states is None:
            case = cases.make_case(n, h, v, percent, device, dtype)
        else:
            case = cases.load_case(states, n, percent, device, dtype)
            n, h, v = case.size
        for pass_, trained in PASSES:
            head = "trained" if trained else "frozen"
            title = f"N={n} H={h} V={v} ignored={percent}% {pass_} {head}"
            todo = [m for m in names if (where.gpu, m, case.data, pass_, head, n, h, v, percent) not in have]
            if not set(todo) & set(implementations):
                continue
            floor = None
            for name in ["gemm", *(m for m in todo if m != "gemm")]:
                print(f"{title} {name}", flush=True)
                try:
                    record = one(case, name, pass_, trained, where, floor, seconds)
                except Unavailable as error:
                    notes[f"{name}: {error}"] = None
                except torch.OutOfMemoryError:
                    notes[f"{name}: out of memory at {title}"] = None
                except Exception as error:  # whatever a peer raises must not cost the others
                    failed = True
                    notes[f"{name}: {type(error).__name__} at {title}: {str(error)[:200]}"] = None
                else:
                    floor = record.ms_median if name == "gemm" else floor
                    lines.append(path, record.line())
                gc.collect()
                if device.type == "cuda":
                    torch.cuda.empty_cache()
    return list(notes), failed


def one(
    case: Case, name: str, pass_: str, trained: bool, where: Environment, floor: float | None, seconds: float
) -> Record:
    """Measures one implementation; `floor` is the time of the bare products in ms, None while that is measured."""
    result = measure(IMPLEMENTATIONS[name](case, pass_, trained), case.device, seconds)
    n, h, v = case.size
    return Record(
        *where,
        implementation=name,
        data=case.data,
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
