"""The score table: one row per answer option, with all that the metrics need.

Every metric of the study is computed from this table alone, so that a definition can be changed without scoring a
model again, and so that forgetting by random labels and by any token objective are measured by the same code.
Rejected: a row per question with the metrics in it (fixes the definitions when the model runs), and JSON lines (ten
times the size, no types).

A study folder holds one Parquet file per finished stage under `scores/`; `read_scores` reads them as one table.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from selsft_kernels.objectives import FORGET_OBJECTIVES

from ..evaluation.examples import SPLITS
from ..records import replaced

STAGES = ("base", "finetuned", "forgotten")
RANDOM_LABELS = ("uniform", "flip", "uniform_wrong", "shuffle")
METHODS = RANDOM_LABELS + FORGET_OBJECTIVES
END = -1
"""`step` of the scores at the end of a stage."""
ALL_TASKS = "*"
"""`label_task` of a fine-tuned model that was trained on every task of the study (the shared reference)."""

SCHEMA = pa.schema([
    ("run", pa.string()), ("seed", pa.int32()), ("stage", pa.string()), ("method", pa.string()),
    ("label_task", pa.string()), ("eval_task", pa.string()), ("split", pa.string()), ("step", pa.int64()),
    ("example_id", pa.string()), ("option", pa.int32()), ("logprob", pa.float64()), ("n_tokens", pa.int32()),
    ("n_chars", pa.int32()), ("n_bytes", pa.int32()), ("is_gold", pa.bool_()), ("is_assigned", pa.bool_()),
])  # fmt: skip
"""Columns and types. Only `is_assigned` may be null. `logprob` is the sum over the option's tokens, in nats."""


class Model(NamedTuple):
    """What names one trained model."""

    run: str
    seed: int
    stage: str
    method: str
    label_task: str

    @property
    def variant(self) -> str:
        """The run's name without its seed: what the seeds of one setting have in common."""
        return re.sub(rf"[-_. ]*seed[-_ ]?{self.seed}(?!\d)", "", self.run).strip("-_. ") or "run"


MODEL = list(Model._fields)
CELL = [*MODEL, "eval_task", "split", "step"]
"""What names one evaluation of one model."""
QUESTION = [*CELL, "example_id"]
_DICTIONARIES = ("run", "stage", "method", "label_task", "eval_task", "split", "example_id")


class ScoreTableError(ValueError):
    """A score table that breaks the schema; the message names the file, the row and what to do."""


def write_scores(path: Path, table: pa.Table | pd.DataFrame | Mapping[str, list]) -> Path:
    """Validate the scores of one stage and write them as Parquet, completely or not at all.

    Args:
        path: the file, as `scores/<stage>.parquet`; its folder is created.
        table: the columns of `SCHEMA`, in any order.

    Raises:
        ScoreTableError: the table breaks the schema (see `check_scores`). Nothing is written.
    """
    arrow = _typed(table, str(path))
    check_scores(_frame(arrow), str(path))
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replaced(path) as file:
        pq.write_table(arrow, file, compression="zstd")
    return path


def read_scores(folder: Path) -> pd.DataFrame:
    """All `*.parquet` files of a folder as one validated table.

    Args:
        folder: a study folder, or its `scores` folder.

    Returns:
        The columns of `SCHEMA` in its order, sorted by question and option, with a fresh index. Strings are
        categoricals, `is_assigned` is pandas' nullable boolean.

    Raises:
        ScoreTableError: no files, a file that breaks the schema, or the same evaluation in two files.
    """
    folder = Path(folder)
    if (folder / "scores").is_dir():
        folder = folder / "scores"
    files = sorted(file for file in folder.glob("*.parquet") if not file.name.startswith("."))
    if not files:
        raise ScoreTableError(f"{folder}: no score tables (*.parquet); run the study first")
    tables = []
    for file in files:
        try:
            table = pq.read_table(file)
        except (pa.ArrowInvalid, OSError) as error:
            raise ScoreTableError(f"{file}: not a readable Parquet file ({error}); delete it and resume") from error
        tables.append(_typed(table, str(file)))
    frame = _frame(pa.concat_tables(tables))
    try:
        check_scores(frame, str(folder))
    except ScoreTableError:
        for file, table in zip(files, tables, strict=True):
            check_scores(_frame(table), str(file))  # Names the file, unless the fault lies between files.
        raise
    return frame.sort_values([*QUESTION, "option"], ignore_index=True)


