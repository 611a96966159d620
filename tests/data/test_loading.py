"""Loading rows: what cannot be trained on is named by row, value and remedy; columns can be renamed."""

import json

import pytest

from selsft.data.loading import DataSource, load_rows, load_splits, parse_columns
from selsft.errors import InputError

TURNS = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"prompt": "a", "completion": 42}],
            "row 0 of the data holds 42 as 'completion', which is int: it needs",
        ),
        ([{"text": 1.5}], "row 0 of the data holds 1.5 as 'text', which is float"),
        ([{"text": ["a", "b"]}], r"row 0 of the data holds \['a', 'b'\] as 'text', which is list: it needs text"),
        ([{"input_ids": "abc"}], "row 0 of the data holds 'abc' as 'input_ids', which is str: it needs token ids"),
        ([{"text": "a"}, {"text": None}], "row 1 of the data has no 'text': repair or remove it"),
        (
            [{"messages": TURNS}, {"text": "plain"}],
            # datasets before 5 does not load such rows
            "row 1 of the data has 'text', row 0 has 'messages': bring all rows into one form|missing key",
        ),
        (
            [{"question": "a", "answer": "b"}],
            "none that can be trained on: .* Give --columns prompt=question,completion=answer",
        ),
        (
            [{"instruction": "a", "input": "", "output": "b"}],
            "Give --columns prompt=instruction,completion=output",
        ),
        ([{"words": "a"}], "or --columns to rename one"),
    ],
)
@pytest.mark.parametrize("streaming", [False, True])
def test_refused(tmp_path, rows, message, streaming):
    name = write(tmp_path / "rows.jsonl", rows)
    with pytest.raises(InputError, match=message):
        list(load_splits(DataSource(name, streaming=streaming))[0])


def test_empty_conversations_when_strict(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"messages": TURNS}, {"messages": []}])
    assert len(load_rows(DataSource(name))) == 2
    with pytest.raises(InputError, match="row 1 of the data is empty: 'messages' has no messages"):
        load_splits(DataSource(name), strict=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_columns_are_renamed(tmp_path, streaming):
    name = write(tmp_path / "rows.jsonl", [{"question": "a", "answer": "b", "id": "x"}])
    source = DataSource(name, streaming=streaming, columns=parse_columns("prompt=question, completion=answer"))
    assert list(load_splits(source)[0]) == [{"prompt": "a", "completion": "b", "id": "x"}]


def test_columns_can_swap_names(tmp_path):
    name = write(tmp_path / "rows.jsonl", [{"prompt": "a", "completion": "b"}])
    source = DataSource(name, columns=parse_columns("prompt=completion,completion=prompt"))
    assert load_rows(source)[0] == {"prompt": "b", "completion": "a"}


@pytest.mark.parametrize("text", ["prompt", "prompt=", "=x", "prompt=a,prompt=b", "prompt=a,completion=a"])
def test_columns_that_mean_nothing(text):
    with pytest.raises(InputError, match="write it as prompt=question,completion=answer"):
        parse_columns(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt=nothing", "'nothing' is not a column of the data, which has 'text', 'id'"),
        ("id=text", "id=text would hide the column 'id' of the data"),
    ],
)
def test_columns_that_do_not_fit(tmp_path, text, message):
    name = write(tmp_path / "rows.jsonl", [{"text": "a", "id": "x"}])
    with pytest.raises(InputError, match=message):
        load_rows(DataSource(name, columns=parse_columns(text)))


def test_a_line_that_is_not_utf8_is_named(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "a"}\n{"text": "caf\xe9"}\n')
    with pytest.raises(InputError, match=r"rows.jsonl' cannot be read as data: line 2 is not UTF-8 \(byte 0xe9"):
        load_rows(DataSource(str(path)))
