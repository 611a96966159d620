"""Rules on arrays of scores: class +1 (positive), -1 (negative) or 0 (neutral) for each token.

A rule, a threshold or a share, becomes a boundary, and a score below it makes a token negative. Flat numpy arrays, no
loop over tokens; `weights.py` says which tokens there are and where their scores come from.

Rejected: a forced share of negatives as the default. The published rule calls the worst 30 % negative whether they are
noise or not, which ruins a small model (docs/demo.md); `positive_fraction=0.7` sets it.
"""

from __future__ import annotations

import numpy as np

from .quantile import from_ordered_bits, kept, ordered_bits

POSITIVE, NEUTRAL, NEGATIVE = np.int8(1), np.int8(0), np.int8(-1)


def classes_at(
    scores: np.ndarray,
    boundary: float | np.floating | np.ndarray,
    *,
    neutral_band: float | np.floating = 0.0,
    protected: np.ndarray | None = None,
) -> np.ndarray:
    """Classes of tokens, given the boundary below which a score is negative.

    Args:
        scores: `(n,)` float, finite.
        boundary: one number, or `(n,)` of the dtype of `scores`: the boundary of each token's own scope.
        neutral_band: tokens whose score is within this distance of the boundary are neutral.
        protected: `(n,)` bool, tokens that are never negative (they stay positive).

    Returns:
        `(n,)` int8 of -1, 0, 1.
    """
    classes = np.where(scores < boundary, NEGATIVE, POSITIVE)
    if neutral_band > 0:
        classes[np.abs(scores - boundary) <= neutral_band] = NEUTRAL
    if protected is not None:
        classes[protected & (classes == NEGATIVE)] = POSITIVE
    return classes


def boundaries_by_group(scores: np.ndarray, groups: np.ndarray, fraction: float) -> np.ndarray:
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


def cap_negatives(classes: np.ndarray, scores: np.ndarray, groups: np.ndarray, share: float) -> None:
    """Turn negatives beyond `share` of their group's tokens into neutral ones, in place; the worst scores stay.

    They do not become positive: a token is not worth learning just because others are worse.

    Args:
        classes: `(n,)` int8. groups: `(n,)` int64, ascending. Equal scores: the earlier token stays negative.
    """
    negative = np.flatnonzero(classes == NEGATIVE)
    order = negative[np.lexsort((scores[negative], groups[negative]))]
    _, starts, counts = np.unique(groups[order], return_index=True, return_counts=True)
    rank = np.arange(order.size) - np.repeat(starts, counts)
    names, sizes = np.unique(groups, return_counts=True)
    allowed = kept(share, sizes)[np.searchsorted(names, groups[order])]
    classes[order[rank >= allowed]] = NEUTRAL
