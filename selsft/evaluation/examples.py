"""Multiple-choice examples, and the one place where a prompt and an option become tokens.

Training and scoring must agree on every token, or forgetting is measured on a different sequence than was trained. So
both go through `encode_pair`; training rows are tokenised here and `SFTTrainer` takes them as they are. Rejected:
giving text to TRL for training and to the scorer for evaluation, and hoping that both tokenise pairs alike.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from datasets import Dataset, Features, List, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import common_prefix_length

from ..data.columns import WEIGHTS

SPLITS = ("train", "test")
IGNORED = -100


@dataclass(frozen=True)
class MultipleChoiceExample:
    """A question with its options.

    Args:
        id: unique within a task.
        prompt: everything before the option, without the delimiter.
        options: at least two texts, all different.
        gold: index of the right one.
        split: `"train"` or `"test"`.
        group: what examples of one passage or premise share, so that a split keeps them together; `None` for none.
        delimiter: between prompt and option, a single space as in lm-evaluation-harness.

    Raises:
        `ValueError` naming the field that cannot be used.
    """

    id: str
    prompt: str
    options: tuple[str, ...]
    gold: int
    split: str = "test"
    group: str | None = None
    delimiter: str = " "

    def __post_init__(self):
        if not self.id:
            raise ValueError("id is empty: give every example an id of its own")
        if len(self.options) < 2:
            raise ValueError(f"options has {len(self.options)} entries: a question needs at least 2")
        if not all(isinstance(option, str) and option for option in self.options):
            raise ValueError(f"options={list(self.options)!r} must be texts that are not empty")
        if not 0 <= self.gold < len(self.options):
            raise ValueError(f"gold={self.gold} is not an index of {len(self.options)} options (counted from 0)")
        if self.split not in SPLITS:
            raise ValueError(f"split={self.split!r} must be one of {', '.join(SPLITS)}")

    def completion(self, option: int) -> str:
        """What follows the prompt when the answer is `option`."""
        return self.delimiter + self.options[option]


class Pair(NamedTuple):
    """A prompt and its completion in tokens; the model sees `context + continuation`."""

    context: list[int]
    """At least one token."""
    continuation: list[int]
    """At least one token."""


def move_spaces(prompt: str, completion: str) -> tuple[str, str]:
    """White space at the end of the prompt belongs to the first word of the completion, where tokenizers put it."""
    stripped = prompt.rstrip()
    return stripped, prompt[len(stripped) :] + completion


def prefix_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """The token that stands before a completion without a prompt: BOS, or EOS where there is none.

    Raises:
        `ValueError` when the tokenizer has neither.
    """
    for token in (tokenizer.bos_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    raise ValueError("the tokenizer has neither bos_token nor eos_token: set one, an answer has to end with it")


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    if text.startswith(str(tokenizer.decode(prefix_token(tokenizer)))):  # BOS is in the text: do not add another
        return list(tokenizer.encode(text, add_special_tokens=False))
    return list(tokenizer.encode(text))


def encode_pair(tokenizer: PreTrainedTokenizerBase, prompt: str, completion: str) -> Pair:
    """Tokens of a prompt and its completion, split as lm-evaluation-harness splits them (`TemplateLM._encode_pair`).

    White space at the end of the prompt moves to the completion; both are encoded together, with the tokenizer's own
    special tokens but for a BOS that is in the text already, and cut where the prompt alone ends. An empty prompt is
    replaced by BOS (EOS where there is none).

    Where the last characters of the prompt and the first of the completion merge into one token, the cut is before
    that token, as in TRL's `SFTTrainer`. The harness cuts by length there and would score a sequence that is not the
    text; a space between prompt and option, the default, rules such merges out in the usual tokenizers.
    """
    if not prompt:
        first, continuation = prefix_token(tokenizer), list(tokenizer.encode(completion, add_special_tokens=False))
        # As in the harness: a completion that starts with BOS gives it to the context
        return Pair([first], continuation[1:] if continuation[:1] == [first] else continuation)
    prompt, completion = move_spaces(prompt, completion)
    whole = _encode(tokenizer, prompt + completion)
    alone = _encode(tokenizer, prompt)
    length = common_prefix_length(alone, whole)
    if length == 0:
        return Pair([prefix_token(tokenizer)], whole)
    return Pair(whole[:length], whole[length:])


def training_row(
    tokenizer: PreTrainedTokenizerBase,
    example: MultipleChoiceExample,
    option: int | None = None,
    *,
    weight: float | None = None,
    max_length: int | None = None,
) -> dict[str, list]:
    """A tokenised row for `SFTTrainer`: loss on the completion and the EOS after it only.

    Args:
        option: index of the answer; the gold one by default.
        weight: signed weight of every completion token, as the column `token_weights`. EOS gets it when positive and 0
            when negative: an answer is forgotten, not the habit of ending one. `None` leaves the column out.
        max_length: tokens in a row; longer prompts lose their start, as in scoring.

    Returns:
        `input_ids`, `labels` (-100 on the prompt) and perhaps `token_weights`, all of one length.
    """
    pair = encode_pair(tokenizer, example.prompt, example.completion(example.gold if option is None else option))
    end = tokenizer.eos_token_id
    if end is None:
        raise ValueError("the tokenizer has no eos_token, which ends an answer in training: set it")
    completion = [*pair.continuation, int(end)]
    ids = [*pair.context, *completion]
    row: dict[str, list] = {"input_ids": ids, "labels": [IGNORED] * len(pair.context) + completion}
    if weight is not None:
        weights = [weight] * len(pair.continuation) + [max(weight, 0.0)]
        row[WEIGHTS] = [0.0] * len(pair.context) + weights
    if max_length is not None:
        if len(completion) >= max_length:
            raise ValueError(
                f"example {example.id!r}: the answer has {len(completion)} tokens, which max_length={max_length} "
                "does not hold: raise it or drop the example"
            )
        row = {name: values[-max_length:] for name, values in row.items()}
    return row


def training_data(rows: Sequence[dict[str, Any]]) -> Dataset:
    """Rows of `training_row` as a data set; all of them have `token_weights` or none has."""
    names = list(rows[0]) if rows else ["input_ids", "labels"]
    types = {name: List(Value("float32" if name == WEIGHTS else "int64")) for name in names}
    return Dataset.from_dict({name: [row[name] for row in rows] for name in names}, features=Features(types))


_FIELDS = ("id", "prompt", "options", "gold")


def read_examples(path: Path) -> tuple[list[MultipleChoiceExample], bool]:
    """Multiple-choice questions of a JSONL file, and whether its rows say which split they belong to.

    Raises:
        `ValueError` for the first row that cannot be used, with file and line.
    """
    examples: list[MultipleChoiceExample] = []
    lines: dict[str, int] = {}
    with_split = 0
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            example = _example(row)
        except ValueError as error:  # JSONDecodeError is one
            raise ValueError(f"{path}, line {number}: {error}") from error
        if example.id in lines:
            raise ValueError(f"{path}, line {number}: id={example.id!r} is also in line {lines[example.id]}")
        lines[example.id] = number
        with_split += "split" in row
        examples.append(example)
    if with_split not in (0, len(examples)):
        raise ValueError(f"{path}: {with_split} of {len(examples)} rows have a 'split': give it to all or to none")
    if not examples:
        raise ValueError(f"{path}: no rows")
    return examples, bool(with_split)


def _example(row: Any) -> MultipleChoiceExample:
    if not isinstance(row, dict):
        raise ValueError(f"a row must be a JSON object, found {type(row).__name__}")
    missing = [field for field in _FIELDS if field not in row]
    if missing:
        raise ValueError(f"missing {', '.join(map(repr, missing))}")
    texts = {"id": row["id"], "prompt": row["prompt"], "split": row.get("split", "test")}
    texts |= {field: row[field] for field in ("group", "delimiter") if row.get(field) is not None}
    for field, value in texts.items():
        if not isinstance(value, str):
            raise ValueError(f"{field}={value!r} must be a text")
    if not isinstance(row["options"], list):
        raise ValueError(f"options={row['options']!r} must be a list of texts")
    if not isinstance(row["gold"], int) or isinstance(row["gold"], bool):
        raise ValueError(f"gold={row['gold']!r} must be the index of an option")
    return MultipleChoiceExample(options=tuple(row["options"]), gold=row["gold"], **texts)
