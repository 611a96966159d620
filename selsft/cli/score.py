"""`selsft score`: the scores of a data set, in a folder for `selsft train`, and a look at the most negative tokens.

Takes the flags of `train`, so that one YAML file serves both. A trainer without a reference prepares the rows, so that
tokens and truncation are those of training; then shards of consecutive rows go through model and reference and to disk
one by one (`scored_folder`). The token weights are not saved, only the log-probabilities they come from: training
chooses its own threshold. Rejected: scoring through the trainer, which annotates all rows or none.
"""

from __future__ import annotations

import dataclasses
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import tqdm
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from .._compat import adapter_on_lm_head, end_training
from ..data.chunks import TokenChunk, supervised_mask
from ..data.columns import BASE_LOGPS, REF_LOGPS, token_columns
from ..data.loading import data_errors
from ..data.scored_folder import ScoredFolder, is_scored, load_scored
from ..data.tokenizers import tokenizer_sha256
from ..errors import InputError, input_errors
from ..records import versions
from ..report.terminal import print_summary, summarize
from ..scoring.batching import shard_chunks
from ..scoring.imported import ImportedLogps
from ..scoring.logprobs import ROW_COLUMNS
from ..scoring.pair import ModelPair
from ..scoring.settings import ScoreArguments
from ..trainer import SelectiveSFTTrainer
from ..training.model import base_model
from .arguments import Arguments, CommandParser
from .launch import launch_command, needs_launch
from .manifest import run_manifest, write_manifest
from .train import build_trainer, check_model_and_data, check_new, name_missing_model

DESCRIPTION = (
    "Score every token of a data set: its log-probability under --reference_model minus that under the model. Saves "
    "the rows with both log-probabilities as Parquet shards, which `selsft train --dataset_name FOLDER` takes in the "
    "place of the data and the reference, and prints a summary with the most negative tokens. A run that was cut off "
    "goes on when the same command is given again."
)
EXAMPLES = """examples:
  selsft score --model_name_or_path Qwen/Qwen3-0.6B --dataset_name data.jsonl --reference_model clean-adapter \\
      --scored_dir runs/scored
  selsft score --config recipe.yaml --scored_dir runs/scored --num_processes 8
  selsft score --config recipe.yaml --ref_logps from-server.parquet --scored_dir runs/scored"""


def main(argv: list[str]) -> int:
    arguments = CommandParser("score", DESCRIPTION, EXAMPLES, ScoreArguments).parse(argv)
    if arguments is None:
        return 0
    training, extra = arguments.training, arguments.extra
    folder = Path(str(extra.scored_dir or training.output_dir))
    if not is_scored(folder):
        check_new(folder, "scored_dir" if extra.scored_dir else "output_dir", "choose another folder")
    _check(arguments)
    check_model_and_data(arguments)
    if needs_launch(arguments.launch):
        return launch_command("score", arguments.launch, arguments.own, training.use_cpu)
    start = time.perf_counter()
    trainer, pair, imported = _prepare(arguments, folder)
    accelerator, main_process = trainer.accelerator, trainer.accelerator.is_main_process
    with input_errors():
        store = ScoredFolder(folder, _identity(arguments, trainer, pair, imported))
        if main_process:
            store.open(_facts(arguments), extra.rescore)
            write_manifest(folder, record := run_manifest("score", arguments, trainer))
        accelerator.wait_for_everyone()
        store.check()
    try:
        count = score_shards(arguments, trainer, pair, imported, store)
    except KeyboardInterrupt:
        if main_process:
            print(f"Finished shards are kept in {folder}: the same command goes on from there.", file=sys.stderr)
        raise
    if main_process:
        while store.missing(count):  # the other processes are at work on them; if one fails, the launcher ends all
            time.sleep(0.5)
        with input_errors():
            store.finish(count)
            summary = summarize(load_scored(folder), trainer._tokenizer, training, extra.show_tokens)
        seconds = time.perf_counter() - start
        write_manifest(folder, record | {"finished": {"seconds": round(seconds, 1), **summary.numbers}})
        print_summary(summary, seconds, str(folder))
    end_training(trainer)
    return 0


