"""Batches with per-token columns.

TRL's collator knows `input_ids`, `labels` and `seq_lengths` and silently drops every other column. This subclass
pads (or, without padding, concatenates) the token columns exactly as it treats the labels, and lists on the host the
rows that a training step has to compute. Rejected: a separate collator, which would have to follow every key that
TRL adds for attention kernels.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from .._compat import DataCollatorForLanguageModeling, pad
from ..data.columns import ACTIVE_ROWS, TOKEN_COLUMNS, WEIGHTS, active_rows
from ..errors import InputError


@dataclass
class DataCollatorForSelectiveSFT(DataCollatorForLanguageModeling):
    """
    TRL's collator, plus the token columns of selsft. Examples without a column are collated as by the parent.

    Additional keys of a batch:
    - `"token_weights"`, `"base_logps"`, `"ref_logps"`: float32 tensors of the shape of `"labels"`, 0 where the label
      is -100 (which covers padding and, without padding, the first token of each document).
    - `"active_rows"`: int64 tensor of shape `(m,)`, with `"token_weights"` only: flat indices, in the grid of
      `(batch, seq_len - 1)` predicting positions, of the tokens with a weight.
    """

    @classmethod
    def from_parent(cls, parent: DataCollatorForLanguageModeling) -> DataCollatorForSelectiveSFT:
        """The same settings, whatever fields the installed TRL has."""
        return cls(**{item.name: getattr(parent, item.name) for item in dataclasses.fields(parent) if item.init})

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        for index, example in enumerate(examples):
            if not isinstance(example, Mapping) or example.get("input_ids") is None:
                raise InputError(f"row {index} of a batch has no 'input_ids': give rows that are tokenised")
        batch = super().torch_call(examples)
        for name in TOKEN_COLUMNS:
            missing = [index for index, example in enumerate(examples) if example.get(name) is None]
            if len(missing) == len(examples):
                continue
            if missing:
                raise ValueError(
                    f"rows {missing} of a batch have no {name!r} and the others do: give every row one value per token"
                )
            try:
                column = [torch.as_tensor(example[name], dtype=torch.float32) for example in examples]
            except (TypeError, ValueError) as error:
                raise InputError(f"column {name!r} holds something else than numbers ({error}): correct it") from error
            for example, values in zip(examples, column, strict=True):
                if len(values) != len(example["input_ids"]):
                    raise ValueError(
                        f"column {name!r} has {len(values)} values in a row of {len(example['input_ids'])} tokens: "
                        "it needs one value per token"
                    )
            if self.padding_free:
                column = [torch.cat(column)]
            padded = pad(column, padding_value=0, padding_side="right", pad_to_multiple_of=self.pad_to_multiple_of)
            batch[name] = padded.masked_fill(batch["labels"] == -100, 0.0)
        if WEIGHTS in batch:
            batch[ACTIVE_ROWS] = active_rows(batch[WEIGHTS])
        return batch
