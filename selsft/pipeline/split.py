"""The parts of a data set: rows to train the reference on, rows to clean, and rows that nobody trains on.

A reference that has seen the rows it judges finds their errors likely, and an evaluation on rows that training has
seen measures memory, so the parts must not share questions: rows with the same prompt (or `group_column`) stay
together. Which side a group falls on depends on a hash of its content and the seed alone, so rows that are added later
do not reshuffle the others. Rows that somebody has judged are a part of their own, and so are those among them that
scores are tested on: what a probe was fitted on says nothing about it. Rejected: `Dataset.train_test_split`, which
knows no groups.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Value, concatenate_datasets

from ..data.columns import SCORE_COLUMNS
from ..data.source_rows import SOURCE_ROW
from ..data.spans import CORRECTED, SPANS, WEIGHT, has_marks, join_parts, read_marks, without_marks
from ..errors import InputError
from ..records import write_json
from .recipe import SplitSettings

LINE, PART, ROWS = SOURCE_ROW, "part", "rows.parquet"
"""Columns: number of the row in the user's data, from 0, and the part that it is in; and the file with both."""
MARKS = (SPANS, CORRECTED, WEIGHT, *SCORE_COLUMNS.values())  # columns that say what is wrong
TRAINED = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "labels")


def split(data: Dataset, settings: SplitSettings, given: dict[str, Dataset], folder: Path) -> dict[str, Any]:
    """Write `reference.parquet`, `train.parquet` (or `train-1.parquet` ...), `eval.parquet` and `split.json`.

    Where rows say what is wrong in them, only `eval` and the judged parts keep that; `marked.parquet` has the rows of
    `train.parquet` with it, for whoever may know. With judged rows there are `judged.parquet` and
    `judged-test.parquet`, and rows of the data with the same prompts are in no other part. Every part has the column
    `source_row`.

    Args:
        given: `"reference"`, `"eval"`, `"replay"`, `"judged"` and `"judged-test"` rows from outside.

    Returns:
        what `split.json` says: rows of each part, and how many groups.

    Raises:
        `InputError` when a part would be empty, or when given rows lack the columns of the data.
    """
    marked = _marked(data)
    if LINE not in data.column_names:
        data = data.add_column(LINE, list(range(len(data))))
    groups = group_hashes(data, settings.group_column)
    keys = _mixed(groups, settings.seed)
    order = np.argsort(keys, kind="stable")
    counts: dict[str, Any] = {"groups": len(np.unique(groups))}
    judged = given.pop("judged", None)
    if judged is not None:
        known = group_hashes(judged, settings.group_column) if _comparable(judged, data) else np.zeros(0, np.uint64)
        taken = np.isin(groups[order], known)
        counts["judged_in_data"] = int(taken.sum())
        order = order[~taken]
    elif settings.judged_fraction:
        if not marked.any():
            raise InputError(
                f"split.judged_fraction={settings.judged_fraction}: no row of the data says what is wrong in it; add "
                "'spans', 'corrected' or 'weight' (docs/spans.md), or give a file with --judged"
            )
        whole = np.isin(groups[order], np.unique(groups[marked]))
        wanted = _rows(settings.judged_fraction, int(marked.sum()))
        end = _border(groups[order[whole]], wanted)
        chosen = order[whole][:end]
        judged, order = data.select(np.sort(chosen)), order[np.isin(order, chosen, invert=True)]
    cuts, done = {}, 0
    for name, size in (("eval", settings.eval_size), ("reference", settings.reference_size)):
        end = done if name in given else done + _border(groups[order[done:]], _rows(size, len(data)))
        cuts[name] = order[done:end]
        done = end
    rest = order[done:]
    if not len(rest):
        raise InputError(
            f"split leaves no row to train on: {len(data)} rows in {counts['groups']} groups, of which evaluation "
            f"takes {len(cuts['eval'])}, the reference {len(cuts['reference'])} and the judged sample "
            f"{len(data) - len(order)}. Lower split.eval_size, split.reference_size or split.judged_fraction"
            + ("; rows with one prompt stay together: name a split.group_column" if counts["groups"] < 10 else "")
        )
    parts = {name: data.select(np.sort(rows)) for name, rows in cuts.items() if len(rows)}
    parts |= {name: _same_columns(rows, data, name) for name, rows in given.items() if name != "replay"}
    if judged is not None:
        parts |= _judged_parts(judged, settings, "judged-test" in given)
    if "reference" in parts and "replay" in given and settings.replay_share:
        parts["reference"], counts["replayed"] = _with_replay(
            parts["reference"], _same_columns(given["replay"], data, "replay"), settings
        )
    start = 0
    for number in range(1, settings.parts + 1):
        end = start + _border(groups[rest[start:]], round(number * len(rest) / settings.parts) - start)
        if start == end:
            raise InputError(
                f"split.parts={settings.parts} leaves part {number} without a row: the {len(rest)} rows to clean are "
                "in too few groups, lower it"
            )
        name = f"train-{number}" if settings.parts > 1 else "train"
        parts[name] = data.select(np.sort(rest[start:end]))
        start = end
    if marked.any() and settings.parts == 1:
        parts["marked"] = parts["train"]
    for name, rows in parts.items():
        (without_marks(rows) if name.startswith(("train", "reference")) else rows).to_parquet(
            str(folder / f"{name}.parquet")
        )
        counts[name] = len(rows)
    write_json(folder / "split.json", counts)
    _write_rows(data, parts, folder)
    return counts


