"""Properties of the base model that may predict forgetting: its confidence and the spread of its hidden states.

The paper (section "predictors") finds both weak at the level of tasks and absent at the level of examples, so each
coefficient comes with n, an interval and a permutation p; a handful of tasks rarely shows anything. Rejected: a
regression on several predictors (more coefficients than a study has tasks).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import pandas as pd
from scipy import stats

from .forgetting import Ends
from .hidden import Hidden

MIN_TASKS = 4
"""The fewest points with an interval: its standard error has n - 3 below the line."""


class Correlation(NamedTuple):
    """Spearman's rho with a 95 % interval and a two-sided permutation p; null with a reason where not defined."""

    n: int
    rho: float
    low: float
    high: float
    p: float
    reason: str


def spearman(x: np.ndarray, y: np.ndarray, permutations: int = 5000, seed: int = 0) -> Correlation:
    """Rank correlation of two vectors (n,), over the places where both are known.

    Ties get mean ranks. The interval is Fisher's z with the standard error sqrt((1 + rho²/2)/(n - 3)) of Bonett and
    Wright 2000 (Psychometrika 65); p = (1 + #{|rho*| >= |rho|})/(1 + permutations).
    """
    x, y = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    known = ~(np.isnan(x) | np.isnan(y))
    x, y, n = x[known], y[known], int(known.sum())
    null = float("nan")
    if n < MIN_TASKS:
        return Correlation(n, null, null, null, null, f"{n} points, at least {MIN_TASKS} needed")
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return Correlation(n, null, null, null, null, "one of the two is constant")
    ranks = [stats.rankdata(v) - (n + 1) / 2 for v in (x, y)]
    a, b = (r / np.sqrt((r**2).sum()) for r in ranks)
    rho = float(np.clip(a @ b, -1.0, 1.0))
    rng = np.random.default_rng(seed)
    extreme = 0
    for start in range(0, permutations, 500):  # in chunks, (500, n) in memory
        shuffled = rng.permuted(np.tile(b, (min(500, permutations - start), 1)), axis=1)
        extreme += int((np.abs(shuffled @ a) >= abs(rho) - 1e-12).sum())
    half = stats.norm.ppf(0.975) * np.sqrt((1 + rho**2 / 2) / (n - 3))
    z = np.arctanh(np.clip(rho, -1 + 1e-15, 1 - 1e-15))
    return Correlation(
        n, rho, float(np.tanh(z - half)), float(np.tanh(z + half)), (1 + extreme) / (1 + permutations), ""
    )


def variance(states: np.ndarray) -> float:
    """tr Cov = sum_i |h_i - mean h|² / (n - 1) of states (n, d); NaN for n < 2."""
    return float(spread(states).sum() / (len(states) - 1)) if len(states) > 1 else float("nan")


def spread(states: np.ndarray) -> np.ndarray:
    """(n,) |h_i - mean h|², each example's part in `variance`."""
    return ((states - states.mean(axis=0)) ** 2).sum(axis=1)


def by_task(table: pd.DataFrame, hidden: Iterable[Hidden] = ()) -> pd.DataFrame:
    """One row per (variant, method, task) forgotten on itself: predictors and what they should predict.

    Args:
        table: rows of `forgetting.forgetting` on the test split.
        hidden: states; those of base models on the test split are used.

    Returns:
        `variant`, `method`, `task`, `base_confidence` (mean P(gold) of the base model), `base_variance` (`variance` at
        the questions' last tokens, averaged over seeds; NaN where none was stored), `layer`, `ratio`, `gap`, `drop`.
    """
    variances: dict[str, list[float]] = {}
    layers: dict[str, int] = {}
    for states in hidden:
        if states.model.stage == "base" and states.split == "test":
            variances.setdefault(states.eval_task, []).append(variance(states.question()))
            layers[states.eval_task] = states.layer
    own = table[table["label_task"] == table["eval_task"]]
    found = own.rename(columns={"eval_task": "task"})
    found = found[["variant", "method", "task", "base_confidence", "ratio", "gap", "drop"]].reset_index(drop=True)
    mean = {task: float(np.mean(values)) for task, values in variances.items()}
    found.insert(4, "base_variance", found["task"].map(mean).astype(np.float64))
    found.insert(5, "layer", found["task"].map(layers).astype("Int64"))
    return found


def correlate_tasks(tasks: pd.DataFrame) -> pd.DataFrame:
    """Spearman of each predictor with the ratio and the gap, over the tasks of each variant and method.

    Returns:
        `variant`, `method`, `predictor`, `outcome` and the fields of `Correlation`. A positive rho with the ratio, or
        a negative one with the gap, says: the higher the predictor, the more is forgotten.
    """
    rows = []
    for (variant, method), group in tasks.groupby(["variant", "method"], observed=True):
        for predictor in ("base_confidence", "base_variance"):
            for outcome in ("ratio", "gap"):
                found = spearman(group[predictor].to_numpy(), group[outcome].to_numpy())
                key = {"variant": variant, "method": method, "predictor": predictor, "outcome": outcome}
                rows.append({**key, **found._asdict()})
    return pd.DataFrame(rows, columns=["variant", "method", "predictor", "outcome", *Correlation._fields])


def correlate_examples(ends: Ends, hidden: Iterable[Hidden] = ()) -> pd.DataFrame:
    """Within each task, over test examples: Spearman of a predictor with the fall of P(gold) in forgetting.

    The predictors are the base model's P(gold), and `spread`, an example's part in the hidden variance; the fall is
    P(gold) of the fine-tuned less that of the forgotten model, all averaged over seeds.

    Returns:
        `variant`, `method`, `task`, `predictor` and the fields of `Correlation`.
    """
    spreads: dict[str, list[np.ndarray]] = {}
    for states in hidden:
        if states.model.stage == "base" and states.split == "test" and (states.eval_task, "test") in ends.ids:
            found = dict(zip(states.example_ids, spread(states.question()), strict=True))
            aligned = [found.get(name, np.nan) for name in ends.ids[states.eval_task, "test"]]
            spreads.setdefault(states.eval_task, []).append(np.array(aligned))
    rows = []
    for (variant, method, task), models in ends.forgotten().items():
        seeds = [(ends.base(m), ends.finetuned(m, task, "parent"), m) for m in models]
        stages = ends.stack(seeds, task, "test", "confidence") if (task, "test") in ends.ids else None
        if stages is None:
            continue
        known = ~np.isnan(stages[0]).all(axis=0)
        base, finetuned, left = (np.nanmean(stage[:, known], axis=0) for stage in stages)
        predictors = {"base_confidence": base}
        if task in spreads:
            predictors["base_spread"] = np.mean(spreads[task], axis=0)[known]
        for name, values in predictors.items():
            key = {"variant": variant, "method": method, "task": task, "predictor": name}
            rows.append({**key, **spearman(values, finetuned - left)._asdict()})
    return pd.DataFrame(rows, columns=["variant", "method", "task", "predictor", *Correlation._fields])
