"""Linear probes: the fit against scipy's and its own optimality, and known signals in made states."""

import dataclasses
import math
from pathlib import Path

import numpy as np
import pytest
from scipy import special

from selsft.skills import forgetting as fg
from selsft.skills import probes
from selsft.skills.hidden import Hidden, read_hidden
from tests.support.skill_tables import write_study


@dataclasses.dataclass(frozen=True)
class Made(Hidden):
    """States in memory."""

    states: np.ndarray = dataclasses.field(default_factory=lambda: np.zeros((0, 0)))

    def options(self):
        return self.states


def made(split, strength, n=200, d=6, k=2, seed=0, names=None, gold=None):
    rng = np.random.default_rng([seed, split == "test"])
    gold = rng.integers(0, k, n) if gold is None else gold
    direction = np.zeros(d)
    direction[0] = strength
    is_gold = np.tile(np.arange(k), n) == np.repeat(gold, k)
    states = rng.standard_normal((n * k, d)) + np.where(is_gold, 1, -1)[:, None] * direction
    ids = names or [f"{split}{i}" for i in range(n)]
    model = fg.Model("r", 0, "base", "", "")
    return Made(Path(f"{split}"), model, "a", split, ids, np.full(n, k), gold, -1, states)


def objective(weight, bias, features, targets, penalty):
    logits = features @ weight + bias
    loss = -special.log_expit(np.where(targets > 0, logits, -logits)).mean()
    return loss + penalty / 2 * weight @ weight


@pytest.mark.parametrize(("m", "d"), [(60, 5), (20, 50)])
def test_the_fit_is_the_minimum(m, d):
    rng = np.random.default_rng(0)
    states = rng.standard_normal((m, d)) * rng.uniform(0.1, 10, d) + 3
    targets = (rng.random(m) < special.expit(states[:, 0] - 3)).astype(float)
    probe = probes.fit(states, targets, 0.05)
    features = (states - states.mean(axis=0)) / states.std(axis=0)
    weight = probe.weight * states.std(axis=0)
    np.testing.assert_allclose(probe.logits(states), features @ weight + probe.bias, rtol=1e-9)
    # The gradient vanishes: pull on each feature, and on the bias.
    pull = (special.expit(probe.logits(states)) - targets) / m
    np.testing.assert_allclose(features.T @ pull + 0.05 * weight, 0, atol=2e-5)
    assert abs(pull.sum()) < 2e-5
    best = objective(weight, probe.bias, features, targets, 0.05)
    for _ in range(20):
        step = 0.01 * rng.standard_normal(d)
        assert objective(weight + step, probe.bias + 0.01 * rng.standard_normal(), features, targets, 0.05) > best


def test_one_feature_by_hand():
    # Two points -1 and 1 with targets 0 and 1, three of four right: w = solution of expit(-w)/... with penalty p:
    # loss = log(1 + exp(-w)) + p/2 w²; its derivative -expit(-w) + p w is 0 at w = 1 for p = expit(-1).
    probe = probes.fit(np.array([[-1.0], [1.0]]), np.array([0.0, 1.0]), float(special.expit(-1)))
    assert probe.weight[0] == pytest.approx(1.0, abs=1e-5) and probe.bias == pytest.approx(0.0, abs=1e-6)


def test_scale_and_place_of_features_do_not_matter():
    rng = np.random.default_rng(1)
    states = rng.standard_normal((80, 4))
    targets = (states[:, 0] > 0).astype(float)
    plain = probes.fit(states, targets, 0.1).logits(states)
    moved = states * [1, 100, 0.01, 5] + [3, -50, 2, 0]
    np.testing.assert_allclose(probes.fit(moved, targets, 0.1).logits(moved), plain, atol=1e-4)
    constant = np.column_stack([states, np.full(80, 7.0)])
    probe = probes.fit(constant, targets, 0.1)
    assert probe.weight[-1] == 0
    np.testing.assert_allclose(probe.logits(constant), plain, atol=1e-4)


def test_the_penalty_is_chosen_by_held_out_questions(monkeypatch):
    train = made("train", 0.0, n=100)
    seen = []
    real = probes.fit

    def watched(states, targets, penalty):
        seen.append(len(states))
        return real(states, targets, penalty)

    monkeypatch.setattr(probes, "fit", watched)
    question = np.repeat(np.arange(100), 2)
    targets = train.is_gold().astype(float)
    assert probes.choose(train.options(), targets, question) >= 1  # Nothing to learn: the strong penalties win.
    assert seen == [160] * len(probes.PENALTIES)  # 80 questions with both of their options.
    strong = made("train", 1.0, n=100)
    assert probes.choose(strong.options(), strong.is_gold().astype(float), question) < 1


