"""The report of a study: one self-contained HTML page, and its tables as CSV.

`write_report` reads a study folder and writes `report.html` and `tables/*.csv` into it. The page needs no script, no
font and no other file; texts of data sets go through Jinja2's escaping. Rejected: a notebook or a dashboard (a server,
or scripts from elsewhere, to look at one study).
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from ..skills.results import Results, compute, sensitive
from . import charts

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


Column = tuple[str, str, Callable[[dict[str, Any]], str]]


def write_report(folder: Path) -> Path:
    """Write `report.html` and `tables/*.csv` of a study, from its folder alone.

    Args:
        folder: with `study.json` and `scores/`; `examples.parquet` and `hidden/` where the study stored them.

    Returns:
        The path of the page.

    Raises:
        ValueError: a file is missing or not what it should be; nothing is written.
    """
    folder = Path(folder)
    found = compute(folder)
    views, frames = tables(found)
    page = render(found, views)
    for name, frame in frames.items():
        _write(folder / "tables" / f"{name}.csv", frame.to_csv(index=False, lineterminator="\n"))
    _write(folder / "report.html", page)
    return folder / "report.html"


def render(found: Results, views: dict[str, Table]) -> str:
    """The page as HTML."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("selsft.report"),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    ratio_ticks, gap_ticks = [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0], [-0.5, -0.25, 0.0, 0.25, 0.5]
    return environment.get_template("skills.html").render(
        model=_model(found.manifest),
        tasks=sorted(set(found.own["eval_task"])),
        reference=found.reference,
        warnings=warnings(found),
        tables=views,
        dots=[
            charts.dot_plot(found.own, "ratio", "Forget ratio", -0.5, 2.0, ratio_ticks),
            charts.dot_plot(found.own, "gap", "Forget gap", -0.5, 0.5, gap_ticks),
        ]
        if len(found.own)
        else [],
        maps=[
            (key, charts.heat_map(matrix, 1.0 if key[3] == "ratio" else 0.5)) for key, matrix in found.matrices.items()
        ],
        examples=_examples(found),
        manifest=json.dumps(found.manifest, indent=2, ensure_ascii=False, sort_keys=True),
    )


def _model(manifest: dict[str, Any]) -> str:
    """The model's name, from `model` or the settings."""
    model, config = manifest.get("model"), manifest.get("config")
    for place, key in ((model, "name"), (config, "model_name_or_path")):
        if isinstance(place, dict) and isinstance(place.get(key), str):
            return place[key]
    return "a model without a name"


def warnings(found: Results) -> list[str]:
    """What a reader must know before the figures, the gravest first."""
    lines = []
    bad = found.summary[found.summary["collapsed"]]
    for row in bad.to_dict("records"):
        stage = "base" if row["stage"] == "base" else f"{row['stage']} {row['method']} ({row['label_task']})".strip()
        lines.append(
            f"Collapse: {row['run']}, {stage}, answers {row['top_share']:.0%} of {row['eval_task']} with the same "
            f"option ({row['top_label']}). Its accuracy of {row['accuracy']:.2f} is about that answer, not about the "
            f"skill: AUC within options, between questions, is {row['auc_within']:.2f} (0.5: it tells nothing)."
        )
    for row in found.own.to_dict("records"):
        who = f"{row['label_task']} ({row['variant']}, {row['method']})"
        if pd.isna(row["ratio"]):
            lines.append(f"No forget ratio for {who}: {row['ratio_reason']}.")
        elif pd.isna(row["outcome"]):
            lines.append(f"No outcome for {who}: {row['outcome_reason']}.")
    small = found.own[(found.own["n_examples"] > 0) & (found.own["n_examples"] < FEW_EXAMPLES)]
    for task, n in sorted(dict(zip(small["eval_task"], small["n_examples"], strict=True)).items()):
        lines.append(f"Few examples: {task} has {n} test questions; its intervals are wide.")
    seeds = int(found.own["n_seeds"].max()) if len(found.own) else 0
    if seeds == 1:
        lines.append("One seed: the intervals are about questions only; another seed may give other figures.")
    elif seeds and seeds < FEW_SEEDS:
        lines.append(f"{seeds} seeds: the intervals allow for how little that says about seeds, and are wide for it.")
    tasks = int(found.task_correlations["n"].max()) if len(found.task_correlations) else 0
    if tasks < FEW_TASKS:
        lines.append(
            f"Predictors: {tasks} tasks with a value; a rank correlation over fewer than {FEW_TASKS} says little."
        )
    return lines + found.notes


