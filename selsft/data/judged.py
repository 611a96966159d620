"""A judged sample as flat arrays: which tokens somebody has judged wrong or right.

Probes are fitted on it and scores are measured with it. Rows come in the forms of docs/spans.md, prepared by TRL
as for training, so that token t of the sample is token t of a training row. Rejected: `token_weights` alone,
where a token that nobody looked at cannot be told from a right one.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from functools import cached_property
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer
from trl.data_utils import get_dataset_column_names

from ..errors import InputError, check_type
from .alignment import Alignment
from .preparation import read_token_marks
from .rows import check_dataset
from .spans import check_marks, has_marks, join_parts
from .tokenizers import special_ids


@dataclass(frozen=True)
class JudgedRows:
    """The tokens of all rows, one row after another.

    Attributes:
        input_ids, labels: `(tokens,)` int32, as training sees them.
        wrong: `(tokens,)` int8: 1 wrong, 0 right, -1 unknown. Unknown are tokens that nobody has judged (prompts,
            other messages, spans of weight 0), special tokens, tokens without a label, and the first token of a row,
            which nothing predicts.
        span: `(tokens,)` int32: number of the wrong span that a wrong token belongs to, else -1. Spans are numbered
            over the sample, in order; a text that is wrong as a whole is one span.
        row: `(tokens,)` int32: position of the row, `0 ... rows - 1`.
        lengths: `(rows,)` int64: tokens of each row.
        index: `(rows,)` int64: number of the row in the data set. Rows without a label after truncation are left out.
        whole: `(rows,)` bool: the row was judged as a whole, by a weight of row or message, so that `wrong` says
            nothing about single tokens.
    """

    input_ids: np.ndarray
    labels: np.ndarray
    wrong: np.ndarray
    span: np.ndarray
    row: np.ndarray
    lengths: np.ndarray
    index: np.ndarray
    whole: np.ndarray

    @cached_property
    def onset(self) -> np.ndarray:
        """Whether a token is the first of its wrong span, `(tokens,)` bool."""
        first = np.zeros(self.span.size, bool)
        numbers, positions = np.unique(self.span, return_index=True)
        first[positions[numbers >= 0]] = True
        return first

    @cached_property
    def row_wrong(self) -> np.ndarray:
        """For each row, `(rows,)` int8: 1 with a wrong token, 0 with right ones only, -1 where none is judged."""
        worst = np.full(self.lengths.size, -1, np.int8)
        np.maximum.at(worst, self.row, self.wrong)
        return worst

    @cached_property
    def dataset(self) -> Dataset:
        """The rows with the columns `input_ids` and `labels`."""
        ends = np.cumsum(self.lengths)[:-1]
        return Dataset.from_dict({name: np.split(getattr(self, name), ends) for name in ("input_ids", "labels")})


def judged_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, chat_template: str | None = None
) -> JudgedRows:
    """Prepare a judged sample.

    Args:
        dataset: rows with `spans`, `corrected` or `weight` (docs/spans.md). A row or message without any of them is
            unknown.
        tokenizer: of the policy, with the settings of training (EOS, chat template).
        args: settings of training: `max_length`, `truncation_mode`, `completion_only_loss`, `assistant_only_loss`,
            `dataset_text_field`.
        chat_template: what the trainer renders with instead of the tokenizer's own (`SFTTrainer.chat_template`).

    Raises:
        `InputError` for anything but a data set with rows, for rows that say nothing about their text, for invalid
            marks (naming the row), and where no token is judged.
    """
    check_dataset("dataset", dataset)
    check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "that of the policy")
    check_type("args", args, SFTConfig, "the SelectiveSFTConfig of the training")
    check_marks(dataset, args.dataset_text_field)
    if not has_marks(dataset, args.dataset_text_field):
        raise InputError(
            f"the judged sample has the columns {', '.join(get_dataset_column_names(dataset))} and no judgement: add "
            "'spans' (an empty list: judged and clean), 'corrected' or 'weight'"
        )
    prepared = tokenize_rows(cast(Dataset, join_parts(dataset)), tokenizer, args, chat_template)
    alignment, special = Alignment(tokenizer), special_ids(tokenizer)
    kept = slice(args.max_length)
    if args.max_length is not None and args.truncation_mode == "keep_end":
        kept = slice(-args.max_length, None)
    rows: list[tuple[np.ndarray, ...]] = []
    index, whole = [], []
    spans = 0
    for number, example in enumerate(prepared):
        tokens = read_token_marks(example, number, tokenizer, alignment, chat_template, args.dataset_text_field, True)
        ids, labels = (np.asarray(example[name], np.int32)[kept] for name in ("input_ids", "labels"))
        if (labels == -100).all():
            continue
        weights = tokens.weights[kept]
        known = tokens.judged[kept] & (labels != -100) & ~np.isin(ids, special) & (weights != 0)
        known[0] = False
        wrong = np.where(known, weights < 0, -1).astype(np.int8)
        # Numbered over the sample, in order of their first tokens
        own, first, inverse = np.unique(tokens.spans[kept][wrong == 1], return_index=True, return_inverse=True)
        span = np.full(ids.size, -1, np.int32)
        span[wrong == 1] = spans + np.argsort(np.argsort(first))[inverse]
        spans += own.size
        rows.append((ids, labels, wrong, span))
        index.append(number)
        whole.append(tokens.whole)
    if not any((wrong >= 0).any() for _, _, wrong, _ in rows):
        raise InputError(
            "no token of the judged sample is judged: give rows 'spans' (an empty list: judged and clean), "
            "'corrected' or a 'weight' other than 0"
        )
    lengths = np.array([len(ids) for ids, *_ in rows], np.int64)
    input_ids, labels, wrong, span = (np.concatenate(column) for column in zip(*rows, strict=True))
    return JudgedRows(
        input_ids=input_ids,
        labels=labels,
        wrong=wrong,
        span=span,
        row=np.repeat(np.arange(lengths.size, dtype=np.int32), lengths),
        lengths=lengths,
        index=np.array(index, np.int64),
        whole=np.array(whole, bool),
    )


def tokenize_rows(
    dataset: Dataset, tokenizer: PreTrainedTokenizerBase, args: SFTConfig, chat_template: str | None
) -> Dataset:
    """The rows as `SFTTrainer` tokenises them, with `input_ids` and `labels`, neither truncated nor shuffled. Its
    method needs no model, and no more of the trainer than is set here."""
    completion_only = args.completion_only_loss
    if completion_only is None:
        completion_only = {"prompt", "completion"} <= set(dataset.column_names)
    trainer = SimpleNamespace(_tokenizer=tokenizer, chat_template=chat_template, completion_only_loss=completion_only)
    plain = copy.copy(args)
    plain.max_length, plain.shuffle_dataset = None, False
    return SFTTrainer._prepare_dataset(cast(Any, trainer), dataset, tokenizer, plain, False, None, "judged")
