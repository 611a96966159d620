"""Held-out rows as training would see them: token ids, labels, and the prompt that an answer is generated from.

TRL prepares the rows (chat template, EOS, truncation), so that an evaluated answer follows the same tokens that
training puts before it. Rejected: tokenising prompts a second time here, which drifts from the trainer with the first
change of a template.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from datasets import Dataset

from ..config import SelectiveSFTConfig
from ..data.spans import CORRECTED
from ..trainer import SelectiveSFTTrainer
from ..training.model import Model

ANSWERS, ROW = "answers", "selsft_row"


@dataclass
class HeldOut:
    """Rows for evaluation.

    Attributes:
        prepared: columns `input_ids` and `labels`, as the trainer prepares them, without packing.
        prompts: token ids before the first label of each row; empty lists where a row is one text without a prompt.
        references: the accepted answers of each row, without outer blanks.
        trainer: holds the collator, the accelerator and the model on its device.
        skipped: rows of the data that truncation left without a label.
        indices: which row of the data each prepared row is.
    """

    prepared: Dataset
    prompts: list[list[int]]
    references: list[list[str]]
    trainer: SelectiveSFTTrainer
    skipped: int = 0
    indices: list[int] = field(default_factory=list)

    @property
    def has_prompts(self) -> bool:
        return any(self.prompts)


def prepare(model: Model, tokenizer, data: Dataset, args: SelectiveSFTConfig) -> HeldOut:
    """Prepare held-out rows: prompt-completion pairs, conversations (their last assistant turn is the answer), plain
    text, or tokenised rows with labels.

    Raises:
        `ValueError` when no row has a token to score after truncation.
    """
    given = accepted_answers(data)
    rows = data.remove_columns([name for name in (ANSWERS, CORRECTED) if name in data.column_names])
    if "messages" in rows.column_names:
        rows = rows.map(_last_turn, remove_columns=rows.column_names, desc="Splitting conversations")
    args = args.without_selection()
    args.packing, args.eval_strategy = False, "no"
    # TRL drops rows that truncation leaves without a label, and keeps columns that it does not know
    rows = rows.add_column(ROW, list(range(len(rows))))
    trainer = SelectiveSFTTrainer(model, args, train_dataset=rows, processing_class=tokenizer)
    prepared = cast(Dataset, trainer.train_dataset)
    origin = list(prepared[ROW])
    columns = [name for name in ("input_ids", "labels") if name in prepared.column_names]
    prepared = prepared.select_columns(columns).with_format(None)
    prompts, references, kept = [], [], []
    for index, row in enumerate(prepared):
        labels = np.asarray(row.get("labels", row["input_ids"]))
        labelled = np.flatnonzero(labels != -100)
        if not labelled.size or labels.size < 2:
            continue
        first = int(labelled[0])
        answer = tokenizer.decode(labels[labelled].tolist(), skip_special_tokens=True).strip()
        kept.append(index)
        prompts.append(list(row["input_ids"][:first]))
        own = None if given is None else given[origin[index]]
        references.append([answer] if own is None else [str(text).strip() for text in own])
    if not kept:
        raise ValueError(
            f"none of the {len(rows)} rows has a token to score: look at max_length={args.max_length} and at the "
            "completions"
        )
    if len(kept) < len(prepared):
        prepared = prepared.select(kept)
    indices = [origin[index] for index in kept]
    return HeldOut(prepared, prompts, references, trainer, len(rows) - len(kept), indices)


def accepted_answers(data: Dataset) -> list[list[str] | None] | None:
    """The answers that rows accept, by their column `answers`, or as corrections of what they say; `None` for a row
    (or all of them) whose answer is what it says."""
    if ANSWERS in data.column_names:
        return list(data[ANSWERS])
    if CORRECTED in data.column_names:
        return [[value] if isinstance(value, str) else value or None for value in data[CORRECTED]]
    return None


def _last_turn(row: dict[str, Any]) -> dict[str, Any]:
    """A conversation as prompt and completion: the last assistant turn is the answer."""
    messages = row["messages"]
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    if not ends or ends[-1] == 0:
        return {"prompt": [], "completion": messages}
    plain = [{"role": message["role"], "content": message["content"]} for message in messages]
    return {"prompt": plain[: ends[-1]], "completion": plain[ends[-1] : ends[-1] + 1]}
