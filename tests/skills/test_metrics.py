"""Metrics of one evaluation, against numbers worked out by hand."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from selsft.skills import metrics
from selsft.skills.table import SCHEMA
from tests.support.skill_tables import columns, table


def scores(*examples, task="a", n_chars=None, assigned=None, model=("r", 0, "forgotten", "uniform", "a")):
    """Of examples (log-probabilities, gold)."""
    rows = []
    for i, (values, gold) in enumerate(examples):
        for option, value in enumerate(values):
            label = None if assigned is None or assigned[i] is None else option == assigned[i]
            length = 1 if n_chars is None else n_chars[i][option]
            key = [*model, task, "test", -1, f"q{i:03d}", option]
            rows.append([*key, value, 1, length, 2 * length, option == gold, label])
    frame = pd.DataFrame(rows, columns=SCHEMA.names)
    return frame.assign(is_assigned=frame["is_assigned"].astype("boolean"))


def test_by_hand():
    log = math.log
    found = metrics.questions(
        scores(
            ([log(0.2), log(0.1), log(0.1)], 0),
            ([log(0.1), log(0.3)], 0),
            ([-1.0, -1.0, -1.0], 2),
            assigned=[1, None, 2],
        )
    )
    assert list(found["n_options"]) == [3, 2, 3] and list(found["gold"]) == [0, 0, 2]
    assert list(found["predicted"]) == [0, 1, 0]  # The tie goes to the lowest index.
    assert list(found["assigned"]) == [1, -1, 2] and list(found["correct"]) == [1, 0, 0]
    np.testing.assert_allclose(found["confidence"], [0.5, 0.25, 1 / 3])
    np.testing.assert_allclose(found["margin"], [log(2), -log(3), 0.0], atol=1e-15)


def test_lengths():
    table = scores(([-6.0, -4.0], 0), n_chars=[[6, 2]])
    assert metrics.questions(table)["predicted"].item() == 1
    by_character = metrics.questions(table, "chars")  # -1 a character against -2.
    assert by_character["predicted"].item() == 0
    assert by_character["margin"].item() == pytest.approx(1.0)
    assert by_character["confidence"].item() == pytest.approx(1 / (1 + math.exp(-1)))
    assert metrics.questions(table, "bytes")["margin"].item() == pytest.approx(0.5)  # Twice as many bytes.
    assert metrics.questions(table, "tokens")["predicted"].item() == 1
    with pytest.raises(ValueError, match="normalization='length' is unknown: use one of none, chars, bytes, tokens"):
        metrics.questions(table, "length")


def test_order_of_rows_does_not_matter():
    table = scores(([-1.0, -2.0, -3.0], 1), ([-3.0, -1.0], 1), ([-1.0, -2.0], 0))
    shuffled = table.sample(frac=1, random_state=3)
    pd.testing.assert_frame_equal(metrics.questions(shuffled), metrics.questions(table))


def test_very_low_scores_do_not_underflow():
    found = metrics.questions(scores(([-2000.0, -2001.0], 0)))
    assert found["confidence"].item() == pytest.approx(1 / (1 + math.exp(-1)))


lists = st.lists(st.floats(-50, -0.01), min_size=2, max_size=5)


@settings(max_examples=60, deadline=None)
@given(values=lists, shift=st.floats(-30, 0), data=st.data())
def test_what_does_not_depend_on_a_shift_or_the_order(values, shift, data):
    gold = data.draw(st.integers(0, len(values) - 1))
    order = data.draw(st.permutations(range(len(values))))
    plain = metrics.questions(scores((values, gold))).iloc[0]
    shifted = metrics.questions(scores(([v + shift for v in values], gold))).iloc[0]
    assert shifted["confidence"] == pytest.approx(plain["confidence"], rel=1e-9)
    assert shifted["margin"] == pytest.approx(plain["margin"], abs=1e-9)
    moved = metrics.questions(scores(([values[i] for i in order], order.index(gold)))).iloc[0]
    assert moved["margin"] == plain["margin"] and moved["confidence"] == pytest.approx(plain["confidence"])
    if len(set(values)) == len(values):
        assert order[moved["predicted"]] == plain["predicted"]
        assert plain["correct"] == (plain["margin"] > 0)


def test_summary_by_hand():
    table = scores(([-1, -2], 0), ([-1, -2], 1), ([-2, -1], 1), ([-1, -2], 0), assigned=[0, 0, 0, 1])
    row = metrics.summarise(table).iloc[0]
    p = 1 / (1 + math.exp(-1))
    assert row["n"] == 4 and row["accuracy"] == 0.75 and row["chance"] == 0.5
    assert row["confidence"] == pytest.approx((3 * p + 1 - p) / 4) and row["margin"] == pytest.approx(0.5)
    assert row["agreement"] == 0.5 and row["match_rate"] == 0.25
    # Gold options have p, 1-p, p, p; the others 1-p, p, 1-p, 1-p. Of 16 pairs 9 are won, 3 + 3 tie, 1 is lost.
    assert row["auc"] == pytest.approx((9 + 6 / 2) / 16)
    # Slot 0 is gold with p, p; not gold with p, 1-p: (0.5 + 1 + 0.5 + 1)/4. Slot 1 likewise.
    assert row["auc_within"] == pytest.approx(0.75)
    assert row["top_label"] == "0" and row["top_share"] == 0.75
    entropy = -(0.75 * math.log(0.75) + 0.25 * math.log(0.25))
    assert row["entropy"] == pytest.approx(entropy) and row["entropy_ratio"] == pytest.approx(entropy / math.log(2))
    assert not row["collapsed"]


def test_no_assigned_labels_is_null():
    row = metrics.summarise(scores(([-1, -2], 0))).iloc[0]
    assert math.isnan(row["agreement"]) and math.isnan(row["match_rate"])


def test_collapse_is_told_from_guessing():
    rng = np.random.default_rng(0)
    gold = np.tile([0, 1], 100)
    # Always option 0, but surer of it where it is right.
    sure = [([-1.0, -3.0 - (g == 0) - 0.1 * rng.random()], g) for g in gold]
    row = metrics.summarise(scores(*sure)).iloc[0]
    assert row["accuracy"] == 0.5 and row["collapsed"] and row["entropy_ratio"] == 0 and row["top_share"] == 1
    assert row["auc_within"] == 1.0
    guess = [([-1.0, -2.0] if rng.random() < 0.5 else [-2.0, -1.0], g) for g in gold]
    row = metrics.summarise(scores(*guess)).iloc[0]
    assert not row["collapsed"] and row["entropy_ratio"] > 0.95 and abs(row["auc_within"] - 0.5) < 0.1


def test_a_constant_gold_slot_says_nothing_about_collapse():
    row = metrics.summarise(scores(*[([-2.0, -1.0], 1)] * 5)).iloc[0]
    assert math.isnan(row["entropy_ratio"]) and not row["collapsed"] and row["accuracy"] == 1


def with_labels(golds, swap=()):
    """Questions with the options no, yes; those in `swap` the other way round."""
    table = scores(*[([-1.0, -2.0], 1 - g if i in swap else g) for i, g in enumerate(golds)])
    rows = [
        {
            "eval_task": "a",
            "split": "test",
            "example_id": f"q{i:03d}",
            "options": ["yes", "no"] if i in swap else ["no", "yes"],
        }
        for i in range(len(golds))
    ]
    return metrics.with_texts(table, pd.DataFrame(rows))


def test_labels_are_told_by_their_text():
    table = with_labels([0, 1] * 10, swap=range(0, 20, 2))
    assert list(table["text"][:4]) == ["yes", "no", "no", "yes"]
    found = metrics.questions(table)  # Always slot 0.
    assert list(found["predicted_label"][:2]) == ["yes", "no"] and list(found["gold_label"][:2]) == ["no", "yes"]
    row = metrics.summarise(table).iloc[0]
    assert row["top_share"] == 0.5 and not row["collapsed"]  # By slot it would be collapse.


def test_few_questions_or_many_texts_have_no_labels():
    assert set(metrics.questions(with_labels([0, 1] * 3))["gold_label"]) == {"0", "1"}
    table = scores(*[([-1.0, -2.0], 0)] * 40)
    table["text"] = [f"option {i}" for i in range(80)]
    assert set(metrics.questions(table)["gold_label"]) == {"0"}


def test_chance():
    mixed = scores(([-1.0] * 2, 0), ([-1.0] * 4, 0))
    assert metrics.chances(metrics.questions(mixed), mixed) == {("a", "test"): pytest.approx(0.375)}
    unbalanced = with_labels([1] * 80 + [0] * 20, swap=range(0, 100, 3))
    assert metrics.chances(metrics.questions(unbalanced), unbalanced) == {("a", "test"): pytest.approx(0.8)}
    # 54 of 100 is within two standard errors (0.1) of one half.
    balanced = with_labels([1] * 54 + [0] * 46)
    assert metrics.chances(metrics.questions(balanced), balanced) == {("a", "test"): 0.5}
    # By slot only, a model cannot know which option is where: one half even if gold is always last.
    last = scores(*[([-1.0, -2.0], 1)] * 50)
    assert metrics.chances(metrics.questions(last), last) == {("a", "test"): 0.5}


def test_majority_of_labels_that_are_not_always_offered():
    texts = [["a", "b"]] * 40 + [["b", "c"]] * 40
    table = scores(*[([-1.0, -2.0], 0)] * 30, *[([-1.0, -2.0], 1)] * 10, *[([-1.0, -2.0], 0)] * 40)
    table["text"] = [text for pair in texts for text in pair]
    # a is gold in 30 of 40, b in 50 of 80, c in 0 of 40: always a before b before c is right in 30 + 40 of 80.
    assert metrics.chances(metrics.questions(table), table) == {("a", "test"): pytest.approx(70 / 80)}


def test_each_evaluation_has_its_row():
    gold = np.array([0, 1, 1])
    base, tuned = ("r", 0, "base", "", ""), ("r", 0, "finetuned", "", "a")
    parts = [columns(base, t, s, -1, np.ones(3), gold) for t in ("a", "b") for s in ("train", "test")]
    parts += [columns(tuned, "a", "test", step, -np.ones(3), gold) for step in (-1, 0, 10)]
    found = metrics.summarise(table(*parts).to_pandas())
    assert len(found) == 7
    assert found.groupby("stage")["accuracy"].mean().to_dict() == {"base": 1.0, "finetuned": 0.0}
