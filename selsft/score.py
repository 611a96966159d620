"""Scores a data set into a folder that training reads: `score_dataset`, and what `selsft score` runs.

A trainer without a reference prepares the rows, so that tokens and truncation are as in training; then chunks of
consecutive rows go through policy and reference and to disk one by one (`data.scored_folder`). The token weights are
not saved, only the log-probabilities behind them: training chooses its own threshold. Judged rows are
scored first, and their verdict on the score is printed and kept before hours go into the data (`evaluation.judging`).
Rejected: scoring through the trainer, which weighs all rows or none.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import tqdm
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from transformers import PreTrainedTokenizerBase

from ._compat import adapter_on_lm_head
from .config import SELECTION_DEFAULTS, SelectiveSFTConfig
from .data.cards import write_card
from .data.chunks import TOKENS_PER_CHUNK, TokenChunk, supervised_mask, token_chunks
from .data.columns import BASE_LOGPS, NOISY_LOGPS, PROBE_SCORES, READ_COLUMNS, REF_LOGPS, token_columns
from .data.loading import DataSource, load_rows
from .data.rows import check_dataset
from .data.scored_folder import ScoredFolder, is_scored, load_scores
from .data.source_rows import numbered, write_source_rows
from .data.spans import has_marks
from .data.tokenizers import tokenizer_sha256
from .errors import InputError
from .evaluation.judging import Judging, Verdict
from .records import versions
from .scoring.frozen import FrozenModels
from .scoring.imported import ImportedLogps
from .scoring.logprobs import ROW_COLUMNS
from .trainer import SelectiveSFTTrainer
from .training.model import Model, base_model

# Takes a chunk and tells the other argument of the tokens it has run; returns column -> `(tokens,)` float32
Columns = Callable[[TokenChunk, Callable[[int], object]], dict[str, np.ndarray]]
SCORED = ("influence", "surprisal", "probe", "contrast")
JUDGED_DATA = ("judged", "judged_test", "probe_clean")


def score_dataset(
    model: str | Path | Model,
    dataset: Dataset | IterableDataset,
    *,
    output_dir: str | Path,
    reference_model: str | Path | Model | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    args: SelectiveSFTConfig | None = None,
    peft_config: PeftConfig | None = None,
    base_logps: str | Path | None = None,
    ref_logps: str | Path | None = None,
    shard_tokens: int = TOKENS_PER_CHUNK,
    mixed_batches: bool = False,
    rescore: bool = False,
    judged: Dataset | None = None,
    judged_test: Dataset | None = None,
    probe_clean: Dataset | None = None,
) -> Dataset:
    """Score every token of `dataset` and keep the scores in a folder: log-probabilities under a model and its
    reference, and the probe's output (`args.score`).

    The Python form of `selsft score`. An interrupted call resumes when it is repeated: finished shards are kept. With
    several processes (`accelerate launch`), all of them call this.

    Args:
        model: as in [`SelectiveSFTTrainer`]; scored as it is.
        dataset: rows in any form that [`SelectiveSFTTrainer`] trains on, without token columns; mapped or streamed.
        output_dir: folder of the scores: new, or one that this call has begun.
        reference_model: see [`SelectiveSFTConfig`]; `args.reference_model` by default.
        tokenizer: that of `model` by default.
        args: settings that decide tokens (`max_length`, `packing`, ...), precision and batches.
        peft_config: for a model that will be trained with a new adapter, and a reference that is `"base"` or one.
        base_logps, ref_logps: Parquet file or folder with log-probabilities computed elsewhere, instead of those
            of `model` or of the reference ([`ImportedLogps`]).
        shard_tokens: tokens of a shard: what is in memory at once, and what an interrupt can cost.
        mixed_batches: score policy and reference in one forward pass where both are LoRA adapters of one model.
        rescore: remove the scores in the folder, whatever made them.
        judged, judged_test, probe_clean: rows (docs/spans.md) instead of the files that `args` names.

    Returns:
        one row per document: `input_ids` and `labels` (int32), and the columns of the score (float32, 0 where nothing
        is supervised): `base_logps`, `ref_logps` and `noisy_logps` in nats, and `probe_scores`, minus the probability
        of being wrong; column index t belongs to token t. It is mapped into memory, and may be the
        `train_dataset` of a trainer.

    Raises:
        `ValueError` naming the field or row, the value and the remedy: for a folder that holds something else or was
        made by something else, and for rows, models or imported values that do not fit.
    """
    check_dataset("dataset", dataset)
    args = args if args is not None else SelectiveSFTConfig(str(output_dir))
    reference = str(reference_model) if isinstance(reference_model, Path) else reference_model or args.reference_model
    given = {"judged": judged, "judged_test": judged_test, "probe_clean": probe_clean}
    given = {name: rows for name, rows in given.items() if rows is not None}
    check_score_settings(args, reference, base_logps, ref_logps, shard_tokens, given)
    folder = Path(output_dir)
    if not is_scored(folder) and folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(
            f"output_dir={str(folder)!r} exists and is not empty, nothing was overwritten: choose another"
        )
    check_unmarked(dataset, args.dataset_text_field)
    data = judged_data(args) | given
    with adapter_on_lm_head():
        trainer = SelectiveSFTTrainer(
            model,
            row_settings(args, folder),
            train_dataset=numbered(dataset),
            processing_class=tokenizer,
            peft_config=peft_config,
        )
    run = ScoringRun(
        trainer, args, folder, reference, base_logps=base_logps, ref_logps=ref_logps, shard_tokens=shard_tokens,
        mixed_batches=mixed_batches, source=dataset, **data,
    )  # fmt: skip
    run.open(
        {"model": base_logps or trainer.model.config._name_or_path, "reference": ref_logps or run.models.name}, rescore
    )
    run.judge()
    run.score()
    run.finish()
    trainer.accelerator.wait_for_everyone()
    return load_scores(folder)


def judged_data(args: SelectiveSFTConfig) -> dict[str, Dataset | None]:
    """The rows that `judged`, `judged_test` and `probe_clean` name.

    Raises:
        `InputError` naming the setting whose rows cannot be read.
    """
    found: dict[str, Dataset | None] = {}
    for name in JUDGED_DATA:
        source = getattr(args, name)
        try:
            found[name] = None if source is None else load_rows(DataSource(source), args.dataset_text_field)
        except InputError as error:
            raise InputError(f"{name}={source!r}: {error}") from error
    return found


def check_score_settings(
    args: SelectiveSFTConfig,
    reference: str | Model | None,
    base_logps: str | Path | None,
    ref_logps: str | Path | None,
    shard_tokens: int,
    given: Collection[str] = (),
) -> None:
    """Raise `InputError` for settings that do not allow scoring, before anything is loaded.

    Args:
        given: which of `JUDGED_DATA` come as rows, and not as the files that `args` names.
    """
    rows = {name for name in JUDGED_DATA if name in given or getattr(args, name) is not None}
    if args.score not in SCORED:
        raise InputError(
            f"score={args.score!r} is not computed beforehand: leave it to `selsft train`, or use one of "
            f"{', '.join(SCORED)}"
        )
    if reference is None and ref_logps is None and REF_LOGPS in READ_COLUMNS[args.score]:
        raise InputError(
            f"reference_model is missing: score={args.score!r} compares with --reference_model NAME or FOLDER, or "
            "with --ref_logps FILE; without a reference use --score probe with --judged FILE, or --score surprisal"
        )
    if reference is not None and ref_logps is not None:
        raise InputError(
            f"reference_model={reference!r} and ref_logps={str(ref_logps)!r} exclude each other: both say what the "
            "reference says"
        )
    if args.score == "contrast" and args.noisy_reference_model is None:
        raise InputError(
            "noisy_reference_model is missing: score='contrast' compares reference_model with a reference that was "
            "trained on the noisy data"
        )
    if args.score == "probe" and base_logps is not None:
        raise InputError(
            f"base_logps={str(base_logps)!r} with score='probe', which reads the model's hidden states: leave it out"
        )
    if args.score == "probe" and args.probe is None and not rows & {"judged", "probe_clean"}:
        raise InputError(
            "score='probe' has nothing to fit a probe on: give --judged FILE, --probe_clean FILE, or a fitted one "
            "with --probe FOLDER"
        )
    if args.score == "probe" and args.probe is not None and "probe_clean" in rows:
        raise InputError(f"probe={args.probe!r} and probe_clean exclude each other: the one is fitted already")
    if args.score != "probe" and "probe_clean" in rows:
        raise InputError(f"probe_clean with score={args.score!r}: set score='probe' to fit one")
    if args.probe_corruptions is not None and "probe_clean" not in rows:
        raise InputError(f"probe_corruptions={args.probe_corruptions!r} without clean rows: set probe_clean")
    for name in ("target_precision", "judged_test", "judged_group"):
        if getattr(args, name) is not None and "judged" not in rows:
            raise InputError(f"{name}={getattr(args, name)!r} without judged rows: set judged")
    if "judged_test" in rows and "judged" not in rows:
        raise InputError("judged_test without judged rows: call them judged where nothing is fitted on any")
    if "judged" in rows and (base_logps is not None or ref_logps is not None):
        raise InputError(
            "judged rows have no imported log-probabilities: leave base_logps and ref_logps out, or score without "
            "judged rows"
        )
    if args.target_precision is not None and not args.rule_is_default:
        raise InputError(
            f"target_precision={args.target_precision} chooses the threshold: leave negative_threshold and "
            "positive_fraction out"
        )
    if shard_tokens < 1:
        raise InputError(f"shard_tokens={shard_tokens} must be at least 1")


def check_unmarked(data: Dataset | IterableDataset, text_field: str) -> None:
    """Raise `InputError` for rows to score that say themselves what is wrong in them."""
    if has_marks(data, text_field):
        raise InputError(
            "the data says itself what is wrong in it, so it is trained on without scores: give it with --judged to "
            "measure a score, or drop its spans and weights to score it"
        )


def row_settings(args: SelectiveSFTConfig, folder: Path) -> SelectiveSFTConfig:
    """Settings of the trainer that prepares the rows: as training sees them, one document each."""
    made = args.without_selection()
    made.output_dir = str(folder)
    made.eval_strategy, made.push_to_hub, made.report_to = "no", False, []
    made.max_steps = max(made.max_steps, 1)  # a trainer of streamed rows must know its end
    if made.packing and made.packing_strategy == "bfd" and made.max_length is not None:
        # Truncates and then packs whole documents, which do not see each other: so they are scored unpacked
        made.packing, made.truncation_mode = False, "keep_start"
    return made


class ScoringRun:
    """Rows, what scores them, and the folder that keeps the scores.

    Args:
        trainer: made with `row_settings(args)`; its model is the policy at the start of training.
        args: all settings; those of selection go back into the trainer's.
        folder: of the scores.
        source: the rows before they were `numbered` and prepared, whose columns are kept beside the scores.
        reference, base_logps, ref_logps, shard_tokens, mixed_batches, judged, judged_test, probe_clean: see
            `score_dataset`.

    Attributes:
        verdict: what the judged rows say, in the main process, after `judge`.

    Raises:
        `ValueError` for rows that have token columns already, and for a reference or imported values that do not fit.
    """

    def __init__(
        self,
        trainer: SelectiveSFTTrainer,
        args: SelectiveSFTConfig,
        folder: Path,
        reference: str | Model | None,
        *,
        base_logps: str | Path | None = None,
        ref_logps: str | Path | None = None,
        shard_tokens: int = TOKENS_PER_CHUNK,
        mixed_batches: bool = False,
        source: Dataset | IterableDataset | None = None,
        judged: Dataset | None = None,
        judged_test: Dataset | None = None,
        probe_clean: Dataset | None = None,
    ):
        if columns := token_columns(trainer.train_dataset):
            raise InputError(f"the data has the columns {columns} already: leave them out to score it")
        for name in SELECTION_DEFAULTS:
            setattr(trainer.args, name, getattr(args, name))
        self.trainer, self.shard_tokens, self.source = trainer, shard_tokens, source
        self.args = copy.copy(trainer.args)
        self.count = 0  # shards of the data, known at the end
        tokenizer: PreTrainedTokenizerBase = trainer._tokenizer
        self.models = models = FrozenModels(
            trainer.model, reference, tokenizer, trainer.args, trainer.accelerator, trainer.data_collator,
            base=base_logps is None, mixed=mixed_batches,
        )  # fmt: skip
        self.noisy: FrozenModels | None = None
        if self.args.score == "contrast":
            self.noisy = FrozenModels(
                trainer.model, self.args.noisy_reference_model, tokenizer, trainer.args, trainer.accelerator,
                trainer.data_collator, base=False, adapter_name="selsft_noisy",
            )  # fmt: skip
        self.verdict: Verdict | None = None
        self.judging = Judging(models, tokenizer, self.args, trainer.chat_template, judged, judged_test, probe_clean)
        expected = {"tokenizer_sha256": tokenizer_sha256(tokenizer, trainer.chat_template)}
        sides = ((BASE_LOGPS, base_logps), (REF_LOGPS, ref_logps))
        self.imported = {
            name: ImportedLogps(
                path, name, expected | ({"model_sha256": models.policy_sha256} if name == BASE_LOGPS else {})
            )
            for name, path in sides
            if path is not None
        }
        self.store = ScoredFolder(folder, self._identity(expected["tokenizer_sha256"]))

    def _identity(self, tokenizer: str) -> dict[str, Any]:
        """All that decides a score besides the rows. Sizes of batches are missing: they change the last bit only."""
        args, models = self.trainer.args, self.models
        given = {name: source.sha256 for name, source in self.imported.items()}
        tokens = ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field")
        base, ref = BASE_LOGPS in models.columns, REF_LOGPS in models.columns
        return {
            "dtype": models.precision(BASE_LOGPS)["dtype"] if base else None,
            "reference_dtype": models.precision(REF_LOGPS)["dtype"] if ref else None,
            "mixed_precision": models.precision(BASE_LOGPS)["mixed_precision"],
            "model_sha256": models.policy_sha256 if base else given[BASE_LOGPS],
            "reference_sha256": models.reference_sha256 if ref else given.get(REF_LOGPS),
            "tokenizer_sha256": tokenizer,
            **{name: getattr(args, name) for name in tokens},
            "packing_strategy": args.packing_strategy if args.packing else None,
            "shuffle_seed": args.seed if args.shuffle_dataset else None,
            "shard_tokens": self.shard_tokens,
            **({} if self.noisy is None else {"noisy_sha256": self.noisy.reference_sha256}),
            **({} if self.judging.probe_key is None else {"probe_sha256": self.judging.probe_key}),
        }

    def open(self, facts: dict[str, Any], rescore: bool = False) -> None:
        """Create the folder, or continue the one that is there. Called in all processes.

        Raises:
            `ValueError` when the folder was made by something else, naming what differs.
        """
        if self.trainer.accelerator.is_main_process:
            self.store.open({**facts, "versions": versions()}, rescore)
        self.trainer.accelerator.wait_for_everyone()
        self.store.check()

    def judge(self) -> None:
        """Fit what needs fitting and measure the score on judged rows, if there are any. Called in all processes.

        Raises:
            `InputError` for judged rows that do not suffice for a probe or a threshold.
        """
        computing = self.models.sharded or self.trainer.accelerator.is_main_process
        fit = self.judging.fit(self.store.path, computing)
        self.verdict = self.judging.verdict(self.store.path, fit, computing, self._others)
        self.trainer.accelerator.wait_for_everyone()

    @property
    def _others(self) -> list[tuple[FrozenModels, str]]:
        return [] if self.noisy is None else [(self.noisy, NOISY_LOGPS)]

    def selection(self) -> dict[str, Any]:
        """How training selects by this folder where nothing else is asked for (`selection.chosen`)."""
        args, verdict = self.args, self.verdict
        names = ("score", "score_base_weight", "score_row_worst", "score_lookahead", "target_precision")
        threshold = None if verdict is None else verdict.threshold
        return {
            **{name: getattr(args, name) for name in names},
            "score_pooling": args.pooling,
            "negative_threshold": None if threshold is None else threshold.negative_threshold,
            "threshold": None if threshold is None else str(threshold),
            "verified": verdict is not None,
            "refusal": None if verdict is None else verdict.refusal,
        }

    def _columns(self, chunk: TokenChunk, progress: Callable[[int], object]) -> dict[str, np.ndarray]:
        with contextlib.nullcontext() if self.noisy is None else self.models.ready():
            values = self.models.score(chunk, self.models.columns, progress=progress)
        for models, name in self._others:
            with models.ready():
                values[name] = models.score(chunk, [REF_LOGPS], progress=progress)[REF_LOGPS]
        return values

    @contextlib.contextmanager
    def here(self) -> Iterator[Columns]:
        """Inside, the models of this process give the scores of a chunk."""
        # With a second reference each is made ready in turn: they may put adapters into the same layers
        with self.models.ready() if self.noisy is None else contextlib.nullcontext():
            yield self._columns

    def score(
        self,
        reading: Callable[[], AbstractContextManager[Any]] = contextlib.nullcontext,
        engine: Callable[[ScoringRun, list[int]], AbstractContextManager[Columns]] | None = None,
    ) -> None:
        """Score the missing shards, which processes share out in turn.

        Shards are independent, so processes do not talk to each other; with sharded weights all of them score every
        shard together. Memory-mapped rows are checked before the first forward pass, streamed ones as they come.

        Args:
            reading: entered while rows are read and compared.
            engine: entered with this run and the numbers of the missing shards, for memory-mapped rows; gives their
                scores in that order, in place of `here`.

        Raises:
            `ValueError` for a row without tokens or longer than the model's context, for shards of other rows, and for
            imported values that do not fit.
        """
        trainer, store, sharded = self.trainer, self.store, self.models.sharded
        accelerator, dataset = trainer.accelerator, trainer.train_dataset
        context = getattr(base_model(trainer.model).config.get_text_config(), "max_position_embeddings", None)
        world, rank = (1, 0) if sharded else (accelerator.num_processes, accelerator.process_index)

        def shards() -> Iterator[tuple[int, TokenChunk, dict[str, np.ndarray], bool]]:
            with reading():
                chunks = token_chunks(dataset, ROW_COLUMNS, self.shard_tokens, documents=True)
                for index, chunk in enumerate(chunks):
                    check_prepared(chunk, context)
                    done = store.finished(index, chunk)
                    given = {} if done else {name: source.take(chunk) for name, source in self.imported.items()}
                    yield index, chunk, given, done

        total: int | None = None
        missing: list[int] = []
        if isinstance(dataset, Dataset):
            total = 0
            for index, chunk, _, done in shards():
                if not done and index % world == rank:
                    total += chunk.size
                    missing.append(index)
            total *= self.models.passes(self.models.columns) + len(self._others)
        # With sharded weights all processes must agree which shards are missing, and the first to write would make
        # them differ
        accelerator.wait_for_everyone()
        self.count = rows = 0
        quiet = bool(os.environ.get("TQDM_DISABLE"))
        bar = tqdm(total=total, desc="Scoring", unit="token", unit_scale=True, disable=quiet)
        with bar, self.here() if engine is None else engine(self, missing) as columns:
            for index, chunk, given, done in shards():
                self.count, rows = index + 1, rows + len(chunk.lengths)
                if done or index % world != rank:
                    continue
                values = {**columns(chunk, bar.update), **given}
                _check_finite(chunk, values)
                if not sharded or accelerator.is_main_process:
                    store.write(index, chunk, {name: values[name] for name in sorted(values)})
                if sharded:
                    accelerator.wait_for_everyone()
        if not self.count:
            raise InputError("the data has no rows: there is nothing to score")
        with reading():
            for source in self.imported.values():
                source.check_end(rows)

    def finish(self) -> None:
        """Write the manifest of the whole folder, in the main process, when the others have written their shards.

        Raises:
            `ValueError` for a shard that is left over or damaged.
        """
        if not self.trainer.accelerator.is_main_process:
            return
        while self.store.missing(self.count):  # the others are at work on them; if one fails, the launcher ends all
            time.sleep(0.5)
        if self.source is not None:
            write_source_rows(self.store.path, self.source, self.trainer.train_dataset)
        write_card(self.store.path, "Rows scored by `selsft score`.")
        selection = self.selection()
        self.store.finish(
            self.count, facts={"selection": selection, "score_base_weight": selection["score_base_weight"]}
        )


def check_prepared(chunk: TokenChunk, context: int | None) -> None:
    if (empty := np.flatnonzero(chunk.lengths == 0)).size:
        raise InputError(f"row {chunk.first_row + int(empty[0])} of the prepared data has no tokens: remove it")
    if context is not None and (long := np.flatnonzero(chunk.lengths > context)).size:
        raise InputError(
            f"row {chunk.first_row + int(long[0])} of the prepared data has {chunk.lengths[long[0]]} tokens, more "
            f"than the model's context of {context}: set --max_length {context}"
        )


def _check_finite(chunk: TokenChunk, values: dict[str, np.ndarray]) -> None:
    supervised = supervised_mask(dataclasses.replace(chunk, documents=None), padding_free=False)
    for name, flat in values.items():
        if (broken := np.flatnonzero(supervised & ~np.isfinite(flat))).size:
            token = int(broken[0])
            side = "the model" if name in (BASE_LOGPS, PROBE_SCORES) else "the reference"
            what = "probability" if name == PROBE_SCORES else "log-probability"
            raise InputError(
                f"row {chunk.row_of(token)}: {side} returned a {what} of {flat[token]}: score in float32 "
                "(--dtype float32, --reference_model_init_kwargs) or repair the model"
            )
