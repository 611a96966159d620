"""A small world with errors that a probe can find: the word `mu` is always wrong."""

from __future__ import annotations

import random
from typing import Any

from datasets import Dataset

from tests.support import tiny


def rows(count: int, seed: int = 0, judged: bool = True) -> list[dict[str, Any]]:
    """Prompt and completion; every second completion has one `mu`, of which the spans say that it is wrong."""
    rng = random.Random(seed)
    made = []
    for index in range(count):
        words = [rng.choice(tiny.WORDS[:-1]) for _ in range(6)]
        if index % 2:
            words[rng.randrange(6)] = "mu"
        text = " " + " ".join(words)
        at = text.find(" mu") + 1
        row: dict[str, Any] = {"prompt": tiny.sentence(index, 3), "completion": text}
        made.append(row | ({"spans": [[at, at + 2]] if at else []} if judged else {}))
    return made


def data(count: int, seed: int = 0, judged: bool = True) -> Dataset:
    return Dataset.from_list(rows(count, seed, judged))
