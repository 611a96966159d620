"""All tables of a study, computed from its folder: what the report shows and the CSV files hold.

Rejected: computing inside the report, where a table could differ from its CSV file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from . import forgetting as forget
from . import learning, matrix, metrics, predictors, probes
from .forgetting import Ends, Reference
from .hidden import read_hidden
from .table import ALL_TASKS, END, MODEL, read_scores

GROUP = ["variant", "method"]
SHOWN = 3
"""Examples of each kind (forgotten, resisted) per task."""


@dataclass(frozen=True)
class Results:
    """A study's tables.

    Attributes:
        manifest: `study.json`.
        examples: `examples.parquet`, or None.
        reference: the main one, of `own`.
        own: `forgetting.forgetting`, where a task's own labels were forgotten, test split, summed scores; and
            `collapsed_seeds`, how many of its forgotten models collapsed.
        own_train, own_per_character: the same on the training split; with scores per character.
        comparisons: all tasks, splits and references, summed scores.
        matrices: {(variant, method, reference, value): matrix}, test split, value "ratio" or "drop".
        agreement, transitions, summary (of own tasks): of the functions of these names.
        task_predictors, task_correlations, example_correlations: of `predictors`.
        probes: `forgetting.forgetting` of probe accuracies, with `control`; learning_order: of `learning`.
        shown: examples that were forgotten and that resisted: `variant`, `method`, `task`, `kind`, `example_id`,
            `finetuned_confidence`, `forgotten_confidence`.
        sensitive: tasks of `shown` whose texts must not be shown.
        notes: what is missing, one sentence each.
    """

    manifest: dict[str, Any]
    examples: pd.DataFrame | None
    reference: Reference
    own: pd.DataFrame
    own_train: pd.DataFrame
    own_per_character: pd.DataFrame
    comparisons: pd.DataFrame
    matrices: dict[tuple[str, str, str, str], matrix.Matrix]
    agreement: pd.DataFrame
    transitions: pd.DataFrame
    summary: pd.DataFrame
    task_predictors: pd.DataFrame
    task_correlations: pd.DataFrame
    example_correlations: pd.DataFrame
    probes: pd.DataFrame
    learning_order: pd.DataFrame
    shown: pd.DataFrame
    sensitive: frozenset[str]
    notes: list[str] = field(default_factory=list)


def compute(folder: Path, draws: int = 2000) -> Results:
    """Everything from one study folder; nothing is written.

    Args:
        draws: of the bootstrap.

    Raises:
        ValueError: a file of the folder is missing or not what it should be; the message names it.
    """
    folder = Path(folder)
    notes: list[str] = []
    manifest = _manifest(folder / "study.json")
    scores = read_scores(folder)
    stages = manifest.get("stages") or []
    if missing := [name for name in stages if not (folder / "scores" / f"{name}.parquet").exists()]:
        done = f"{len(stages) - len(missing)} of {len(stages)} stages"
        notes.append(f"Unfinished: these figures are of {done}; {missing[0]} is the first that is not there.")
    examples = _examples(folder / "examples.parquet")
    if examples is None:
        notes.append("No examples.parquet: options are told apart by slot, chance is 1/k, and no text is shown.")
    else:
        scores = metrics.with_texts(scores, examples)
    found = metrics.questions(scores)
    ends = Ends(found)
    chances = metrics.chances(found, scores)
    references = _references(ends)
    reference = _main(manifest, references)

    tables = [forget.forgetting(ends, chances, name, draws=draws) for name in references]
    comparisons = pd.concat(tables, ignore_index=True)
    main = comparisons[comparisons["reference"] == reference]
    own = main[main["label_task"] == main["eval_task"]]
    by_character = forget.forgetting(Ends(metrics.questions(scores, "chars")), chances, reference, draws=draws)
    per_character = by_character[by_character["label_task"] == by_character["eval_task"]]

    hidden = list(read_hidden(folder))
    if not hidden:
        notes.append("No hidden states were stored: no probes, and no hidden-state variance as a predictor.")
    probed, left_out = probes.probe_all(hidden)
    notes += [f"Probe left out: {what}." for what in left_out]
    task_predictors = predictors.by_task(_test(main), hidden)
    end_scores = scores[scores["step"] == END]
    own_task = end_scores["eval_task"].astype(str) == end_scores["label_task"].astype(str)
    own_task |= end_scores["label_task"].isin(["", ALL_TASKS])
    summary = _test(metrics.summarise(end_scores[own_task]))
    shown = _shown(ends)
    return Results(
        manifest=manifest,
        examples=examples,
        reference=reference,
        own=_with_collapsed(_test(own), summary, ends),
        own_train=own[own["split"] == "train"].reset_index(drop=True),
        own_per_character=_test(per_character),
        comparisons=comparisons,
        matrices=_matrices(_test(comparisons)),
        agreement=forget.agreement(found, ends),
        transitions=_own_test(forget.transitions(ends)),
        summary=summary,
        task_predictors=task_predictors,
        task_correlations=predictors.correlate_tasks(task_predictors),
        example_correlations=predictors.correlate_examples(ends, hidden),
        probes=_probes(probed, chances, draws),
        learning_order=learning.learning_order(learning.example_steps(found)),
        shown=shown,
        sensitive=frozenset(task for task in shown["task"] if sensitive(manifest, task)),
        notes=notes,
    )


def sensitive(manifest: Mapping[str, Any], task: str) -> bool:
    """Whether a task's text must not be shown: its area is toxicity, it is flagged, its name says so, or the manifest
    does not know it."""
    known = _task_notes(manifest).get(task)
    if known is None or re.search("toxi|hate|offens|abus", task, re.IGNORECASE):
        return True
    return bool(known.get("sensitive")) or "toxi" in str(known.get("area", "")).lower()


def _task_notes(manifest: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """{task: its notes}, from `tasks` of the manifest or of its `config`: a mapping by name or a list with names."""
    for place in (manifest, manifest.get("config") or {}):
        tasks = place.get("tasks") if isinstance(place, Mapping) else None
        if isinstance(tasks, Mapping):
            return {str(name): notes for name, notes in tasks.items() if isinstance(notes, Mapping)}
        if isinstance(tasks, list) and any(isinstance(notes, Mapping) for notes in tasks):
            return {str(notes["name"]): notes for notes in tasks if isinstance(notes, Mapping) and "name" in notes}
    return {}


def _manifest(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{path}: not found; a study folder has it (selsft skills writes one)") from None
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path}: must hold a JSON object")
    return found


def _examples(path: Path) -> pd.DataFrame | None:
    if not path.exists():
        return None
    wanted = ["eval_task", "split", "example_id", "prompt", "options", "gold"]
    try:
        return pq.read_table(path, columns=wanted).to_pandas()
    except (pa.ArrowInvalid, OSError) as error:
        raise ValueError(f"{path}: must have the columns {', '.join(wanted)} ({error})") from error


def _references(ends: Ends) -> list[Reference]:
    """Those that the fine-tuned models of the study allow, the main one first."""
    tasks = {model.label_task for model in ends.models if model.stage == "finetuned"}
    shared: list[Reference] = ["shared"] if ALL_TASKS in tasks else []
    own: list[Reference] = ["per_task", "parent"] if tasks - {ALL_TASKS} else []
    return [*shared, *own] or ["per_task"]


def _main(manifest: Mapping[str, Any], references: list[Reference]) -> Reference:
    config = manifest.get("config")
    asked = config.get("reference") if isinstance(config, Mapping) else None
    return next((name for name in references if name == asked), references[0])


def _test(table: pd.DataFrame) -> pd.DataFrame:
    return table[table["split"] == "test"].reset_index(drop=True)


def _own_test(table: pd.DataFrame) -> pd.DataFrame:
    return _test(table[table["label_task"] == table["eval_task"]])


def _matrices(table: pd.DataFrame) -> dict[tuple[str, str, str, str], matrix.Matrix]:
    if table["eval_task"].nunique() < 2:
        return {}
    groups = table.groupby([*GROUP, "reference"], observed=True, sort=True)
    return {
        (str(key[0]), str(key[1]), str(key[2]), value): matrix.cross_task(group, value)
        for key, group in groups
        for value in ("ratio", "drop")
    }


def _with_collapsed(own: pd.DataFrame, summary: pd.DataFrame, ends: Ends) -> pd.DataFrame:
    bad = summary[summary["collapsed"]].to_dict("records")
    collapsed = {(tuple(row[name] for name in MODEL), row["eval_task"]) for row in bad}
    groups = ends.forgotten()
    keys = own[[*GROUP, "label_task"]].itertuples(index=False, name=None)
    return own.assign(collapsed_seeds=[sum((tuple(m), key[2]) in collapsed for m in groups[key]) for key in keys])


def _probes(probed: pd.DataFrame, chances: Mapping[tuple[str, str], float], draws: int) -> pd.DataFrame:
    """Accuracies of the probes with intervals, and of the controls: one row per (variant, method, task)."""
    if probed.empty:
        return pd.DataFrame(columns=[*forget.COLUMNS, "control", "layer", "n_train"])
    uniform = (1 / probed["n_options"]).groupby(probed["eval_task"]).mean()
    ends = Ends(probed)
    table = _own_test(
        forget.forgetting(ends, {(task, "test"): c for task, c in uniform.items()}, "parent", draws=draws)
    )
    for column in ("control", "layer", "n_train"):
        by_group = {
            group: [mean for m in models if (mean := _mean(probed, m, column)) is not None]
            for group, models in ends.forgotten().items()
        }
        key = table[[*GROUP, "label_task"]].itertuples(index=False, name=None)
        table[column] = [sum(by_group[k]) / len(by_group[k]) for k in key]
    return table


def _mean(probed: pd.DataFrame, model: forget.Model, column: str) -> float | None:
    of = (probed[MODEL] == list(model)).all(axis=1) & (probed["eval_task"] == model.label_task)
    return float(probed.loc[of, column].mean()) if of.any() else None


def _shown(ends: Ends) -> pd.DataFrame:
    """Of the test examples that every seed's fine-tuned model got right: those that most seeds now get wrong, with the
    lowest P(gold) after forgetting, and those that all still get right, with the highest."""
    rows = []
    for (variant, method, task), models in ends.forgotten().items():
        if (task, "test") not in ends.ids:
            continue
        pairs = [(ends.finetuned(m, task, "parent"), m) for m in models]
        correct = ends.stack(pairs, task, "test", "correct")
        confidence = ends.stack(pairs, task, "test", "confidence")
        if correct is None or confidence is None:
            continue
        after = correct[1].mean(axis=0)  # NaN where a seed lacks the example: never selected
        before, left = (values.mean(axis=0) for values in confidence)
        learned = correct[0].mean(axis=0) == 1
        frame = pd.DataFrame({"example_id": ends.ids[task, "test"], "finetuned_confidence": before})
        frame = frame.assign(forgotten_confidence=left, variant=variant, method=method, task=task)
        lost = frame[learned & (after < 0.5)].nsmallest(SHOWN, "forgotten_confidence")
        kept = frame[learned & (after == 1)].nlargest(SHOWN, "forgotten_confidence")
        rows += [lost.assign(kind="forgotten"), kept.assign(kind="resisted")]
    names = [*GROUP, "task", "kind", "example_id", "finetuned_confidence", "forgotten_confidence"]
    return pd.concat(rows, ignore_index=True)[names] if rows else pd.DataFrame(columns=names)
