"""Figures about a score on judged rows: levels, intervals, thresholds."""

import numpy as np
import pytest
from sklearn.metrics import average_precision_score, roc_auc_score

from selsft.data.judged import JudgedRows
from selsft.evaluation.judged import (
    Examples,
    by_threshold,
    examples_of,
    figures,
    judge_scores,
    learning_curve,
    threshold_for,
)


def rows_of(*verdicts, spans=None, whole=None):
    """Judged rows of verdicts 1, 0, -1 for each token; a run of 1 is a span unless `spans` says otherwise."""
    wrong = np.concatenate([np.array(row, np.int8) for row in verdicts])
    lengths = np.array([len(row) for row in verdicts])
    row = np.repeat(np.arange(lengths.size, dtype=np.int32), lengths)
    if spans is None:
        begins = (wrong == 1) & ~np.concatenate(
            [[False], (wrong[1:] == 1) & (wrong[:-1] == 1) & (row[1:] == row[:-1])]
        )
        spans = np.where(wrong == 1, np.cumsum(begins) - 1, -1)
    ids = np.arange(wrong.size, dtype=np.int32)
    flags = np.zeros(lengths.size, bool) if whole is None else np.array(whole)
    return JudgedRows(ids, ids, wrong, np.array(spans, np.int32), row, lengths, np.arange(lengths.size), flags)


ROWS = rows_of([-1, 0, 1, 1, 0], [0, 0, 0, -1, 0], [1, 0, 1, 0, 0])
SCORES = np.array([-9, -1, -5, -2, -3, -1, -1, -1.5, -9, -0.5, -4, -1, -0.2, -2.5, -0.1], np.float32)
WORDS = np.array([0, 1, 2, 2, 3, 4, 5, 5, 6, 7, 8, 9, 10, 11, 12])


def test_levels():
    token = examples_of(ROWS, SCORES, WORDS, "token")
    assert sorted(token.badness[token.wrong]) == pytest.approx([0.2, 2, 4, 5]) and token.wrong.size == 13
    onset = examples_of(ROWS, SCORES, WORDS, "onset")
    assert sorted(onset.badness[onset.wrong]) == pytest.approx([0.2, 4, 5]) and onset.wrong.size == 12
    span = examples_of(ROWS, SCORES, WORDS, "span")
    assert sorted(span.badness[span.wrong]) == pytest.approx([0.2, 4, 5])
    assert sorted(span.badness[~span.wrong]) == pytest.approx([0.1, 0.5, 1, 1, 1, 1.5, 2.5, 3])
    row = examples_of(ROWS, SCORES, WORDS, "row")
    assert row.badness == pytest.approx([10 / 3, 3.5 / 3, 7.5 / 3]) and row.wrong.tolist() == [True, False, True]
    kept = examples_of(ROWS, SCORES, WORDS, "token", np.array([False, True, True]))
    assert set(kept.rows) == {1, 2}


def test_rows_judged_as_a_whole_have_the_level_row_alone():
    rows = rows_of([1, 1], [0, 0], [0, 0], whole=[True] * 3)
    found = judge_scores(rows, {"score": np.array([-1, -2, -1, 0, 0, 0], np.float32)}, np.arange(6))
    assert list(found["score"]) == ["row"] and found["score"]["row"]["auc"] == 1.0


def noisy(n_rows=60, seed=0, strength=1.0):
    rng = np.random.default_rng(seed)
    rows = rows_of(*[(rng.random(20) < 0.15).astype(int) for _ in range(n_rows)])
    return rows, (rng.normal(size=rows.row.size) - strength * (rows.wrong == 1)).astype(np.float32)


def test_figures_are_those_of_scikit_learn_with_intervals_over_rows():
    rows, scores = noisy()
    found = judge_scores(rows, {"score": scores}, np.arange(scores.size))["score"]["token"]
    assert found["auc"] == pytest.approx(roc_auc_score(rows.wrong, -scores))
    assert found["ap"] == pytest.approx(average_precision_score(rows.wrong, -scores))
    assert found["auc_low"] < found["auc"] < found["auc_high"]
    worst = np.sort(scores)[(rows.wrong == 1).sum() - 1]
    assert found["precision_at_share"] == pytest.approx((rows.wrong[scores <= worst] == 1).mean())
    assert found["n_rows"] == 60 and found["n_wrong"] == (rows.wrong == 1).sum()
    # tokens of a row that stand or fall together make an interval wider than as many tokens by themselves
    copies = rows_of(*[np.repeat(rows.wrong[rows.row == row], 5) for row in range(60)])
    again = figures(examples_of(copies, np.repeat(scores, 5), np.arange(scores.size * 5), "token"))
    assert again["auc_low"] == pytest.approx(found["auc_low"], abs=0.01)