def _check(arguments: Arguments) -> None:
    training, extra = arguments.training, arguments.extra
    if training.reference_model is None and extra.ref_logps is None:
        raise InputError(
            "reference_model is missing: scores compare the model with --reference_model NAME or FOLDER, or with "
            "--ref_logps FILE"
        )
    if training.reference_model is not None and extra.ref_logps is not None:
        raise InputError(
            f"reference_model={training.reference_model!r} and ref_logps={extra.ref_logps!r} exclude each other: both "
            "say what the reference says"
        )
    if training.score != "influence":
        raise InputError(
            f"score={training.score!r} is not computed beforehand: leave it to `selsft train`, or score 'influence'"
        )
    if extra.shard_tokens < 1:
        raise InputError(f"shard_tokens={extra.shard_tokens} must be at least 1")


def _prepare(arguments: Arguments, folder: Path) -> tuple[SelectiveSFTTrainer, ModelPair, dict[str, ImportedLogps]]:
    """Rows as training sees them, one document each, and what scores them."""
    training, extra = arguments.training, arguments.extra
    reference, training.reference_model = training.reference_model, None
    training.output_dir, training.eval_strategy, training.push_to_hub = str(folder), "no", False
    training.max_steps = max(training.max_steps, 1)  # a trainer of streamed rows must know its end
    if training.packing and training.packing_strategy == "bfd" and training.max_length is not None:
        # Truncates and then packs whole documents, which see nothing of each other: so they are scored unpacked
        training.packing, training.truncation_mode = False, "keep_start"
    with adapter_on_lm_head():
        trainer = build_trainer(arguments, evaluate=False, strict=True)
    training.reference_model = reference
    if columns := token_columns(trainer.train_dataset):
        raise InputError(f"the data has the columns {columns} already: leave them out to score it")
    with input_errors():
        try:
            pair = ModelPair(
                trainer.model, reference, trainer._tokenizer, training, trainer.accelerator, trainer.data_collator,
                trainer._prepare_frozen, base=extra.base_logps is None, mixed=extra.mixed_batches,
            )  # fmt: skip
        except OSError as error:
            name_missing_model("reference_model", reference, error)
            raise
        expected = {"tokenizer_sha256": _tokenizer_sha256(trainer)}
        sides = (
            (BASE_LOGPS, extra.base_logps, expected | {"model_sha256": pair.policy_sha256}),
            (REF_LOGPS, extra.ref_logps, expected),
        )
        imported = {name: ImportedLogps(path, name, wanted) for name, path, wanted in sides if path is not None}
    return trainer, pair, imported


def _identity(
    arguments: Arguments, trainer: SelectiveSFTTrainer, pair: ModelPair, imported: dict[str, ImportedLogps]
) -> dict[str, Any]:
    """All that decides a score besides the rows. Sizes of batches are missing: they change the last bit only."""
    args = arguments.training
    tokens = ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field")
    cut = args.packing_strategy if args.packing else None
    given = {name: source.sha256 for name, source in imported.items()}
    return {
        "dtype": str(base_model(trainer.model).dtype).removeprefix("torch.") if pair.base_sha256 else None,
        "reference_dtype": pair.reference_dtype,
        "mixed_precision": str(trainer.accelerator.mixed_precision),
        "model_sha256": pair.base_sha256 or given.get(BASE_LOGPS),
        "reference_sha256": pair.ref_sha256 or given.get(REF_LOGPS),
        "tokenizer_sha256": _tokenizer_sha256(trainer),
        **{name: getattr(args, name) for name in tokens},
        "packing_strategy": cut,
        "shuffle_seed": args.seed if args.shuffle_dataset else None,
        "shard_tokens": arguments.extra.shard_tokens,
    }


def _facts(arguments: Arguments) -> dict[str, Any]:
    """What a manifest says beside the identity."""
    extra = arguments.extra
    return {
        "model": extra.base_logps or arguments.model.model_name_or_path,
        "reference": extra.ref_logps or arguments.training.reference_model,
        "data": {"source": arguments.source.description, "split": arguments.script.dataset_train_split},
        "versions": versions(),
    }


