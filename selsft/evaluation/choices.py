"""Accuracy on a file of multiple-choice questions: whether the model finds the right option most likely.

The questions and the scorer are those of the skill study, so that one file serves both.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..training.model import Model
from .examples import MultipleChoiceExample, read_examples
from .kept import Kept
from .options import score_options

_SCHEMA = pa.schema(
    {
        "example_id": pa.string(),
        "option": pa.int32(),
        "logprob": pa.float64(),
        "n_chars": pa.int32(),
        "is_gold": pa.bool_(),
    }
)


def option_accuracy(
    model: Model, tokenizer: PreTrainedTokenizerBase, path: str, batch_tokens: int = 8192, kept: Kept | None = None
) -> tuple[dict[str, float], pa.Table]:
    """Accuracy over the test questions of a JSONL file (over all, where no row has a `split`).

    Returns:
        `options_acc` (summed log-probability, the harness's `acc`), `options_acc_norm` (per character), `options` (the
        number of questions); and a table of one row per option: `example_id`, `option`, `logprob` (nats), `n_chars`,
        `is_gold`.

    Raises:
        `ValueError` for a row that cannot be used, with file and line, and for a file without test questions.
    """
    examples, with_split = read_examples(Path(path))
    if with_split:
        examples = [example for example in examples if example.split == "test"]
    if not examples:
        raise ValueError(f"options_file={path!r} has no question with split 'test'")

    def work() -> tuple[dict[str, float], dict[str, list[Any]]]:
        metrics, table = _measured(model, tokenizer, examples, batch_tokens)
        return metrics, table.to_pydict()

    asked = [[example.id, example.prompt, list(example.options), example.gold] for example in examples]
    metrics, columns = (kept or Kept()).one("options", "Multiple choice", asked, work)
    return metrics, pa.table(columns, schema=_SCHEMA)


def _measured(
    model: Model, tokenizer: PreTrainedTokenizerBase, examples: Sequence[MultipleChoiceExample], batch_tokens: int
) -> tuple[dict[str, float], pa.Table]:
    found = score_options(model, tokenizer, examples, batch_tokens=batch_tokens)
    counts = np.diff(found.offsets)
    option = np.arange(len(found.logprob)) - np.repeat(found.offsets[:-1], counts)
    table = pa.table(
        {
            "example_id": np.repeat([example.id for example in examples], counts),
            "option": option.astype(np.int32),
            "logprob": found.logprob,
            "n_chars": found.n_chars,
            "is_gold": option == np.repeat(found.gold, counts),
        },
        schema=_SCHEMA,
    )
    metrics = {
        "options": len(examples),
        "options_acc": found.accuracy(),
        "options_acc_norm": found.accuracy("chars"),
    }
    return metrics, table
