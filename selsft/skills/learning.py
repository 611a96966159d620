"""When single examples are learned and forgotten, and whether what is learned late is forgotten early.

An example is learned at the first step at which P(gold) is at least 0.6, and forgotten at the first at which it is
below (the paper, learning order). Rejected: fitting a curve per example (few evaluations, and parameters to choose).
"""

from __future__ import annotations

import numpy as np
import pandas as pd

from .forgetting import Ends
from .predictors import Correlation, spearman
from .table import END, MODEL, Model

THRESHOLD = 0.6
MIN_EXAMPLES = 100
"""Tasks with fewer examples that are both learned and forgotten give no coefficient, as in the paper."""


def crossings(curve: np.ndarray, steps: np.ndarray, rising: bool, threshold: float = THRESHOLD) -> np.ndarray:
    """The first step at which each example has crossed the threshold.

    Args:
        curve: (steps, n) P(gold); the first row is where the stage starts.
        steps: (steps,) increasing.
        rising: learned, from below to at least the threshold; else forgotten, from at least it to below.

    Returns:
        (n,) float64, NaN for examples that start on the far side already, never cross, or lack a value.
    """
    across = curve >= threshold if rising else curve < threshold
    crossed = across.any(axis=0) & ~across[0] & ~np.isnan(curve).any(axis=0)
    return np.where(crossed, steps[across.argmax(axis=0)].astype(np.float64), np.nan)


def example_steps(found: pd.DataFrame, threshold: float = THRESHOLD) -> pd.DataFrame:
    """The step at which each example is learned (fine-tuning) and forgotten, in the runs that scored inside stages.

    A stage starts at its step 0 if that was scored, else at the end of the stage before it. Its end counts as one step
    after the last that was scored.

    Args:
        found: rows of `metrics.questions`, all steps.

    Returns:
        One row per forgotten model, split and example of its own task: `MODEL`, `split`, `example_id`, `learned_step`,
        `forgotten_step` (NaN: did not cross).
    """
    names = [*MODEL, "split", "example_id", "learned_step", "forgotten_step"]
    if (found["step"] == END).all():
        return pd.DataFrame(columns=names)
    ends = Ends(found)
    by_model = dict(list(found.groupby([*MODEL, "eval_task", "split"], observed=True)))
    rows = []
    for (_, _, task), models in ends.forgotten().items():
        for model in models:
            parent = ends.finetuned(model, task, "parent")
            for split in ("train", "test"):
                stages = [ends.base(model), parent, model]
                curves = [_curve(by_model.get((*stage, task, split))) if stage else None for stage in stages]
                steps = [
                    _crossing_steps(before, after, rising, threshold)
                    for before, after, rising in ((curves[0], curves[1], True), (curves[1], curves[2], False))
                ]
                if steps[0] is None or steps[1] is None:
                    continue
                both = pd.DataFrame({"learned_step": steps[0], "forgotten_step": steps[1]})
                both = both.rename_axis("example_id").reset_index()
                rows.append(both.assign(**model._asdict(), split=split))
    return pd.concat(rows, ignore_index=True)[names] if rows else pd.DataFrame(columns=names)


def _curve(group: pd.DataFrame | None) -> pd.DataFrame | None:
    """(steps, n) P(gold), by step and example; the end of the stage as one step after the last."""
    if group is None:
        return None
    last = group["step"].max() + 1
    step = group["step"].where(group["step"] != END, last)
    return group.assign(step=step, example_id=group["example_id"].astype(str)).pivot(
        index="step", columns="example_id", values="confidence"
    )


def _crossing_steps(
    before: pd.DataFrame | None, after: pd.DataFrame | None, rising: bool, threshold: float
) -> pd.Series | None:
    """By example; None if the stage was not scored inside, or if its start is not known."""
    if after is None or len(after) < 2:
        return None
    if after.index[0] != 0:
        if before is None:
            return None
        start = before.iloc[[-1]].set_axis([0]).reindex(columns=after.columns)
        after = pd.concat([start, after])
    found = crossings(after.to_numpy(dtype=np.float64), after.index.to_numpy(), rising, threshold)
    return pd.Series(found, index=after.columns)


def learning_order(steps: pd.DataFrame, min_examples: int = MIN_EXAMPLES) -> pd.DataFrame:
    """Spearman of the learned with the forgotten step, over the examples that have both.

    A negative rho says: what was learned late is forgotten early.

    Returns:
        One row per model and split: `MODEL`, `split`, `n_examples` (all), and the fields of `Correlation`, where `n`
        counts the examples that were learned and forgotten. Null below `min_examples` of them.
    """
    rows = []
    for key, group in steps.groupby([*MODEL, "split"], observed=True, sort=True):
        both = group[["learned_step", "forgotten_step"]].dropna()
        found = spearman(both["learned_step"].to_numpy(), both["forgotten_step"].to_numpy())
        if len(both) < min_examples:
            null = float("nan")
            reason = f"{len(both)} examples were learned and forgotten, at least {min_examples} needed"
            found = Correlation(len(both), null, null, null, null, reason)
        model = Model(*key[:5])
        rows.append({**model._asdict(), "split": key[5], "n_examples": len(group), **found._asdict()})
    return pd.DataFrame(rows, columns=[*MODEL, "split", "n_examples", *Correlation._fields])
