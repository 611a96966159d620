"""Random labels: what each mode draws, what it depends on, and what it keeps."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from selsft.evaluation.examples import MultipleChoiceExample
from selsft.skills.randomize import assign_labels, match_rate
from selsft.skills.table import RANDOM_LABELS


def examples(count: int, size: int = 2, fixed: bool = False) -> list[MultipleChoiceExample]:
    """Gold is place 0 three times in four, so that a lost marginal shows."""
    made = []
    for i in range(count):
        options = [f"{word}{'' if fixed else i}" for word in ("no", "yes", "maybe", "never")[:size]]
        gold = 0 if i % 4 else 1
        if fixed and i % 3 == 0:  # the same labels in another order
            options, gold = options[::-1], size - 1 - gold
        made.append(MultipleChoiceExample(f"e{i}", f"p{i}", tuple(options), gold, "train"))
    return made


@pytest.mark.parametrize("mode", RANDOM_LABELS)
def test_a_draw_is_fixed_by_seed_example_and_epoch(mode):
    rows = examples(200, 4)
    first = assign_labels(rows, mode, 0)
    assert (assign_labels(rows, mode, 0) == first).all()
    others = [
        assign_labels(rows, mode, 1),
        assign_labels(rows, mode, 0, epoch=0),
        assign_labels(rows, mode, 0, epoch=1),
    ]
    changed = [(labels != first).any() for labels in others] + [(others[1] != others[2]).any()]
    assert changed == [mode != "flip"] * 4
    if mode != "shuffle":
        assert (assign_labels(rows[::-1], mode, 0)[::-1] == first).all()
        assert (assign_labels(rows[50:], mode, 0) == first[50:]).all()


@pytest.mark.parametrize("size", [2, 4])
def test_uniform_draws_every_option_alike(size):
    rows = examples(2000, size)
    counts = np.bincount(assign_labels(rows, "uniform", 0), minlength=size)
    spread = np.sqrt(2000 * (1 / size) * (1 - 1 / size))
    assert np.abs(counts - 2000 / size).max() < 4 * spread
    assert abs(match_rate(rows, assign_labels(rows, "uniform", 0)) - 1 / size) < 4 * spread / 2000


@pytest.mark.parametrize("size", [2, 4])
def test_wrong_modes_never_hit_the_gold_option(size):
    rows = examples(600, size)
    gold = np.array([e.gold for e in rows])
    wrong = (assign_labels(rows, "uniform_wrong", 0) - gold) % size
    assert set(wrong) == set(range(1, size))
    assert np.abs(np.bincount(wrong)[1:] - 600 / (size - 1)).max() <= 4 * np.sqrt(600 / (size - 1))
    flipped = assign_labels(rows, "flip", 0)
    assert (flipped == (gold + 1) % size).all()
    assert match_rate(rows, flipped) == match_rate(rows, assign_labels(rows, "uniform_wrong", 3)) == 0.0


def test_shuffle_keeps_how_often_each_label_occurs():
    rows = examples(400)
    labels = assign_labels(rows, "shuffle", 0)
    assert Counter(labels.tolist()) == Counter(e.gold for e in rows)
    # 3/4 of the labels are 0: a shuffled label is right with probability 10/16, a uniform one with 1/2
    assert abs(match_rate(rows, labels) - 10 / 16) < 4 * np.sqrt(10 / 16 * 6 / 16 / 400)
    texts = examples(400, fixed=True)
    drawn = assign_labels(texts, "shuffle", 0)
    assert Counter(e.options[i] for e, i in zip(texts, drawn, strict=True)) == Counter(
        e.options[e.gold] for e in texts
    )
    assert Counter(drawn.tolist()) != Counter(e.gold for e in texts)  # the places are not what is kept
    mixed = examples(100, 2) + [
        MultipleChoiceExample(f"x{i}", "p", ("a", "b", f"c{i}"), i % 3, "train") for i in range(90)
    ]
    labels = assign_labels(mixed, "shuffle", 0)
    assert Counter(labels[100:].tolist()) == {0: 30, 1: 30, 2: 30}
    assert labels[:100].max() == 1


def test_an_unknown_mode_is_refused():
    with pytest.raises(ValueError, match="mode='random' is unknown: use one of uniform"):
        assign_labels(examples(2), "random", 0)
