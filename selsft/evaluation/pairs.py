"""Minimal pairs: whether a model finds the right one of two texts likelier.

What a held-out likelihood cannot tell from fluency. The right text comes as `corrected` beside a wrong `completion` or
`text`, or the wrong one as `rejected` beside a right `completion`; `chosen` and `rejected` as in preference data. The
sums of both are compared, since the pair shares all but a few words. Rejected: means per token, which reward whatever
makes the wrong text longer.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.spans import CORRECTED
from ..training.model import Model
from .kept import Kept
from .likelihood import answer_nll
from .rows import prepare

CHOSEN, REJECTED = "chosen", "rejected"


def pairs(data: Dataset) -> tuple[list[int], Dataset, Dataset] | None:
    """Numbers of the rows that hold a pair, and these rows with the right and with the wrong text; `None` without."""
    names = set(data.column_names)
    field = "completion" if "completion" in names else "text"
    if {CHOSEN, REJECTED} <= names:
        right, wrong = data[CHOSEN], data[REJECTED]
    elif field in names and REJECTED in names:
        right, wrong = data[field], data[REJECTED]
    elif field in names and CORRECTED in names:
        wrong = data[field]
        right = [_first(value, text) for value, text in zip(data[CORRECTED], wrong, strict=True)]
    else:
        return None
    chosen = [
        index
        for index, (good, bad) in enumerate(zip(right, wrong, strict=True))
        if good and bad and type(good) is type(bad) and good != bad
    ]
    if not chosen:
        return None
    prompts = {name: [data[index][name] for index in chosen] for name in ("prompt",) if name in names}

    def rows(texts: Any) -> Dataset:
        return Dataset.from_dict({**prompts, field: [texts[index] for index in chosen]})

    return chosen, rows(right), rows(wrong)


def _first(value: Any, text: Any) -> Any:
    """The first correction, which begins with white space like the text that it corrects."""
    found = value if isinstance(value, str) or not value else value[0]
    if isinstance(found, str) and isinstance(text, str):
        return text[: len(text) - len(text.lstrip())] + found.lstrip()
    return found


def pair_margins(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    args: SelectiveSFTConfig,
    batch_tokens: int = 8192,
    kept: Kept | None = None,
) -> np.ndarray | None:
    """log p(right) - log p(wrong) of each row, `(rows,)` float64 in nats; NaN where a row holds no pair. `None` where
    none does."""
    found = pairs(data)
    if found is None:
        return None
    numbers, *both = found
    sums = np.full((2, len(data)), np.nan)
    for side, rows in enumerate(both):
        held = prepare(model, tokenizer, rows, args)
        for index, (total, count) in zip(held.indices, answer_nll(held, batch_tokens, kept), strict=True):
            sums[side, numbers[index]] = -total if count else np.nan
    return sums[0] - sums[1]
