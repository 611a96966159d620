"""Scores -> token weights: which tokens are learnt (+1), forgotten (-1) or left alone (0).

A score is `ref_logps - base_logps`, in nats, high = the reference finds the token more likely than the base does
(influence score of arXiv 2508.04329, there with the losses' sign; the same as Token Cleaning, 2502.01968). Selection
needs no model, so changing a threshold never rescores. Everything here is numpy over one flat array of tokens: a
data set of 1e8 tokens has 4 bytes of score and 1 byte of label each, and a Python loop over tokens would take minutes.

Rejected: a forced share of negatives as the default. The published rule calls the worst 30 % negative whether they are
noise or not, which ruins a small model (docs/demo.md); it is one setting away (`positive_fraction=0.7`).
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from .config import SelectiveSFTConfig

POSITIVE, NEUTRAL, NEGATIVE = np.int8(1), np.int8(0), np.int8(-1)


def label_tokens(
    scores: np.ndarray,
    *,
    negative_threshold: float | None = None,
    positive_fraction: float | None = None,
    neutral_band: float = 0.0,
    protected: np.ndarray | None = None,
) -> np.ndarray:
    """Label the scored tokens of one scope (a whole data set, or one sequence).

    Args:
        scores: `(n,)` float, nats, high = useful.
        negative_threshold: a token is negative when its score is below minus this value.
        positive_fraction: share of the tokens that is positive, best scores first; the rest is negative. Tokens that
            tie with the last positive one are positive too. Exactly one of the two rules must be given.
        neutral_band: tokens whose score lies within this distance of the boundary get label 0, in nats.
        protected: `(n,)` bool, tokens that are never negative (they stay positive).

    Returns:
        `(n,)` int8 of -1, 0, 1.
    """
    if (negative_threshold is None) == (positive_fraction is None):
        raise ValueError(
            f"exactly one of negative_threshold ({negative_threshold}) and positive_fraction ({positive_fraction}) "
            "must be set"
        )
    n = scores.size
    if n == 0:
        return np.zeros(0, dtype=np.int8)
    if not np.isfinite(scores).all():
        bad = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"score number {bad} is {scores[bad]}: a model returned a log-probability that is not finite. "
            "Score in float32 (reference_model_init_kwargs={'dtype': 'float32'}) or repair the model"
        )
    if negative_threshold is not None:
        boundary = -float(negative_threshold)
    else:
        assert positive_fraction is not None
        keep = int(positive_fraction * n + 1e-9)  # 0.7 * 10 is 7.000000000000001 or 6.999..., never 6
        boundary = np.inf if keep == 0 else float(np.partition(scores, n - keep)[n - keep])
    labels = np.where(scores < boundary, NEGATIVE, POSITIVE)
    if neutral_band > 0 and np.isfinite(boundary):
        labels[np.abs(scores - boundary) <= neutral_band] = NEUTRAL
    if protected is not None:
        labels[protected & (labels == NEGATIVE)] = POSITIVE
    return labels


def select_token_weights(
    base_logps: Sequence[np.ndarray],
    ref_logps: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    protected: Sequence[np.ndarray],
    args: SelectiveSFTConfig,
) -> list[np.ndarray]:
    """Token weights of every row, under the selection settings of `args`.

    Args:
        base_logps, ref_logps: one `(row length,)` float array per row, nats.
        trained: one bool array per row: the token has a label and is predicted from its past.
        protected: one bool array per row: special tokens, never negative (positive instead).

    Returns:
        one float32 array per row of -1, 0, 1; 0 wherever `trained` is false. With `forget_weight=0` negatives are 0:
        ignoring is forgetting with weight zero, and such rows are then skipped altogether.
    """
    label = functools.partial(
        label_tokens,
        negative_threshold=args.negative_threshold,
        positive_fraction=args.positive_fraction,
        neutral_band=args.neutral_band,
    )
    lengths = [len(row) for row in trained]
    mask = _concatenate(trained, bool)
    scores = (_concatenate(ref_logps, np.float32) - _concatenate(base_logps, np.float32))[mask]
    shield = _concatenate(protected, bool)[mask]
    if args.selection_scope == "global":
        labels = label(scores, protected=shield)
    else:
        ends = np.cumsum([int(row.sum()) for row in trained])[:-1]
        parts = zip(np.split(scores, ends), np.split(shield, ends), strict=True)
        labels = _concatenate([label(part, protected=guard) for part, guard in parts], np.int8)
    if args.forget_weight == 0:
        labels = np.maximum(labels, NEUTRAL)
    weights = np.zeros(mask.size, dtype=np.float32)
    weights[mask] = labels
    return np.split(weights, np.cumsum(lengths)[:-1]) if lengths else []


def _concatenate(rows: Sequence[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if len(rows) else np.zeros(0, dtype=dtype)
