"""Scores -> token weights: which tokens are learnt (+1), forgotten (-1) or left alone (0).

A score is in nats, high = useful: `ref_logps - base_logps` for `"influence"` (arXiv 2508.04329, there with the losses'
sign; the same as Token Cleaning, 2502.01968). Selection needs no model, so changing a threshold never rescores. A
rule turns into one boundary per token, and labels follow from comparing with it: for a whole data set the boundary
comes from `order_statistic` and the rows pass by in blocks, so 1e8 tokens need no more memory than 1e6.

Rejected: a forced share of negatives as the default. The published rule calls the worst 30 % negative whether they are
noise or not, which ruins a small model (docs/demo.md); it is one setting away (`positive_fraction=0.7`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
from datasets import Dataset

from .blocks import ColumnWriter, TokenBlock, token_blocks, trained_mask, with_column
from .collator import BASE_LOGPS, REF_LOGPS, WEIGHTS
from .order_statistic import boundary_of_fraction, kept

if TYPE_CHECKING:
    from .config import SelectiveSFTConfig

logger = logging.getLogger(__name__)

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
    check_finite(scores)
    if negative_threshold is not None:
        boundary = -float(negative_threshold)
    else:
        assert positive_fraction is not None
        keep = int(kept(positive_fraction, n))
        boundary = np.inf if keep == 0 else float(np.partition(scores, n - keep)[n - keep])
    return labels_at(scores, boundary, neutral_band=neutral_band, protected=protected)


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
        neutral_band, protected: as in `label_tokens`.

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
        scores: `(n,)` float.
        groups: `(n,)` int64, ascending: the group of each token.

    Returns:
        `(n,)`, of the dtype of `scores`: lowest score among the best `fraction` of the token's group, or +inf.
    """
    _, starts, counts = np.unique(groups, return_index=True, return_counts=True)
    ranked = scores[np.lexsort((scores, groups))]
    keep = kept(fraction, counts)
    lowest = np.where(keep > 0, ranked[np.minimum(starts + counts - keep, scores.size - 1)], np.inf)
    return np.repeat(lowest.astype(scores.dtype), counts)


def check_finite(scores: np.ndarray, where: str = "score number {}") -> None:
    """Raise `ValueError` when a score is NaN or infinite; `where` names it by its index."""
    if np.isfinite(scores).all():
        return
    bad = int(np.flatnonzero(~np.isfinite(scores))[0])
    raise ValueError(
        f"{where.format(bad)} is {scores[bad]}: a model returned a log-probability that is not finite. "
        "Score in float32 (reference_model_init_kwargs={'dtype': 'float32'}) or repair the model"
    )


def select_token_weights(
    base_logps: Sequence[np.ndarray],
    ref_logps: Sequence[np.ndarray],
    trained: Sequence[np.ndarray],
    protected: Sequence[np.ndarray],
    args: SelectiveSFTConfig,
) -> list[np.ndarray]:
    """Token weights of every row of a batch, under the selection settings of `args`.

    Args:
        base_logps, ref_logps: one `(row length,)` float array per row, nats.
        trained: one bool array per row: the token has a label and is predicted from its past.
        protected: one bool array per row: special tokens, never negative (positive instead).

    Returns:
        one float32 array per row of -1, 0, 1; 0 wherever `trained` is false. With `forget_weight=0` negatives are 0:
        ignoring is forgetting with weight zero, and such rows are then skipped altogether.
    """
    lengths = np.array([len(row) for row in trained], np.int64)
    mask = _concatenate(trained, bool)
    scores = (_concatenate(ref_logps, np.float32) - _concatenate(base_logps, np.float32))[mask]
    check_finite(scores)
    rows = np.repeat(np.arange(len(lengths)), lengths)[mask]
    boundary = _boundary(lambda: iter([scores]), args)
    labels = _labels(scores, boundary, rows, _concatenate(protected, bool)[mask], args)
    weights = np.zeros(mask.size, dtype=np.float32)
    weights[mask] = labels
    return np.split(weights, np.cumsum(lengths)[:-1]) if len(lengths) else []


def add_token_weights(
    dataset: Dataset, args: SelectiveSFTConfig, special_ids: np.ndarray, padding_free: bool
) -> Dataset:
    """`dataset` with the column `token_weights`, selected under the settings of `args`, in bounded memory.

    Args:
        dataset: final rows with `input_ids`, `labels`, `base_logps`, `ref_logps` and, when packed, `seq_lengths`.
        special_ids: `(k,)` int64, ids of tokens that are never negative.
        padding_free: whether the documents of a packed row are kept apart.

    Returns:
        the data set with int8 lists of -1, 0, 1, in a memory-mapped temporary file; 0 for tokens that are not trained
        and, with `forget_weight=0`, for negative ones.

    Raises:
        `ValueError` for a score that is not finite, naming its row.
    """

    def scored() -> Iterator[tuple[TokenBlock, np.ndarray, np.ndarray]]:
        for block in token_blocks(dataset, ["input_ids", "labels", BASE_LOGPS, REF_LOGPS]):
            mask = trained_mask(block, padding_free)
            yield block, mask, _scores(block, mask)

    boundary = _boundary(lambda: (scores for _, _, scores in scored()), args)
    writer = ColumnWriter(WEIGHTS, "int8")
    lowest, highest = np.inf, -np.inf
    for block, mask, scores in scored():
        rows = np.repeat(np.arange(len(block.lengths)), block.lengths)[mask]
        protected = np.isin(block.columns["input_ids"], special_ids)[mask]
        weights = np.zeros(mask.size, np.int8)
        weights[mask] = _labels(scores, boundary, rows, protected, args)
        writer.write(weights, block.lengths)
        lowest, highest = scores.min(initial=lowest), scores.max(initial=highest)
    if highest - lowest < 1e-6 and highest >= lowest:
        logger.warning(
            "all tokens have the same score: the reference says what the model says, so nothing can be selected. "
            "Is the reference another checkpoint than the model?"
        )
    return with_column(dataset, WEIGHTS, writer.dataset())


def _scores(block: TokenBlock, mask: np.ndarray) -> np.ndarray:
    """Scores of the trained tokens of a block, float32."""
    scores = (block.columns[REF_LOGPS] - block.columns[BASE_LOGPS])[mask]
    if not np.isfinite(scores).all():
        token = int(np.flatnonzero(mask)[np.flatnonzero(~np.isfinite(scores))[0]])
        check_finite(scores, f"row {block.row_of(token)}: score number {{}} of its block")
    return scores


def _boundary(blocks, args: SelectiveSFTConfig) -> float | None:
    """The boundary that all tokens share; `None` when each row has its own."""
    if args.negative_threshold is not None:
        return -float(args.negative_threshold)
    assert args.positive_fraction is not None
    return boundary_of_fraction(blocks, args.positive_fraction) if args.selection_scope == "global" else None


def _labels(
    scores: np.ndarray, boundary: float | None, rows: np.ndarray, protected: np.ndarray, args: SelectiveSFTConfig
) -> np.ndarray:
    own = boundary if boundary is not None else group_boundaries(scores, rows, args.positive_fraction or 0.0)
    labels = labels_at(scores, own, neutral_band=args.neutral_band, protected=protected)
    return np.maximum(labels, NEUTRAL) if args.forget_weight == 0 else labels


def _concatenate(rows: Sequence[np.ndarray], dtype) -> np.ndarray:
    return np.concatenate([np.asarray(row, dtype=dtype) for row in rows]) if len(rows) else np.zeros(0, dtype=dtype)
