"""The page of a run: the verdict first, then what it rests on; one file, and the same as JSON and on a terminal.

Gets plain values (`pipeline.results`) and draws them. Intervals are of paired differences: two models answer the same
questions, and the interval of each mean alone would hide a difference that nearly every row shows. Rejected: colours
for every difference that is not zero; green means here that the whole interval is on the better side.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..records import write_json
from .charts import Estimate, bars, dot_plot, lines
from .page import write_page
from .terminal import printable

_LINES = {
    "loss": "training loss",
    "positive_loss": "loss of positive tokens, nats",
    "forget_loss": "forgetting term of negative tokens",
    "negative_prob": "probability of negative tokens",
    "forget_weight": "weight of the forgetting term",
}


def write_report(root: Path, content: dict[str, Any]) -> Path:
    """Write `report.html` and `report.json` into the folder of a run; returns the page's path."""
    write_json(root / "report.json", content)
    charts = {
        "arms": [_arms(measure, content["baseline"]) for measure in content["measures"] if _drawn(measure)],
        "curves": [chart for name, title in _LINES.items() if (chart := _curves(name, title, content["arms"]))],
        "histogram": _histogram(content["outlook"]),
    }
    return write_page(root / "report.html", "run.html", {**content, "charts": charts})


def _drawn(measure: dict[str, Any]) -> bool:
    return any(each["low"] is not None for each in measure["differences"].values())


def _arms(measure: dict[str, Any], baseline: str) -> Any:
    """Differences of all models to the baseline, with their intervals."""
    estimates = [
        Estimate(name, each["value"], each["low"], each["high"])
        for name, each in measure["differences"].items()
        if each["low"] is not None
    ]
    reach = max(max(abs(each.low), abs(each.high)) for each in estimates) or 1.0
    step = 10 ** math.floor(math.log10(reach))
    end = math.ceil(reach / step) * step
    better = {True: " (right is better)", False: " (left is better)", None: ""}[measure["better"]]
    title = f"{measure['name'].replace('_', ' ')} minus {baseline}{better}"
    return dot_plot(title, estimates, [-end, -end / 2, 0.0, end / 2, end])


def _curves(name: str, title: str, arms: list[dict[str, Any]]) -> Any:
    drawn = {arm["name"]: [(step["step"], step[name]) for step in arm["curve"] if name in step] for arm in arms}
    if max(map(len, drawn.values()), default=0) < 2:
        return None
    return lines(title, drawn)


def _histogram(outlook: dict[str, Any] | None) -> Any:
    if outlook is None or not outlook["counts"]:
        return None
    boundary = None if outlook["threshold"] is None else -outlook["threshold"]
    return bars("scores of supervised tokens", outlook["edges"], outlook["counts"], boundary)


def print_report(content: dict[str, Any], console: Console | None = None) -> None:
    """The verdict and the arms on a terminal, a line for each model and measure."""
    console = console or Console(highlight=False, soft_wrap=True)
    verdict = content["verdict"]
    style = {"better": "bold green", "worse": "bold red"}.get(verdict["kind"], "bold")
    if content["measures"]:
        table = Table(title=f"Held-out rows, and the difference to {printable(content['baseline'])}, 95 % intervals")
        for name in ("measure", "model", "value", "difference"):
            table.add_column(name, justify="left" if name in ("measure", "model") else "right", overflow="fold")
        for measure in content["measures"]:
            _add(table, measure)
        console.print(table)
    for each in content["warnings"]:
        console.print(printable(f"{each['cause']}: {' '.join(each['texts'])}"), markup=False)
    console.print(f"Verdict: {printable(verdict['sentence'])}", style=style, markup=False)


def _add(table: Table, measure: dict[str, Any]) -> None:
    digits, names = measure["digits"], list(measure["values"])
    for name in names:
        effect = measure["differences"].get(name)
        text = "" if effect is None else f"{effect['value']:+.{digits}f}"
        if effect is not None and effect["low"] is not None:
            text += f" \\[{effect['low']:+.{digits}f}, {effect['high']:+.{digits}f}]"
        first = measure["label"] if name == names[0] else ""
        value = f"{measure['values'][name]:.{digits}f}"
        table.add_row(first, printable(name), value, text, end_section=name == names[-1])
