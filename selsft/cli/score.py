"""`selsft score`: the scores of a data set, saved for `selsft train`, and a look at the most negative tokens.

Takes the flags of `train`, so that one YAML file serves both, and scores through the trainer: same tokens, same
truncation. Packed rows are taken apart again into their documents, so that the saved data set can be packed in any way
later. The token weights are not saved, only the log-probabilities they come from: training chooses its own threshold.
Rejected: scoring with a loop of our own, which would have to follow TRL's data preparation.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset, Features, List, Value

from ..collator import BASE_LOGPS, REF_LOGPS
from .arguments import CommandParser
from .errors import InputError
from .launch import launch_command, needs_launch
from .manifest import run_manifest, write_manifest
from .summary import print_summary, summarize
from .train import build_trainer, check_model_and_data, check_new

DESCRIPTION = (
    "Score every token of a data set: its log-probability under --reference_model minus that under the model. Saves "
    "the rows with both log-probabilities as an Arrow data set, which `selsft train --dataset_name FOLDER` takes "
    "in the place of the data and the reference, and prints a summary with the most negative tokens."
)
EXAMPLES = """examples:
  selsft score --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --reference_model clean-adapter \\
      --scored_dir runs/scored
  selsft score --config recipe.yaml --scored_dir runs/scored --negative_threshold 2.0"""
COLUMNS = ("input_ids", "labels", BASE_LOGPS, REF_LOGPS)
_LOGPS = {name: List(Value("float32")) for name in (BASE_LOGPS, REF_LOGPS)}


@dataclass
class ScoreArguments:
    """Flags of `selsft score` only."""

    scored_dir: str | None = field(
        default=None, metadata={"help": "Folder for the scored data set, which must not exist. Default: output_dir."}
    )
    show_tokens: int = field(default=10, metadata={"help": "How many of the most negative tokens to print."})


def main(argv: list[str]) -> int:
    arguments = CommandParser("score", DESCRIPTION, EXAMPLES, ScoreArguments).parse(argv)
    if arguments is None:
        return 0
    training = arguments.training
    folder = Path(str(arguments.extra.scored_dir or training.output_dir))
    check_new(folder, "scored_dir" if arguments.extra.scored_dir else "output_dir", "choose another folder")
    if training.reference_model is None:
        raise InputError("reference_model is missing: scores compare the model with --reference_model NAME or FOLDER")
    if arguments.script.dataset_streaming or arguments.mixture.streaming:
        raise InputError("dataset_streaming=True cannot be scored into a folder: leave it out")
    check_model_and_data(arguments)
    if needs_launch(arguments.launch):
        return launch_command("score", arguments.launch, arguments.own, training.use_cpu)
    training.output_dir, training.precompute_scores = str(folder), True
    training.eval_strategy, training.push_to_hub = "no", False
    start = time.perf_counter()
    trainer = build_trainer(arguments, evaluate=False)
    seconds = time.perf_counter() - start
    if trainer.accelerator.is_main_process:
        dataset = trainer.train_dataset
        summary = summarize(dataset, trainer, arguments.extra.show_tokens)
        found = {"seconds": round(seconds, 1), **summary.numbers}
        save(dataset, folder, run_manifest("score", arguments, trainer) | {"finished": found})
        print_summary(summary, seconds, str(folder))
    trainer.accelerator.wait_for_everyone()
    trainer.end()
    return 0


def save(dataset: Dataset, folder: Path, manifest: dict[str, Any]) -> None:
    """Write the data set to a folder that appears when it is whole."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        unpacked(dataset).save_to_disk(str(temporary))
        write_manifest(temporary, manifest)
        os.chmod(temporary, 0o755)
        os.rename(temporary, folder)  # takes the place of an empty folder, of nothing else
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def unpacked(dataset: Dataset) -> Dataset:
    """One row per document, with the columns to keep. A document of a packed row sees none of its neighbours, so its
    log-probabilities are those that it has alone."""
    if "seq_lengths" not in dataset.column_names:
        return dataset.select_columns(list(COLUMNS))

    def split(rows: dict[str, list]) -> dict[str, list]:
        parts: dict[str, list] = {name: [] for name in COLUMNS}
        for index, lengths in enumerate(rows["seq_lengths"]):
            ends = np.cumsum(lengths)
            for name in COLUMNS:
                values = rows[name][index]
                parts[name] += [values[end - length : end] for end, length in zip(ends, lengths, strict=True)]
        return parts

    kept = dataset.select_columns([*COLUMNS, "seq_lengths"]).with_format(None)
    features = Features({**{name: kept.features[name] for name in COLUMNS[:2]}, **_LOGPS})
    options: dict[str, Any] = {"features": features, "remove_columns": ["seq_lengths"], "desc": "Unpacking rows"}
    return kept.map(split, batched=True, **options)
