"""What came out of a run, read from the folders of its stages: plain values for the page, the terminal and JSON.

Arms are compared in pairs over held-out rows and seeds (`workflow.arms.ArmComparison`), with the arm `plain`, or with
the base where there is none. Rejected: keeping figures in memory while stages run, which a resumed run would lack.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..evaluation.harness import compare_harness
from ..evaluation.settings import METRICS, ROWS
from ..records import RUN as MANIFEST
from ..records import read_json
from ..secrets import redact
from ..selection.select import COUNTS, SELECTED
from ..workflow.arms import ArmComparison
from .arms import ORACLE, PLAIN
from .check import CHECK
from .outlook import OUTLOOK, Outlook
from .samples import changed_answers, coloured_rows
from .verdict import MEASURES, TOTALS, verdict

_HINTS = {
    "exact_match": "free text hardly ever matches word for word",
    "eos_rate": "raise or lower evaluate.max_new_tokens",
    "preference": "the pairs are too easy or too few",
}
_CURVES = ("loss", "positive_loss", "forget_loss", "forget_weight", "negative_prob")


def results(root: Path) -> dict[str, Any]:
    """Everything that `report.html` and `report.json` show of the run in `root`."""
    run = read_json(root / "run.json")
    folders = {name: root / stage["folder"] for name, stage in run["stages"].items()}
    evaluated = {name: folder / "evaluation" for name, folder in folders.items() if name.startswith("evaluate-")}
    names = {name: [f"evaluate-{name}"] for name in ("base", "reference") if f"evaluate-{name}" in evaluated}
    names |= {
        name: [f"evaluate-{stage.removeprefix('train-')}" for stage in arm["train"]]
        for name, arm in run["arms"].items()
    }
    models: dict[str, list[Path]] = {
        name: [evaluated[stage] for stage in stages]
        for name, stages in names.items()
        if stages and all((evaluated.get(stage, root / "none") / METRICS).is_file() for stage in stages)
    }
    baseline = next((name for name, arm in run["arms"].items() if arm["kind"] == PLAIN and name in models), "base")
    measures, left_out = _measures(models, baseline)
    selections = {name: folder / COUNTS for name, folder in folders.items() if name.startswith("select")}
    counts = {name: read_json(path) for name, path in selections.items() if path.is_file()}
    arms = [_arm(name, arm, root, run, counts) for name, arm in run["arms"].items()]
    check = read_json(folders["check"] / CHECK) if "check" in folders else {}
    outlook = None
    if "select" in folders and (folders["select"] / OUTLOOK).is_file():
        outlook = Outlook.read(folders["select"])
    found: dict[str, Any] = {
        "recipe": run["recipe"],
        "method": run["method"],
        "baseline": baseline,
        "arms": arms,
        "measures": measures,
        "left_out": left_out,
        "outlook": None if outlook is None else {**vars(outlook), "lines": outlook.lines()},
        "selections": {name: {**each, "worst": each["worst"][:30]} for name, each in counts.items()},
        "split": read_json(folders["split"] / "split.json") if "split" in folders else {},
        "check": check,
        "harness": compare_harness(models, baseline),
        "accepts": next((read_json(paths[0] / METRICS).get("accepts") for paths in models.values()), None),
        "answers": changed_answers({name: paths[0] / ROWS for name, paths in models.items()}),
        "rows": [],
        "stages": [{"name": name, **stage} for name, stage in run["stages"].items()],
        "flags": run["flags"],
        "stage_flags": run["stage_flags"],
        "overrides": run.get("overrides", []),
        "versions": run["versions"],
        "written": run["written"],
        "device": next((arm["device"] for arm in arms if arm["device"]), None),
    }
    if "select" in folders and (folders["select"] / SELECTED).is_file() and "triage" in folders:
        model = run["flags"].get("model_name_or_path") or str(folders["world"] / "base")
        found["rows"] = coloured_rows(folders["select"] / SELECTED, folders["triage"] / "rows.parquet", model)
    found = redact(found)
    found["verdict"] = verdict(found, run, finished=bool(run.get("finished")) or bool(models))
    found["warnings"] = _warnings(found, run)
    return found


def _arm(
    name: str, arm: dict[str, Any], root: Path, run: dict[str, Any], counts: dict[str, dict[str, Any]]
) -> dict[str, Any]:
    """Where an arm's numbers come from, how many tokens it forgot, and how its training went."""
    trained = [root / run["stages"][stage]["folder"] for stage in arm["train"] if stage in run["stages"]]
    records = [read_json(folder / "model" / MANIFEST) for folder in trained]
    curves = [_curve(record) for record in records]
    shares = [step["negative_fraction"] for curve in curves for step in curve if "negative_fraction" in step]
    share = float(np.mean(shares)) if shares else None
    weights = next((each for record in records if (each := record.get("data", {}).get("weights"))), None)
    left_out = share
    # Of tokens that are ranked in every step, those that are not forgotten leave no other trace
    if picked := [step["selected_fraction"] for curve in curves for step in curve if "selected_fraction" in step]:
        left_out = 1 - float(np.mean(picked))
    if weights is not None:  # what the rows themselves say, whether a step was logged or not
        total = max(sum(weights.values()), 1)
        share, left_out = weights["negative"] / total, (weights["negative"] + weights["neutral"]) / total
    chosen = counts.get(f"select-{name}", counts.get("select"))
    if chosen is not None and arm["kind"] not in (PLAIN, ORACLE):
        share = left_out = chosen["negative"] / max(chosen["trained"], 1)
    return {
        "name": name,
        "kind": arm["kind"],
        "changes": arm["changes"],
        "folders": [str(folder.relative_to(root)) for folder in trained],
        "evaluations": [
            run["stages"][stage]["folder"]
            for each in arm["train"]
            if (stage := f"evaluate-{each.removeprefix('train-')}") in run["stages"]
        ],
        "seconds": [record.get("finished", {}).get("seconds") for record in records if record],
        "steps": next((record["finished"].get("steps") for record in records if record.get("finished")), None),
        "negative": None if arm["kind"] == PLAIN else share,
        "selected": None if arm["kind"] == PLAIN else left_out,
        "curve": curves[0] if curves else [],
        "device": next((record.get("device") for record in records if record), None),
    }


