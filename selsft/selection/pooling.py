"""Token scores pooled over words, spans or rows, and a look ahead at the next token.

A word is wrong as a whole. A probability of being wrong is pooled by its worst piece (`word`): the first piece of a
misspelt word is often likely and the second is not. Log-probabilities are summed (`word_sum`), which gives that of the
word; rare words and misspelt ones have many pieces. Where an error begins is easier to see than where it ends, hence
`span`: from a bad token to the end of its word. `row` is for judgements of whole answers. One pass over flat arrays.
Rejected: the mean within a word (measured: worse than the minimum), and smoothing over neighbours (no gain).
"""

from __future__ import annotations

import numpy as np


def pool_scores(
    scores: np.ndarray,
    mask: np.ndarray,
    documents: np.ndarray,
    words: np.ndarray | None,
    pooling: str = "token",
    lookahead: float = 0.0,
    worst: int | None = None,
) -> np.ndarray:
    """Pooled scores, `(tokens,)` float32; meaningless outside `mask`.

    Args:
        scores: `(tokens,)` float, high = useful.
        mask: `(tokens,)` bool: tokens that count.
        documents: `(tokens,)` int, ascending: the document of each token, which bounds words, spans and rows.
        words: `(tokens,)` int, ascending: number of each token's word; for `word`, `word_sum` and `span`.
        pooling: `token` leaves scores as they are; `word` gives each token the lowest score of its word, `word_sum`
            the sum over its word; `span` the lowest from the beginning of its word up to itself; `row` the mean over
            its document.
        lookahead: this times the next token's score is added first, where the document has a next token that counts.
        worst: with `row`: the mean of this many lowest scores instead of all.
    """
    scores = np.array(scores, np.float32)
    if lookahead and scores.size:
        follows = (documents[1:] == documents[:-1]) & mask[1:]
        scores[:-1] += np.where(follows, np.float32(lookahead) * scores[1:], np.float32(0))
    if pooling == "token" or not scores.size:
        return scores
    if pooling == "row":
        return _row_means(scores, mask, documents, worst)
    assert words is not None
    own = np.where(mask, scores, np.float32(0 if pooling == "word_sum" else np.inf))
    # A word of one document; words are numbered within rows, which may hold several documents
    same = (words[1:] == words[:-1]) & (documents[1:] == documents[:-1])
    if pooling in ("word", "word_sum"):
        starts = np.flatnonzero(np.concatenate([[True], ~same]))
        if pooling == "word":
            pooled = np.minimum.reduceat(own, starts)
        else:  # in float64: the sum of a word is the same wherever the word stands
            pooled = np.add.reduceat(own.astype(np.float64), starts).astype(np.float32)
        return np.repeat(pooled, np.diff(starts, append=own.size))
    groups = np.cumsum(np.concatenate([[True], ~same]))
    step = 1
    while step < own.size:  # running minimum within a group, over 2, 4, 8 ... tokens
        inside = groups[step:] == groups[:-step]
        if not inside.any():
            break
        own[step:] = np.where(inside, np.minimum(own[step:], own[:-step]), own[step:])
        step *= 2
    return own


def _row_means(scores: np.ndarray, mask: np.ndarray, documents: np.ndarray, worst: int | None) -> np.ndarray:
    at = np.unique(documents, return_inverse=True)[1]
    counted = np.flatnonzero(mask)
    if worst is not None:
        order = counted[np.lexsort((scores[counted], at[counted]))]
        first = np.searchsorted(at[order], at[order])
        counted = order[np.arange(order.size) - first < worst]
    size = int(at.max()) + 1
    sums = np.bincount(at[counted], scores[counted].astype(np.float64), minlength=size)
    counts = np.bincount(at[counted], minlength=size)
    return (sums / np.maximum(counts, 1)).astype(np.float32)[at]
