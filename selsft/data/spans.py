"""What rows say about their own text: spans, corrections, weights and train flags, and the tokens that they reach.

A *mark* is one such statement. Marks come in layers, and the inner layer wins wherever both reach a token: row weight,
message weight (or axolotl's `train`), weight of a content part, span. Within a layer a token that several marks touch
takes the lowest weight: wrong wins over unknown, unknown over right. docs/spans.md shows every form.

Characters of a conversation are found by rendering it a second time with private-use characters at the borders of the
spans: whatever a chat template puts around a message, trims or escapes, the borders come out where they belong, and
the rendering without them must be the true one. Rejected: searching for the text of a message, which finds it in
another turn; rendering prefixes of the conversation, which costs a rendering per message and fails with templates that
rewrite history.
"""

from __future__ import annotations

import json
import math
import numbers
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset, Value
from transformers import PreTrainedTokenizerBase
from trl.data_utils import get_dataset_column_names

from ..errors import InputError
from .alignment import Alignment, CharacterRange
from .columns import SCORE_COLUMNS, TOKEN_COLUMNS
from .corrections import spans_of_corrections

SPANS, CORRECTED, WEIGHT, TRAIN, TRAIN_DETAIL = "spans", "corrected", "weight", "train", "train_detail"
_ROW_KEYS = {SPANS, CORRECTED, WEIGHT}
_MESSAGE_KEYS = {SPANS, CORRECTED, WEIGHT, TRAIN, TRAIN_DETAIL}
_PART_KEYS = {SPANS, WEIGHT, TRAIN}
_CONVERSATIONS = ("messages", "conversations", "prompt", "completion")
_CONTENTS = ("content", "value", "reasoning_content")
# Marks of the parts of a message, once its content is one string: [[start, end, weight, layer], ...]
_PARTS_OF = "selsft_marks_of_"
_IN_PARTS = "\0"  # stands for marks of content parts among the keys of messages
_PEEK = 256  # rows of a stream without features that are looked at for marks
_PART, _SPAN = 1, 2
_JSON_KEY = rf'"({"|".join(sorted(_MESSAGE_KEYS))})"\s*:'
_PRIVATE = re.compile("[\U000f0000-\U0010ffff]")


class Span(NamedTuple):
    """Characters `start` to `end` (exclusive) of a text. `named` ones were written by the user: they must reach a
    token; the others follow from a flag."""

    start: int
    end: int
    weight: float
    layer: int = _SPAN
    named: bool = True


@dataclass
class TextMarks:
    """What is said about one text: the text or completion of a row, or `field` of message number `message`.

    `detailed`: somebody has judged its parts, so there is a list of spans, perhaps empty, or corrections.
    `weight` is that of the whole text.
    """

    text: str
    spans: list[Span]
    detailed: bool
    weight: float | None
    message: int = -1
    field: str = "content"

    @property
    def judged(self) -> bool:
        """Whether somebody has looked at the text at all."""
        return self.detailed or self.weight is not None


@dataclass
class TokenMarks:
    """Of one row, for each token: `weights` float32; `judged`, whether it belongs to a text that somebody has judged;
    `spans` int32, number within the row of the negative span (or text) that reaches it, else -1. `whole`
    says that there are no judgements but those of whole texts."""

    weights: np.ndarray
    judged: np.ndarray
    spans: np.ndarray
    whole: bool


# Which data sets have marks


def has_marks(dataset: Dataset | IterableDataset, text_field: str = "text") -> bool:
    """Whether rows of `dataset` say something about their own text."""
    names = set(get_dataset_column_names(dataset))
    if "input_ids" in names or not ({"completion", *_CONVERSATIONS[:2], text_field} & names):
        return False
    return bool(_ROW_KEYS & names) or any(_keys(dataset, name) & _MESSAGE_KEYS for name in _CONVERSATIONS)


def _has_marked_parts(dataset: Dataset | IterableDataset) -> bool:
    return any(_IN_PARTS in _keys(dataset, name) for name in _CONVERSATIONS)


