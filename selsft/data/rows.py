"""Rows as they come: all of one form that can be trained on, or one line that names the row, the value and the remedy.

Whole columns are looked at in Arrow, and single rows only where a column cannot tell: keys or types that differ
between rows, missing values. Rejected: looking at the first row alone, as TRL does: it is the odd one that fails, in a
worker, after the model was loaded.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, IterableDataset
from trl.data_utils import get_dataset_column_names

from ..errors import InputError

Split: TypeAlias = Dataset | IterableDataset
# Columns of question and answer in widespread formats
_PAIRS = (
    ("question", "answer"), ("instruction", "output"), ("instruction", "response"), ("query", "response"),
    ("input", "output"), ("question", "response"), ("prompt", "response"), ("prompt", "answer"),
)  # fmt: skip
PAIR, IDS = ("prompt", "completion"), ("input_ids",)
_BESIDE_CONTENT = {"role", "from", "weight", "train", "spans", "corrected", "train_detail", "name"}


def check_rows(data: Split, text_field: str = "text", strict: bool = False, what: str = "the data") -> Split:
    """`data`, whose rows all have one form that can be trained on. A stream is checked while it goes by.

    Args:
        text_field: column of plain text.
        strict: refuse rows without tokens or messages too, which SFTTrainer drops in silence.
        what: the data, in words.

    Raises:
        `InputError` for columns that cannot be trained on, for a first row without a value, of a wrong type or of
        another form than those before it, and for a message without role or content.
    """
    if isinstance(data, Dataset) and len(data) == 0:
        raise InputError(f"{what} has no rows: there is nothing to learn from")
    forms = _forms(text_field)
    names = form_of(data, text_field, what)
    first = next(iter(data), None)
    if first is None:
        return data  # a stream that ends at once, which is told when it is read
    form, kinds = _form_of_row(first, forms), {name: _kind(first.get(name)) for name in names}
    if form is None:
        raise InputError(f"row 0 of {what} has no {_missing(first, names)!r}: repair or remove it")

    def check(row: dict[str, Any], number: int) -> bool:
        if fault := _fault(row, number, forms, form, kinds, text_field, strict):
            raise InputError(f"row {number} of {what} {fault}")
        return True

    check(first, 0)
    if isinstance(data, IterableDataset):
        return data.filter(check, with_indices=True)
    mixed = form != names or any("Json(" in repr(data.features[name]) for name in names)
    start = 0
    for chunk in data.select_columns(list(names)).with_format("arrow").iter(batch_size=10_000):
        columns = {name: chunk[name].combine_chunks() for name in names}
        for column in columns.values():
            column.validate(full=True)  # texts that are not UTF-8 would fail far from here
        if mixed or not all(_sound(column, name, text_field, strict) for name, column in columns.items()):
            for offset, row in enumerate(data.select(range(start, start + len(chunk)))):
                check(row, start + offset)
        start += len(chunk)
    if form != names:
        raise InputError(f"column {_missing(first, names)!r} of {what} holds nothing: remove it")
    return data


def check_dataset(argument: str, data: Any) -> None:
    """Raise `InputError`, naming the argument, for anything but a `Dataset` with rows or an `IterableDataset`."""
    if not isinstance(data, Dataset | IterableDataset):
        hint = (
            "Dataset.from_list(rows)"
            if isinstance(data, list)
            else "one split of it"
            if isinstance(data, dict)
            else ""
        )
        raise InputError(
            f"{argument} is a {type(data).__name__}: give a datasets.Dataset{f', such as {hint}' if hint else ''}"
        )
    if isinstance(data, Dataset) and len(data) == 0:
        raise InputError(f"{argument} has no rows: give at least one")


def form_of(data: Split, text_field: str = "text", what: str = "the data") -> tuple[str, ...]:
    """The columns that rows are made from. TRL stops with a bare KeyError in a worker when there are none.

    Raises:
        `InputError` naming the columns that there are, and the flag that renames them.
    """
    names = get_dataset_column_names(data)
    for form in _forms(text_field):
        if set(form) <= set(names):
            return form
    pair = next((pair for pair in _PAIRS if set(pair) <= set(names)), None)
    hint = f". Give --columns prompt={pair[0]},completion={pair[1]}" if pair else ", or --columns to rename one"
    if pair and "input" in {*names} - {*pair}:
        hint += f", with the text of 'input' appended to {pair[0]!r} where there is any"
    raise InputError(
        f"{what} has the columns {', '.join(map(repr, names))} and none that can be trained on: it needs "
        f"{text_field!r} (see --dataset_text_field), 'messages', 'prompt' and 'completion', or 'input_ids'{hint}"
    )


def _forms(text_field: str) -> tuple[tuple[str, ...], ...]:
    """Forms of a row, in the order in which TRL looks for them."""
    return (IDS, PAIR, ("messages",), ("conversations",), (text_field,))


def _form_of_row(row: Mapping[str, Any], forms: Sequence[tuple[str, ...]]) -> tuple[str, ...] | None:
    return next((form for form in forms if all(row.get(name) is not None for name in form)), None)


def _missing(row: Mapping[str, Any], form: tuple[str, ...]) -> str:
    return next(name for name in form if row.get(name) is None)


_MAY_BE_EMPTY = ("input_ids", "messages")  # TRL drops such rows; it takes others for a text


def _kind(value: Any) -> str:
    if isinstance(value, str):
        return "text"
    if isinstance(value, list):
        return "messages" if all(isinstance(item, dict) for item in value) else "a list"
    return type(value).__name__


def _fault(
    row: Mapping[str, Any],
    number: int,
    forms: Sequence[tuple[str, ...]],
    first: tuple[str, ...],
    kinds: Mapping[str, str],
    text_field: str,
    strict: bool,
) -> str | None:
    """What is wrong with a row; `first` and `kinds` are form and types of row 0."""
    form = _form_of_row(row, forms)
    if form is None:
        return f"has no {_missing(row, first)!r}: repair or remove it"
    if form != first:
        return f"has {form[0]!r}, row 0 has {first[0]!r}: bring all rows into one form"
    for name in form:
        value, kind = row[name], _kind(row[name])
        wanted = _wanted(name, text_field)
        if name == "input_ids":
            right = isinstance(value, list) and all(isinstance(token, int) for token in value)
        else:
            right = kind in wanted.split(" or ")
        if not right:
            return f"holds {_short(value)} as {name!r}, which is {type(value).__name__}: it needs {wanted}"
        # An empty list of ids is none of messages
        if name != "input_ids" and kind in ("text", "messages") and kind != kinds.get(name, kind):
            return f"holds {kind} as {name!r}, row 0 {kinds[name]}: bring all rows into one form"
        if (
            not value
            and kind != "text"
            and (strict or name not in _MAY_BE_EMPTY or (number == 0 and name != "input_ids"))
        ):
            return f"is empty: {name!r} has no {'tokens' if name == 'input_ids' else 'messages'}: repair or remove it"
        if kind == "messages" and name != "input_ids":
            for place, message in enumerate(value):
                if fault := _message_fault(message):
                    return f"is wrong: message {place} of {name!r} {fault}"
    if form == PAIR and _kind(row["prompt"]) != _kind(row["completion"]):
        return (
            f"holds {_kind(row['prompt'])} as 'prompt' and {_kind(row['completion'])} as 'completion': both must be "
            "text, or both messages"
        )
    return None


def _wanted(name: str, text_field: str) -> str:
    if name == text_field:
        return "text"
    return {"input_ids": "token ids", "prompt": "text or messages", "completion": "text or messages"}.get(
        name, "messages"
    )


def _message_fault(message: Mapping[str, Any]) -> str | None:
    role, content = message.get("role", message.get("from")), message.get("content", message.get("value"))
    if not isinstance(role, str):
        what = "has no 'role'" if role is None else f"has role={_short(role)}"
        return f"{what}: give it a text such as 'user' or 'assistant'"
    if content is None:
        # of a message that calls tools, or thinks
        said = any(value for key, value in message.items() if key not in _BESIDE_CONTENT)
        return None if said else "has no 'content': repair or remove it"
    if not isinstance(content, str | list):
        return f"has content={_short(content)}, which is {type(content).__name__}: it needs text"
    return None


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sound(column: pa.Array, name: str, text_field: str, strict: bool) -> bool:
    """Whether a column alone tells that all of its rows are right."""
    kind = column.type
    if column.null_count:
        return False
    if _is_text(kind):
        return "text" in _wanted(name, text_field)
    if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
        return False
    if (strict or name not in _MAY_BE_EMPTY) and pc.any(pc.equal(pc.list_value_length(column), 0)).as_py():
        return False
    if name == "input_ids":
        return pa.types.is_integer(kind.value_type) and not column.flatten().null_count
    if not pa.types.is_struct(kind.value_type) or "messages" not in _wanted(name, text_field):
        return False
    messages, keys = column.flatten(), {field.name for field in kind.value_type}
    for pair in (("role", "content"), ("from", "value")):
        if set(pair) <= keys and not ({"role", "from"} - {pair[0]}) & keys:
            role, content = (messages.field(key) for key in pair)
            whole = not (messages.null_count or role.null_count or content.null_count)
            return whole and _is_text(role.type) and (_is_text(content.type) or pa.types.is_list(content.type))
    return False


def _is_text(kind: pa.DataType) -> bool:
    return pa.types.is_string(kind) or pa.types.is_large_string(kind)