def _curve(record: dict[str, Any]) -> list[dict[str, float]]:
    """The logged values by step, of a training's record."""
    log = (record.get("finished") or {}).get("log") or []
    names = (*_CURVES, "negative_fraction", "selected_fraction")
    return [
        {"step": each["step"], **{name: each[name] for name in names if isinstance(each.get(name), int | float)}}
        for each in log
        if "loss" in each
    ]


def _measures(models: dict[str, list[Path]], baseline: str) -> tuple[list[dict[str, Any]], list[dict[str, str]]]:
    """Every measure of every model with paired differences to the baseline, and the measures without resolution."""
    rows = {name: [_table(path) for path in paths] for name, paths in models.items()}
    metrics = {name: [read_json(path / METRICS) for path in paths] for name, paths in models.items()}
    found: list[dict[str, Any]] = []
    left_out: list[dict[str, str]] = []
    for name, (label, better, digits, column, size) in MEASURES.items():
        if name == "kl_to_base" and "base" in rows:  # whose distance to itself is 0
            kept = {model: tables for model, tables in rows.items() if all(column in table for table in tables)}
        else:
            kept = rows
        if baseline not in kept or not all(column in table for tables in kept.values() for table in tables):
            continue
        compared = _compare(kept, baseline, name, column, size)
        if compared is None:
            continue
        count = int((~np.isnan(compared.values[baseline][name]).any(axis=0)).sum())
        if reason := _without_resolution(name, compared, count):
            left_out.append({"name": name, "label": label, "reason": reason})
            continue
        found.append(
            {
                "name": name, "label": label, "better": better, "digits": digits, "rows": count,
                "seeds": max(len(paths) for paths in models.values()),
                "values": {model: compared.mean(model, name) for model in kept},
                "differences": {
                    model: dict(zip(("value", "low", "high"), compared.difference(model, name), strict=True))
                    for model in kept
                    if model != baseline
                },
                "by_seed": {
                    model: [float(np.nanmean(seed)) for seed in compared.values[model][name]] for model in kept
                },
            }
        )  # fmt: skip
    if any("answer" in table for tables in rows.values() for table in tables) and not any(
        "chrf" in table for tables in rows.values() for table in tables
    ):
        left_out.append(
            {"name": "chrf", "label": MEASURES["chrf"][0], "reason": "needs sacrebleu: pip install selsft[metrics]"}
        )
    for name, (label, more, digits) in TOTALS.items():
        values: dict[str, list[Any]] = {
            model: [each.get(name) for each in tables] for model, tables in metrics.items()
        }
        if baseline not in values or any(value is None for each in values.values() for value in each):
            continue
        means = {model: float(np.mean(each)) for model, each in values.items()}
        found.append(
            {
                "name": name, "label": label, "better": more, "digits": digits, "rows": None,
                "seeds": max(len(paths) for paths in models.values()), "values": means,
                "differences": {
                    model: {"value": value - means[baseline], "low": None, "high": None}
                    for model, value in means.items()
                    if model != baseline
                },
                "by_seed": values,
            }
        )  # fmt: skip
    return found, left_out


