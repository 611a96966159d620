"""The report of a study: one self-contained HTML page, and its tables as CSV.

The tables are computed by the caller (`skills.results`); here each column gets a heading, an explanation and a
text per cell. The page needs no script. Rejected: a notebook or a dashboard (a server, or third-party scripts, to
look at one study).
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from ..records import replaced
from . import charts
from .page import write_page

FEW_EXAMPLES = 100
FEW_TASKS = 10
FEW_SEEDS = 3
TEXT = 400
"""Characters of an example that are shown."""


@dataclass(frozen=True)
class Table:
    """A table of the page: `columns` are (heading, explanation), `rows` are texts; `name` is the CSV file's."""

    name: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]


Column = tuple[str, str, str | Callable[[dict[str, Any]], str]]


def write_report(folder: Path, results: Any) -> Path:
    """Write `report.html` and `tables/*.csv` into a study's folder.

    Args:
        results: its tables, a `skills.results.Results`.

    Returns:
        The path of the page.
    """
    views, frames = tables(results)
    (folder / "tables").mkdir(exist_ok=True)
    for name, frame in frames.items():
        with replaced(folder / "tables" / f"{name}.csv") as file:
            file.write(frame.to_csv(index=False, lineterminator="\n").encode())
    content = {
        "model": _model(results.manifest),
        "tasks": sorted(set(results.own["eval_task"])),
        "reference": results.reference,
        "warnings": warnings(results),
        "tables": views,
        "dots": [
            _dots(results.own, "Forget ratio", "ratio", "ratio_reason", [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0]),
            _dots(results.own, "Forget gap", "gap", "outcome_reason", [-0.5, -0.25, 0.0, 0.25, 0.5]),
        ]
        if len(results.own)
        else [],
        "maps": [(key, _map(key, matrix)) for key, matrix in results.matrices.items()],
        "examples": _examples(results),
        "manifest": json.dumps(results.manifest, indent=2, ensure_ascii=False, sort_keys=True),
    }
    return write_page(folder / "report.html", "skills.html", content)


def _dots(own: pd.DataFrame, title: str, name: str, reason: str, ticks: list[float]) -> charts.DotPlot:
    several = own[["variant", "method"]].drop_duplicates().shape[0] > 1
    rows = own.to_dict("records")
    labels = [f"{r['label_task']} ({r['variant']}, {r['method']})" if several else r["label_task"] for r in rows]
    columns = (name, f"{name}_low", f"{name}_high", reason)
    estimates = [charts.Estimate(label, *(r[c] for c in columns)) for label, r in zip(labels, rows, strict=True)]
    return charts.dot_plot(title, estimates, ticks)


def _map(key: tuple[str, str, str, str], matrix: Any) -> charts.HeatMap:
    variant, method, reference, value = key
    title = f"Forget {value}s across tasks, {variant}, {method}, reference {reference}"
    return charts.heat_map(title, matrix, "labels of {row}, evaluated on {column}", 1.0 if value == "ratio" else 0.5)


def _model(manifest: dict[str, Any]) -> str:
    """The model's name, from `model` or the settings."""
    model, config = manifest.get("model"), manifest.get("config")
    for place, key in ((model, "name"), (config, "model_name_or_path")):
        if isinstance(place, dict) and isinstance(place.get(key), str):
            return place[key]
    return "a model without a name"


def warnings(results: Any) -> list[str]:
    """What a reader must know before the figures, the most serious first."""
    lines = []
    bad = results.summary[results.summary["collapsed"]]
    for row in bad.to_dict("records"):
        stage = "base" if row["stage"] == "base" else f"{row['stage']} {row['method']} ({row['label_task']})".strip()
        lines.append(
            f"Collapse: {row['run']}, {stage}, answers {row['top_share']:.0%} of {row['eval_task']} with the same "
            f"option ({row['top_label']}). Its accuracy of {row['accuracy']:.2f} is about that answer, not about the "
            f"skill: AUC within options, between questions, is {row['auc_within']:.2f} (0.5: it tells nothing)."
        )
    for row in results.own.to_dict("records"):
        who = f"{row['label_task']} ({row['variant']}, {row['method']})"
        if pd.isna(row["ratio"]):
            lines.append(f"No forget ratio for {who}: {row['ratio_reason']}.")
        elif pd.isna(row["outcome"]):
            lines.append(f"No outcome for {who}: {row['outcome_reason']}.")
    small = results.own[(results.own["n_examples"] > 0) & (results.own["n_examples"] < FEW_EXAMPLES)]
    for task, n in sorted(dict(zip(small["eval_task"], small["n_examples"], strict=True)).items()):
        lines.append(f"Few examples: {task} has {n} test questions; its intervals are wide.")
    seeds = int(results.own["n_seeds"].max()) if len(results.own) else 0
    if seeds == 1:
        lines.append("One seed: the intervals are about questions only; another seed may give other figures.")
    elif seeds and seeds < FEW_SEEDS:
        lines.append(f"{seeds} seeds: the intervals allow for how little that says about seeds, and are wide for it.")
    tasks = int(results.task_correlations["n"].max()) if len(results.task_correlations) else 0
    if tasks < FEW_TASKS:
        lines.append(
            f"Predictors: {tasks} tasks with a value; a rank correlation over fewer than {FEW_TASKS} says little."
        )
    return lines + results.notes


