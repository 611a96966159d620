"""Lines and bars of a run's page: where values lie, and what is left out."""

import itertools
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from scipy.cluster import hierarchy

from selsft.report.charts import PAGE, bars, heat_map, lines
from selsft.report.terminal import ScoreHistogram


def test_lines_share_their_axes_and_keep_their_numbers():
    chart = lines("loss", {"plain": [(0, 4.0), (10, 2.0)], "none": [], "forget": [(0, 3.0), (5, np.nan), (10, 1.0)]})
    places = {
        name: [tuple(map(float, pair.split(","))) for pair in points.split()] for name, points, *_ in chart.curves
    }
    assert places["plain"][0][0] == places["forget"][0][0] and len(places["forget"]) == 2
    low, high = places["forget"][1][1], places["plain"][0][1]
    assert high < places["forget"][0][1] < low  # y grows downwards
    assert places["plain"][1][1] == pytest.approx(high + (low - high) * 2 / 3, abs=0.1)
    assert {name: number for name, _, _, number in chart.curves} == {"plain": 0, "forget": 2}
    assert chart.ends == ("0", "10") and [text for _, text in chart.ticks] == ["1", "2.5", "4"]


def test_a_flat_line_and_names_that_would_overlap():
    chart = lines("loss", {name: [(1, 2.0), (2, 2.0)] for name in "abc"})
    ends = sorted(y for _, _, y, _ in chart.curves)
    assert all(b - a >= 14 for a, b in itertools.pairwise(ends))


def test_bars_show_a_small_tail_and_the_boundary():
    chart = bars("scores", [-2.0, -1.0, 0.0, 1.0], [1, 0, 100], -1.0)
    assert [bar[5] for bar in chart.bars] == [True, False, False]
    heights = [bar[3] for bar in chart.bars]
    assert heights[0] == pytest.approx(heights[2] / 10, abs=0.1) and heights[1] == 0
    assert chart.boundary is not None and chart.boundary[0] == pytest.approx(chart.bars[1][0])
    outside = bars("scores", [0.0, 1.0], [5], -3.0)
    assert outside.boundary is not None and outside.boundary[0] < outside.bars[0][0]
    assert bars("scores", [0.0, 1.0], [5], None).boundary is None


def test_the_share_below_a_score():
    scores = np.random.default_rng(0).normal(size=4000).astype(np.float32)
    histogram = ScoreHistogram()
    histogram.add(scores)
    for score in (-3.0, -1.0, -0.1, 0.0, 0.5, 2.0):
        assert histogram.below(score) == pytest.approx((scores < score).mean(), abs=1e-3)
    assert histogram.below(-100.0) == 0.0 and histogram.below(100.0) == 1.0


@pytest.mark.parametrize(("count", "fits"), [(3, 52), (21, 45), (26, 36)])
def test_a_heat_map_of_many_tasks_fits_the_page(count, fits):
    """The longest name of the suite has 17 letters; a window of 1280 pixels has 1168 for the page."""
    names = [f"commonsense_qa_{i:02}" for i in range(count)]
    values = pd.DataFrame(np.linspace(0, 1.2, count * count).reshape(count, count), names, names)
    linkage = hierarchy.linkage(np.arange(count)[:, None].astype(float), "average")
    order = [names[i] for i in hierarchy.dendrogram(linkage, no_plot=True)["leaves"]]
    matrix = SimpleNamespace(
        values=values.loc[order, order], low=values - 0.1, high=values + 0.1, reasons=values.astype(str),
        row_linkage=linkage, column_linkage=linkage, row_leaves=names, column_leaves=names,
    )  # fmt: skip
    found = heat_map("ratios", matrix, "{row}, {column}")
    assert found.width <= PAGE and found.cell[0] == fits - 2
    ends = [x + found.cell[0] for x, *_ in found.cells]
    assert max(ends) < found.width and len({x for x, *_ in found.cells}) == count
    corners = [float(point.split(",")[0]) for points in found.trees for point in points.split()]
    assert max(corners) <= found.width