def _keys(dataset: Dataset | IterableDataset, name: str) -> set[str]:
    """Keys of the messages in column `name`, with `_IN_PARTS` and those of content parts where parts have marks."""
    if name not in get_dataset_column_names(dataset):
        return set()
    kind = (dataset.features or {}).get(name)
    if isinstance(kind, Value):
        return set()
    struct = getattr(kind, "feature", None)
    keys: set[str] = set()
    if isinstance(struct, Mapping):
        parts = [getattr(struct.get(content), "feature", None) for content in _CONTENTS]
        inside = {key for part in parts if isinstance(part, Mapping) for key in _PART_KEYS & set(part)}
        keys = set(struct) | inside | ({_IN_PARTS} if inside else set())
        if not any(type(struct.get(content)).__name__ == "Json" for content in _CONTENTS):
            return keys
    # Keys that differ between messages are stored as JSON, which the features do not describe
    messages = _json_messages(dataset, name) if isinstance(dataset, Dataset) else _first_messages(dataset, name)
    for message in messages:
        keys |= _marks_of(message)
        if _IN_PARTS in keys:
            break
    return keys


def _marks_of(message: dict[str, Any]) -> set[str]:
    """Keys of one message that say something, with those of its content parts."""
    keys = {key for key, value in message.items() if value is not None}
    for content in (message.get(content) for content in _CONTENTS):
        for part in content if isinstance(content, list) else []:
            inside = {key for key in _PART_KEYS if isinstance(part, dict) and part.get(key) is not None}
            keys |= inside | ({_IN_PARTS} if inside else set())
    return keys


def _first_messages(dataset: IterableDataset, name: str) -> Iterator[dict[str, Any]]:
    for row in dataset.take(_PEEK):
        messages = row.get(name)
        yield from (message for message in messages if isinstance(message, dict)) if isinstance(messages, list) else ()


def _json_messages(dataset: Dataset, name: str) -> Iterator[dict[str, Any]]:
    """Messages, or their contents, of which the stored JSON has the key of a mark."""
    for chunk in dataset.select_columns([name]).with_format("arrow").iter(batch_size=10_000):
        column = chunk[name].combine_chunks()
        while pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
            column = column.flatten()
        fields = {"": column}
        if pa.types.is_struct(column.type):
            fields = {field.name: column.field(field.name) for field in column.type if field.name in _CONTENTS}
        for key, texts in fields.items():
            texts = texts.storage if isinstance(texts, pa.ExtensionArray) else texts
            for text in texts.filter(pc.match_substring_regex(texts, _JSON_KEY)).to_pylist():
                value = json.loads(text)
                yield {key: value} if key else value


def check_marks(
    dataset: Dataset | IterableDataset, text_field: str, *, formatting: bool = False, reference: bool = False
) -> None:
    """Raise `InputError` where marks conflict with another source of token weights or of the text.

    Args:
        formatting: whether a `formatting_func` makes the text.
        reference: whether a reference model scores the tokens.
    """
    names = set(get_dataset_column_names(dataset))
    marks = sorted(_ROW_KEYS & names)
    if "input_ids" in names and set(marks) - {WEIGHT}:
        raise InputError(
            f"the dataset has the column {marks[0]!r}, which speaks of a text, and tokenised rows ('input_ids'): "
            "bring the text without input_ids, or the column token_weights"
        )
    if not has_marks(dataset, text_field):
        return
    what = f"the dataset has the column {marks[0]!r}" if marks else "messages of the dataset have spans or weights"
    for column in (*TOKEN_COLUMNS, *SCORE_COLUMNS.values()):
        if column in names:
            raise InputError(f"{what}, and the column {column!r} too: both say which tokens count. Drop one of them")
    if {"image", "images"} & names:
        raise InputError(f"{what}, and images, whose tokens are made in the collator: only text can be marked")
    if formatting:
        raise InputError(f"{what}, and formatting_func makes another text of them: format the rows beforehand")
    if reference:
        raise InputError(
            f"{what}, and a reference_model is set: both say what is negative. Drop one of them, or use the rows as a "
            "judged sample"
        )