def tables(results: Any) -> tuple[dict[str, Table], dict[str, pd.DataFrame]]:
    """The tables of the page, and the frames of the CSV files under the same names (and some that are not shown)."""
    own = [*_WHO, *_SIZES, *_STAGES, *_LEFT]
    if (results.own["method"] == "flip").any():
        own.append(("flipped ratio", "drop over that to 1 − fine-tuned", "flipped_ratio"))
    plan: dict[str, tuple[pd.DataFrame, list[Column]]] = {
        "own": (results.own, [*own, _COLLAPSED]),
        "own-train": (results.own_train, own),
        "own-per-character": (results.own_per_character, own),
        "collapse": (results.summary, [*_MODEL, *_COLLAPSE]),
        "agreement": (results.agreement, [*_MODEL, *_AGREEMENT]),
        "transitions": (results.transitions, [*_WHO, *_TRANSITIONS]),
        "task-predictors": (results.task_predictors, [*_SETTING, _TASK, *_PREDICTORS]),
        "task-correlations": (results.task_correlations, [*_SETTING, _PREDICTOR, _WITH, *_CORRELATION]),
        "example-correlations": (results.example_correlations, [*_SETTING, _TASK, _PREDICTOR, *_CORRELATION]),
        "probes": (results.probes, [*_WHO, _LAYER, *_SIZES, *_STAGES, *_PROBES]),
        "learning-order": (
            results.learning_order,
            [*_MODEL, ("split", "", "split"), ("examples", "", "n_examples"), *_CORRELATION],
        ),
        "examples": (results.shown, [*_SETTING, _TASK, *_EXAMPLES]),
    }
    views = {
        name: Table(
            name,
            [(heading, title) for heading, title, _ in columns],
            [[_cell(row, what) for _, _, what in columns] for row in frame.to_dict("records")],
        )
        for name, (frame, columns) in plan.items()
    }
    frames = {name: frame for name, (frame, _) in plan.items()}
    return views, {**frames, "comparisons": results.comparisons, "matrices": _long(results)}


def _cell(row: dict[str, Any], what: str | Callable[[dict[str, Any]], str]) -> str:
    """The text of a column: with its interval where the row has one, and the reason where it is null."""
    if callable(what):
        return what(row)
    value = row[what]
    if pd.isna(value):
        reason = row.get(_REASONS.get(what, ""))
        return f"null: {reason}" if reason else "null"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if what in _WHOLE:
        return str(int(value)) if math.isfinite(value) else "null"
    low, high = _ENDS.get(what, (f"{what}_low", f"{what}_high"))
    if low in row:
        return f"{value:.2f} ({row[low]:.2f} to {row[high]:.2f})"
    return f"{value:.2f}" if isinstance(value, float) else str(value)


_WHOLE = {"n", "n_examples", "n_seeds", "layer"}
_ENDS = {"rho": ("low", "high")}
_REASONS = {
    "ratio": "ratio_reason", "outcome": "outcome_reason", "flipped_ratio": "flipped_reason", "rho": "reason",
}  # fmt: skip
_NAMES = {
    "base_confidence": "base confidence",
    "base_variance": "hidden-state variance",
    "base_spread": "distance of the hidden state from its mean, squared",
}