def tables(found: Results) -> tuple[dict[str, Table], dict[str, pd.DataFrame]]:
    """The tables of the page, and the frames of the CSV files under the same names (and some that are not shown)."""
    who: list[Column] = [
        ("setting", "the run's name without its seed", lambda r: str(r["variant"])),
        ("method", "labels or objective of the forgetting stage", lambda r: str(r["method"])),
    ]
    task: Column = (
        "task",
        "the task whose labels were forgotten, evaluated on itself",
        lambda r: str(r["label_task"]),
    )
    sizes: list[Column] = [
        ("n", "test questions", lambda r: _whole(r["n_examples"])),
        ("seeds", "", lambda r: _whole(r["n_seeds"])),
        ("chance", "accuracy of an answer that ignores the question", lambda r: _two(r["chance"])),
    ]
    stages: list[Column] = [
        ("base", "accuracy of the base model", _interval("base")),
        ("fine-tuned", "accuracy after fine-tuning on the true labels", _interval("finetuned")),
        ("forgotten", "accuracy after forgetting", _interval("forgotten")),
    ]
    left: list[Column] = [
        ("gap", "forgotten − chance; 0: forgotten", _interval("gap")),
        (
            "ratio",
            "share of what fine-tuned has above chance that is gone; 1: all",
            _interval("ratio", "ratio_reason"),
        ),
        ("outcome", "see the text", _outcome),
    ]
    flipped: Column = (
        "flipped ratio",
        "drop over that to 1 − fine-tuned",
        _interval("flipped_ratio", "flipped_reason"),
    )
    own = [*who, task, *sizes, *stages, *left]
    collapsed: Column = ("collapsed", "forgotten models that answer everything alike, see below", _collapsed_seeds)
    if (found.own["method"] == "flip").any():
        own.append(flipped)
    model: list[Column] = [
        ("run", "", lambda r: str(r["run"])),
        ("stage", "", lambda r: str(r["stage"])),
        ("method", "", lambda r: str(r["method"])),
        ("labels of", "the task that the model was trained on", lambda r: str(r["label_task"])),
    ]
    correlation: list[Column] = [
        ("n", "points", lambda r: _whole(r["n"])),
        ("Spearman ρ", "rank correlation with its 95 % interval", _interval("rho", "reason", "low", "high")),
        ("p", "two-sided permutation test", lambda r: "" if pd.isna(r["p"]) else f"{r['p']:.2g}"),
    ]
    plan: dict[str, tuple[pd.DataFrame, list[Column]]] = {
        "own": (found.own, [*own, collapsed]),
        "own-train": (found.own_train, own),
        "own-per-character": (found.own_per_character, own),
        "collapse": (found.summary, [*model, *(_number(*column) for column in _COLLAPSE)]),
        "agreement": (found.agreement, [*model, *(_number(*column) for column in _AGREEMENT)]),
        "transitions": (
            found.transitions,
            [
                *who,
                task,
                *(
                    (name, "", _right(key))
                    for name, key in zip(_STAGES, ("base", "finetuned", "forgotten"), strict=True)
                ),
                ("n", "questions, over all seeds", lambda r: _whole(r["n"])),
                ("share", "", lambda r: f"{r['share']:.1%}"),
            ],
        ),
        "task-predictors": (
            found.task_predictors,
            [*who, ("task", "", lambda r: str(r["task"])), *(_number(*column) for column in _PREDICTORS)],
        ),
        "task-correlations": (
            found.task_correlations,
            [
                *who,
                ("predictor", "", lambda r: _PLAIN[r["predictor"]]),
                ("with", "", lambda r: f"forget {r['outcome']}"),
                *correlation,
            ],
        ),
        "example-correlations": (
            found.example_correlations,
            [
                *who,
                ("task", "", lambda r: str(r["task"])),
                ("predictor", "", lambda r: _PLAIN[r["predictor"]]),
                *correlation,
            ],
        ),
        "probes": (
            found.probes,
            [
                *who,
                task,
                ("layer", "index into hidden_states", lambda r: _whole(r["layer"])),
                *sizes,
                *stages,
                ("drop", "fine-tuned − forgotten", _interval("drop")),
                ("control", "probe fitted on shuffled labels; should be near chance", lambda r: _two(r["control"])),
            ],
        ),
        "learning-order": (
            found.learning_order,
            [
                *model,
                ("split", "", lambda r: str(r["split"])),
                ("examples", "", lambda r: _whole(r["n_examples"])),
                *correlation,
            ],
        ),
        "examples": (
            found.shown,
            [
                *who,
                ("task", "", lambda r: str(r["task"])),
                ("kind", "", lambda r: str(r["kind"])),
                ("example", "", lambda r: str(r["example_id"])),
                ("P(gold) fine-tuned", "mean over seeds", lambda r: _two(r["finetuned_confidence"])),
                ("P(gold) forgotten", "mean over seeds", lambda r: _two(r["forgotten_confidence"])),
            ],
        ),
    }
    views = {
        name: Table(
            name,
            [(heading, title) for heading, title, _ in columns],
            [[cell(row) for _, _, cell in columns] for row in frame.to_dict("records")],
        )
        for name, (frame, columns) in plan.items()
    }
    frames = {name: frame for name, (frame, _) in plan.items()}
    return views, {**frames, "comparisons": found.comparisons, "matrices": _long(found)}