def _without_resolution(name: str, compared: ArmComparison, rows: int) -> str | None:
    """Why a measure tells no model from another, or no arm from the baseline; `None` when it does."""
    hint = f": {_HINTS[name]}" if name in _HINTS else ""
    values = {model: np.nan_to_num(each[name]) for model, each in compared.values.items()}
    every = np.concatenate([each[name][~np.isnan(each[name])] for each in compared.values.values()])
    if every.size and np.ptp(every) == 0:
        return f"is {every[0]:g} for every row of every model{hint}"
    arms = [each for model, each in values.items() if model not in ("base", "reference", compared.baseline)]
    if arms and all((each == values[compared.baseline]).all() for each in arms):
        return f"is the same for every arm in each of {rows} rows, {every.mean():.3g} on average{hint}"
    return None


def _table(folder: Path) -> dict[str, list]:
    found = pq.read_table(folder / ROWS).to_pydict() if (folder / ROWS).is_file() else {}
    if {"nll_right", "nll_wrong"} <= found.keys():
        means = [
            np.array(found[f"nll_{kind}"], float)
            / np.where(np.array(found[f"{kind}_tokens"]) > 0, found[f"{kind}_tokens"], np.nan)
            for kind in ("wrong", "right")
        ]
        found["gap"] = (means[0] - means[1]).tolist()
    return found


def _compare(
    rows: dict[str, list[dict[str, list]]], baseline: str, name: str, column: str, size: str | None
) -> ArmComparison | None:
    """One measure of all models on the rows that all of them have."""
    shared = sorted(set.intersection(*(set(table["row"]) for tables in rows.values() for table in tables)))
    if len(shared) < 2:
        return None

    def taken(table: dict[str, list], key: str) -> np.ndarray:
        of = dict(zip(table["row"], table[key], strict=True))
        return np.array([np.nan if of[row] is None else of[row] for row in shared], float)

    sizes = {} if size is None else {name: taken(rows[baseline][0], size)}
    values = {}
    for model, tables in rows.items():
        stacked = np.stack([taken(table, column) for table in tables])
        if size is not None:  # sums over the tokens of a row become means
            stacked = stacked / np.where(sizes[name] > 0, sizes[name], np.nan)
        values[model] = {name: stacked}
    if np.isnan(values[baseline][name]).all():
        return None
    return ArmComparison(baseline, tuple(range(len(values[baseline][name]))), values, None, {}, sizes)


def _warnings(found: dict[str, Any], run: dict[str, Any]) -> list[dict[str, Any]]:
    """What to keep in mind, grouped by cause."""
    groups: dict[str, list[str]] = {}
    outlook = found["outlook"]
    if outlook is not None:
        if outlook["refusal"]:
            groups.setdefault("The score", []).append(f"{outlook['refusal']}.")
        if not outlook["judged"]:
            groups.setdefault("The score", []).append(outlook["lines"][1 if outlook["moved"] else 0] + ".")
        if outlook["moved"] is not None and outlook["moved"]["sd"] < 0.1:
            groups.setdefault("The score", []).append("The reference has hardly moved from the model.")
    groups["The data"] = [f"{text[0].upper()}{text[1:]}." for text in found["check"].get("warnings", [])]
    held_out = max((each["rows"] or 0 for each in found["measures"]), default=0)
    if found["measures"]:
        if 0 < held_out < 100:
            groups.setdefault("The comparison", []).append(
                f"{held_out} held-out rows: small differences cannot be seen (split.eval_size)."
            )
        if max(each["seeds"] for each in found["measures"]) == 1:
            groups.setdefault("The comparison", []).append(
                "One seed: the intervals are over rows and say nothing of another training (--seeds 3)."
            )
        if not any(each["name"] == "text_nats_per_token" for each in found["measures"]):
            groups.setdefault("The comparison", []).append(
                "What training costs elsewhere was not measured on neutral text (--evaluate.neutral_text FILE)."
            )
    forgotten = [
        (arm["name"], step["negative_prob"])
        for arm in found["arms"]
        for step in arm["curve"][:1]
        if "negative_prob" in step and arm["kind"] != "ignore"
    ]
    for name, value in forgotten:
        if value < 0.01 and run["flags"].get("forget_objective", "unlikelihood") in ("unlikelihood", "probability"):
            groups.setdefault("The objective", []).append(
                f"{name}: negative tokens have a mean probability of {value:.2g} at the start, where unlikelihood "
                "hardly pulls (--forget_objective npo does)."
            )
    for each in found["left_out"]:
        groups.setdefault("Measures left out", []).append(f"{each['label']} {each['reason']}.")
    return [{"cause": cause, "texts": texts} for cause, texts in groups.items() if texts]
