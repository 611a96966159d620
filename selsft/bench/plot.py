"""The results as a picture: bars of time and memory for the main case, and a roofline of all of them."""

from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from .cases import MAIN_ROWS, MAIN_SHAPE, SYNTHETIC
from .peers import NLL_ONLY, TRAINING, products
from .records import Record

matplotlib.use("Agg")

OURS, GEMM, OTHERS = "#c2410c", "#9ca3af", "#475569"


def save(found: list[Record], bandwidth: float, path: Path) -> None:
    figure = Figure(figsize=(15, 4.8), layout="constrained")
    time, memory, roof = figure.subplots(1, 3)
    found = [r for r in found if r.gpu == found[0].gpu and r.data == SYNTHETIC]
    n, h, v, ignored = main_case(found)
    for head, hatch in (("frozen", ""), ("trained", "///")):
        chosen = [r for r in found if r.pass_ == TRAINING and r.head == head]
        chosen = [r for r in chosen if (r.n, r.h, r.v, r.ignored) == (n, h, v, ignored)]
        _bars(time, chosen, [r.ms_median for r in chosen], head, hatch)
        _bars(memory, chosen, [r.peak_mib for r in chosen], head, hatch)
    for axes, title in ((time, "ms, forward + backward"), (memory, "peak extra memory, MiB")):
        axes.set_title(title)
        axes.set_xlim(left=0)
        axes.spines[["top", "right"]].set_visible(False)
    roofline(roof, found, bandwidth)
    first = found[0]
    figure.suptitle(f"{first.gpu}, torch {first.torch}: N={n}, H={h}, V={v}, {ignored} % of the rows ignored")
    figure.savefig(path, dpi=150)


def main_case(found: list[Record]) -> tuple[int, int, int, int]:
    """The case of the bars if it was measured, else the first one."""
    cases = [(r.n, r.h, r.v, r.ignored) for r in found]
    main = (MAIN_ROWS, *MAIN_SHAPE, 0)
    return main if main in cases else cases[0]


def _bars(axes: Axes, chosen: list[Record], values: list[float], head: str, hatch: str) -> None:
    order = sorted(range(len(chosen)), key=lambda i: -values[i])
    names = [f"{_label(chosen[i])}, {head}" for i in order]
    colours = [_colour(chosen[i].implementation) for i in order]
    bars = axes.barh(names, [values[i] for i in order], color=colours, hatch=hatch)
    axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=7)
    axes.tick_params(axis="y", labelsize=8)


def roofline(axes: Axes, found: list[Record], bandwidth: float) -> None:
    """Achieved TFLOP/s over the arithmetic per byte of the least traffic that the task itself needs.

    Roofs of this run: the copy bandwidth, and the fastest bare product.
    """
    peak = max(r.tflops for r in found if r.implementation == "gemm")
    itemsize = 4 if found[0].gpu.startswith("CPU") else 2
    reach = [intensity(r, itemsize) for r in found]
    knee = peak * 1e12 / bandwidth
    left, right = min(*reach, knee) / 2, max(*reach, knee) * 2
    axes.plot([left, knee, right], [left * bandwidth / 1e12, peak, peak], color="black", linewidth=1)
    for name in dict.fromkeys(r.implementation for r in found):
        points = [(x, r.tflops) for x, r in zip(reach, found, strict=True) if r.implementation == name]
        x, y = zip(*points, strict=True)
        ours = name == "selsft"
        axes.scatter(x, y, label=name, s=28 if ours else 10, zorder=3 if ours else 2, color=OURS if ours else None)
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte of the task", ylabel="TFLOP/s (useful)")
    axes.xaxis.set_minor_formatter("")
    axes.set_title("roofline")
    axes.legend(fontsize=7)


def intensity(r: Record, itemsize: int) -> float:
    """Arithmetic of the pass over its inputs and outputs, each moved once; the logits are not among them."""
    used = r.n * (100 - r.ignored) / 100
    flops = 2 * products(r.pass_, r.head == "trained") * used * r.h * r.v
    head = 2 if r.pass_ == TRAINING and r.head == "trained" else 1
    rows = 2 if r.pass_ == TRAINING else 1
    return flops / (itemsize * (head * r.v * r.h + rows * used * r.h))


def _label(r: Record) -> str:
    return f"{r.implementation}*" if r.implementation in NLL_ONLY else r.implementation


def _colour(name: str) -> str:
    return {"selsft": OURS, "gemm": GEMM}.get(name, OTHERS)
