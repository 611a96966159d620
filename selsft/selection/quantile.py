"""The exact k-th smallest of any number of float32 scores, from two passes over chunks of them.

The bits of a float, with the sign folded in, sort like the float. A histogram of their upper half finds the bin that
holds the rank, a histogram of the lower half within that bin finds the value: 65,536 counters whatever the number of
scores, and the counters of several processes add up. Rejected: `numpy.partition`, which needs all scores in memory; a
quantile sketch, whose error would change token classes with the batch size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

_BINS = 1 << 16

Chunks = Callable[[], Iterable[np.ndarray]]
Reduce = Callable[[np.ndarray], np.ndarray]


def boundary_of_fraction(chunks: Chunks, fraction: float, reduce: Reduce | None = None) -> float:
    """Lowest score among the best `fraction` of all scores.

    Args:
        chunks: called twice; returns the same finite float32 scores each time, in any number of arrays.
        fraction: share of the scores at or above the boundary; more where scores tie with it.
        reduce: sums an int64 array over processes, when each holds a part of the scores.

    Returns:
        the boundary, a float32 value that occurs among the scores; +inf when the fraction keeps no score, -inf when
        there are no scores.
    """
    reduce = reduce or (lambda counts: counts)
    upper = reduce(_histogram(keys >> 16 for keys in map(ordered_bits, chunks())))
    total = int(upper.sum())
    keep = kept(fraction, total)
    if total == 0 or keep == 0:
        return np.inf if total else -np.inf
    bin_, rank = _find(upper, total - keep)
    lower = reduce(_histogram(keys[keys >> 16 == bin_] & np.uint32(0xFFFF) for keys in map(ordered_bits, chunks())))
    low, _ = _find(lower, rank)
    return float(from_ordered_bits(np.array([bin_ << 16 | low], np.uint32))[0])


def kept(fraction: float, total: int | np.ndarray):
    """Number of scores that `fraction` keeps of `total`: rounded down, but 0.7 of 10 (6.999... or 7.000...1) is 7."""
    return np.floor(fraction * np.asarray(total) + 1e-9).astype(np.int64)


def ordered_bits(scores: np.ndarray) -> np.ndarray:
    """`(n,)` float32 -> `(n,)` uint32 in the same order: negative ones are flipped, positive ones set the top bit."""
    bits = np.ascontiguousarray(scores, np.float32).view(np.int32)
    return bits.view(np.uint32) ^ ((bits >> 31).view(np.uint32) | np.uint32(0x80000000))


def from_ordered_bits(keys: np.ndarray) -> np.ndarray:
    """Inverse of `ordered_bits`: `(n,)` uint32 -> `(n,)` float32."""
    return np.where(keys >> 31, keys ^ np.uint32(0x80000000), ~keys).view(np.float32)


def _histogram(keys: Iterable[np.ndarray]) -> np.ndarray:
    counts = np.zeros(_BINS, np.int64)
    for part in keys:
        counts += np.bincount(part, minlength=_BINS)
    return counts


def _find(counts: np.ndarray, rank: int) -> tuple[int, int]:
    """Bin that holds the element of this rank, and its rank within the bin."""
    ends = np.cumsum(counts)
    bin_ = int(np.searchsorted(ends, rank, side="right"))
    return bin_, int(rank - (ends[bin_] - counts[bin_]))