def _tokenizer_sha256(trainer: SelectiveSFTTrainer) -> str:
    tokenizer: PreTrainedTokenizerBase = trainer._tokenizer
    return tokenizer_sha256(tokenizer, trainer.chat_template)


def score_shards(
    arguments: Arguments,
    trainer: SelectiveSFTTrainer,
    pair: ModelPair,
    imported: dict[str, ImportedLogps],
    store: ScoredFolder,
) -> int:
    """Score the shards that are not there, each process in turn, and return the number of all shards.

    Shards are independent, so processes do not talk to each other; with sharded weights all of them score every shard
    together. Memory-mapped rows are checked before the first forward pass, streamed ones as they come.

    Raises:
        `InputError` for a row without tokens or longer than the model's context, for shards of other rows, and for
        imported values that do not fit.
    """
    accelerator, dataset = trainer.accelerator, trainer.train_dataset
    context = getattr(base_model(trainer.model).config.get_text_config(), "max_position_embeddings", None)
    world, rank = (1, 0) if pair.sharded else (accelerator.num_processes, accelerator.process_index)

    def shards() -> Iterator[tuple[int, TokenChunk, dict[str, np.ndarray], bool]]:
        with input_errors(), data_errors(arguments.source):
            for index, chunk in enumerate(
                shard_chunks(dataset, ROW_COLUMNS, arguments.extra.shard_tokens, documents=True)
            ):
                _check_chunk(chunk, context)
                done = store.finished(index, chunk)
                given = {} if done else {name: source.take(chunk) for name, source in imported.items()}
                yield index, chunk, given, done

    total = None
    if isinstance(dataset, Dataset):
        total = sum(chunk.size for index, chunk, _, done in shards() if not done and index % world == rank)
    # Sharded weights: all processes must agree which shards are missing, and the first to write would make them differ
    accelerator.wait_for_everyone()
    count = rows = 0
    bar = tqdm(
        total=total, desc="Scoring", unit="token", unit_scale=True, disable=bool(os.environ.get("TQDM_DISABLE"))
    )
    with bar, pair.ready() as score:
        for index, chunk, given, done in shards():
            count, rows = index + 1, rows + len(chunk.lengths)
            if done or index % world != rank:
                continue
            values = {**score(chunk, bar.update), **given}
            _check_finite(chunk, values)
            if not pair.sharded or accelerator.is_main_process:
                store.write(index, chunk, values[BASE_LOGPS], values[REF_LOGPS])
            if pair.sharded:
                accelerator.wait_for_everyone()
    if not count:
        raise InputError("the data has no rows: there is nothing to score")
    with input_errors():
        for source in imported.values():
            source.check_end(rows)
    return count


def _check_chunk(chunk: TokenChunk, context: int | None) -> None:
    if (empty := np.flatnonzero(chunk.lengths == 0)).size:
        raise InputError(f"row {chunk.first_row + int(empty[0])} of the prepared data has no tokens: remove it")
    if context is not None and (long := np.flatnonzero(chunk.lengths > context)).size:
        raise InputError(
            f"row {chunk.first_row + int(long[0])} of the prepared data has {chunk.lengths[long[0]]} tokens, more "
            f"than the model's context of {context}: set --max_length {context}"
        )


def _check_finite(chunk: TokenChunk, values: dict[str, np.ndarray]) -> None:
    trained = supervised_mask(dataclasses.replace(chunk, documents=None), padding_free=False)
    for name, flat in values.items():
        if (broken := np.flatnonzero(trained & ~np.isfinite(flat))).size:
            token = int(broken[0])
            side = "the model" if name == BASE_LOGPS else "the reference"
            raise InputError(
                f"row {chunk.row_of(token)}: {side} returned a log-probability of {flat[token]}: score in float32 "
                "(--dtype float32, --reference_model_init_kwargs) or repair the model"
            )