def test_auc_within_groups():
    """Groups that differ in their level: scores that follow the groups alone tell nothing within them."""
    rows, scores = noisy()
    groups = np.arange(60) // 4
    level = 100.0 * (groups % 2)[rows.row]
    shifted = judge_scores(rows, {"score": scores + level}, np.arange(scores.size), groups=groups)["score"]["token"]
    wanted = [
        roc_auc_score(rows.wrong[groups[rows.row] == group], -scores[groups[rows.row] == group]) for group in range(15)
    ]
    assert shifted["auc_within"] == pytest.approx(np.mean(wanted), abs=1e-6) and shifted["n_groups"] == 15
    assert shifted["auc_within"] > shifted["auc"] + 0.05
    assert 0.02 < shifted["auc_within_high"] - shifted["auc_within_low"] < 0.4
    assert shifted["auc_within_low"] < shifted["auc_within"] < shifted["auc_within_high"]
    alone = judge_scores(rows, {"score": scores}, np.arange(scores.size), groups=np.arange(60))["score"]["row"]
    assert alone["n_groups"] == 0 and "auc_within" not in alone  # a row has one kind
    assert "auc_within" not in judge_scores(rows, {"score": scores}, np.arange(scores.size))["score"]["token"]


def test_intervals_cover():
    inside = 0
    for seed in range(40):
        rows, scores = noisy(40, seed)
        found = figures(examples_of(rows, scores, np.arange(scores.size), "token"))
        inside += found["auc_low"] <= 0.7602 <= found["auc_high"]  # Phi(1/sqrt(2))
    assert inside >= 34


def test_nothing_to_tell_apart():
    rows = rows_of([0, 0], [0, -1])
    assert judge_scores(rows, {"score": np.zeros(4, np.float32)}, np.arange(4)) == {"score": {}}


def test_the_threshold_flags_as_much_as_the_precision_allows():
    wrong = np.array([True] * 30 + [False] * 20 + [True] * 5 + [False] * 45)
    examples = Examples(np.arange(100, 0, -1).astype(float), wrong, np.arange(100))
    found = threshold_for(examples, 0.6)
    assert found.flagged == 58 and found.precision == pytest.approx(35 / 58) and found.recall == 1.0
    assert found.negative_threshold == 42.5 and found.precision_low < 0.6 < found.precision_high
    assert "for precision 0.6: 0.60" in str(found)
    flagged = examples.badness > found.negative_threshold  # as selection compares
    assert flagged.sum() == 58
    strict = threshold_for(examples, 1.0)
    assert strict.flagged == 30 and strict.precision == 1.0


def test_no_threshold_reaches_the_precision():
    rng = np.random.default_rng(0)
    examples = Examples(rng.normal(size=500), rng.random(500) < 0.1, np.arange(500) // 10)
    found = threshold_for(examples, 0.9)
    assert found.negative_threshold is None and str(found).startswith(
        "no threshold reaches precision 0.9: the best is"
    )
    # a handful of lucky examples on top is no threshold
    lucky = Examples(np.arange(500, 0, -1.0), np.array([True] * 5 + [False] * 445 + [True] * 50), np.arange(500))
    assert threshold_for(lucky, 0.9).negative_threshold is None


def test_ties_are_cut_together():
    examples = Examples(np.array([2.0] * 20 + [1.0] * 20), np.array([True] * 15 + [False] * 25), np.arange(40))
    assert threshold_for(examples, 0.7).flagged == 20
    lines = by_threshold(examples)
    assert lines[0] == {"negative_threshold": 1.5, "flagged": 0.5, "precision": 0.75, "recall": 1.0}


def test_learning_curve_predicts_by_the_logarithm():
    rows, scores = noisy(100)
    half = scores + np.random.default_rng(1).normal(size=scores.size) * 1.5
    curve = learning_curve(rows, {1.0: scores, 0.5: half.astype(np.float32)}, np.arange(scores.size), "token")
    assert [line["share"] for line in curve] == [0.5, 1.0, 2.0]
    assert curve[2]["predicted"] and curve[2]["auc"] == pytest.approx(2 * curve[1]["auc"] - curve[0]["auc"])