def test_options_of_a_question_stay_on_one_side(monkeypatch):
    # Each question has a state of its own, its options share it: only a split by rows would find that useful.
    rng = np.random.default_rng(3)
    question = np.repeat(np.arange(50), 3)
    states = np.eye(50)[question] + 1e-3 * rng.standard_normal((150, 50))
    sides = []
    real = probes.fit

    def watched(states, *rest):
        sides.append({int(row.argmax()) for row in states})
        return real(states, *rest)

    monkeypatch.setattr(probes, "fit", watched)
    probes.choose(states, np.tile([1.0, 0, 0], 50), question)
    assert all(len(side) == 40 for side in sides)


def test_a_signal_is_found_and_its_absence_too():
    found = probes.probe_questions(made("train", 1.0), made("test", 1.0))
    assert len(found) == 200 and found["correct"].mean() > 0.85 and abs(found["control"].mean() - 0.5) < 0.12
    assert set(found["n_options"]) == {2} and found["confidence"].mean() > 0.8
    none = probes.probe_questions(made("train", 0.0), made("test", 0.0))
    assert abs(none["correct"].mean() - 0.5) < 0.1
    # A signal in the training states alone does not carry over: the test labels are not looked at.
    gone = probes.probe_questions(made("train", 1.0), made("test", 0.0))
    assert abs(gone["correct"].mean() - 0.5) < 0.1


def test_more_options():
    found = probes.probe_questions(made("train", 1.0, k=4), made("test", 1.0, k=4))
    assert found["correct"].mean() > 0.75 and abs(found["control"].mean() - 0.25) < 0.1


def test_the_answer_is_the_highest_logit_the_lowest_on_ties():
    logits = np.array([1.0, 2.0, 3.0, 3.0, 0.0, 5.0, 5.0])
    np.testing.assert_array_equal(probes.answers(logits, np.array([2, 3, 2])), [1, 0, 0])


def test_shuffled_labels():
    flags = probes.shuffled(np.array([2, 3, 4] * 200), np.random.default_rng(0))
    parts = np.split(flags, np.cumsum([2, 3, 4] * 200)[:-1])
    assert all(part.sum() == 1 for part in parts)
    assert np.mean([part[0] for part in parts[2::3]]) == pytest.approx(0.25, abs=0.1)


def test_refused():
    with pytest.raises(ValueError, match="1 questions are in both splits, as 'x'"):
        names = [[f"{s}{i}" for i in range(29)] + ["x"] for s in ("a", "b")]
        probes.probe_questions(made("train", 1.0, n=30, names=names[0]), made("test", 1.0, n=30, names=names[1]))
    with pytest.raises(ValueError, match="19 training questions, a probe needs 20"):
        probes.probe_questions(made("train", 1.0, n=19), made("test", 1.0))
    other = dataclasses.replace(made("test", 1.0), model=fg.Model("s", 0, "base", "", ""))
    with pytest.raises(ValueError, match="not of the same model"):
        probes.probe_questions(made("train", 1.0), other)


def test_a_study(tmp_path):
    write_study(tmp_path, seeds=1)
    found, left_out = probes.probe_all(read_hidden(tmp_path))
    assert not left_out and len(found) == 6 * 3 * 150
    ends = fg.Ends(found)
    rows = fg.forgetting(ends, dict.fromkeys(ends.ids, 0.5), "parent", draws=200)
    assert len(rows) == 6
    assert (rows["finetuned"] > 0.95).all() and (rows["drop"].abs() < 0.03).all()  # Nothing is lost in the states.
    assert (rows["base"] < rows["finetuned"]).all() and (rows["outcome"] == fg.UNFORGOTTEN).all()
    assert found["control"].mean() == pytest.approx(0.5, abs=0.1)
    again, _ = probes.probe_all(read_hidden(tmp_path))
    assert again.equals(found)
    next((tmp_path / "hidden").glob("*base*/apple-train.safetensors")).unlink()
    some, left_out = probes.probe_all(read_hidden(tmp_path))
    assert left_out == ["uniform-full-seed0, base, apple: states of the test split only"]
    assert len(some) == len(found) - 150 and not math.isnan(some["correct"].mean())
