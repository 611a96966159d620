"""Scores -> labels on cases that can be worked out by hand, and properties over random ones."""

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selsft.labels import label_tokens
from selsft.schedules import FORGET_SCHEDULES, forget_weight_at
from selsft.selection import select_token_weights

SCORES = np.array([-3.0, -1.0, -0.5, 0.0, 2.0])


def test_threshold_is_strict():
    assert label_tokens(SCORES, negative_threshold=1.0).tolist() == [-1, 1, 1, 1, 1]


def test_fraction_keeps_the_best():
    assert label_tokens(SCORES, positive_fraction=0.6).tolist() == [-1, -1, 1, 1, 1]


@pytest.mark.parametrize(("fraction", "expected"), [(0.0, [-1] * 5), (1.0, [1] * 5)])
def test_fraction_at_the_ends(fraction, expected):
    assert label_tokens(SCORES, positive_fraction=fraction).tolist() == expected


def test_fraction_is_not_fooled_by_rounding():
    # 0.7 * 10 is 7.000000000000001 or 6.999999999999999 depending on how the share was computed
    labels = label_tokens(np.arange(10.0), positive_fraction=1 - 0.3)
    assert (labels == 1).sum() == 7


def test_equal_scores_are_all_positive():
    assert label_tokens(np.zeros(4), positive_fraction=0.5).tolist() == [1, 1, 1, 1]


def test_neutral_band_is_around_the_boundary():
    assert label_tokens(SCORES, negative_threshold=1.0, neutral_band=0.5).tolist() == [-1, 0, 0, 1, 1]


def test_protected_tokens_stay_positive():
    protected = np.array([True, False, False, False, True])
    assert label_tokens(SCORES, negative_threshold=-1.0, protected=protected).tolist() == [1, -1, -1, -1, 1]


@pytest.mark.parametrize("rules", [{}, {"negative_threshold": 1.0, "positive_fraction": 0.5}])
def test_exactly_one_rule(rules):
    with pytest.raises(ValueError, match="exactly one of negative_threshold"):
        label_tokens(SCORES, **rules)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_scores_must_be_finite(bad):
    with pytest.raises(ValueError, match="score number 1 is"):
        label_tokens(np.array([0.0, bad]), negative_threshold=1.0)


def settings_of(**changes):
    rule = {"negative_threshold": 1.0, "positive_fraction": None, "neutral_band": 0.0, "selection_scope": "global"}
    rule |= {"score": "influence", "gate_reference_prob": None, "max_negative_share": None, "seed": 0}
    return SimpleNamespace(**{**rule, "forget_weight": 0.25, **changes})


def rows_of(*scores):
    """Rows whose base log-probability is 0, so that the score is the reference's."""
    ref = [np.array(row, dtype=np.float32) for row in scores]
    return [np.zeros_like(row) for row in ref], ref


def test_scope_decides_which_tokens_compete():
    base, ref = rows_of([-4.0, -3.0], [1.0, 2.0])
    trained, free = [np.ones(2, bool)] * 2, [np.zeros(2, bool)] * 2
    fraction = {"negative_threshold": None, "positive_fraction": 0.5}
    whole = select_token_weights(base, ref, trained, free, settings_of(**fraction))
    each = select_token_weights(base, ref, trained, free, settings_of(**fraction, selection_scope="sequence"))
    assert [row.tolist() for row in whole] == [[-1, -1], [1, 1]]
    assert [row.tolist() for row in each] == [[-1, 1], [-1, 1]]


def test_untrained_tokens_neither_count_nor_get_a_weight():
    base, ref = rows_of([-9.0, -9.0, 1.0, 2.0])
    trained = [np.array([False, False, True, True])]
    args = settings_of(negative_threshold=None, positive_fraction=0.5)
    assert select_token_weights(base, ref, trained, [np.zeros(4, bool)], args)[0].tolist() == [0, 0, -1, 1]


def test_forget_weight_zero_ignores_the_negatives():
    base, ref = rows_of([-2.0, 0.0])
    args = settings_of(forget_weight=0.0)
    assert select_token_weights(base, ref, [np.ones(2, bool)], [np.zeros(2, bool)], args)[0].tolist() == [0, 1]


def test_no_rows():
    assert select_token_weights([], [], [], [], settings_of()) == []


@settings(max_examples=60, deadline=None)
@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=40), st.floats(0, 1), st.floats(0, 3))
def test_a_better_score_never_gets_a_worse_label(scores, fraction, band):
    values = np.array(scores, dtype=np.float32)
    labels = label_tokens(values, positive_fraction=fraction, neutral_band=band)
    assert (np.diff(labels[np.argsort(values, kind="stable")]) >= 0).all()
    if band == 0:
        assert (labels == 1).sum() >= int(fraction * len(scores))


def test_schedules():
    weights = {name: [forget_weight_at(s, 4, 0.2, name) for s in (0, 2, 4, 9)] for name in FORGET_SCHEDULES}
    assert weights["constant"] == [0.2] * 4
    assert weights["linear"] == pytest.approx([0, 0.1, 0.2, 0.2])
    assert weights["cosine"] == pytest.approx([0, 0.1, 0.2, 0.2])
    with pytest.raises(ValueError, match="forget_schedule='step'"):
        forget_weight_at(0, 1, 0.2, "step")