def without_marks(dataset: Dataset, text_field: str = "text") -> Dataset:
    """The rows without anything that says which of their tokens count, in columns or in messages."""
    columns = (*_ROW_KEYS, *TOKEN_COLUMNS, *SCORE_COLUMNS.values())
    dataset = dataset.remove_columns([name for name in columns if name in dataset.column_names])
    if not has_marks(dataset, text_field):
        return dataset
    return dataset.map(
        lambda row: {name: _unmarked(row[name]) for name in _CONVERSATIONS if isinstance(row.get(name), list)},
        desc="Taking marks away",
    )


def _unmarked(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmarked(each) for each in value]
    if isinstance(value, dict):
        return {key: _unmarked(each) for key, each in value.items() if key not in _MESSAGE_KEYS}
    return value


# Reading rows


def refuse_late_marks(dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
    """`dataset`, in which no marks were found. A stream without declared features can still bring some; it raises
    `InputError` at the first such row, whose marks would otherwise be ignored."""
    declared = dataset.features is not None and "Json(" not in repr(dataset.features)
    if isinstance(dataset, Dataset) or declared or "input_ids" in get_dataset_column_names(dataset):
        return dataset

    def check(example: dict[str, Any], row: int) -> bool:
        late = {key for key in (SPANS, CORRECTED) if example.get(key) is not None}
        for name in _CONVERSATIONS:
            messages = example.get(name)
            for message in messages if isinstance(messages, list) else []:
                late |= _marks_of(message) & (_MESSAGE_KEYS | {_IN_PARTS})
        if late - {_IN_PARTS}:
            raise InputError(
                f"row {row} is the first with {sorted(late - {_IN_PARTS})[0]!r}, after {_PEEK} rows without: declare "
                "the features of the stream, or give an early row this key"
            )
        return True

    return dataset.filter(check, with_indices=True)


def join_parts(dataset: Dataset | IterableDataset, **map_options) -> Dataset | IterableDataset:
    """`dataset` with the content parts of a message joined to one string, and the marks of the parts kept beside
    it, so that any chat template renders them; the same data set where no part has a mark."""
    if not _has_marked_parts(dataset):
        return dataset
    columns = [name for name in _CONVERSATIONS if name in get_dataset_column_names(dataset)]

    def join(example, row):
        return {
            name: [_joined(message, f"row {row}: message {place}") for place, message in enumerate(example[name])]
            for name in columns
            if isinstance(example[name], list)
        }

    return dataset.map(join, with_indices=True, **map_options)


def _joined(message: dict[str, Any], where: str) -> dict[str, Any]:
    """The message with strings in place of lists of parts, and their marks as JSON, which has one type in every
    row."""
    message = dict(message)
    for name in _CONTENTS:
        parts = message.get(name)
        if not isinstance(parts, list):
            continue
        if name != "reasoning_content":
            for key in (SPANS, CORRECTED, TRAIN_DETAIL):
                if message.get(key) is not None:
                    raise InputError(f"{where} has {key!r} and a list of content parts: put it into the parts")
        text, marks, marked = "", [], False
        for number, part in enumerate(parts):
            here = f"{where}, part {number}"
            part = {"text": part} if isinstance(part, str) else part
            piece, weight, spans = _text_of_part(part, here), weight_of(part, here), part.get(SPANS)
            marked |= weight is not None or spans is not None
            if weight is not None and piece:
                marks.append((len(text), len(text) + len(piece), weight, _PART))
            for span in _spans([] if spans is None else spans, piece, here):
                marks.append((len(text) + span.start, len(text) + span.end, span.weight, _SPAN))
            text += piece
        message[name] = text
        message[_PARTS_OF + ("content" if name == "value" else name)] = json.dumps(marks) if marked else ""
    return message


def _text_of_part(part: Any, where: str) -> str:
    text = next((part[key] for key in ("text", "content", "value") if isinstance(part.get(key), str)), None)
    if text is None or part.get("type") not in (None, "text"):
        raise InputError(
            f"{where} is no text (type={part.get('type')!r}): spans, weights and train flags are for text parts alone"
        )
    return text


def read_marks(row: Mapping[str, Any], number: int, text_field: str = "text", eos: str | None = None) -> RowMarks:
    """What row `number` says about its text.

    Args:
        row: with `messages`, `prompt` and `completion`, or `text_field`, and any of the mark keys.
        eos: end-of-sequence token, which TRL has appended to texts and which is not part of them.

    Raises:
        `InputError` naming row and value, for malformed marks and marks outside the text.
    """
    where = f"row {number}"
    weight = weight_of(row, where, keys=(WEIGHT,))
    conversation = _messages(row)
    if conversation is None:
        name = "completion" if row.get("completion") is not None else text_field
        whole = row[name]
        text = whole.removesuffix(eos) if eos else whole
        marks = TextMarks(text, *_text_spans(row, text, where), weight)
        prompt = row["prompt"] if name == "completion" else ""
        return RowMarks(weight, [marks], None, prompt, prompt + whole)
    texts = []
    for place, message in enumerate(conversation):
        here = f"{where}: message {place}"
        own = weight_of(message, here)
        if _IN_PARTS in _marks_of(message):  # else they are strings by now
            raise InputError(
                f"{here} has content parts with marks, after {_PEEK} rows without: declare the features of the "
                "stream, or give an early row such parts"
            )
        for name in ("content", "reasoning_content"):
            text = message.get(name)
            if not isinstance(text, str):
                continue
            spans, detailed = _text_spans(message, text, here) if name == "content" else ([], False)
            if given := message.get(_PARTS_OF + name):
                detailed = True
                spans = [
                    Span(start, end, heavy, layer, layer == _SPAN) for start, end, heavy, layer in json.loads(given)
                ]
            texts.append(TextMarks(text, spans, detailed, weight if own is None else own, place, name))
    named = [key for key in (SPANS, CORRECTED) if row.get(key) is not None]
    if named:
        _mark_answer(row, texts, named[0], where)
    return RowMarks(weight, texts, conversation, "", "")


@dataclass
class RowMarks:
    """What one row says.

    Attributes:
        weight: of the row.
        texts: in order; one of a row without messages, else one for each text of a message.
        messages: of the conversation, with its prompt; `None` where the row is a text or a completion.
        prompt: in front of the text of a row without messages.
        whole: prompt and text as they were tokenised.
    """

    weight: float | None
    texts: list[TextMarks]
    messages: list[dict[str, Any]] | None
    prompt: str
    whole: str


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    if isinstance(row.get("messages"), list):
        return row["messages"]
    if isinstance(row.get("completion"), list):
        return [*row["prompt"], *row["completion"]]
    return None


def _mark_answer(row: Mapping[str, Any], texts: list[TextMarks], key: str, where: str) -> None:
    """Marks of a row whose completion is one message: offsets are in its content."""
    completion = row.get("completion")
    if not isinstance(completion, list) or len(completion) != 1 or not isinstance(completion[0].get("content"), str):
        raise InputError(
            f"{where} has {key!r} beside a conversation, which does not say in which message: put it into the message"
        )
    answer = next(text for text in texts if text.message == len(row["prompt"]) and text.field == "content")
    if answer.detailed:
        raise InputError(f"{where} has {key!r}, and its completion has marks of its own: keep one of them")
    answer.spans, answer.detailed = _text_spans(row, answer.text, where)


def _text_spans(source: Mapping[str, Any], text: str, where: str) -> tuple[list[Span], bool]:
    """Spans of one text, and whether the row says anything about them."""
    given = [key for key in (SPANS, CORRECTED, TRAIN_DETAIL) if source.get(key) is not None]
    if len(given) > 1:
        raise InputError(f"{where} has {given[0]!r} and {given[1]!r}: both say what is wrong. Keep one of them")
    if not given:
        return [], False
    value = source[given[0]]
    if given[0] == SPANS:
        return _spans(value, text, where), True
    if given[0] == TRAIN_DETAIL:
        return _details(value, text, where), True
    corrections = [value] if isinstance(value, str) else value
    wrong = not isinstance(corrections, list | tuple) or not corrections
    if wrong or not all(isinstance(item, str) and item.strip() for item in corrections):
        raise InputError(
            f"{where}: corrected={_short(value)} must be a text or a list of texts, none of them empty: leave it out "
            "where there is no correction (a text that is wrong throughout has weight -1)"
        )
    return [Span(*span) for span in spans_of_corrections(text, corrections)], True


def _spans(value: Any, text: str, where: str) -> list[Span]:
    form = "each span is [start, end] or [start, end, weight] in characters, end exclusive"
    if not isinstance(value, list | tuple | np.ndarray):
        raise InputError(f"{where}: spans={_short(value)} must be a list: {form}")
    spans = []
    for item in value:
        here = f"{where}: span {_short(item)}"
        if not isinstance(item, list | tuple | np.ndarray) or len(item) not in (2, 3):
            raise InputError(f"{here} has another form: {form}")
        start, end, *rest = item
        for offset in (start, end):
            if not _is_number(offset) or offset != int(offset):
                raise InputError(f"{here}: {_short(offset)} is not a whole number of characters: {form}")
        weight = -1.0 if not rest or rest[0] is None else rest[0]
        if not _is_number(weight):
            raise InputError(
                f"{here}: weight {_short(weight)} must be a finite number (negative: wrong, 0: unknown): correct it, "
                "or leave it out for -1"
            )
        spans.append(_inside(Span(int(start), int(end), float(weight)), text, here))
    return spans


def _details(value: Any, text: str, where: str) -> list[Span]:
    """axolotl's `train_detail`: inclusive end; text that no detail trains is masked there, so it is unknown here."""
    form = "each is {begin_offset, end_offset, train}, end_offset inclusive as in axolotl"
    if not isinstance(value, list | tuple):
        raise InputError(f"{where}: train_detail={_short(value)} must be a list: {form}")
    trained = np.zeros(len(text), bool)
    untrained = np.zeros(len(text), bool)
    for item in value:
        here = f"{where}: train_detail {_short(item)}"
        start, end, train = (
            (item.get(key) for key in ("begin_offset", "end_offset", TRAIN)) if isinstance(item, dict) else [None] * 3
        )
        if not isinstance(start, int) or not isinstance(end, int) or not isinstance(train, bool):
            raise InputError(f"{here} has another form: {form}")
        span = _inside(Span(start, end + 1, 0.0), text, here)
        (trained if train else untrained)[span.start : span.end] = True
    masked = np.concatenate([[0], (untrained | ~trained).astype(np.int8), [0]])
    starts, ends = np.flatnonzero(np.diff(masked) == 1), np.flatnonzero(np.diff(masked) == -1)
    return [Span(int(start), int(end), 0.0, named=False) for start, end in zip(starts, ends, strict=True)]


def _inside(span: Span, text: str, where: str) -> Span:
    if span.start >= span.end:
        raise InputError(f"{where} is empty: start must be below end (characters {span.start} to {span.end})")
    if span.start < 0 or span.end > len(text):
        raise InputError(
            f"{where} is outside the text, which has {len(text)} characters: offsets count characters from 0, "
            "not bytes or tokens"
        )
    return span


def weight_of(source: Mapping[str, Any], where: str, keys: tuple[str, ...] = (WEIGHT, TRAIN)) -> float | None:
    """Weight of a row, message or content part, from its `weight` or `train`; `None` where it has neither."""
    weight = source.get(WEIGHT)
    train = source.get(TRAIN) if TRAIN in keys else None
    if weight is not None and train is not None:
        raise InputError(f"{where} has weight={_short(weight)} and train={_short(train)}: keep one of them")
    if train is not None:
        if not isinstance(train, bool):
            raise InputError(f"{where}: train={_short(train)} must be true or false")
        return float(train)
    if weight is not None and not _is_number(weight):
        raise InputError(f"weight={_short(weight)} of {where} must be a finite number: correct it, or leave it out")
    return None if weight is None else float(weight)


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _short(value: Any) -> str:
    text = repr(value.tolist() if isinstance(value, np.ndarray) else value)
    return text if len(text) <= 60 else text[:57] + "..."


# From characters to tokens


def mark_tokens(
    marks: RowMarks,
    input_ids: list[int],
    alignment: Alignment,
    render: Callable[[list[dict[str, Any]]], str],
    message_weights: Callable[[list[dict[str, Any]], float], np.ndarray],
    judged: bool = False,
) -> TokenMarks:
    """What the marks of a row say about its tokens.

    Args:
        input_ids: the row as TRL tokenised it, not truncated yet; `(n,)`.
        render: text of a conversation under the chat template.
        message_weights: weights of the tokens of a conversation, `(n,)`, from those of its messages and a default.
        judged: whether `judged` and `spans` are asked for; else only `weights` means something.

    Raises:
        `ValueError` for a span that reaches no token, and for texts that cannot be found in the tokens.
    """
    default = 1.0 if marks.weight is None else marks.weight
    spans = [(text, span) for text in marks.texts for span in text.spans]
    looked_at = [text for text in marks.texts if judged and text.judged]
    ranges = [(text, span.start, span.end) for text, span in spans]
    ranges += [(text, 0, len(text.text)) for text in looked_at]
    if marks.messages is None:
        base = len(marks.prompt)
        weights = np.ones(len(input_ids), np.float32)
        places = [(base + start, base + end) for _, start, end in ranges]
        if default != 1:  # with the EOS that TRL has appended
            places.append((base, len(marks.whole)))
        tokens = alignment.tokens(input_ids, marks.whole, places, special=True) if places else []
        if default != 1:
            weights[tokens.pop()] = default
    else:
        weights = message_weights(marks.messages, default)
        tokens = []
        if ranges:
            tokens = alignment.tokens(input_ids, *_rendered(marks.messages, ranges, len(spans), render))
    reached, wholes = tokens[: len(spans)], tokens[len(spans) :]
    covered = np.zeros(len(input_ids), bool)
    for own in wholes:
        covered[own] = True
    for layer in (_PART, _SPAN):
        lowest = np.full(len(input_ids), np.inf, np.float32)
        for (_, span), own in zip(spans, reached, strict=True):
            if not own.size and span.named:
                raise ValueError(
                    f"the span of the characters {span.start} to {span.end} overlaps no token, since the chat "
                    "template or the tokenizer drops this text: move or remove the span"
                )
            if span.layer == layer:
                lowest[own] = np.minimum(lowest[own], span.weight)
        weights = np.where(lowest < np.inf, lowest, weights)
    # The innermost mark numbers a token last, and of two spans the one that starts first
    numbered = [own for text, own in zip(looked_at, wholes, strict=True) if (text.weight or 0) < 0]
    for layer in (_PART, _SPAN):
        negative = [
            (text.message, span, own)
            for (text, span), own in zip(spans, reached, strict=True)
            if span.layer == layer and span.weight < 0
        ]
        numbered += [own for _, _, own in sorted(negative, key=lambda item: item[:2], reverse=True)]
    numbers = np.full(len(input_ids), -1, np.int32)
    for index, own in enumerate(numbered):
        numbers[own] = index
    return TokenMarks(weights, covered, numbers, bool(looked_at) and not any(text.detailed for text in looked_at))


def text_places(
    row: Mapping[str, Any], text_field: str, tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> tuple[str, list[tuple[int, int, int, int]], bool]:
    """Where the texts of a row stand in what was tokenised.

    Args:
        row: as TRL has prepared it, with its text.

    Returns:
        the text that was tokenised; for each text its message (-1: the text or completion of the row), start and end
        in that text, and how many characters of its own stand before the start; and whether the tokenizer put its
        special tokens around the whole.

    Raises:
        `ValueError` for a template that rewrites the text.
    """
    marks = read_marks(row, 0, text_field, str(tokenizer.eos_token or ""))
    if marks.messages is None:
        base = len(marks.prompt)
        return marks.whole, [(-1, base, base + len(marks.texts[0].text), 0)], True
    texts = [text for text in marks.texts if text.field == "content" and text.text]
    ranges = [(text, 0, len(text.text)) for text in texts]
    render = chat_renderer(row, tokenizer, chat_template)
    whole, places = _rendered(marks.messages, ranges, 0, render) if ranges else (render(marks.messages), [])
    found = []
    for text, (start, end) in zip(texts, places, strict=True):
        shift = text.text.find(whole[start:end])
        if shift not in (0, len(text.text) - len(text.text.lstrip())):
            raise ValueError(
                f"the chat template rewrites message {text.message}, so its characters cannot be found: export labels "
                "or weights"
            )
        if start < end:
            found.append((text.message, start, end, shift))
    return whole, found, False


def chat_renderer(
    row: Mapping[str, Any], tokenizer: PreTrainedTokenizerBase, chat_template: str | None
) -> Callable[[list[dict[str, Any]]], str]:
    """What renders conversations as TRL does for this row, with its tools and settings."""
    options = chat_options(row, chat_template)
    return lambda messages: str(tokenizer.apply_chat_template(messages, tokenize=False, **options))


def chat_options(row: Mapping[str, Any], chat_template: str | None) -> dict[str, Any]:
    """Arguments of `apply_chat_template` for a row."""
    tools = row.get("tools")
    return {
        "chat_template": chat_template,
        "tools": json.loads(tools) if isinstance(tools, str) else tools,
        **(row.get("chat_template_kwargs") or {}),
    }


def _rendered(
    messages: list[dict[str, Any]],
    ranges: list[tuple[TextMarks, int, int]],
    exact: int,
    render: Callable[[list[dict[str, Any]]], str],
) -> tuple[str, list[CharacterRange]]:
    """The conversation as text, and the places of the ranges in it; the first `exact` must be there whole.

    A template that trims its messages moves a border at their end. So a second attempt leaves outer white space, which
    such a template drops, outside of all borders.
    """
    whole = render(messages)
    for trimmed in (False, True):

        def border(text: TextMarks, offset: int, trimmed: bool = trimmed) -> tuple[int, str, int]:
            if trimmed:
                last = len(text.text.rstrip())
                offset = min(max(offset, len(text.text) - len(text.text.lstrip())), last)
            return text.message, text.field, offset

        borders = sorted({border(text, offset) for text, start, end in ranges for offset in (start, end)})
        first = _unused(whole, len(borders))
        marked = [dict(message) for message in messages]
        for number, (message, name, offset) in reversed(list(enumerate(borders))):
            text = marked[message][name]
            marked[message][name] = text[:offset] + chr(first + number) + text[offset:]
        rendering = render(marked)
        signs = re.compile(f"[{chr(first)}-{chr(first + len(borders) - 1)}]")
        if signs.sub("", rendering) != whole:
            continue
        found: dict[tuple[int, str, int], list[int]] = {key: [] for key in borders}
        for before, match in enumerate(signs.finditer(rendering)):
            found[borders[ord(match[0]) - first]].append(match.start() - before)
        places = []
        for number, (text, start, end) in enumerate(ranges):
            left, right = found[border(text, start)], found[border(text, end)]
            if number >= exact:  # what the template keeps of the message
                left = right = sorted(
                    place for key, own in found.items() if key[:2] == border(text, 0)[:2] for place in own
                )
            elif len(left) != 1 or len(right) != 1:
                raise ValueError(
                    f"the chat template leaves out or repeats the characters {start} to {end} of message "
                    f"{text.message} ({messages[text.message]['role']}), so they cannot be found: use a template that "
                    "keeps earlier turns unchanged, or remove the marks of this message"
                )
            places.append((left[0], right[-1]) if left else (0, 0))
        return whole, places
    raise ValueError(
        "the chat template renders the conversation differently when characters are added to its messages, so spans "
        "cannot be found in it: use a simpler template, or bring token_weights with tokenised rows"
    )


def _unused(text: str, count: int) -> int:
    """First of `count` consecutive private-use code points that `text` does not contain."""
    first = 0xF0000
    for used in sorted({ord(character) for character in _PRIVATE.findall(text)}):
        if used - first >= count:
            break
        first = used + 1
    return first
