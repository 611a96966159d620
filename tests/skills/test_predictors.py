"""Rank correlations, predictors, and the order of learning and forgetting."""

import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selsft.skills import forgetting as fg
from selsft.skills import learning, metrics, predictors
from selsft.skills.hidden import Hidden, read_hidden
from selsft.skills.table import read_scores
from tests.support.skill_tables import CLUSTERS, SUSCEPTIBLE, columns, table, write_study


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    return write_study(tmp_path_factory.mktemp("study"))


@pytest.fixture(scope="module")
def found(study):
    return metrics.questions(read_scores(study))


def test_spearman_by_hand():
    # Ranks 1 2 3 4 5 against 2 1 4 3 5: 1 - 6 * 4 / (5 * 24) = 0.8.
    got = predictors.spearman(np.array([1, 2, 3, 4, 5]), np.array([20, 10, 40, 30, 50]))
    assert got.n == 5 and got.rho == pytest.approx(0.8) and got.reason == ""
    half = 1.959964 * math.sqrt((1 + 0.32) / 2)
    assert got.low == pytest.approx(math.tanh(math.atanh(0.8) - half))
    assert got.high == pytest.approx(math.tanh(math.atanh(0.8) + half))
    # All 120 permutations: how many have |rho| >= 0.8.
    assert got.p == pytest.approx(stats.spearmanr([1, 2, 3, 4, 5], [2, 1, 4, 3, 5]).pvalue, abs=0.06)
    exact = [abs(stats.spearmanr(range(5), order)[0]) >= 0.8 - 1e-9 for order in _orders(5)]
    assert got.p == pytest.approx(np.mean(exact), abs=0.02)


def _orders(n):
    if n == 0:
        return [[]]
    return [[*rest[:i], n - 1, *rest[i:]] for rest in _orders(n - 1) for i in range(n)]


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), n=st.integers(4, 30))
def test_spearman_is_scipys_with_ties(seed, n):
    rng = np.random.default_rng(seed)
    x, y = rng.integers(0, 4, n).astype(float), rng.integers(0, 4, n).astype(float)
    got = predictors.spearman(x, y, permutations=10)
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        assert math.isnan(got.rho) and got.reason == "one of the two is constant"
    else:
        assert got.rho == pytest.approx(stats.spearmanr(x, y)[0]) and got.low <= got.rho <= got.high


def test_spearman_null():
    got = predictors.spearman(np.array([1.0, np.nan, 2.0, 3.0, 4.0]), np.array([1.0, 2.0, np.nan, 3.0, 4.0]))
    assert got.n == 3 and math.isnan(got.rho) and got.reason == "3 points, at least 4 needed"
    assert predictors.spearman(np.arange(6.0), np.arange(6.0)).rho == pytest.approx(1.0)


def test_p_is_uniform_without_an_effect():
    rng = np.random.default_rng(0)
    p = [predictors.spearman(rng.random(12), rng.random(12), permutations=200).p for _ in range(200)]
    assert stats.kstest(p, "uniform").pvalue > 0.01


def test_interval_of_spearman_covers():
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(300):
        x = rng.standard_normal(40)
        y = 0.6 * x + 0.8 * rng.standard_normal(40)
        got = predictors.spearman(x, y, permutations=1)
        covered += got.low <= 6 / np.pi * np.arcsin(0.3) <= got.high  # Spearman's rho of a normal pair with r = 0.6.
    assert 0.90 <= covered / 300 <= 0.99


def test_variance_by_hand():
    states = np.array([[0.0, 0.0], [2.0, 0.0], [1.0, 3.0]])
    assert predictors.variance(states) == pytest.approx(1.0 + 3.0) == pytest.approx(np.trace(np.cov(states.T)))
    np.testing.assert_allclose(predictors.spread(states), [2.0, 2.0, 4.0])
    assert math.isnan(predictors.variance(states[:1]))


def test_the_known_sign_is_found(study, found):
    ends = fg.Ends(found)
    rows = fg.forgetting(ends, dict.fromkeys(ends.ids, 0.5), draws=100)
    hidden = list(read_hidden(study))
    tasks = predictors.by_task(rows[rows["split"] == "test"], hidden)
    assert list(tasks["task"]) == sorted(CLUSTERS) and set(tasks["layer"]) == {-5}
    base = [h for h in hidden if h.model.stage == "base" and h.eval_task == "birch" and h.split == "test"]
    assert len(base) == 2
    row = tasks[tasks["task"] == "birch"].iloc[0]
    assert row["base_variance"] == pytest.approx(np.mean([np.trace(np.cov(h.question().T)) for h in base]))
    got = predictors.correlate_tasks(tasks).set_index(["predictor", "outcome"])
    assert (got["n"] == 6).all() and (got["p"] < 0.05).all()
    assert (got.xs("ratio", level=1)["rho"] < -0.9).all() and (got.xs("gap", level=1)["rho"] > 0.9).all()
    by_share = tasks.set_index("task")["ratio"].rank()
    assert list(by_share.sort_values().index) == sorted(SUSCEPTIBLE, key=SUSCEPTIBLE.__getitem__)