def check_scores(frame: pd.DataFrame, source: str) -> None:
    """Raise for a table in which a metric would silently mean something else.

    Checked: allowed values; finite log-probabilities of at most 0; lengths of at least 1; for every question of an
    evaluation, options numbered 0..k-1 once each with k >= 2, exactly one gold option, and either one assigned option
    or none known; the same gold option for a question in all stages.

    Raises:
        ScoreTableError: the first violation, with the row it was found in.
    """

    def refuse(bad: pd.Series, what: str) -> None:
        if bad.any():
            row = frame.loc[bad.idxmax()]
            where = ", ".join(f"{name}={str(row[name])!r}" for name in [*QUESTION, "option"])
            raise ScoreTableError(f"{source}: {what} ({where})")

    if frame.empty:
        raise ScoreTableError(f"{source}: the table has no rows; delete it and resume the study")
    for name, allowed in (("stage", STAGES), ("split", SPLITS)):
        refuse(~frame[name].isin(allowed), f"{name} must be one of {', '.join(allowed)}")
    forgotten = frame["stage"] == "forgotten"
    refuse(forgotten & ~frame["method"].isin(METHODS), f"method of a forgotten model must be one of {METHODS}")
    refuse(~forgotten & (frame["method"] != ""), "method must be empty before forgetting")
    refuse(
        (frame["stage"] == "base") != (frame["label_task"] == ""), "label_task must be empty for base, and only there"
    )
    refuse(frame["step"] < END, f"step must be {END} (end of the stage) or at least 0")
    refuse(frame["eval_task"] == "", "eval_task must not be empty")
    refuse(~np.isfinite(frame["logprob"]), "logprob must be finite: score this stage again in a wider dtype")
    refuse(frame["logprob"] > 1e-3, "logprob must be a log-probability, at most 0")
    for name in ("n_tokens", "n_chars", "n_bytes"):
        refuse(frame[name] < 1, f"{name} must be at least 1: an empty option cannot be scored")

    question = frame.groupby(QUESTION, observed=True, sort=False).ngroup()
    by_question = frame.assign(assigned=frame["is_assigned"].fillna(False), known=frame["is_assigned"].notna())
    grouped = by_question.groupby(question, sort=False)
    count = grouped["option"].transform("size")
    refuse(
        frame.duplicated([*QUESTION, "option"]),
        "the same option twice: the same evaluation is in the table twice, delete one of the files",
    )
    refuse((frame["option"] < 0) | (frame["option"] >= count), "options must be numbered 0 to k-1 without gaps")
    refuse(count < 2, "a question needs at least two options")
    refuse(grouped["is_gold"].transform("sum") != 1, "exactly one option must be gold")
    known = grouped["known"].transform("sum")
    refuse((known != 0) & (known != count), "is_assigned must be set for all options of a question or for none")
    refuse((known != 0) & (grouped["assigned"].transform("sum") != 1), "exactly one option must be assigned")
    gold = frame[frame["is_gold"]]
    first = gold.groupby(["eval_task", "split", "example_id", "seed"], observed=True, sort=False)["option"]
    moved = gold["option"] != first.transform("first")
    refuse(moved, "the gold option differs between stages: they were scored on different data, use one folder each")


def _typed(table: pa.Table | pd.DataFrame | Mapping[str, list], source: str) -> pa.Table:
    """The table with the columns and types of `SCHEMA`, without nulls but in `is_assigned`."""
    if isinstance(table, pd.DataFrame):
        table = {name: pa.Array.from_pandas(table[name]) for name in table.columns}
    names = table.column_names if isinstance(table, pa.Table) else list(table)
    missing = [name for name in SCHEMA.names if name not in names]
    unknown = [name for name in names if name not in SCHEMA.names]
    if missing or unknown:
        text = [f"missing {', '.join(missing)}"] * bool(missing) + [f"unknown {', '.join(unknown)}"] * bool(unknown)
        raise ScoreTableError(f"{source}: columns: {'; '.join(text)}; expected {', '.join(SCHEMA.names)}")
    columns = []
    for field in SCHEMA:
        try:
            column = table[field.name]
            if not isinstance(column, (pa.Array, pa.ChunkedArray)):
                column = pa.array(column)
            column = column.cast(field.type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError) as error:
            raise ScoreTableError(f"{source}: column {field.name} must be {field.type}: {error}") from error
        if column.null_count and field.name != "is_assigned":
            raise ScoreTableError(f"{source}: column {field.name} has {column.null_count} nulls; only is_assigned may")
        columns.append(column)
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def _frame(table: pa.Table) -> pd.DataFrame:
    """To pandas: strings as categoricals (a study has millions of rows), nullable booleans."""
    nullable = table.select(["is_assigned"]).to_pandas(types_mapper={pa.bool_(): pd.BooleanDtype()}.get)
    columns = {
        field.name: table[field.name].combine_chunks().dictionary_encode().to_pandas()
        if field.name in _DICTIONARIES
        else table[field.name].to_numpy()
        for field in SCHEMA
        if field.name != "is_assigned"
    }
    frame = pd.DataFrame({**columns, "is_assigned": nullable["is_assigned"]})[SCHEMA.names]
    for name in _DICTIONARIES:  # Sorting by a categorical follows its categories: sorted ones sort like the strings.
        column = frame[name].astype("category")
        frame[name] = column.cat.set_categories(sorted(column.cat.categories))
    return frame
