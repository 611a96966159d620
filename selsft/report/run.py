"""The report of a run: one self-contained HTML page, made from the files of the stages alone.

Differences to the base come with paired bootstrap intervals over the held-out rows: two models answer the same
questions, and the interval of each mean alone would hide a difference that nearly every row shows. Rejected: plots,
since there are only two or three models to compare.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from ..evaluation.intervals import paired
from ..evaluation.settings import METRICS, ROWS
from ..records import read_json, write_json
from ..selection.select import COUNTS
from .page import write_page

# name in the tables of the stages -> label, whether more is better, digits
MEASURES = {
    "nll": ("negative log-likelihood of the held-out answers, nats a token", False, 3),
    "exact_match": ("exact match of greedy answers", True, 3),
    "eos_rate": ("answers that end by themselves", True, 3),
    "answer_tokens": ("tokens of an answer", None, 1),
    "kl_to_base": ("KL to the base on the prompts, nats", False, 4),
    "text_perplexity": ("perplexity of neutral text", False, 2),
    "options_acc": ("accuracy on options", True, 3),
    "options_acc_norm": ("accuracy on options, by length", True, 3),
}
_COLUMNS = {"eos_rate": "ended"}  # where `rows.parquet` has another name
_SHOWN_TOKENS, _SHOWN_ANSWERS = 30, 12


def write_report(root: Path) -> Path:
    """Write `report.html` and `report.json` from `run.json` and the folders that it names; returns the page's path."""
    run = json.loads((root / "run.json").read_text(encoding="utf-8"))
    folders = {name: root / stage["folder"] for name, stage in run["stages"].items()}
    models = {
        name.removeprefix("evaluate-"): _evaluation(folder / "evaluation")
        for name, folder in folders.items()
        if name.startswith("evaluate-")
    }
    selections = {name: read_json(folder / COUNTS) for name, folder in folders.items() if name.startswith("select")}
    content = {
        "recipe": run["recipe"],
        "measures": _table(models),
        "harness": _harness(models),
        "answers": _answers(models),
        "selections": {name: _selection(found) for name, found in selections.items()},
        "split": read_json(folders["split"] / "split.json") if "split" in folders else {},
        "stages": [{"name": name, **stage} for name, stage in run["stages"].items()],
        "flags": run["flags"],
        "stage_flags": run["stage_flags"],
        "versions": run["versions"],
        "written": run["written"],
        "device": _device(folders),
    }
    write_json(root / "report.json", content)
    return write_page(root / "report.html", "run.html", content)


def _evaluation(folder: Path) -> dict[str, Any]:
    rows = folder / ROWS
    return {
        "metrics": read_json(folder / METRICS),
        "rows": pq.read_table(rows).to_pydict() if rows.is_file() else {},
    }


def _table(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    found = []
    for name, (label, better, digits) in MEASURES.items():
        values = {model: each["metrics"].get(name) for model, each in models.items()}
        if all(value is None for value in values.values()):
            continue
        differences = {
            model: paired_difference(models["base"]["rows"], each["rows"], name)
            for model, each in models.items()
            if model != "base" and "base" in models
        }
        found.append(
            {
                "name": name,
                "label": label,
                "better": better,
                "digits": digits,
                "values": values,
                "differences": {model: value for model, value in differences.items() if value},
            }
        )
    return found


def paired_difference(base: dict[str, list], other: dict[str, list], name: str) -> dict[str, float] | None:
    """Difference of two models on the rows that both have, with a 95 % percentile bootstrap interval over rows.

    For `nll` both models are summed over the tokens of a row, and the difference is of the ratios, as in the means.

    Returns:
        `mean`, `low`, `high` and `rows`; `None` where there is no value per row, or fewer than two rows.
    """
    name = _COLUMNS.get(name, name)
    if name not in base or name not in other:
        return None
    of = {row: index for index, row in enumerate(base["row"])}
    pairs = [(of[row], index) for index, row in enumerate(other["row"]) if row in of]
    if len(pairs) < 2:
        return None
    left, right = (np.array(pairs).T[side] for side in (0, 1))
    size = np.array(base["tokens"], float)[left] if name == "nll" else np.ones(len(pairs))
    with np.errstate(invalid="ignore"):
        first, second = np.array(base[name], float)[left] / size, np.array(other[name], float)[right] / size
    found = paired(first, second, size)
    return {"mean": found.value, "low": found.low, "high": found.high, "rows": len(pairs)}


def _harness(models: dict[str, dict[str, Any]]) -> dict[str, dict[str, dict[str, float]]]:
    found: dict[str, dict[str, dict[str, float]]] = {}
    for model, each in models.items():
        for task, metrics in (each["metrics"].get("lm_eval") or {}).items():
            found.setdefault(task, {})[model] = metrics
    return found


def _answers(models: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Held-out rows whose answer training has changed, right ones to wrong ones first."""
    base, trained = (models.get(name, {}).get("rows", {}) for name in ("base", "trained"))
    if "answer" not in base or "answer" not in trained:
        return []
    of = {row: index for index, row in enumerate(base["row"])}
    changed = []
    for index, row in enumerate(trained["row"]):
        if row in of and trained["answer"][index] != base["answer"][of[row]]:
            was, now = base["exact_match"][of[row]], trained["exact_match"][index]
            changed.append(
                {
                    "row": row,
                    "reference": trained["reference"][index],
                    "base": base["answer"][of[row]],
                    "trained": trained["answer"][index],
                    "was": was,
                    "now": now,
                }
            )
    changed.sort(key=lambda each: (each["now"] - each["was"], each["row"]))
    half = _SHOWN_ANSWERS // 2
    return changed if len(changed) <= _SHOWN_ANSWERS else changed[:half] + changed[-half:]


def _selection(found: dict[str, Any]) -> dict[str, Any]:
    trained = max(found["trained"], 1)
    return {
        **{key: found[key] for key in ("rows", "tokens", "trained")},
        "shares": {key: found[key] / trained for key in ("positive", "neutral", "negative")},
        "worst": found["worst"][:_SHOWN_TOKENS],
    }


def _device(folders: dict[str, Path]) -> str | None:
    for folder in reversed(list(folders.values())):
        record = read_json(folder / "model" / "selsft_run.json")
        if record:
            return record.get("device")
    return None
