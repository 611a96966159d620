"""Which words a correction calls wrong, and which it leaves in doubt."""

import pytest

from selsft.data.corrections import spans_of_corrections


def said(text, *corrections):
    """`{weight: words}` of the spans."""
    found = {-1.0: [], 0.0: []}
    for start, end, weight in spans_of_corrections(text, corrections):
        assert 0 <= start < end <= len(text)
        found[weight].append(text[start:end])
    return found


def test_no_change_is_no_span():
    assert spans_of_corrections("He goes to school.", ["He  goes to school ."]) == []


@pytest.mark.parametrize(
    ("text", "correction", "wrong", "doubt"),
    [
        ("He go to school.", "He goes to school.", ["go"], []),
        ("He goes to to school.", "He goes to school.", ["to"], []),  # one of the two
        ("He have being there.", "He was there.", ["have being"], []),
        ("He goes school.", "He goes to school.", [], ["school"]),  # a missing word
        ("He goes", "He goes home", [], []),  # missing at the end: nothing follows
        ("Alot of work", "A lot of work", ["Alot"], []),
        ("it is , good", "it is good", [","], []),
        ("das cafe\u0301 hier", "das haus hier", ["cafe\u0301"], []),
        ("我昨天去了学校", "我昨天去过学校", ["了"], []),
        ("don't know", "doesn't know", ["don't"], []),
    ],
)
def test_one_correction(text, correction, wrong, doubt):
    found = said(text, correction)
    assert found == {-1.0: wrong, 0.0: doubt}


@pytest.mark.parametrize(("votes", "wrong"), [(0, None), (1, False), (2, False), (3, True), (4, True)])
def test_of_four_corrections_three_must_agree(votes, wrong):
    corrections = ["He goes home"] * votes + ["He go home"] * (4 - votes)
    found = said("He go home", *corrections)
    assert found == {-1.0: ["go"] if wrong else [], 0.0: ["go"] if wrong is False else []}


def test_neighbours_with_other_verdicts_are_spans_of_their_own():
    found = spans_of_corrections("a b c d", ["a x y d", "a x c d", "a x c d", "a x c d"])
    assert found == [(2, 3, -1.0), (4, 5, 0.0)]