def _right(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "right" if row[key] else "wrong"


# (heading, explanation, column or what makes the text of a row)
_SETTING: list[Column] = [
    ("setting", "the run's name without its seed", "variant"),
    ("method", "labels or objective of the forgetting stage", "method"),
]
_WHO: list[Column] = [*_SETTING, ("task", "the task whose labels were forgotten, evaluated on itself", "label_task")]
_TASK: Column = ("task", "", "task")
_SIZES: list[Column] = [
    ("n", "test questions", "n_examples"),
    ("seeds", "", "n_seeds"),
    ("chance", "accuracy of an answer that ignores the question", "chance"),
]
_STAGES: list[Column] = [
    ("base", "accuracy of the base model", "base"),
    ("fine-tuned", "accuracy after fine-tuning on the true labels", "finetuned"),
    ("forgotten", "accuracy after forgetting", "forgotten"),
]
_LEFT: list[Column] = [
    ("gap", "forgotten − chance; 0: forgotten", "gap"),
    ("ratio", "share of what fine-tuned has above chance that is gone; 1: all", "ratio"),
    ("outcome", "see the text", "outcome"),
]
_COLLAPSED: Column = (
    "collapsed",
    "forgotten models that answer everything alike, see below",
    lambda r: f"{r['collapsed_seeds']} of {r['n_seeds']} seeds" if r["collapsed_seeds"] else "no",
)
_MODEL: list[Column] = [
    ("run", "", "run"),
    ("stage", "", "stage"),
    ("method", "", "method"),
    ("labels of", "the task that the model was trained on", "label_task"),
]
_TRANSITIONS: list[Column] = [
    *((name, "", _right(key)) for name, _, key in _STAGES if isinstance(key, str)),
    ("n", "questions, over all seeds", "n"),
    ("share", "", lambda r: f"{r['share']:.1%}"),
]
_PREDICTOR: Column = ("predictor", "", lambda r: _NAMES[r["predictor"]])
_WITH: Column = ("with", "", lambda r: f"forget {r['outcome']}")
_CORRELATION: list[Column] = [
    ("n", "points", "n"),
    ("Spearman ρ", "rank correlation with its 95 % interval", "rho"),
    ("p", "two-sided permutation test", lambda r: "" if pd.isna(r["p"]) else f"{r['p']:.2g}"),
]
_LAYER: Column = ("layer", "index into hidden_states", "layer")
_PROBES: list[Column] = [
    ("drop", "fine-tuned − forgotten", "drop"),
    ("control", "probe fitted on shuffled labels; should be near chance", "control"),
]
_EXAMPLES: list[Column] = [
    ("kind", "", "kind"),
    ("example", "", "example_id"),
    ("P(gold) fine-tuned", "mean over seeds", "finetuned_confidence"),
    ("P(gold) forgotten", "mean over seeds", "forgotten_confidence"),
]
_COLLAPSE: list[Column] = [
    ("evaluated on", "", "eval_task"),
    ("accuracy", "", "accuracy"),
    ("confidence", "mean of P(gold), softmax over the options", "confidence"),
    ("margin", "mean of the gold score less the best other, in nats", "margin"),
    ("commonest answer", "the option's text where a task has few, else its slot", "top_label"),
    ("its share", "", "top_share"),
    ("entropy ratio", "entropy of the answers over that of the gold answers; below 0.5: collapsed", "entropy_ratio"),
    ("AUC", "gold against other options, all questions together", "auc"),
    ("AUC within options", "of the same option between questions; not moved by a liking for one option", "auc_within"),
    ("collapsed", "", "collapsed"),
]
_AGREEMENT: list[Column] = [
    ("split", "", "split"),
    ("n", "", "n"),
    ("match rate", "assigned labels that are the gold ones", "match_rate"),
    ("assigned, before", "agreement with the assigned labels of the fine-tuned model", "assigned_before"),
    ("assigned, after", "and of the forgotten model", "assigned_after"),
    ("gold, before", "accuracy", "gold_before"),
    ("gold, after", "accuracy", "gold_after"),
    ("wrong labels, before", "agreement where the assigned label is not gold", "wrong_before"),
    ("wrong labels, after", "agreement where the assigned label is not gold", "wrong_after"),
]
_PREDICTORS: list[Column] = [
    ("base confidence", "mean of P(gold) of the base model", "base_confidence"),
    ("hidden-state variance", "trace of the covariance at the questions' last tokens", "base_variance"),
    ("layer", "index into hidden_states", "layer"),
    ("forget ratio", "", "ratio"),
    ("forget gap", "", "gap"),
]


def _long(results: Any) -> pd.DataFrame:
    """The matrices, one row per cell, in the order of the page."""
    rows = [
        dict(zip(("variant", "method", "reference", "value"), key, strict=True))
        | {"label_task": row, "eval_task": column, "number": matrix.values.at[row, column]}
        | {"low": matrix.low.at[row, column], "high": matrix.high.at[row, column]}
        | {"reason": matrix.reasons.at[row, column]}
        for key, matrix in results.matrices.items()
        for row in matrix.values.index
        for column in matrix.values.columns
    ]
    names = ["variant", "method", "reference", "value", "label_task", "eval_task", "number", "low", "high", "reason"]
    return pd.DataFrame(rows, columns=names)


def _examples(results: Any) -> list[dict[str, Any]]:
    """The shown examples with their texts, by task; texts are None where they must not be shown or are not there."""
    texts = {}
    if results.examples is not None:
        test = results.examples[results.examples["split"] == "test"]
        texts = {(row.eval_task, row.example_id): row for row in test.itertuples()}
    groups: dict[tuple, dict[str, Any]] = {}
    for row in results.shown.to_dict("records"):
        key = (row["variant"], row["method"], row["task"])
        hidden = row["task"] in results.sensitive
        group = groups.setdefault(key, {"key": key, "hidden": hidden, "forgotten": [], "resisted": []})
        text = None if hidden else texts.get((row["task"], row["example_id"]))
        options = [] if text is None else [(_short(o), i == text.gold) for i, o in enumerate(text.options)]
        confidences = [_cell(row, f"{stage}_confidence") for stage in ("finetuned", "forgotten")]
        prompt = None if text is None else _short(text.prompt)
        group[row["kind"]].append(
            {"id": row["example_id"], "prompt": prompt, "options": options, "confidences": confidences}
        )
    return list(groups.values())


def _short(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
