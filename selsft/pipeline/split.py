"""The parts of a data set: rows to train the reference on, rows to clean, and rows that nobody trains on.

A reference that has seen the rows it judges finds their errors likely, and an evaluation on rows that training has
seen measures memory, so the parts must not share questions: rows with the same prompt (or `group_column`) stay
together. Which side a group falls on depends on a hash of its content and the seed alone, so rows that are added later
do not reshuffle the others. Rejected: `Dataset.train_test_split`, which knows no groups.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, concatenate_datasets

from ..errors import InputError
from ..records import write_json

TRAINED = ("prompt", "completion", "messages", "conversations", "text", "input_ids", "labels")


@dataclass
class SplitSettings:
    """Flags of the stage `split`.

    Args:
        reference_size: rows for the reference, as a share (below 1) or a number. 0 when a reference is given.
        reference_dataset: rows of your own for the reference, ones that you trust, instead of a share of the data.
        eval_size: rows for evaluation, likewise.
        eval_dataset: rows of your own for evaluation.
        replay_dataset: rows that the base already knows, mixed into the reference's, since a reference that forgets
            calls truths negative.
        replay_share: share of these among all rows of the reference.
        parts: parts of the rows to clean, for self-evolving selection.
        group_column: rows with the same value stay together; by default those with the same prompt.
        seed: decides which group falls where.
    """

    reference_size: float = 0.2
    reference_dataset: str | None = None
    eval_size: float = 0.05
    eval_dataset: str | None = None
    replay_dataset: str | None = None
    replay_share: float = 0.2
    parts: int = 1
    group_column: str | None = None
    seed: int = 0

    def __post_init__(self):
        for name in ("reference_size", "eval_size"):
            value = getattr(self, name)
            if not _is_number(value) or value < 0 or (value > 1 and value != int(value)):
                raise InputError(f"split.{name}={value!r} must be a share in [0, 1) or a number of rows")
        if not _is_number(self.replay_share) or not 0 <= self.replay_share < 1:
            raise InputError(f"split.replay_share={self.replay_share!r} must be in [0, 1)")
        for name, least in (("parts", 1), ("seed", None)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or (least is not None and value < least):
                raise InputError(f"split.{name}={value!r} must be a whole number{'' if least is None else ' from 1'}")
        for name in ("reference_dataset", "eval_dataset", "replay_dataset", "group_column"):
            if not isinstance(getattr(self, name), str | None):
                raise InputError(f"split.{name}={getattr(self, name)!r} must be text")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def split(data: Dataset, settings: SplitSettings, given: dict[str, Dataset], folder: Path) -> dict[str, Any]:
    """Write `reference.parquet`, `train.parquet` (or `train-1.parquet` ...), `eval.parquet` and `split.json`.

    Args:
        given: `"reference"`, `"eval"` and `"replay"` rows from outside.

    Returns:
        what `split.json` says: rows of each part, and how many groups.

    Raises:
        `InputError` when a part would be empty, or when given rows lack the columns of the data.
    """
    groups = group_hashes(data, settings.group_column)
    order = np.argsort(_mixed(groups, settings.seed), kind="stable")
    starts = np.flatnonzero(np.diff(groups[order], prepend=~groups[order[:1]]) != 0)
    wanted = {
        "eval": 0 if "eval" in given else _rows(settings.eval_size, len(data)),
        "reference": 0 if "reference" in given else _rows(settings.reference_size, len(data)),
    }
    cuts, done = {}, 0
    bounds = np.append(starts, len(order))

    def border(row: float) -> int:
        """The first group border at or after a row."""
        return int(bounds[np.searchsorted(bounds, min(row, len(order)))])

    for name, count in wanted.items():
        end = border(done + count)
        cuts[name] = order[done:end]
        done = end
    rest = order[done:]
    if not len(rest):
        raise InputError(
            f"split leaves no row to train on: {len(data)} rows in {len(starts)} groups, of which evaluation takes "
            f"{len(cuts['eval'])} and the reference {len(cuts['reference'])}. Lower split.eval_size or "
            "split.reference_size"
        )
    parts = {name: data.select(np.sort(rows)) for name, rows in cuts.items() if len(rows)}
    parts |= {name: _same_columns(rows, data, name) for name, rows in given.items() if name != "replay"}
    counts: dict[str, Any] = {"groups": len(starts)}
    if "reference" in parts and "replay" in given and settings.replay_share:
        parts["reference"], counts["replayed"] = _with_replay(
            parts["reference"], _same_columns(given["replay"], data, "replay"), settings
        )
    ends = [border(done + number * len(rest) / settings.parts) for number in range(settings.parts + 1)]
    for number, (start, end) in enumerate(itertools.pairwise(ends), start=1):
        if start == end:
            raise InputError(
                f"split.parts={settings.parts} leaves part {number} without a row: the {len(rest)} rows to clean are "
                "in too few groups, lower it"
            )
        name = f"train-{number}" if settings.parts > 1 else "train"
        parts[name] = data.select(np.sort(order[start:end]))
    for name, rows in parts.items():
        rows.to_parquet(str(folder / f"{name}.parquet"))
        counts[name] = len(rows)
    write_json(folder / "split.json", counts)
    return counts


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