_STAGES = ("base", "fine-tuned", "forgotten")
_PLAIN = {
    "base_confidence": "base confidence",
    "base_variance": "hidden-state variance",
    "base_spread": "distance of the hidden state from its mean, squared",
}
_COLLAPSE = [
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
_AGREEMENT = [
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
_PREDICTORS = [
    ("base confidence", "mean of P(gold) of the base model", "base_confidence"),
    ("hidden-state variance", "trace of the covariance at the questions' last tokens", "base_variance"),
    ("layer", "index into hidden_states", "layer"),
    ("forget ratio", "", "ratio"),
    ("forget gap", "", "gap"),
]


def _number(heading: str, title: str, key: str) -> Column:
    def cell(row: dict[str, Any]) -> str:
        value = row[key]
        if pd.isna(value):
            return "null"
        if isinstance(value, bool):
            return "yes" if value else "no"
        if isinstance(value, float):
            return f"{value:.2f}"
        return str(value)

    return heading, title, cell


def _interval(
    name: str, reason: str | None = None, low: str | None = None, high: str | None = None
) -> Callable[[dict[str, Any]], str]:
    def cell(row: dict[str, Any]) -> str:
        if pd.isna(row[name]):
            return f"null: {row[reason]}" if reason and row[reason] else "null"
        return f"{row[name]:.2f} ({row[low or f'{name}_low']:.2f} to {row[high or f'{name}_high']:.2f})"

    return cell


def _right(key: str) -> Callable[[dict[str, Any]], str]:
    return lambda row: "right" if row[key] else "wrong"


def _outcome(row: dict[str, Any]) -> str:
    return f"null: {row['outcome_reason']}" if pd.isna(row["outcome"]) else str(row["outcome"])


def _collapsed_seeds(row: dict[str, Any]) -> str:
    return f"{row['collapsed_seeds']} of {row['n_seeds']} seeds" if row["collapsed_seeds"] else "no"


def _two(value: float) -> str:
    return "null" if pd.isna(value) else f"{value:.2f}"


def _whole(value: float) -> str:
    return "null" if pd.isna(value) or not math.isfinite(value) else str(int(value))


def _long(found: Results) -> pd.DataFrame:
    """The matrices, one row per cell, in the order of the page."""
    rows = [
        dict(zip(("variant", "method", "reference", "value"), key, strict=True))
        | {"label_task": row, "eval_task": column, "number": matrix.values.at[row, column]}
        | {"low": matrix.low.at[row, column], "high": matrix.high.at[row, column]}
        | {"reason": matrix.reasons.at[row, column]}
        for key, matrix in found.matrices.items()
        for row in matrix.values.index
        for column in matrix.values.columns
    ]
    names = ["variant", "method", "reference", "value", "label_task", "eval_task", "number", "low", "high", "reason"]
    return pd.DataFrame(rows, columns=names)


def _examples(found: Results) -> list[dict[str, Any]]:
    """The shown examples with their texts, by task; texts are None where they must not be shown or are not there."""
    texts = {}
    if found.examples is not None:
        test = found.examples[found.examples["split"] == "test"]
        texts = {(row.eval_task, row.example_id): row for row in test.itertuples()}
    groups: dict[tuple, dict[str, Any]] = {}
    for row in found.shown.to_dict("records"):
        key = (row["variant"], row["method"], row["task"])
        hidden = sensitive(found.manifest, row["task"])
        group = groups.setdefault(key, {"key": key, "hidden": hidden, "forgotten": [], "resisted": []})
        text = None if hidden else texts.get((row["task"], row["example_id"]))
        options = [] if text is None else [(_short(o), i == text.gold) for i, o in enumerate(text.options)]
        confidences = _two(row["finetuned_confidence"]), _two(row["forgotten_confidence"])
        prompt = None if text is None else _short(text.prompt)
        group[row["kind"]].append(
            {"id": row["example_id"], "prompt": prompt, "options": options, "confidences": confidences}
        )
    return list(groups.values())


def _short(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        part.write_text(text, encoding="utf-8")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
