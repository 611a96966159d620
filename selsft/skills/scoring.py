"""From the scores of a model to the rows of the score table, and its hidden states on disk."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from safetensors.torch import save_file

from ..evaluation.examples import SPLITS, MultipleChoiceExample
from ..evaluation.options import OptionScores
from ..records import replaced
from .table import END, SCHEMA, Model
from .tasks import SkillTask


def score_table(
    identity: Model,
    eval_task: str,
    split: str,
    examples: Sequence[MultipleChoiceExample],
    scores: OptionScores,
    assigned: Sequence[int] | None = None,
    step: int = END,
) -> pa.Table:
    """The rows of one evaluation, one per option, with the columns of `table.SCHEMA`.

    Args:
        assigned: the label that each example was given, if the stage has trained on them.
    """
    counts = np.diff(scores.offsets)
    option = np.concatenate([np.arange(count) for count in counts])
    total = len(option)
    columns = {
        **{name: [value] * total for name, value in identity._asdict().items()},
        "eval_task": [eval_task] * total,
        "split": [split] * total,
        "step": [step] * total,
        "example_id": np.repeat([example.id for example in examples], counts),
        "option": option,
        "logprob": np.minimum(scores.logprob, 0.0),
        "n_tokens": scores.n_tokens,
        "n_chars": scores.n_chars,
        "n_bytes": scores.n_bytes,
        "is_gold": option == np.repeat(scores.gold, counts),
        "is_assigned": [None] * total if assigned is None else option == np.repeat(assigned, counts),
    }
    return pa.table({field.name: pa.array(columns[field.name], field.type) for field in SCHEMA})


def save_states(
    folder: Path,
    identity: Model,
    eval_task: str,
    split: str,
    examples: Sequence[MultipleChoiceExample],
    scores: OptionScores,
    layer: int,
) -> None:
    """Write `<eval_task>-<split>.safetensors` (`question`, `options`) and the JSON that describes it."""
    assert scores.question_states is not None and scores.option_states is not None
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {"question": scores.question_states.contiguous(), "options": scores.option_states.contiguous()}
    save_file(tensors, folder / f"{eval_task}-{split}.safetensors")
    notes = {
        **identity._asdict(),
        "layer": layer,
        "example_ids": [example.id for example in examples],
        "option_counts": np.diff(scores.offsets).tolist(),
        "gold": scores.gold.tolist(),
    }
    (folder / f"{eval_task}-{split}.json").write_text(json.dumps(notes, ensure_ascii=False) + "\n", encoding="utf-8")


def write_examples(path: Path, tasks: Sequence[SkillTask]) -> None:
    """The questions of all tasks as Parquet: `eval_task`, `split`, `example_id`, `prompt`, `options`, `gold`."""
    rows = [(task.name, split, e) for task in tasks for split in SPLITS for e in task.split(split)]
    table = pa.table(
        {
            "eval_task": pa.array([name for name, _, _ in rows], pa.string()),
            "split": pa.array([split for _, split, _ in rows], pa.string()),
            "example_id": pa.array([e.id for _, _, e in rows], pa.string()),
            "prompt": pa.array([e.prompt for _, _, e in rows], pa.string()),
            "options": pa.array([list(e.options) for _, _, e in rows], pa.list_(pa.string())),
            "gold": pa.array([e.gold for _, _, e in rows], pa.int32()),
        }
    )
    with replaced(path) as file:
        pq.write_table(table, file, compression="zstd")
