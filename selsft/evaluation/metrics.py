"""How well a score tells two kinds of examples apart: the one AUC of the package.

Weights make it a statistic of resampled rows, so that an interval over rows costs a pass over sorted scores for each
draw. Rejected: `sklearn.metrics.roc_auc_score`, which sorts again in every draw; counting all pairs, of which tokens
have too many.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from .intervals import Interval, bootstrap


def auc(scores: np.ndarray, positive: np.ndarray, weights: np.ndarray | None = None) -> float:
    """The area under the ROC curve: P(a positive scores above a negative) + P(they tie)/2.

    Args:
        scores: (n,).
        positive: (n,) bool.
        weights: (n,) how often each example counts; once by default.

    Returns:
        NaN when there are no positives or no negatives.
    """
    return _auc(scores, positive)(np.ones(len(scores)) if weights is None else weights)


def auc_interval(
    scores: np.ndarray, positive: np.ndarray, groups: np.ndarray | None = None, draws: int = 2000, seed: int = 0
) -> Interval:
    """`auc` with its 95 % interval over groups.

    Args:
        groups: (n,) what is drawn together: the row of each token, the question of each answer. By default each
            example alone.
    """
    return bootstrap(_auc(scores, positive), np.arange(len(scores)) if groups is None else groups, draws, seed)


def _auc(scores: np.ndarray, positive: np.ndarray) -> Callable[[np.ndarray], float]:
    """`auc` as a function of the weights, with the scores sorted once."""
    order = np.argsort(scores, kind="stable")
    kind = np.asarray(positive, bool)[order]
    ties = np.flatnonzero(np.diff(np.asarray(scores)[order], prepend=np.nan) != 0)

    def area(weights: np.ndarray) -> float:
        if not len(ties):
            return float("nan")
        weights = np.asarray(weights, float)[order]
        up, down = (np.add.reduceat(np.where(of, weights, 0.0), ties) for of in (kind, ~kind))
        pairs = up.sum() * down.sum()
        return float((up * (np.cumsum(down) - down / 2)).sum() / pairs) if pairs else float("nan")

    return area
