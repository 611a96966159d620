"""Tasks of lm-evaluation-harness on a trained model, with the extra `selsft[lm-eval]`.

The harness has hundreds of published tasks and their prompts; rewriting any of them would give numbers that compare
with nobody's. It is an extra because it brings about forty packages. Answers are decoded greedily, whatever a task
says, so that two models differ in their weights alone. Values of single documents are kept: intervals over documents
and seeds come from them, paired between models. Rejected: the harness's standard errors, which know nothing of pairs
or seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PreTrainedTokenizerBase

from ..records import read_json
from ..training.model import Model
from .intervals import Interval, draw, interval, mean, mean_draws, paired
from .settings import METRICS

DOCUMENTS = "lm_eval.parquet"  # task, document (int64), measure, value (float64)
GREEDY = {"do_sample": False, "temperature": 0.0}


@dataclass(frozen=True)
class Requests:
    """What tasks ask of a model: documents, tokens that are read, and most tokens that are written."""

    documents: int
    read: int
    written: int


def run_harness(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    tasks: Sequence[str],
    *,
    batch_size: int = 8,
    limit: int | None = None,
    include_path: str | None = None,
) -> tuple[dict[str, dict[str, float]], list[tuple[str, int, str, float]]]:
    """Metrics of each task, by name, as the harness calls them (`acc`, `acc_norm`, `acc_stderr`, ...), and
    `(task, document, measure, value)` of the measures that are means over documents.

    Args:
        tasks: names of tasks of the harness, or of YAML files in `include_path`.
        limit: documents of each task; all when `None`.
        include_path: folder of task files of one's own; the tasks of the harness are then not listed, which takes it
            seconds.

    Raises:
        `ImportError` without the extra, `ValueError` for a task that the harness does not know.
    """
    manager = _manager(tasks, include_path)
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM

    training = model.training
    try:  # `HFLM` leaves the model in evaluation mode
        harness = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
        measured: Any = simple_evaluate(
            model=harness, tasks=list(tasks), task_manager=manager, limit=limit, gen_kwargs=GREEDY, log_samples=True,
            bootstrap_iters=0,
        )  # fmt: skip
    finally:
        model.train(training)
    metrics = {
        task: {
            key.replace(",none", ""): float(value)
            for key, value in found.items()
            if isinstance(value, int | float) and not isinstance(value, bool)
        }
        for task, found in measured["results"].items()
    }
    return metrics, list(_documents(measured["samples"]))


def _documents(samples: Mapping[str, list[dict[str, Any]]]) -> Iterator[tuple[str, int, str, float]]:
    """`(task, document, measure, value)` of the measures that are numbers."""
    for task, rows in samples.items():
        for row in rows:
            suffix = "" if row.get("filter", "none") == "none" else f",{row['filter']}"
            for name in row["metrics"]:
                if isinstance(row[name], int | float | np.number):
                    yield task, int(row["doc_id"]), f"{name}{suffix}", float(row[name])


def document_table(rows: Sequence[Sequence[Any]]) -> pa.Table:
    """The rows of `run_harness` as a table."""
    columns = list(zip(*rows, strict=True)) or [(), (), (), ()]
    types = {"task": pa.string(), "document": pa.int64(), "measure": pa.string(), "value": pa.float64()}
    return pa.table(
        {name: pa.array(column, kind) for (name, kind), column in zip(types.items(), columns, strict=True)}
    )


def compare_harness(models: Mapping[str, Sequence[Path]], baseline: str) -> dict[str, dict[str, dict[str, float]]]:
    """Task -> model -> measures, means over seeds.

    A measure that has values for documents comes with the ends of its 95 % interval over documents and seeds
    (`acc_low`, `acc_high`) and, but for the baseline, with the paired difference (`acc_minus_plain`, also `_low` and
    `_high`).

    Args:
        models: name -> folders of `selsft evaluate`, one for each seed.
        baseline: a name of `models`.
    """
    found: dict[str, dict[str, dict[str, float]]] = {}
    values = {model: _values(paths) for model, paths in models.items()}
    for model, paths in models.items():
        records = [read_json(path / METRICS).get("lm_eval") or {} for path in paths]
        for task, first in (records[0] if records else {}).items():
            into = found.setdefault(task, {})[model] = {
                name: float(np.mean([record[task][name] for record in records if name in record.get(task, {})]))
                for name in first
                if not name.endswith("_stderr")
            }
            for (of, name), table in values[model].items():
                if of != task:
                    continue
                ours = table.to_numpy()
                around = interval(mean(ours), mean_draws(ours, draw(*ours.shape)))
                into |= {f"{name}_low": around.low, f"{name}_high": around.high}
                theirs = values.get(baseline, {}).get((task, name))
                if model != baseline and theirs is not None:
                    apart = _difference(theirs, table)
                    ends = zip(("", "_low", "_high"), apart, strict=True)
                    into |= {f"{name}_minus_{baseline}{end}": value for end, value in ends}
    return found


def _values(paths: Sequence[Path]) -> dict[tuple[str, str], pd.DataFrame]:
    """(task, measure) -> a row for each seed, a column for each document that all seeds have."""
    if not paths or not all((path / DOCUMENTS).is_file() for path in paths):
        return {}
    frames = [pq.read_table(path / DOCUMENTS).to_pandas().assign(seed=seed) for seed, path in enumerate(paths)]
    grouped = pd.concat(frames).groupby(["task", "measure"])
    tables = {key: part.pivot_table(index="seed", columns="document", values="value") for key, part in grouped}
    return {(str(key[0]), str(key[1])): table.dropna(axis=1) for key, table in tables.items()}


def _difference(first: pd.DataFrame, second: pd.DataFrame) -> Interval:
    """`second - first` over the documents of both; one row stands for all seeds of a model that was not trained."""
    shared = first.columns.intersection(second.columns)
    seeds = max(len(first), len(second))
    shape = seeds, len(shared)
    a, b = (np.broadcast_to(each[shared].to_numpy(), shape) for each in (first, second))
    return paired(a, b)


def count_requests(
    tokenizer: PreTrainedTokenizerBase, tasks: Sequence[str], limit: int | None = None, include_path: str | None = None
) -> Requests:
    """What the tasks ask of one model, counted on the requests that the harness builds: it loads their data."""
    manager = _manager(tasks, include_path)
    documents = read = written = 0
    for task in manager.load(list(tasks))["tasks"].values():
        task.build_all_requests(limit=limit, rank=0, world_size=1)
        documents += len({each.doc_id for each in task.instances})
        for each in task.instances:
            context, second = each.args[0], each.args[1] if len(each.args) > 1 else ""
            text = context + second if isinstance(second, str) else context
            read += len(tokenizer(text)["input_ids"])
            if isinstance(second, dict):
                written += int(second.get("max_gen_toks", 256))
    return Requests(documents, read, written)


def _manager(tasks: Sequence[str], include_path: str | None) -> Any:
    try:
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            f"lm_eval_tasks={','.join(tasks)} needs lm-evaluation-harness, which is not installed: "
            "pip install 'selsft[lm-eval]'"
        ) from error
    manager = TaskManager(include_path=include_path, include_defaults=include_path is None)
    unknown = [task for task in tasks if task not in manager.all_tasks]
    if unknown:
        raise ValueError(
            f"lm_eval_tasks={unknown[0]!r} is not a task of lm-evaluation-harness: `lm-eval ls tasks` lists them"
        )
    return manager
