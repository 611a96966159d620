"""Accuracy on a file of multiple-choice questions: whether the model finds the right option most likely.

The questions and the scorer are those of the skill study, so that one file serves both.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
from transformers import PreTrainedTokenizerBase

from ..training.model import Model
from .examples import read_examples
from .options import score_options


def option_accuracy(
    model: Model, tokenizer: PreTrainedTokenizerBase, path: str, batch_tokens: int = 8192
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
    scores = score_options(model, tokenizer, examples, batch_tokens=batch_tokens)
    counts = np.diff(scores.offsets)
    option = np.arange(len(scores.logprob)) - np.repeat(scores.offsets[:-1], counts)
    table = pa.table(
        {
            "example_id": np.repeat([example.id for example in examples], counts),
            "option": option.astype(np.int32),
            "logprob": scores.logprob,
            "n_chars": scores.n_chars,
            "is_gold": option == np.repeat(scores.gold, counts),
        }
    )
    metrics = {
        "options": len(examples),
        "options_acc": scores.accuracy(),
        "options_acc_norm": scores.accuracy("chars"),
    }
    return metrics, table
