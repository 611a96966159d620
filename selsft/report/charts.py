"""Geometry of the report's charts: plain numbers and texts that the template draws as SVG.

Rejected: matplotlib (a dependency of its size for two charts, and its SVG can neither follow the reader's colours nor
carry a text per cell).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pandas as pd
from scipy.cluster import hierarchy

from ..skills.matrix import Matrix

CIVIDIS = ("#00224e", "#213b6e", "#4c556c", "#6c6e72", "#8e8978", "#b2a570", "#d9c55c", "#fee838")
"""Stops of the cividis scale (Nuñez, Anderton and Renslow 2018), which reads the same with a colour-vision deficiency
and rises evenly in lightness."""
CELL_WIDTH, CELL_HEIGHT, TREE = 52, 30, 60


@dataclass(frozen=True)
class Cell:
    """One cell of a heat map; `fill` is empty for null."""

    x: float
    y: float
    text: str
    title: str
    fill: str
    ink: str


@dataclass(frozen=True)
class HeatMap:
    """Cells, labels as (x, y, text), and the two dendrograms as lists of SVG `points`."""

    width: float
    height: float
    cells: list[Cell]
    rows: list[tuple[float, float, str]]
    columns: list[tuple[float, float, str]]
    trees: list[str]
    legend: list[tuple[float, str]]
    ends: tuple[str, str]


def colour(value: float) -> tuple[str, str]:
    """(fill, ink) for a value of 0 to 1, clipped: cividis, and black or white text, whichever has more contrast."""
    place = float(np.clip(value, 0, 1)) * (len(CIVIDIS) - 1)
    low = min(int(place), len(CIVIDIS) - 2)
    a, b = (np.array([int(stop[i : i + 2], 16) for i in (1, 3, 5)]) for stop in CIVIDIS[low : low + 2])
    rgb = a + (b - a) * (place - low)
    linear = np.where(rgb / 255 <= 0.04045, rgb / 255 / 12.92, ((rgb / 255 + 0.055) / 1.055) ** 2.4)
    luminance = float(linear @ [0.2126, 0.7152, 0.0722])
    ink = "#000000" if (luminance + 0.05) / 0.05 > 1.05 / (luminance + 0.05) else "#ffffff"
    return "#" + "".join(f"{round(channel):02x}" for channel in rgb), ink


def heat_map(matrix: Matrix, top: float = 1.0) -> HeatMap:
    """A cross-task matrix with colours from 0 to `top`; values beyond are clipped in colour, not in print."""
    row_names, column_names = list(matrix.values.index), list(matrix.values.columns)
    left = 8 + 7.2 * max(len(name) for name in row_names)
    label_height = 8 + 7.2 * max(len(name) for name in column_names) * 0.71
    head = label_height + TREE
    right = left + CELL_WIDTH * len(column_names)
    bottom = head + CELL_HEIGHT * len(row_names)
    cells = []
    for i, row in enumerate(row_names):
        for j, column in enumerate(column_names):
            value = float(matrix.values.iat[i, j])
            x, y, what = left + CELL_WIDTH * j, head + CELL_HEIGHT * i, f"labels of {row}, evaluated on {column}: "
            if np.isnan(value):
                cells.append(Cell(x, y, "", what + (str(matrix.reasons.iat[i, j]) or "no value"), "", ""))
                continue
            ends = f"{value:.3f}, 95 % interval {matrix.low.iat[i, j]:.3f} to {matrix.high.iat[i, j]:.3f}"
            cells.append(Cell(x, y, f"{value:.2f}", what + ends, *colour(value / top)))
    rows = [(left - 6, head + CELL_HEIGHT * (i + 0.5), name) for i, name in enumerate(row_names)]
    columns = [(left + CELL_WIDTH * (j + 0.5), head - 6, name) for j, name in enumerate(column_names)]
    trees = []
    for points in _tree(matrix.row_linkage, matrix.row_leaves, row_names, CELL_HEIGHT):
        trees.append(" ".join(f"{right + 4 + depth:.1f},{head + place:.1f}" for place, depth in points))
    for points in _tree(matrix.column_linkage, matrix.column_leaves, column_names, CELL_WIDTH):
        trees.append(" ".join(f"{left + place:.1f},{TREE - 2 - depth:.1f}" for place, depth in points))
    legend = [(left + 20 * i, colour(i / 10)[0]) for i in range(11)]
    return HeatMap(right + TREE + 60, bottom + 44, cells, rows, columns, trees, legend, ("0", f"{top:g}"))


def _tree(linkage: np.ndarray, leaves: list[str], order: list[str], size: float) -> list[list[tuple[float, float]]]:
    """The brackets of a dendrogram as four (place along the axis, depth from the matrix) each."""
    if not len(linkage):
        return []
    drawn = hierarchy.dendrogram(linkage, no_plot=True)
    if [leaves[i] for i in drawn["leaves"]] != order[: len(leaves)]:
        raise AssertionError("the dendrogram's leaves are not in the order of the matrix")
    deepest = max(float(linkage[:, 2].max()), 1e-12)
    return [
        [(x / 10 * size, y / deepest * (TREE - 8)) for x, y in zip(xs, ys, strict=True)]
        for xs, ys in zip(drawn["icoord"], drawn["dcoord"], strict=True)
    ]


@dataclass(frozen=True)
class Dot:
    """One estimate: `x` and the ends of its line, or None with the reason."""

    y: float
    label: str
    text: str
    title: str
    x: float | None = None
    low: float = 0.0
    high: float = 0.0
    cut: bool = False


@dataclass(frozen=True)
class DotPlot:
    """Estimates with intervals over one axis; `marks` are (x, label, whether it is a reference line)."""

    title: str
    width: float
    height: float
    left: float
    dots: list[Dot] = field(default_factory=list)
    marks: list[tuple[float, str, bool]] = field(default_factory=list)


def dot_plot(table: pd.DataFrame, name: str, title: str, low: float, high: float, ticks: list[float]) -> DotPlot:
    """The column `name` of rows of `forgetting.forgetting`, with its interval, between low and high.

    Args:
        ticks: values marked on the axis; 0 and 1 are drawn as reference lines.
    """
    several = table[["variant", "method"]].drop_duplicates().shape[0] > 1
    labels = [
        f"{row.label_task} ({row.variant}, {row.method})" if several else row.label_task for row in table.itertuples()
    ]
    left, span = 16 + 7.2 * max((len(label) for label in labels), default=0), 360.0

    def place(value: float) -> float:
        return left + span * (min(max(value, low), high) - low) / (high - low)

    dots = []
    for i, (label, row) in enumerate(zip(labels, table.to_dict("records"), strict=True)):
        y, value = 40.0 + 24 * i, row[name]
        if pd.isna(value):
            reason = str(row["ratio_reason"] if name == "ratio" else row["outcome_reason"])
            dots.append(Dot(y, label, "null", reason))
            continue
        ends = row[f"{name}_low"], row[f"{name}_high"]
        text = f"{value:.2f} ({ends[0]:.2f} to {ends[1]:.2f})"
        cut = min(ends[0], value) < low or max(ends[1], value) > high
        dots.append(Dot(y, label, text, f"{label}: {text}", place(value), place(ends[0]), place(ends[1]), cut))
    marks = [(place(tick), f"{tick:g}", tick in (0.0, 1.0)) for tick in ticks]
    return DotPlot(title, left + span + 190, 56 + 24 * len(dots), left, dots, marks)
