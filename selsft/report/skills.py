"""The report of a study: one self-contained HTML page, and its tables as CSV.

The tables are computed by the caller (`skills.results`); here each column gets a heading, an explanation and a
text per cell. The page needs no script. Rejected: a notebook or a dashboard (a server, or scripts from elsewhere, to
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

from ..data.cards import write_card
from ..records import replaced
from . import charts
from .page import write_page

FEW_EXAMPLES = 100
FEW_TASKS = 10
FEW_SEEDS = 3
TEXT = 400
"""Characters of an example that are shown."""
COLLAPSED, FEW = "◆", "*"
NAMED = 6
"""Tasks that a warning names; of more it says the number, and the tables mark them."""
LEFT_OUT = "Probe left out:"


@dataclass(frozen=True)
class Table:
    """A table of the page: `columns` are (heading, explanation), `rows` are texts; `name` is the CSV file's."""

    name: str
    columns: list[tuple[str, str]]
    rows: list[list[str]]


Column = tuple[str, str, str | Callable[[dict[str, Any]], str]]


def write_report(folder: Path, found: Any) -> Path:
    """Write `report.html` and `tables/*.csv` into a study's folder.

    Args:
        found: its tables, a `skills.results.Results`.

    Returns:
        The path of the page.
    """
    areas = _areas(found.manifest)
    marks = _marks(found)
    views, frames = tables(found, areas)
    examples = _examples(found, areas)
    links = {name: f"questions-{number}" for number, name in enumerate(examples, 1)}
    (folder / "tables").mkdir(exist_ok=True)
    for name, frame in frames.items():
        with replaced(folder / "tables" / f"{name}.csv") as file:
            file.write(frame.to_csv(index=False, lineterminator="\n").encode())
    for part in (folder, folder / "tables"):
        write_card(part, "Questions or tables of a skill study, by `selsft skills`.")
    content = {
        "model": _model(found.manifest),
        "areas": _by_area(sorted(set(found.own["eval_task"])), areas),
        "n_tasks": found.own["eval_task"].nunique(),
        "links": links,
        "marks": marks,
        "reference": found.reference,
        "warnings": warnings(found),
        "tables": views,
        "dots": [
            _dots(frames["own"], "Forget ratio", "ratio", [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0], links, marks),
            _dots(frames["own"], "Forget gap", "gap", [-0.5, -0.25, 0.0, 0.25, 0.5], links, marks),
        ]
        if len(found.own)
        else [],
        "maps": [(key, _map(key, matrix)) for key, matrix in found.matrices.items()],
        "examples": examples,
        "manifest": json.dumps(found.manifest, indent=2, ensure_ascii=False, sort_keys=True),
    }
    return write_page(folder / "report.html", "skills.html", content)


def _dots(
    own: pd.DataFrame, title: str, name: str, ticks: list[float], links: dict[str, str], marks: dict[str, str]
) -> charts.DotPlot:
    several = own[["variant", "method"]].drop_duplicates().shape[0] > 1
    reason = {"ratio": "ratio_reason", "gap": "outcome_reason"}[name]
    found = []
    for row in own.to_dict("records"):
        task = row["label_task"]
        label = f"{task} ({row['variant']}, {row['method']})" if several else task
        numbers = row[name], row[f"{name}_low"], row[f"{name}_high"], row[reason]
        label = " ".join(filter(None, (label, marks.get(task, ""))))
        found.append(charts.Estimate(label, *numbers, row.get("area", ""), links.get(task, "")))
    return charts.dot_plot(title, found, ticks)


def _areas(manifest: dict[str, Any]) -> dict[str, str]:
    """{task: its area}, where the manifest of a study says so."""
    tasks = manifest.get("tasks")
    known = tasks.items() if isinstance(tasks, dict) else []
    return {str(name): str(notes["area"]) for name, notes in known if isinstance(notes, dict) and notes.get("area")}


def _by_area(tasks: list[str], areas: dict[str, str]) -> list[tuple[str, list[str]]]:
    """Areas and their tasks; those without an area stand last, under an empty name."""
    names = sorted({areas.get(task, "") for task in tasks}, key=lambda area: (not area, area))
    return [(area, [task for task in tasks if areas.get(task, "") == area]) for area in names]


def _marks(found: Any) -> dict[str, str]:
    """{task: signs of what to know about its figures}; `warnings` explains them."""
    few = set(found.own.loc[_few(found.own), "eval_task"])
    collapsed = set(found.summary.loc[found.summary["collapsed"].astype(bool), "eval_task"])
    return {task: COLLAPSED * (task in collapsed) + FEW * (task in few) for task in sorted(few | collapsed)}


def _few(own: pd.DataFrame) -> pd.Series:
    return (own["n_examples"] > 0) & (own["n_examples"] < FEW_EXAMPLES)


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


