"""Rules on arrays of scores: label +1 (learn), -1 (forget) or 0 (leave alone) for each token.

A rule, a threshold or a share, turns into a boundary, and labels follow from comparing with it. numpy over flat
arrays, no loop over tokens; which tokens there are and where their scores come from is `selection.py`.

Rejected: a forced share of negatives as the default. The published rule calls the worst 30 % negative whether they are
noise or not, which ruins a small model (docs/demo.md); it is one setting away (`positive_fraction=0.7`).
"""

from __future__ import annotations

import numpy as np

from .quantile import from_ordered_bits, kept, ordered_bits

POSITIVE, NEUTRAL, NEGATIVE = np.int8(1), np.int8(0), np.int8(-1)


def labels_at(
    scores: np.ndarray,
    boundary: float | np.ndarray,
    *,
    neutral_band: float = 0.0,
    protected: np.ndarray | None = None,
) -> np.ndarray:
    """Labels of tokens, given the boundary below which a score is negative.

    Args:
        scores: `(n,)` float, finite.
        boundary: one number, or `(n,)` of the dtype of `scores`: the boundary of each token's own scope.
        neutral_band: tokens whose score lies within this distance of the boundary get label 0.
        protected: `(n,)` bool, tokens that are never negative (they stay positive).

    Returns:
        `(n,)` int8 of -1, 0, 1.
    """
    labels = np.where(scores < boundary, NEGATIVE, POSITIVE)
    if neutral_band > 0:
        labels[np.abs(scores - boundary) <= neutral_band] = NEUTRAL
    if protected is not None:
        labels[protected & (labels == NEGATIVE)] = POSITIVE
    return labels


def group_boundaries(scores: np.ndarray, groups: np.ndarray, fraction: float) -> np.ndarray:
    """Boundary of each token when every group is ranked on its own.

    Args:
        scores: `(n,)` float32.
        groups: `(n,)` int64 below 2^32, ascending: the group of each token.

    Returns:
        `(n,)` float32: lowest score among the best `fraction` of the token's group, or +inf.
    """
    starts = np.flatnonzero(np.diff(groups, prepend=-1))
    counts = np.diff(starts, append=scores.size)
    # One integer per token that sorts by group, then by score: several times as fast as `numpy.lexsort`
    ranked = np.sort(groups.astype(np.uint64) << np.uint64(32) | ordered_bits(scores))
    keep = kept(fraction, counts)
    last = ranked[np.minimum(starts + counts - keep, scores.size - 1)].astype(np.uint32)  # drops the group
    lowest = np.where(keep > 0, from_ordered_bits(last), np.float32(np.inf))
    return np.repeat(lowest, counts)


def check_finite(scores: np.ndarray, where: str = "score number {}") -> None:
    """Raise `ValueError` when a score is NaN or infinite; `where` names it by its index."""
    if np.isfinite(scores).all():
        return
    bad = int(np.flatnonzero(~np.isfinite(scores))[0])
    raise ValueError(
        f"{where.format(bad)} is {scores[bad]}: a model returned a log-probability that is not finite. "
        "Score in float32 (reference_model_init_kwargs={'dtype': 'float32'}) or repair the model"
    )


def cap_negatives(labels: np.ndarray, scores: np.ndarray, groups: np.ndarray, share: float) -> None:
    """Turn negatives beyond `share` of their group's tokens into neutral ones, in place; the worst scores stay.

    They do not become positive: that others are worse does not make a token worth learning.

    Args:
        labels: `(n,)` int8. groups: `(n,)` int64, ascending. Equal scores: the earlier token stays negative.
    """
    negative = np.flatnonzero(labels == NEGATIVE)
    order = negative[np.lexsort((scores[negative], groups[negative]))]
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    rank = np.arange(order.size) - np.repeat(starts, counts)
    names, sizes = np.unique(groups, return_counts=True)
    allowed = kept(share, sizes)[np.searchsorted(names, groups[order])]
    labels[order[rank >= allowed]] = NEUTRAL
