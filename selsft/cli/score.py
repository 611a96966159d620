"""`selsft score`: writes the scores of a data set to a folder for `selsft train`, and prints a summary.

Takes the flags of `train`, so that one YAML file serves both; the work is done by `selsft.score`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import os
import time
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset

from .._compat import adapter_on_lm_head, end_training
from ..data.loading import data_errors, load_splits
from ..data.scored_folder import is_scored, load_scores
from ..data.source_rows import numbered
from ..errors import InputError, input_errors
from ..report.terminal import print_judged, print_summary, summarize
from ..score import ScoringRun, check_score_settings, check_unmarked, judged_data, row_settings
from ..score_ray import connect, ray_columns
from ..scoring.settings import ScoreArguments
from .arguments import Arguments, CommandParser
from .launch import at_work, launch_command, launched, needs_launch
from .manifest import run_manifest, write_manifest
from .train import build_trainer, check_model_and_data, check_new

DESCRIPTION = (
    "Score every token of a data set, by default its log-probability under --reference_model minus that under the "
    "model. With --judged, rows whose wrong characters somebody has marked, it says how well the score tells wrong "
    "tokens from right ones, fits a probe (--score probe) and chooses a threshold (--target_precision). Saves the "
    "rows with their scores as Parquet shards, which `selsft train --dataset_name FOLDER` takes instead of the "
    "data and the reference, and prints a summary with the most negative tokens. An interrupted run resumes when "
    "the same command is given again."
)
EXAMPLES = """examples:
  selsft score --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --reference_model clean-adapter \\
      --scored_dir runs/scored
  selsft score --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --score probe --judged judged.jsonl \
      --target_precision 0.6 --scored_dir runs/scored
  selsft score --config recipe.yaml --scored_dir runs/scored --num_processes 8
  selsft score --config recipe.yaml --scored_dir runs/scored --engine ray
  selsft score --config recipe.yaml --ref_logps from-server.parquet --scored_dir runs/scored"""


def main(argv: list[str]) -> int:
    arguments = CommandParser("score", DESCRIPTION, EXAMPLES, ScoreArguments).parse(argv)
    if arguments is None:
        return 0
    training, extra = arguments.training, arguments.extra
    folder = Path(str(extra.scored_dir or training.output_dir))
    if not is_scored(folder):
        check_new(folder, "scored_dir" if extra.scored_dir else "output_dir", "choose another folder")
    check_score_settings(training, training.reference_model, extra.base_logps, extra.ref_logps, extra.shard_tokens)
    check_model_and_data(arguments)
    field = "scored_dir" if extra.scored_dir else "output_dir"
    with at_work(folder, field, "finished shards are kept in it, the same command resumes from there"):
        if extra.engine == "ray":
            _check_ray(arguments)
        elif needs_launch(arguments.launch):
            return launch_command("score", arguments.launch, arguments.own, training.use_cpu)
        return _score(arguments, folder)


def _check_ray(arguments: Arguments) -> None:
    if arguments.launch or launched():
        flag = arguments.launch[0] if arguments.launch else "accelerate launch"
        raise InputError(f"engine='ray' starts its own workers: leave {flag} out, and give --ray_workers")
    connect()
    arguments.training._n_gpu = min(arguments.training.n_gpu, 1)  # of the command itself, which needs no more


def _score(arguments: Arguments, folder: Path) -> int:
    training, extra = arguments.training, arguments.extra
    start = time.perf_counter()
    run = prepare(arguments, folder)
    trainer, main_process = run.trainer, run.trainer.accelerator.is_main_process
    with input_errors():
        run.open(
            {
                "model": extra.base_logps or arguments.model.model_name_or_path,
                "reference": extra.ref_logps or training.reference_model,
                "data": {"source": arguments.source.description, "split": arguments.script.dataset_train_split},
            },
            extra.rescore,
        )
    if main_process:
        write_manifest(folder, record := run_manifest("score", arguments, trainer))

    @contextlib.contextmanager
    def reading() -> Iterator[None]:
        with input_errors(), data_errors(arguments.source):
            yield

    with input_errors():
        run.judge()
    if main_process:
        print_judged(run.verdict.record if run.verdict else None, run.selection())
    engine = None
    if extra.engine == "ray":
        make = functools.partial(_worker_run, arguments.own, os.getcwd(), folder)
        engine = functools.partial(ray_columns, make=make, workers=extra.ray_workers)
    run.score(reading, engine)
    with input_errors():
        run.finish()
    if main_process:
        with input_errors():
            summary = summarize(load_scores(folder), trainer._tokenizer, training, extra.show_tokens)
        seconds = time.perf_counter() - start
        write_manifest(folder, record | {"finished": {"seconds": round(seconds, 1), **summary.numbers}})
        print_summary(summary, seconds, str(folder))
    end_training(trainer)
    return 0


def _worker_run(argv: list[str], directory: str, folder: Path, rows: Dataset) -> ScoringRun:
    """What this command line makes in another process, where the paths in it mean the same."""
    os.chdir(directory)
    arguments = CommandParser("score", DESCRIPTION, EXAMPLES, ScoreArguments).parse(argv)
    assert arguments is not None
    return prepare(arguments, folder, rows)


def prepare(arguments: Arguments, folder: Path, rows: Dataset | None = None) -> ScoringRun:
    """Rows as training sees them, and what scores them.

    Args:
        rows: prepared rows, in place of the data.
    """
    extra, training = arguments.extra, arguments.training
    reference = training.reference_model
    data = judged_data(training)
    source = None
    if rows is None:
        source, _ = load_splits(arguments.source, None, training.dataset_text_field, strict=True)
        check_unmarked(source, training.dataset_text_field)
    with adapter_on_lm_head():
        settings = dataclasses.replace(arguments, training=row_settings(training, folder))
        given = rows if source is None else numbered(source)
        trainer = build_trainer(settings, evaluate=False, scored=True, rows=given)
    with input_errors():
        return ScoringRun(
            trainer, training, folder, reference, base_logps=extra.base_logps, ref_logps=extra.ref_logps,
            shard_tokens=extra.shard_tokens, mixed_batches=extra.mixed_batches, source=source, **data,
        )  # fmt: skip