def test_between_examples(study, found):
    got = predictors.correlate_examples(fg.Ends(found), read_hidden(study)).set_index(["task", "predictor"])
    assert len(got) == 12 and (got["n"] == 150).all()
    assert (got.xs("base_confidence", level=1)["rho"] < -0.5).all()  # The hard ones fall furthest.
    assert (got.xs("base_spread", level=1)["p"] > 0.001).all()
    without = predictors.correlate_examples(fg.Ends(found))
    assert set(without["predictor"]) == {"base_confidence"} and len(without) == 6


def test_without_hidden_states_the_variance_is_null(found):
    ends = fg.Ends(found)
    rows = fg.forgetting(ends, dict.fromkeys(ends.ids, 0.5), draws=50)
    tasks = predictors.by_task(rows[rows["split"] == "test"])
    assert tasks["base_variance"].isna().all() and tasks["base_confidence"].notna().all()
    got = predictors.correlate_tasks(tasks).set_index("predictor")
    assert set(got.loc["base_variance", "reason"]) == {"0 points, at least 4 needed"}


def test_hidden_states_that_do_not_fit(study, tmp_path):
    states = next(read_hidden(study))
    assert isinstance(states, Hidden) and states.question().shape == (150, 8) and states.options().shape == (300, 8)
    assert states.is_gold().sum() == 150 and (states.is_gold().reshape(150, 2).argmax(axis=1) == states.gold).all()
    place = tmp_path / "hidden" / "x"
    place.mkdir(parents=True)
    target = place / states.path.name
    target.write_bytes(states.path.read_bytes())
    with pytest.raises(ValueError, match=r"apple-test\.json: not the description"):
        list(read_hidden(tmp_path))
    notes = states.path.with_suffix(".json").read_text()
    target.with_suffix(".json").write_text(notes.replace('"option_counts": [2,', '"option_counts": [2, 2,'))
    with pytest.raises(ValueError, match="do not fit"):
        list(read_hidden(tmp_path))
    target.with_suffix(".json").write_text(notes.replace('"option_counts": [2,', '"option_counts": [3,'))
    with pytest.raises(ValueError, match=r"options must be \(301, d\)"):
        next(read_hidden(tmp_path)).options()
    target.write_bytes(b"half")
    with pytest.raises(ValueError, match="tensor question is not readable"):
        next(read_hidden(tmp_path)).question()


def test_crossings_by_hand():
    curve = np.array([[0.1, 0.7, 0.5, 0.6, 0.1], [0.6, 0.1, 0.5, 0.1, np.nan], [0.1, 0.9, 0.5, 0.59, 0.9]])
    steps = np.array([0, 5, 7])
    np.testing.assert_array_equal(learning.crossings(curve, steps, True), [5, np.nan, np.nan, np.nan, np.nan])
    np.testing.assert_array_equal(learning.crossings(curve, steps, False), [np.nan, 5, np.nan, 5, np.nan])


def logit(p):
    return np.log(np.array(p) / (1 - np.array(p)))


def evaluation(stage, step, confidences, task="a"):
    model = ("r-seed0", 0, stage, "uniform" if stage == "forgotten" else "", "" if stage == "base" else task)
    return columns(model, task, "test", step, logit(confidences), np.zeros(len(confidences), dtype=int))


def test_steps_by_hand():
    parts = [
        evaluation("base", -1, [0.5, 0.5, 0.7]),
        evaluation("finetuned", 10, [0.7, 0.5, 0.9]),
        evaluation("finetuned", 20, [0.7, 0.5, 0.9]),
        evaluation("finetuned", -1, [0.9, 0.8, 0.9]),
        evaluation("forgotten", 0, [0.9, 0.8, 0.9]),
        evaluation("forgotten", 10, [0.9, 0.3, 0.9]),
        evaluation("forgotten", -1, [0.1, 0.3, 0.9]),
    ]
    steps = learning.example_steps(metrics.questions(table(*parts).to_pandas()))
    np.testing.assert_array_equal(steps["learned_step"], [10, 21, np.nan])  # The end is one after the last.
    np.testing.assert_array_equal(steps["forgotten_step"], [11, 10, np.nan])
    assert list(steps["example_id"]) == [f"a-test-000{i}" for i in range(3)]


def test_no_steps_inside_stages():
    parts = [evaluation(stage, -1, [0.9]) for stage in ("base", "finetuned", "forgotten")]
    steps = learning.example_steps(metrics.questions(table(*parts).to_pandas()))
    assert steps.empty and learning.learning_order(steps).empty
    parts = [*parts[1:], evaluation("finetuned", 5, [0.9]), evaluation("forgotten", 5, [0.9])]
    assert learning.example_steps(metrics.questions(table(*parts).to_pandas())).empty  # Where it started is not known.


def test_learning_order(found):
    got = learning.learning_order(learning.example_steps(found))
    test, train = got[got["split"] == "test"], got[got["split"] == "train"]
    assert len(test) == 12 and (test["rho"] < -0.8).all() and (test["n"] >= 100).all() and (test["p"] < 0.01).all()
    assert train["rho"].isna().all() and train["reason"].iloc[0].endswith("at least 100 needed")
    assert isinstance(got, pd.DataFrame) and (got["n_examples"] >= got["n"]).all()
