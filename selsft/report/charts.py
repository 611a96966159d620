"""Geometry of the charts: plain numbers and texts that a template draws as SVG.

Rejected: matplotlib (a large dependency for two charts, and its SVG can neither follow the reader's colours nor
carry a text per cell).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from scipy.cluster import hierarchy

CIVIDIS = ("#00224e", "#213b6e", "#4c556c", "#6c6e72", "#8e8978", "#b2a570", "#d9c55c", "#fee838")
"""Stops of the cividis scale (Nuñez, Anderton and Renslow 2018), which reads the same with a colour-vision deficiency
and rises evenly in lightness."""
CELL_WIDTH, CELL_HEIGHT, TREE, LETTER, AXIS = 52, 30, 60, 7.2, 360.0
PAGE, NARROWEST = 1168, 32
"""Width of the page's text in a window of 1280 pixels, into which a heat map shrinks its cells, and that of a cell in
which a number can still be read."""


class Cell(NamedTuple):
    """One cell of a heat map; `fill` is empty for null."""

    x: float
    y: float
    text: str
    title: str
    fill: str = ""
    ink: str = ""


@dataclass(frozen=True)
class HeatMap:
    """Cells, labels as (x, y, text), and the two dendrograms as lists of SVG `points`."""

    title: str
    width: float
    height: float
    cells: list[Cell]
    rows: list[tuple[float, float, str]]
    columns: list[tuple[float, float, str]]
    trees: list[str]
    legend: list[tuple[float, str]]
    ends: tuple[str, str]
    cell: tuple[float, float]


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


def heat_map(title: str, matrix: Any, what: str, top: float = 1.0) -> HeatMap:
    """A clustered matrix with colours from 0 to `top`; values beyond are clipped in colour, not in print.

    Args:
        matrix: has the data frames `values` (NaN: null), `low`, `high` and `reasons` (why null) of one shape, and for
            `row` and `column` the scipy linkage `*_linkage` over the names `*_leaves`.
        what: describes a cell; a format string of `row` and `column`.
    """
    row_names, column_names = list(matrix.values.index), list(matrix.values.columns)
    left = 8 + LETTER * max(map(len, row_names))
    head = 8 + TREE + LETTER * max(map(len, column_names)) * 0.71
    margin = max(TREE + 8, LETTER * len(column_names[-1]) * 0.71)  # the last label leans over it
    wide = min(CELL_WIDTH, max(NARROWEST, (PAGE - left - margin) // len(column_names)))
    right, bottom = left + wide * len(column_names), head + CELL_HEIGHT * len(row_names)
    cells = []
    for i, row in enumerate(row_names):
        for j, column in enumerate(column_names):
            value, low, high = (float(each.iat[i, j]) for each in (matrix.values, matrix.low, matrix.high))
            place = round(left + wide * j, 1), round(head + CELL_HEIGHT * i, 1)
            cell = what.format(row=row, column=column)
            if np.isnan(value):
                cells.append(Cell(*place, "", f"{cell}: {matrix.reasons.iat[i, j] or 'no value'}"))
            else:
                ends = f"{cell}: {value:.3f}, 95 % interval {low:.3f} to {high:.3f}"
                cells.append(Cell(*place, f"{value:.2f}", ends, *colour(value / top)))
    rows = [(round(left - 6, 1), round(head + CELL_HEIGHT * (i + 0.5), 1), name) for i, name in enumerate(row_names)]
    columns = [(round(left + wide * (j + 0.5), 1), round(head - 6, 1), name) for j, name in enumerate(column_names)]
    trees = []
    for points in _tree(matrix.row_linkage, matrix.row_leaves, row_names, CELL_HEIGHT):
        trees.append(" ".join(f"{right + 4 + depth:.1f},{head + place:.1f}" for place, depth in points))
    for points in _tree(matrix.column_linkage, matrix.column_leaves, column_names, wide):
        trees.append(" ".join(f"{left + place:.1f},{TREE - 2 - depth:.1f}" for place, depth in points))
    legend = [(round(left + 20 * i, 1), colour(i / 10)[0]) for i in range(11)]
    size = round(right + margin), round(bottom + 44)
    scale = ("0", f"{top:g}")
    return HeatMap(title, *size, cells, rows, columns, trees, legend, scale, (wide - 2, CELL_HEIGHT - 2))


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


class Estimate(NamedTuple):
    """A number with the ends of its interval; NaN with the reason. `group` heads those that follow each other with it,
    `about` is an id of the page that the label links to."""

    label: str
    value: float
    low: float = float("nan")
    high: float = float("nan")
    reason: str = ""
    group: str = ""
    about: str = ""


class Dot(NamedTuple):
    """One drawn estimate: `x` and the ends of its line, or None with the reason as `title`."""

    y: float
    label: str
    text: str
    title: str
    x: float | None = None
    low: float = 0.0
    high: float = 0.0
    cut: bool = False
    about: str = ""


@dataclass(frozen=True)
class DotPlot:
    """Estimates with intervals over one axis; `marks` are (x, label, whether it is a reference line), `groups` are
    (y, text)."""

    title: str
    width: float
    height: float
    left: float
    dots: list[Dot]
    marks: list[tuple[float, str, bool]]
    groups: list[tuple[float, str]]


def dot_plot(title: str, estimates: Iterable[Estimate], ticks: list[float]) -> DotPlot:
    """Estimates over an axis from the first to the last tick; ticks at 0 and 1 are drawn as reference lines."""
    estimates, low, high = list(estimates), ticks[0], ticks[-1]
    left = 16 + LETTER * max((max(len(each.label), 1.15 * len(each.group)) for each in estimates), default=0)

    def place(value: float) -> float:
        return round(left + AXIS * (min(max(value, low), high) - low) / (high - low), 1)

    dots: list[Dot] = []
    groups: list[tuple[float, str]] = []
    y, last = 40, ""
    for label, value, start, end, reason, group, about in estimates:
        if group != last:
            groups.append((y, group))
            y, last = y + 24, group
        if np.isnan(value):
            dots.append(Dot(y, label, "null", reason, about=about))
        else:
            text = f"{value:.2f} ({start:.2f} to {end:.2f})"
            cut = min(start, value) < low or max(end, value) > high
            dots.append(Dot(y, label, text, f"{label}: {text}", place(value), place(start), place(end), cut, about))
        y += 24
    marks = [(place(tick), f"{tick:g}", tick in (0.0, 1.0)) for tick in ticks]
    return DotPlot(title, round(left + AXIS + 190), 16 + y, round(left, 1), dots, marks, groups)


@dataclass(frozen=True)
class LineChart:
    """Lines over steps: `curves` are (name, SVG `points`, y of the end, number among all that were given), `ticks`
    (y, text), `ends` the first and the last step."""

    title: str
    width: float
    height: float
    left: float
    curves: list[tuple[str, str, float, int]]
    ticks: list[tuple[float, str]]
    ends: tuple[str, str]


def lines(title: str, curves: dict[str, list[tuple[float, float]]]) -> LineChart:
    """Lines of (step, value) points, all over one pair of axes; points that are not finite are left out, and so are
    lines without a point."""
    curves = {name: [p for p in points if np.isfinite(p[1])] for name, points in curves.items()}
    every = [point for points in curves.values() for point in points]
    first, last = min(x for x, _ in every), max(x for x, _ in every)
    low, high = min(y for _, y in every), max(y for _, y in every)
    if high - low < 1e-12:
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)
    left, top, width, height = 58.0, 26.0, 330.0, 140.0

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - first) / (last - first) if last > first else 0.5
        return round(left + width * across, 1), round(top + height * (high - y) / (high - low), 1)

    drawn = []
    for number, (name, points) in enumerate(curves.items()):
        if points:
            places = [place(*point) for point in points]
            drawn.append((name, " ".join(f"{x},{y}" for x, y in places), places[-1][1], number))
    # Names at the ends of their lines, apart from each other
    drawn.sort(key=lambda curve: curve[2])
    labels: list[float] = []
    for _, _, y, _ in drawn:
        labels.append(max(y, labels[-1] + 14) if labels else y)
    named = [(name, points, round(y, 1), n) for (name, points, _, n), y in zip(drawn, labels, strict=True)]
    ticks = [(place(first, value)[1], f"{value:.3g}") for value in np.linspace(low, high, 3)]
    right = 12 + LETTER * max((len(name) for name, *_ in named), default=0)
    tall = max([top + height + 24, *(y + 10 for y in labels)])
    return LineChart(title, round(left + width + right), round(tall), left, named, ticks, (f"{first:g}", f"{last:g}"))


@dataclass(frozen=True)
class Bars:
    """A histogram: `bars` are (x, y, width, height, title, whether left of the boundary), `boundary` its x."""

    title: str
    width: float
    height: float
    bars: list[tuple[float, float, float, float, str, bool]]
    boundary: tuple[float, str] | None
    ticks: list[tuple[float, str]]


def bars(title: str, edges: list[float], counts: list[int], boundary: float | None) -> Bars:
    """A histogram whose heights are square roots of counts, so that a tail of a few tokens is still seen.

    Args:
        boundary: where tokens become negative; `None` for a rule without one.
    """
    low, high = edges[0], edges[-1]
    if boundary is not None:
        low, high = min(low, boundary), max(high, boundary)
    span = (high - low) or 1.0
    left, top, width, height = 10.0, 26.0, 620.0, 130.0

    def place(value: float) -> float:
        return round(left + width * (value - low) / span, 1)

    tallest = np.sqrt(max(counts)) or 1.0
    drawn = []
    for start, end, count in zip(edges, edges[1:], counts, strict=False):
        tall = round(height * float(np.sqrt(count)) / tallest, 1)
        middle = (start + end) / 2
        text = f"{start:.3g} to {end:.3g}: {count:,} tokens"
        wide = round(max(place(end) - place(start) - 0.6, 0.6), 1)
        drawn.append(
            (place(start), round(top + height - tall, 1), wide, tall, text, boundary is not None and middle < boundary)
        )
    line = None if boundary is None else (place(boundary), f"boundary {boundary:.3g}")
    ticks = [(place(value), f"{value:.3g}") for value in np.linspace(low, high, 5)]
    return Bars(title, round(left + width + 20), round(top + height + 24), drawn, line, ticks)
