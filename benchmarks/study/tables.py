"""The figures of docs/study/results.md, from the tables that `arms.py` writes.

    python benchmarks/study/tables.py benchmarks/results/study/jfleg.csv benchmarks/results/study/wi.csv > results.md

Intervals are over held-out rows and draws at once (`selsft.evaluation.intervals`). The primary comparisons are those
of docs/study/plan.md, with intervals for all of them together (Bonferroni); the others have plain 95 % intervals.
Rejected: a test per draw, which counts rows only.
"""

from __future__ import annotations

import csv
import sys
from pathlib import Path

import numpy as np

from selsft.evaluation.intervals import Interval, draw, interval, mean_draws

MEASURES = {"margin": 2, "prefers": 3, "corrected": 4, "marked": 3, "neutral": 4}  # and their digits
PRIMARY = (("ignore", "plain"), ("forget", "ignore"), ("forget", "plain"))
SECONDARY = (
    ("plain", "base"), ("forget", "random"), ("random", "ignore"),
    ("ignore_oracle", "plain"), ("ignore_oracle", "ignore"), ("forget_oracle", "forget"),
    ("forget_oracle", "ignore_oracle"),
    *((arm, "ignore") for arm in ("forget01", "forget1", "unlikelihood025", "unlikelihood", "probability", "wga",
                                  "ascent")),
    ("dft", "plain"),
    *(pair for source in ("surprisal", "influence", "contrast", "probe60")
      for pair in ((f"ignore_{source}", "plain"), (f"forget_{source}", f"ignore_{source}"),
                   ("forget", f"forget_{source}"))),
)  # fmt: skip
DRAWS = 10_000
CORPORA = ("jfleg", "wi")  # of the first part of the plan, whose primary comparisons share one level

Values = dict[str, dict[str, np.ndarray]]  # arm -> measure -> (draws, rows)


def read(path: str) -> Values:
    """NaN where a draw lacks an arm, or a measure does not apply to a row."""
    with open(path, newline="", encoding="utf-8") as file:
        lines = list(csv.DictReader(file))
    rows = {row: index for index, row in enumerate(dict.fromkeys(line["row"] for line in lines))}
    draws = 1 + max(int(line["draw"]) for line in lines)
    found: Values = {}
    for line in lines:
        arm = found.setdefault(line["arm"], {name: np.full((draws, len(rows)), np.nan) for name in MEASURES})
        for name in MEASURES:
            if line[name]:
                arm[name][int(line["draw"]), rows[line["row"]]] = float(line[name])
    for values in found.get("base", {}).values():
        values[1:] = values[0]  # it is not trained
    return found


def difference(values: Values, arm: str, other: str, measure: str, level: float = 0.95) -> tuple[Interval, int]:
    """`arm - other`, and the number of draws that have both."""
    change = values[arm][measure] - values[other][measure]
    change = change[~np.isnan(change).all(axis=1)]
    change = change[:, ~np.isnan(change).any(axis=0)]
    drawn = mean_draws(change, draw(*change.shape, draws=DRAWS, level=level))
    return interval(float(change.mean()), drawn, level=level), len(change)


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(each) + " |" for each in [header, ["---"] * len(header), *lines])


def report(name: str, values: Values, comparisons: int) -> str:
    means = []
    for arm, measures in values.items():
        draws = int((~np.isnan(measures["margin"]).all(axis=1)).sum())
        shown = [f"{np.nanmean(measures[measure]):.{digits}f}" for measure, digits in MEASURES.items()]
        means.append([arm, "" if arm == "base" else str(draws), *shown])
    parts = [f"### {name}", table(["arm", "draws", *MEASURES], means)]
    level = 1 - 0.05 / comparisons
    primary = (f"Primary comparisons of the margin, {100 * level:.2f} % intervals", PRIMARY, level)
    for title, pairs, width in (
        *([primary] if name in CORPORA else []),
        ("All measures, 95 % intervals", (*PRIMARY, *SECONDARY), 0.95),
    ):
        lines = []
        for arm, other in pairs:
            if arm not in values or other not in values:
                continue
            cells, draws = [], 0
            for measure, digits in MEASURES.items():
                if pairs is PRIMARY and measure != "margin":
                    continue
                (value, low, high), draws = difference(values, arm, other, measure, width)
                bold = "**" if low > 0 or high < 0 else ""
                cells.append(f"{bold}{value:+.{digits}f}{bold} [{low:+.{digits}f}, {high:+.{digits}f}]")
            lines.append([f"{arm} - {other}", str(draws), *cells])
        parts += [title + ":", table(["difference", "draws", *(["margin"] if pairs is PRIMARY else MEASURES)], lines)]
    return "\n\n".join(parts)


def main() -> None:
    tables = {Path(path).stem: read(path) for path in sys.argv[1:]}
    print("\n\n".join(report(name, values, len(PRIMARY) * len(CORPORA)) for name, values in tables.items()))


if __name__ == "__main__":
    main()
