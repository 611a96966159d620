"""What a selective run cannot do, each with its reason and its remedy, before anything is scored.

Kept apart from the trainer, whose overrides should stay readable. `SelectiveSFTConfig` checks settings against each
other; here is what depends on the data, the model or the launcher.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset, IterableDataset
from transformers import TrainingArguments
from trl.data_utils import get_dataset_column_names

from selsft_kernels.objectives import FORGET

from .._compat import DataCollatorForLanguageModeling
from ..data.columns import BASE_LOGPS, NOISY_LOGPS, PROBE_SCORES, READ_COLUMNS, REF_LOGPS, SCORE_COLUMNS, WEIGHTS
from ..data.rows import check_dataset, form_of
from ..errors import InputError
from .collator import DataCollatorForSelectiveSFT
from .model import Model

if TYPE_CHECKING:
    from ..config import SelectiveSFTConfig
    from ..trainer import SelectiveSFTTrainer


# Fields that say which tokens are negative, and fields that say what becomes of them
_RULES = (
    "negative_threshold", "positive_fraction", "selection_scope", "neutral_band", "gate_reference_prob",
    "max_negative_share",
)  # fmt: skip
# Fields that say what a token's score is
_SCORING = (
    "score_base_weight", "score_pooling", "score_row_worst", "score_lookahead", "noisy_reference_model",
)  # fmt: skip
_PLAIN_SCORE = {"score_base_weight": 1.0, "score_pooling": "token"}
_SCORE_ONLY = ("judged", "judged_test", "judged_group", "target_precision", "probe_clean", "probe_corruptions")
_FORGETTING = (
    "forget_objective", "forget_weight", "forget_schedule", "forget_normalization", "forget_beta", "forget_floor",
    "entropy_gate", "anchor_weight", "z_loss_weight",
)  # fmt: skip


def validate_arguments(model: Any, args: Any, train_dataset: Any, eval_dataset: Any, formatted: bool = False) -> None:
    """Raise `InputError` for an argument of the trainer of a wrong type, and for data without rows or without columns
    that can be trained on.

    Args:
        formatted: whether a `formatting_func` makes the text of the rows.
    """
    if not isinstance(model, str | Path | torch.nn.Module):
        raise InputError(f"model is a {type(model).__name__}: give a name, a folder or a loaded model")
    if args is not None and not isinstance(args, TrainingArguments):
        raise InputError(f"args is a {type(args).__name__}: give a SelectiveSFTConfig")
    parts = {} if eval_dataset is None else {"eval_dataset": eval_dataset}
    if isinstance(eval_dataset, dict):
        parts = {f"eval_dataset[{name!r}]": part for name, part in eval_dataset.items()}
    prepared = formatted or (getattr(args, "dataset_kwargs", None) or {}).get("skip_prepare_dataset")
    for name, part in {"train_dataset": train_dataset, **parts}.items():
        check_dataset(name, part)
        if not prepared:
            form_of(part, getattr(args, "dataset_text_field", "text"), name)


def validate_prepared(trainer: SelectiveSFTTrainer) -> None:
    """Raise `InputError` when no prepared row is left to train on."""
    dataset, args = trainer.train_dataset, trainer.args
    if isinstance(dataset, Dataset) and len(dataset) == 0:
        raise InputError(
            f"max_length={args.max_length} (truncation_mode={args.truncation_mode!r}) leaves no row with a supervised "
            "token: raise max_length, or bring rows with shorter prompts"
        )


def validate_effects(trainer: SelectiveSFTTrainer, source: str | Model | None, given: list[str]) -> None:
    """Raise `ValueError` for the first setting or column of selection that this run would ignore.

    Args:
        source: the reference.
        given: token columns of the train dataset.
    """
    args, selective = trainer.args, source is not None or bool(given) or trainer.args.score != "influence"
    names = get_dataset_column_names(trainer.train_dataset)
    for score, column in SCORE_COLUMNS.items():
        if column in names and args.score != score:
            raise ValueError(
                f"the train dataset has the column {column!r}, which has no effect under score={args.score!r}: set "
                f"score={score!r}, or remove the column"
            )
    if source is None and args.reference_model_init_kwargs:
        raise ValueError("reference_model_init_kwargs has no effect without reference_model: remove it or set both")
    if args.score == "probe" and args.probe is not None and PROBE_SCORES in given:
        raise ValueError(
            f"probe={args.probe!r} has no effect: the rows have {PROBE_SCORES!r} already. Remove one of both"
        )
    ignored: tuple[str, ...] = (*_RULES, *_SCORING) if WEIGHTS in given else ()
    reason = f"the column {WEIGHTS!r} (or marks in the text) says which tokens are negative"
    if not selective:
        ignored = (*_RULES, *_SCORING, *_FORGETTING, "protect_special_tokens")
        reason = "without a reference_model, token columns or marks in the text no token is selected"
    for name, value in _misleading(args, ignored).items():
        raise ValueError(f"{name}={value!r} has no effect: {reason}. Remove it, or give what it works on")
    # forget_weight=0 is not among these: it is the end of a sweep, whose other settings stay as they are
    unread = [
        (args.score != "influence", ("score_base_weight",), f"score={args.score!r} does not read it"),
        (args.score != "excess" or args.excess_passes == 2, ("excess_decay",), "only excess_passes=1 reads it"),
        (args.positive_fraction is None and args.score != "excess", ("selection_scope",),
         "a threshold ranks nothing: only positive_fraction does"),
        (not FORGET[args.forget_objective].needs_beta, ("forget_beta",),
         f"forget_objective={args.forget_objective!r} does not read it"),
        (not given, _SCORE_ONLY, "it is for `selsft score`, whose folder training takes in the place of the data"),
    ]  # fmt: skip
    for holds, settings, reason in unread:
        for name, value in _misleading(args, settings).items() if holds else ():
            raise ValueError(f"{name}={value!r} has no effect: {reason}. Remove it")


def _misleading(args: SelectiveSFTConfig, settings: tuple[str, ...]) -> dict[str, Any]:
    """Settings that are not at their defaults. Those of the plain score, a difference by token, are none: presets and
    schemes pin them whatever the score."""
    return {name: value for name, value in args.changed(settings).items() if _PLAIN_SCORE.get(name) != value}


def validate_selection(trainer: SelectiveSFTTrainer, source: str | Model | None, given: list[str]) -> None:
    """Raise `ValueError` for the first reason why `trainer` cannot select tokens.

    Args:
        source: the reference.
        given: token columns of the train dataset.
    """
    args, names = trainer.args, get_dataset_column_names(trainer.train_dataset)
    parallelism = trainer.accelerator.parallelism_config
    scores = {BASE_LOGPS, REF_LOGPS, NOISY_LOGPS, PROBE_SCORES} & set(given)
    streamed = isinstance(trainer.train_dataset, IterableDataset)
    collator = type(trainer.data_collator)
    score, column = args.score, SCORE_COLUMNS.get(args.score)
    reasons = [
        (
            score != "influence" and WEIGHTS in given,
            f"the train dataset has the column {WEIGHTS!r} (or messages with a weight) and score={score!r}: both "
            "say what is negative. Drop one of them",
        ),
        (
            score in ("random", "oracle", "given", "surprisal", "probe") and source is not None,
            f"score={score!r} reads no reference: leave reference_model out",
        ),
        (
            column is not None and column not in given,
            f"score={score!r} needs the column {column!r}, one value per token of 'input_ids', which the train "
            "dataset does not have",
        ),
        (
            score == "excess" and source is None and REF_LOGPS not in given,
            f"score='excess' compares with a reference: set reference_model, or bring the column {REF_LOGPS!r} "
            "(`selsft score`)",
        ),
        (
            score == "random" and streamed,
            "score='random' ranks the rows of a loaded dataset, and this one is streamed: load it",
        ),
        (
            score == "given" and streamed and args.positive_fraction is not None and args.selection_scope == "global",
            f"positive_fraction={args.positive_fraction} ranks the tokens of the whole dataset, which streamed "
            "rows do not show: use negative_threshold, or selection_scope='sequence'",
        ),
        (
            source is not None and given,
            f"the train dataset has the columns {given} and a reference_model is set: both say what is negative. "
            "Drop the columns or the reference",
        ),
        (
            bool(scores) and not {BASE_LOGPS, REF_LOGPS} <= scores and WEIGHTS not in given and score == "influence",
            f"the train dataset has the column {sorted(scores)[0] if scores else ''!r} alone: a score needs both "
            f"{BASE_LOGPS!r} and {REF_LOGPS!r}",
        ),
        (
            score == "contrast" and not set(READ_COLUMNS[score]) <= set(given),
            f"score='contrast' needs the columns {REF_LOGPS!r} and {NOISY_LOGPS!r}, of two references: run "
            "`selsft score --score contrast` first and train on its folder",
        ),
        (
            score == "probe" and args.probe is None and PROBE_SCORES not in given,
            "score='probe' needs a probe: set probe to a saved one, or run `selsft score --score probe --judged FILE` "
            f"and train on its folder (column {PROBE_SCORES!r})",
        ),
        (
            streamed and scores and WEIGHTS not in given and score in ("influence", "surprisal", "probe", "contrast"),
            f"streamed rows cannot be selected by the columns {sorted(scores)}: load the dataset, or bring "
            f"{WEIGHTS!r}",
        ),
        (
            streamed and source is None and BASE_LOGPS not in given and args.needs_start_logps,
            "forget_objective='npo' and anchor_weight need the log-probabilities at the start of training, which "
            "streamed rows with given weights do not have: use another objective and no anchor",
        ),
        (
            trainer.compute_loss_func is not None,
            "compute_loss_func and token selection exclude each other: the loss of a token is set by "
            "forget_objective and loss_type",
        ),
        (
            args.label_smoothing_factor > 0,
            f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for negative tokens: set it to 0",
        ),
        (
            trainer._is_vision_dataset,
            "token selection is not available for datasets with images, whose tokens are made in the collator: "
            "train on text, or without a reference",
        ),
        (
            # accelerate has sequence parallelism since 1.12
            any(getattr(parallelism, f"{kind}_enabled", False) for kind in ("cp", "sp", "tp")),
            "token selection is not available with context, sequence or tensor parallelism (cp_size, sp_size or "
            "tp_size > 1): use data parallelism, FSDP or DeepSpeed",
        ),
        (
            "input_ids" not in names and not streamed,
            "token selection needs tokenised rows: with skip_prepare_dataset bring the column 'input_ids'",
        ),
        (
            not issubclass(collator, DataCollatorForSelectiveSFT) and collator is not DataCollatorForLanguageModeling,
            f"data_collator is a {collator.__name__}, which drops the token columns: derive it from "
            "selsft.DataCollatorForSelectiveSFT, or leave it out",
        ),
    ]
    for holds, reason in reasons:
        if holds:
            raise ValueError(reason)
