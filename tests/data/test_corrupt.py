"""Damage by rules: what is said to be wrong is what was changed."""

import random

import pytest
from datasets import Dataset

from selsft.data.corrupt import ANSWER, KINDS, corrupt_rows, corrupt_text
from selsft.errors import InputError

TEXT = "The children were going to their school because they wanted to learn something about the old history."


@pytest.mark.parametrize("kind", KINDS)
def test_spans_cover_what_was_changed_and_nothing_else(kind):
    changed = 0
    for seed in range(40):
        text, spans = corrupt_text(TEXT, [kind], random.Random(seed), ["table", "house"])
        if not spans:
            assert text == TEXT
            continue
        changed += 1
        for start, end, weight in spans:
            assert 0 <= start < end <= len(text)
            assert weight == (0 if kind == "delete" else -1)
            assert text[start:end].strip() == text[start:end]
        right, last = [], 0
        for start, end, _ in spans:
            right.append(text[last:start])
            last = end
        at = 0  # what is not marked is in the old text, in order
        for part in [*right, text[last:]]:
            for word in part.split():
                at = TEXT.find(word, at)
                assert at >= 0, (text, spans)
    assert changed > 10


def test_rows_take_the_kinds_in_turn_and_keep_their_form():
    rows = [{"prompt": "Say.", "completion": TEXT, "id": 7} for _ in range(4)]
    made = corrupt_rows(Dataset.from_list(rows), ["double", "case"])
    assert set(made.column_names) == {"prompt", "completion", "spans"}
    assert all(row["spans"] and row["completion"] != TEXT for row in made)
    assert made[:] == corrupt_rows(Dataset.from_list(rows), ["double", "case"])[:]
    chat = [{"messages": [{"role": "user", "content": "Say."}, {"role": "assistant", "content": TEXT}]}]
    turns = corrupt_rows(Dataset.from_list(chat), ["double"])[0]["messages"]
    assert turns[0]["content"] == "Say." and turns[0]["spans"] is None and turns[1]["spans"]


def test_swapped_answers_are_judged_as_a_whole():
    rows = [{"prompt": f"Say {i}.", "completion": f"Number {i}."} for i in range(10)]
    made = corrupt_rows(Dataset.from_list(rows), [ANSWER])
    for row, old in zip(made, rows, strict=True):
        assert row["weight"] == (1 if row["completion"] == old["completion"] else -1)
    assert {-1.0, 1.0} == set(made["weight"])


def test_refusals():
    data = Dataset.from_list([{"prompt": "a", "completion": "b"}])
    for kinds in (["typo"], [ANSWER, "swap"], []):
        with pytest.raises(InputError, match="probe_corruptions"):
            corrupt_rows(data, kinds)
    with pytest.raises(InputError, match="row 0 of the clean rows"):
        corrupt_rows(Dataset.from_list([{"prompt": "a"}]))