def check_every_mark(data: Dataset, text_field: str) -> None:
    """Raise `InputError` for marks of a wrong form, also in rows whose part will not read them."""
    if has_marks(data, text_field) and "input_ids" not in data.column_names:
        for number, row in enumerate(join_parts(data)):
            read_marks(row, number, text_field)


def _write_rows(data: Dataset, parts: dict[str, Dataset], folder: Path) -> None:
    """`rows.parquet`: every row of the data with the columns that are no text to train on, and the part it is in;
    rows in no part are judged ones that came from outside."""
    where = np.full(len(data), "judged", object)
    for name, rows in parts.items():
        if LINE in rows.column_names and name != "marked":
            where[np.asarray(rows[LINE], np.int64)] = name
    simple = [
        name
        for name, kind in data.features.items()
        if name not in (*TRAINED, *MARKS) and isinstance(kind, Value) and name != PART
    ]
    data.select_columns(simple).add_column(PART, where.tolist()).to_parquet(str(folder / ROWS))


def _marked(data: Dataset) -> np.ndarray:
    """Which rows say what is wrong in them, `(rows,)` bool."""
    found = np.zeros(len(data), bool)
    for name in MARKS:
        if name in data.column_names:
            found |= np.array([value is not None for value in data[name]], bool)
    return found if found.any() or not has_marks(data) else np.ones(len(data), bool)


def _comparable(rows: Dataset, data: Dataset) -> bool:
    """Whether both say in the same columns which question a row is about."""
    return {"prompt", "text"} & set(rows.column_names) == {"prompt", "text"} & set(data.column_names)


def _judged_parts(judged: Dataset, settings: SplitSettings, tested: bool) -> dict[str, Dataset]:
    """The judged rows that a probe and a threshold may see, and those that only the report sees."""
    if tested or not settings.judged_test_size:
        return {"judged": judged}
    groups = group_hashes(judged, settings.group_column if settings.group_column in judged.column_names else None)
    order = np.argsort(_mixed(groups, settings.seed + 1), kind="stable")
    end = _border(groups[order], _rows(settings.judged_test_size, len(judged)))
    if end >= len(judged):
        raise InputError(
            f"split.judged_test_size={settings.judged_test_size} takes all {len(judged)} judged rows: lower it, or "
            "judge more rows"
        )
    return {"judged-test": judged.select(np.sort(order[:end])), "judged": judged.select(np.sort(order[end:]))}


def _border(groups: np.ndarray, count: int) -> int:
    """The first border between groups at or after `count` rows; `groups` has equal values side by side."""
    if count <= 0 or not len(groups):
        return 0
    ends = np.append(np.flatnonzero(groups[1:] != groups[:-1]) + 1, len(groups))
    return int(ends[np.searchsorted(ends, min(count, len(groups)))])


def group_hashes(data: Dataset, group_column: str | None) -> np.ndarray:
    """64 bits that are equal for rows that must stay together, `(rows,)` uint64."""
    if group_column is not None and group_column not in data.column_names:
        raise InputError(
            f"split.group_column={group_column!r} is not a column of the data, which has "
            f"{', '.join(map(repr, data.column_names))}"
        )
    columns = [group_column] if group_column else _identity(data.column_names)
    hashes = np.empty(len(data), np.uint64)
    position = 0
    for batch in data.select_columns(columns).with_format(None).iter(batch_size=1000):
        for values in zip(*(batch[name] for name in columns), strict=True):
            hashes[position] = _hash([_question(value) for value in values])
            position += 1
    return hashes


def _identity(columns: Sequence[str]) -> list[str]:
    for names in (("prompt",), ("messages",), ("conversations",), ("text",), ("input_ids",)):
        if set(names) <= set(columns):
            return list(names)
    raise InputError(f"the data has the columns {', '.join(map(repr, columns))} and none that can be trained on")


def _question(value: Any) -> Any:
    """A conversation is known by its turns before the first answer."""
    if isinstance(value, list) and value and isinstance(value[0], dict) and "role" in value[0]:
        turns = [(turn["role"], turn.get("content")) for turn in value]
        first = next((i for i, (role, _) in enumerate(turns) if role == "assistant"), len(turns))
        return turns[:first] or turns
    return value


def _hash(value: Any) -> int:
    text = json.dumps(value, sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


def _mixed(groups: np.ndarray, seed: int) -> np.ndarray:
    """Another 64 bits for each group, by the finaliser of SplitMix64: sorting by them shuffles the groups, and keeps
    the rows of one group together."""
    offset = _hash(["split", seed])
    with np.errstate(over="ignore"):
        z = groups + np.uint64(offset)
        z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


def _rows(size: float, total: int) -> int:
    return min(total, int(size) if size >= 1 else math.ceil(size * total))


def _same_columns(rows: Dataset, data: Dataset, name: str) -> Dataset:
    needed = [column for column in data.column_names if column in TRAINED]
    missing = [column for column in needed if column not in rows.column_names]
    if missing and name != "eval":  # evaluation rows may have another form
        raise InputError(
            f"split.{name}_dataset has the columns {', '.join(map(repr, rows.column_names))} and lacks "
            f"{missing[0]!r}, which the data has: rows that are trained together need the same columns"
        )
    return rows if name == "eval" else rows.select_columns(needed)


def _with_replay(reference: Dataset, replay: Dataset, settings: SplitSettings) -> tuple[Dataset, int]:
    wanted = round(settings.replay_share / (1 - settings.replay_share) * len(reference))
    count = min(wanted, len(replay))
    drawn = replay.shuffle(seed=settings.seed).select(range(count))
    reference = reference.select_columns(replay.column_names)
    joined = concatenate_datasets([reference, drawn.cast(reference.features)])
    return joined.shuffle(seed=settings.seed), count