def warnings(found: Any) -> list[str]:
    """What a reader must know before the figures, one line for each kind; the tables mark the tasks."""
    lines = []
    bad = found.summary[found.summary["collapsed"].astype(bool)]
    if len(bad):
        lines.append(
            f"{COLLAPSED} Collapse: {_count(len(bad), 'evaluation')} of {_listed(bad['eval_task'])} gave nearly "
            "always the same answer. Such an accuracy is about that answer, not about the skill: see the collapse "
            "check, whose AUC within options tells whether the knowledge is still there (0.5: it is not)."
        )
    for column, what in (("ratio", "forget ratio"), ("outcome", "outcome")):
        null = found.own[found.own[column].isna() & (found.own["ratio"].notna() | (column == "ratio"))]
        if len(null):
            reasons = sorted(set(null[f"{column}_reason"].dropna()))
            why = f": {reasons[0]}" if len(reasons) == 1 else ", each with its reason in the table"
            lines.append(f"No {what} for {_listed(null['label_task'])}{why}.")
    small = found.own[_few(found.own)].drop_duplicates("eval_task").sort_values("eval_task")
    if len(small):
        lines.append(
            f"{FEW} Few examples: {_listed(small['eval_task'])}; with {small['n_examples'].min()} to "
            f"{small['n_examples'].max()} test questions the intervals are wide."
        )
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
    probes = [note for note in found.notes if note.startswith(LEFT_OUT)]
    notes = [note for note in found.notes if note not in probes]
    if len(probes) > 1:
        notes.append(f"{LEFT_OUT} {len(probes)} times, first {probes[0].removeprefix(LEFT_OUT).strip()}")
    else:
        notes += probes
    return lines + notes


def _listed(tasks: pd.Series) -> str:
    """The names of tasks, or their number where a line would not hold them."""
    names = sorted(set(tasks))
    return ", ".join(names) if len(names) <= NAMED else f"{len(names)} tasks"


def _count(number: int, what: str) -> str:
    return f"{number} {what}{'' if number == 1 else 's'}"


def tables(found: Any, areas: dict[str, str]) -> tuple[dict[str, Table], dict[str, pd.DataFrame]]:
    """The tables of the page, and the frames of the CSV files under the same names (and some that are not shown).

    Those of single tasks are in the order of areas.
    """

    def by_area(frame: pd.DataFrame) -> pd.DataFrame:
        if not areas:
            return frame
        frame = frame.assign(area=[areas.get(task, "") for task in frame["label_task"]])
        last = (frame["area"] == "").rename("last")  # those without an area
        order = pd.concat([frame[["variant", "method", "area", "label_task"]], last], axis=1)
        order = order.sort_values(["last", "area", "label_task", "variant", "method"]).index
        return frame.loc[order].reset_index(drop=True)

    area: list[Column] = [("area", "of the suite", "area")] if areas else []
    own = [*area, *_WHO, *_SIZES, *_STAGES, *_LEFT]
    if (found.own["method"] == "flip").any():
        own.append(("flipped ratio", "drop over that to 1 − fine-tuned", "flipped_ratio"))
    plan: dict[str, tuple[pd.DataFrame, list[Column]]] = {
        "own": (by_area(found.own), [*own, _COLLAPSED]),
        "own-train": (by_area(found.own_train), own),
        "own-per-character": (by_area(found.own_per_character), own),
        "collapse": (found.summary, [*_MODEL, *_COLLAPSE]),
        "agreement": (found.agreement, [*_MODEL, *_AGREEMENT]),
        "transitions": (found.transitions, [*_WHO, *_TRANSITIONS]),
        "task-predictors": (found.task_predictors, [*_SETTING, _TASK, *_PREDICTORS]),
        "task-correlations": (found.task_correlations, [*_SETTING, _PREDICTOR, _WITH, *_CORRELATION]),
        "example-correlations": (found.example_correlations, [*_SETTING, _TASK, _PREDICTOR, *_CORRELATION]),
        "probes": (found.probes, [*_WHO, _LAYER, *_SIZES, *_STAGES, *_PROBES]),
        "learning-order": (
            found.learning_order,
            [*_MODEL, ("split", "", "split"), ("examples", "", "n_examples"), *_CORRELATION],
        ),
        "examples": (found.shown, [*_SETTING, _TASK, *_EXAMPLES]),
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
    return views, {**frames, "comparisons": found.comparisons, "matrices": _long(found)}


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


def _long(found: Any) -> pd.DataFrame:
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


def _examples(found: Any, areas: dict[str, str]) -> dict[str, list[dict[str, Any]]]:
    """{task: its shown examples with their texts, by setting}, in the order of areas; texts are None where they must
    not be shown or are not there."""
    texts = {}
    if found.examples is not None:
        test = found.examples[found.examples["split"] == "test"]
        texts = {(row.eval_task, row.example_id): row for row in test.itertuples()}
    groups: dict[tuple, dict[str, Any]] = {}
    for row in found.shown.to_dict("records"):
        key = (row["variant"], row["method"], row["task"])
        hidden = row["task"] in found.sensitive
        group = groups.setdefault(key, {"key": key, "hidden": hidden, "forgotten": [], "resisted": []})
        text = None if hidden else texts.get((row["task"], row["example_id"]))
        options = [] if text is None else [(_short(o), i == text.gold) for i, o in enumerate(text.options)]
        confidences = [_cell(row, f"{stage}_confidence") for stage in ("finetuned", "forgotten")]
        prompt = None if text is None else _short(text.prompt)
        group[row["kind"]].append(
            {"id": row["example_id"], "prompt": prompt, "options": options, "confidences": confidences}
        )
    tasks = [task for _, members in _by_area(sorted({key[2] for key in groups}), areas) for task in members]
    return {task: [group for key, group in groups.items() if key[2] == task] for task in tasks}


def _short(text: str) -> str:
    return text if len(text) <= TEXT else text[: TEXT - 1] + "…"
