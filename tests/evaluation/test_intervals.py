"""Intervals over examples and seeds: by hand, against a loop, and whether they cover what they should."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from selsft.evaluation import intervals


def test_draws_are_weights():
    weights = intervals.draw(3, 20, draws=500, seed=1)
    assert weights.examples.shape == (500, 20) and weights.seeds.shape == (500, 3)
    np.testing.assert_allclose(weights.examples.sum(axis=1), 1)
    np.testing.assert_allclose(weights.seeds.sum(axis=1), 0, atol=1e-12)
    again, other = intervals.draw(3, 20, draws=500, seed=1), intervals.draw(3, 20, draws=500, seed=2)
    assert (again.examples == weights.examples).all() and (again.seeds == weights.seeds).all()
    assert (other.examples != weights.examples).any() and (other.seeds != weights.seeds).any()
    with pytest.raises(ValueError, match="at least one seed and one example; got 0 and 3"):
        intervals.draw(0, 3)


def test_seed_weights_have_the_variance_of_a_mean_of_seeds_times_t_over_z():
    for seeds in (2, 3, 5):
        values = np.random.default_rng(0).standard_normal(seeds)
        draws = intervals.draw_seeds(seeds, draws=200_000) @ values
        scale = stats.t.ppf(0.975, seeds - 1) / stats.norm.ppf(0.975)
        assert draws.std() == pytest.approx(scale * values.std(ddof=1) / np.sqrt(seeds), rel=0.01)
    assert (intervals.draw_seeds(1, draws=10) == 0).all()


@settings(max_examples=30, deadline=None)
@given(seeds=st.integers(1, 4), n=st.integers(2, 12), data=st.randoms(use_true_random=False))
def test_a_draw_is_the_weighted_mean_over_resampled_examples(seeds, n, data):
    values = np.array([[float(data.random() < 0.6) for _ in range(n)] for _ in range(seeds)])
    weights = intervals.draw(seeds, n, draws=20, seed=data.randrange(1000))
    share = intervals.seed_share(values)
    got = intervals.mean_draws(values, weights)
    for b in range(20):
        taken = np.repeat(np.arange(n), np.rint(weights.examples[b] * n).astype(int))
        means = [row[taken].mean() for row in values]
        wanted = sum((1 / seeds + share * w) * m for w, m in zip(weights.seeds[b], means, strict=True))
        assert got[b] == pytest.approx(wanted)


def test_missing_examples_are_left_out():
    nan = np.nan
    values = np.array([[1.0, 0.0, nan, 1.0], [0.0, nan, 1.0, 1.0]])
    assert intervals.mean(values) == pytest.approx(2 / 3)
    weights = intervals.Draws(np.array([[0.25, 0.25, 0.5, 0.0]]), np.array([[0.1, -0.1]]))
    share = intervals.seed_share(values)
    wanted = (0.5 + 0.1 * share) * 0.5 + (0.5 - 0.1 * share) * (0.5 / 0.75)
    assert intervals.mean_draws(values, weights) == pytest.approx([wanted])


def test_share_of_the_seeds_by_hand():
    # Seeds' means 1 and 1/4 over four examples: MS_seeds = 4 * 0.28125 = 1.125. Residuals ±1/8 (three examples) and
    # ±3/8 (one): sum of squares 6/64 + 2 * 9/64 = 0.375, over (2 - 1)(4 - 1): 0.125.
    values = np.array([[1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 1.0]])
    assert intervals.seed_share(values) == pytest.approx(np.sqrt(1 - 0.125 / 2.25))
    assert intervals.seed_share(np.tile(values[1], (3, 1))) == 0  # Equal seeds: nothing of their own.
    assert intervals.seed_share(np.array([[1.0, 0.0], [0.0, 1.0]])) == 0  # Equal means.
    assert intervals.seed_share(values[:1]) == 1


def test_interval_by_hand():
    draws = np.arange(101) / 100
    assert intervals.interval(0.5, draws) == pytest.approx((0.5, 0.025, 0.975))
    assert intervals.interval(0.5, 2 * draws - 0.5, 0.0, 1.0) == pytest.approx((0.5, 0.0, 1.0))
    assert intervals.interval(0.5, np.append(draws, np.nan)).low == pytest.approx(0.025)


def test_a_paired_difference_is_narrower_than_an_unpaired_one():
    rng = np.random.default_rng(0)
    before = (rng.random((1, 400)) < 0.6).astype(float)
    after = before.copy()
    after[0, :20] = 0
    weights, others = intervals.draw(1, 400, seed=0), intervals.draw(1, 400, seed=1)
    paired = intervals.mean_draws(before, weights) - intervals.mean_draws(after, weights)
    unpaired = intervals.mean_draws(before, weights) - intervals.mean_draws(after, others)
    lost = (before - after).mean()
    assert paired.std() == pytest.approx(np.sqrt(lost * (1 - lost) / 400), rel=0.08)
    assert unpaired.std() > 2 * paired.std()


@pytest.mark.parametrize(
    ("seeds", "n", "by_seed", "by_example", "by_both"),
    [
        (1, 100, 0.0, 1.5, 0.0),
        (3, 100, 0.0, 1.5, 0.0),
        (3, 200, 0.3, 1.5, 0.5),
        (3, 200, 0.8, 1.5, 0.5),
        (5, 200, 0.3, 0.0, 0.5),
        (2, 200, 0.3, 1.5, 0.5),
    ],
)
def test_coverage(seeds, n, by_seed, by_example, by_both):
    """95 % intervals of an accuracy, a drop and a ratio cover the truth in 90 to 99 % of 300 simulated studies: logits
    with normal effects of seed, example and both, the effects of examples shared by the two stages."""
    rng = np.random.default_rng([seeds, n])
    spread = np.sqrt(by_seed**2 + by_example**2 + by_both**2)
    nodes, node_weights = np.polynomial.hermite_e.hermegauss(60)

    def truth(level):
        return float(node_weights @ (1 / (1 + np.exp(-(level + spread * nodes)))) / node_weights.sum())

    before, after = truth(1.5), truth(0.5)
    wanted = np.array([before, before - after, (before - after) / (before - 0.3)])
    weights = intervals.draw(seeds, n, draws=600, seed=5)
    covered = np.zeros(3)
    for _ in range(300):
        example = rng.normal(0, by_example, n)
        stages = []
        for level in (1.5, 0.5):
            logit = level + example + rng.normal(0, by_seed, (seeds, 1)) + rng.normal(0, by_both, (seeds, n))
            stages.append((rng.random((seeds, n)) < 1 / (1 + np.exp(-logit))).astype(float))
        top, drop = intervals.mean_draws(stages[0], weights), intervals.mean_draws(stages[0] - stages[1], weights)
        for i, draws in enumerate((top, drop, drop / (top - 0.3))):
            found = intervals.interval(0.0, draws)
            covered[i] += found.low <= wanted[i] <= found.high
    print(f"S={seeds} n={n} seeds' sd {by_seed}: {covered / 300}")
    assert (covered / 300 >= 0.90).all() and (covered / 300 <= 0.99).all(), covered / 300


def test_a_paired_difference_weighs_examples_by_their_size():
    rng = np.random.default_rng(3)
    size, first = rng.integers(1, 9, 200).astype(float), rng.normal(size=(2, 200))
    second = first + rng.normal(0.3, 0.5, size=(2, 200))
    found = intervals.paired(first, second, size)
    assert found.value == pytest.approx((((second - first) * size).sum(1) / size.sum()).mean())
    assert found.low < 0.3 < found.high
    reverse = intervals.paired(second, first, size)
    assert (reverse.value, reverse.low, reverse.high) == pytest.approx(
        (-found.value, -found.high, -found.low), rel=0.1
    )
    first[:, :150] = np.nan  # examples that one of them lacks count nowhere
    assert intervals.paired(first, second, size) == intervals.paired(first[:, 150:], second[:, 150:], size[150:])


def test_groups_are_drawn_together():
    """Five copies of an example say what it says alone, and as a group they are not taken for five."""
    rng = np.random.default_rng(4)
    first, second = rng.normal(size=60), rng.normal(0.2, 1, size=60)
    alone = intervals.paired(first, second)
    copies = [np.repeat(values, 5) for values in (first, second, np.arange(60))]
    assert intervals.paired(copies[0], copies[1], groups=copies[2]) == pytest.approx(alone)
    naive = intervals.paired(copies[0], copies[1])
    assert naive.high - naive.low < 0.6 * (alone.high - alone.low)
    nothing = intervals.paired(np.full(3, np.nan), np.zeros(3))
    assert np.isnan(nothing).all()
