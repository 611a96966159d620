"""Intervals over examples and seeds at once: the one bootstrap of the package.

Evaluations cross the two: every seed's model answers the same questions. A draw takes the questions with replacement,
the same ones for all seeds and all models (so that differences are paired), and weights the seeds. Three corrections
make 95 % intervals hold their level at the usual three seeds (measured in `tests/evaluation/test_intervals.py`):

* Resampling S seeds understates their variance by (S - 1)/S (Davison & Hinkley 1997, section 2.7 of "Bootstrap
  Methods"): deviations from equal weights are scaled by sqrt(S/(S-1)).
* Two or three seeds say little about their own spread: deviations are scaled by t(S-1)/z as well, the ratio of the
  Student and normal quantiles.
* Seeds' means also differ because each answers finitely many questions, which the resampled questions count already:
  deviations are shrunk towards the variance component of the seeds of the two-way analysis of variance (ibid.,
  section 3.8), by sqrt(max(0, 1 - MS_residual/(2 MS_seeds))). Without the 2 it would be that component, whose
  estimate from a few seeds is 0 too often: coverage falls to 87 % at two seeds.

Examples that belong together (the tokens of a row, the answers to a question) are drawn together, as groups.

Rejected: resampling seeds and questions independently without these: at three seeds that differ, 95 % intervals cover
75 %. With one seed there is nothing to resample; such an interval is about examples only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy import stats

LEVEL = 0.95


class Interval(NamedTuple):
    """An estimate with the ends of its interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Draws:
    """Weights of one set of bootstrap draws, shared by all that is compared draw by draw.

    Attributes:
        examples: (draws, n) float64, times each question was drawn, over n.
        seeds: (draws, S) float64, deviation of each seed's weight from 1/S, before shrinkage. Rows sum to 0.
    """

    examples: np.ndarray
    seeds: np.ndarray


@functools.lru_cache(maxsize=8)  # Tasks of a study mostly have the same number of questions.
def draw(n_seeds: int, n_examples: int, draws: int = 2000, seed: int = 0, level: float = LEVEL) -> Draws:
    """Draw the weights, which are read-only. The same arguments give the same weights."""
    if n_seeds < 1 or n_examples < 1:
        raise ValueError(f"a bootstrap needs at least one seed and one example; got {n_seeds} and {n_examples}")
    rng = np.random.default_rng([seed, n_examples])
    examples = rng.multinomial(n_examples, np.full(n_examples, 1 / n_examples), size=draws) / n_examples
    weights = Draws(examples, draw_seeds(n_seeds, draws, seed, level))
    weights.examples.flags.writeable = weights.seeds.flags.writeable = False
    return weights


def draw_seeds(n_seeds: int, draws: int = 2000, seed: int = 0, level: float = LEVEL) -> np.ndarray:
    """(draws, S) the deviations of `Draws.seeds`."""
    if n_seeds == 1:
        return np.zeros((draws, 1))
    rng = np.random.default_rng([seed, n_seeds, 1])
    weights = rng.multinomial(n_seeds, np.full(n_seeds, 1 / n_seeds), size=draws) / n_seeds
    tail = (1 + level) / 2
    scale = np.sqrt(n_seeds / (n_seeds - 1)) * stats.t.ppf(tail, n_seeds - 1) / stats.norm.ppf(tail)
    return (weights - 1 / n_seeds) * scale


def mean(values: np.ndarray) -> float:
    """Mean over seeds of the means over examples; values (S, n), NaN where a seed lacks an example."""
    return float(np.nanmean(values, axis=1).mean())


def mean_draws(values: np.ndarray, weights: Draws, size: np.ndarray | None = None) -> np.ndarray:
    """(draws,) bootstrap draws of `mean(values)`; values (S, n), NaN where a seed lacks an example.

    Args:
        size: (n,) weight of each example in a seed's mean, for instance its tokens; then without NaN in `values`.
    """
    if size is not None:
        by_seed = (weights.examples @ (size * values).T) / (weights.examples @ size)[:, None]
        values = size * values / size.mean()  # whose plain means are the weighted ones
    else:
        known = ~np.isnan(values)
        by_seed = weights.examples @ np.where(known, values, 0.0).T
        if not known.all():  # Otherwise the examples' weights of a draw sum to 1.
            with np.errstate(invalid="ignore"):
                by_seed = by_seed / (weights.examples @ known.T)
    return ((1 / len(values) + weights.seeds * seed_share(values)) * by_seed).sum(axis=1)


def seed_share(values: np.ndarray) -> float:
    """sqrt(max(0, 1 - MS_residual/(2 MS_seeds))): how much of the spread of the seeds' means to count as their own.

    Over the examples that all seeds have; 1 (no shrinkage) where there are fewer than two.
    """
    complete = values[:, ~np.isnan(values).any(axis=0)]
    seeds, n = complete.shape
    if seeds == 1 or n < 2:
        return 1.0
    by_seed, by_example = complete.mean(axis=1), complete.mean(axis=0)
    residual = complete - by_seed[:, None] - by_example + complete.mean()
    between = n * by_seed.var(ddof=1)
    within = (residual**2).sum() / ((seeds - 1) * (n - 1))
    return float(np.sqrt(max(0.0, 1 - within / (2 * between)))) if between > 0 else 0.0


def interval(
    value: float, draws: np.ndarray, low: float = -np.inf, high: float = np.inf, level: float = LEVEL
) -> Interval:
    """The percentile interval of draws, cut to the range that the quantity can have."""
    ends = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2])
    return Interval(value, float(np.clip(ends[0], low, high)), float(np.clip(ends[1], low, high)))


def paired(
    first: np.ndarray,
    second: np.ndarray,
    size: np.ndarray | None = None,
    groups: np.ndarray | None = None,
    draws: int = 2000,
    seed: int = 0,
) -> Interval:
    """The difference `second - first` of two models' means, with its interval over examples and seeds.

    Args:
        first, second: (n,) or (S, n), a value per example, row s with one seed. Examples with a NaN are left out.
        size: (n,) weight of each example in a mean, for instance its tokens; equal by default.
        groups: (n,) examples with equal values are drawn together; by default each alone.

    Returns:
        the mean over seeds of the (weighted) means over examples; all NaN when no example is left.
    """
    change = np.atleast_2d(second).astype(float) - np.atleast_2d(first)
    known = ~np.isnan(change).any(axis=0)
    if not known.any():
        return Interval(np.nan, np.nan, np.nan)
    change = change[:, known]
    weight = np.ones(change.shape[1]) if size is None else np.asarray(size, float)[known]
    if groups is not None:
        at = np.unique(np.asarray(groups)[known], return_inverse=True)[1]
        totals = np.stack([np.bincount(at, weight * row) for row in change])
        weight = np.bincount(at, weight)
        change = totals / weight
    value = float(np.average(change, axis=1, weights=weight).mean())
    return interval(value, mean_draws(change, draw(*change.shape, draws, seed), weight))


def bootstrap(
    statistic: Callable[[np.ndarray], float], groups: np.ndarray, draws: int = 2000, seed: int = 0
) -> Interval:
    """A statistic of weighted examples with its interval over groups of examples.

    Args:
        statistic: of (n,) weights, how often each example counts; NaN where it is undefined.
        groups: (n,) examples with equal values are drawn together.
    """
    at = np.unique(groups, return_inverse=True)[1]
    times = draw(1, int(at.max()) + 1, draws, seed).examples * (at.max() + 1)
    return interval(statistic(np.ones(len(at))), np.array([statistic(row[at]) for row in times]))
