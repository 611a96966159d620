"""From the questions of a data set to the train and test rows of a study.

The order is fixed: options that coincide, duplicates, overlap, balance and size, two options. Every dropped row
is counted under a reason. The draws of an example (its distractor, its label, the place of the right
answer) come from a hash of the seed and its id, so that they do not depend on other rows. Rejected: one
generator for a whole task, with which an extra row at the top of a file would change every draw below it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import unicodedata
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..evaluation.examples import SPLITS, MultipleChoiceExample

_MOST_LABELS = 8  # a task with more option texts than this over all its questions has no fixed labels


@dataclass
class SkillTask:
    """A skill as questions to learn from and questions to be tested on.

    Args:
        name: also its name in the score table.
        area: of the five of the suite, or empty.
        source: where the rows come from and what has to stay with them (BIG-bench's canary), JSON values.
        dropped: reason -> number of rows that were lost.
    """

    name: str
    train: list[MultipleChoiceExample]
    test: list[MultipleChoiceExample]
    area: str = ""
    source: dict[str, Any] = field(default_factory=dict)
    dropped: dict[str, int] = field(default_factory=dict)

    def split(self, name: str) -> list[MultipleChoiceExample]:
        return {"train": self.train, "test": self.test}[name]

    def fingerprint(self) -> str:
        """SHA-256 of all questions, in their order."""
        rows = [dataclasses.astuple(example) for example in (*self.train, *self.test)]
        return hashlib.sha256(json.dumps([self.name, rows], ensure_ascii=False).encode()).hexdigest()


@dataclass(frozen=True)
class TaskSettings:
    """How a task is made ready.

    Args:
        options: `"binary"` (the true option and one random distractor, as in Zhang et al. 2024) or `"all"`.
        max_train, max_test: most rows; `None` for all.
        balance: whether each label of a task with fixed labels (yes/no) is equally often the right one.
        strict: whether overlap between train and test is an error, and not dropped from train.
        seed: of every draw.
    """

    options: str = "binary"
    max_train: int | None = 1000
    max_test: int | None = 500
    balance: bool = True
    strict: bool = False
    seed: int = 0

    def __post_init__(self):
        if self.options not in ("binary", "all"):
            raise ValueError(f"options={self.options!r} is unknown: use 'binary' or 'all'")
        for name in ("max_train", "max_test"):
            value = getattr(self, name)
            if value is not None and value < 2:
                raise ValueError(f"{name}={value} must be at least 2")


def rng(*parts: Hashable) -> random.Random:
    """A generator that depends on `parts` alone, in every process and on every machine."""
    digest = hashlib.sha256(json.dumps([str(part) for part in parts]).encode()).digest()
    return random.Random(int.from_bytes(digest[:8], "big"))


def normalize(text: str) -> str:
    """NFKC, case folded, white space collapsed."""
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def question_key(example: MultipleChoiceExample) -> Hashable:
    """Equal for rows that ask the same question: normalised prompt and options, in any order."""
    return normalize(example.prompt), tuple(sorted(normalize(option) for option in example.options))


def fixed_labels(examples: Sequence[MultipleChoiceExample]) -> tuple[str, ...] | None:
    """The labels of a task whose questions all choose from the same few (yes/no), or `None`."""
    labels = {option for example in examples for option in example.options}
    return tuple(sorted(labels)) if len(labels) <= min(_MOST_LABELS, len(examples) - 1) else None


def split_by_group(
    examples: Sequence[MultipleChoiceExample], test_fraction: float, seed: int
) -> list[MultipleChoiceExample]:
    """The examples with a split of our own: rows of one group, or of one prompt where there is none, stay together.

    Args:
        test_fraction: share of the groups that goes to test, in (0, 1).
    """
    if not 0 < test_fraction < 1:
        raise ValueError(f"test_fraction={test_fraction} must be between 0 and 1")
    groups = sorted({example.group or normalize(example.prompt) for example in examples})
    rng("split", seed).shuffle(groups)
    test = set(groups[: max(1, round(test_fraction * len(groups)))])
    return [
        dataclasses.replace(e, split="test" if (e.group or normalize(e.prompt)) in test else "train") for e in examples
    ]


def prepare(task: SkillTask, settings: TaskSettings) -> SkillTask:
    """A task ready for a study.

    Raises:
        `ValueError` when train and test overlap under `strict`, or when nothing is left of a split.
    """
    dropped = defaultdict(int, task.dropped)
    splits = {}
    for name in SPLITS:
        distinct = [e for e in task.split(name) if len({normalize(o) for o in e.options}) == len(e.options)]
        dropped["options coincide"] += len(task.split(name)) - len(distinct)
        splits[name] = _deduplicate(distinct, dropped)
    splits["train"] = _separate(task.name, splits, settings.strict, dropped)
    for name, limit in (("train", settings.max_train), ("test", settings.max_test)):
        balance = fixed_labels(splits[name]) if settings.balance else None
        chosen = _draw(splits[name], limit, balance, rng("draw", settings.seed, task.name, name), dropped)
        if not chosen:
            never = ": a label is never the right one, use balance=False" if splits[name] and balance else ""
            raise ValueError(f"task {task.name!r} has no {name} rows left of {len(task.split(name))}{never}")
        splits[name] = [arrange(example, settings.options, settings.seed) for example in chosen]
    counts = {reason: number for reason, number in dropped.items() if number}
    return dataclasses.replace(task, train=splits["train"], test=splits["test"], dropped=counts)


def _deduplicate(examples: Sequence[MultipleChoiceExample], dropped: dict[str, int]) -> list[MultipleChoiceExample]:
    """One row per question; none of a question whose rows disagree on the answer."""
    rows: dict[Hashable, list[MultipleChoiceExample]] = defaultdict(list)
    for example in examples:
        rows[question_key(example)].append(example)
    kept = []
    for same in rows.values():
        if len({normalize(example.options[example.gold]) for example in same}) > 1:
            dropped["same question, different answers"] += len(same)
        else:
            dropped["repeated question"] += len(same) - 1
            kept.append(same[0])
    return kept


def _separate(
    name: str, splits: dict[str, list[MultipleChoiceExample]], strict: bool, dropped: dict[str, int]
) -> list[MultipleChoiceExample]:
    """The train rows that share neither question nor group with a test row."""
    questions = {question_key(example) for example in splits["test"]}
    groups = {example.group for example in splits["test"]} - {None}
    kept = []
    for example in splits["train"]:
        same, near = question_key(example) in questions, example.group in groups
        if strict and (same or near):
            what = "question is" if same else f"group {example.group!r} is"
            raise ValueError(
                f"task {name!r}: train example {example.id!r} overlaps with test (its {what} there too): "
                "take it out, or let strict=False drop it"
            )
        dropped["train question in test" if same else "train group in test"] += same or near
        if not (same or near):
            kept.append(example)
    return kept


def _draw(
    examples: Sequence[MultipleChoiceExample],
    limit: int | None,
    labels: tuple[str, ...] | None,
    generator: random.Random,
    dropped: dict[str, int],
) -> list[MultipleChoiceExample]:
    """At most `limit` rows in random order; of each of `labels`, if given, equally many have it as gold."""
    shuffled = list(examples)
    generator.shuffle(shuffled)
    limit = len(shuffled) if limit is None else limit
    if labels is None:
        dropped["beyond the size"] += max(0, len(shuffled) - limit)
        return shuffled[:limit]
    strata = {label: [e for e in shuffled if e.options[e.gold] == label] for label in labels}
    smallest = min(len(rows) for rows in strata.values())
    dropped["balance of the labels"] += len(shuffled) - smallest * len(labels)
    each = min(smallest, limit // len(labels))
    dropped["beyond the size"] += (smallest - each) * len(labels)
    chosen = {example.id for rows in strata.values() for example in rows[:each]}
    return [example for example in shuffled if example.id in chosen]


def arrange(example: MultipleChoiceExample, options: str, seed: int) -> MultipleChoiceExample:
    """Gold and one random distractor (`"binary"`) or all options (`"all"`), in random order: the place of the right
    answer says nothing."""
    generator = rng("options", seed, example.id)
    order = list(range(len(example.options)))
    if options == "binary":
        order = [example.gold, generator.choice([i for i in order if i != example.gold])]
    generator.shuffle(order)
    texts = tuple(example.options[i] for i in order)
    return dataclasses.replace(example, options=texts, gold=order.index(example.gold))
