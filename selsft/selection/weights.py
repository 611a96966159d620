"""From scored tokens to the column `token_weights`, for a batch, a streamed row, or a whole data set on disk.

A score is high = useful; `raw_scores` has the formulas (docs/scores.md), and pooling follows (`pooling`). Selection
needs no model, so changing a threshold, a base weight or a pooling never rescores. For a data set the boundary comes
from `quantile` and the rows are read in chunks, so 1e8 tokens need no more memory than 1e6. In this order: the rule
(threshold or share, with the neutral band), what is never negative (special tokens, the gate on the reference's
probability), the cap per document, and `forget_weight=0`, which makes negatives neutral. `"excess"`, whose scores
change with every step, is in `excess.py`.

Rejected: a class per scheme. They differ only in where a score comes from, which is one line each.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.chunks import ColumnWriter, TokenChunk, supervised_mask, token_chunks, with_column
from ..data.columns import (
    BASE_LOGPS,
    NEGATIVE_MASK,
    NOISY_LOGPS,
    PROBE_SCORES,
    READ_COLUMNS,
    REF_LOGPS,
    TOKEN_SCORES,
    WEIGHTS,
)
from ..data.tokenizers import special_ids
from ..data.words import Words
from .pooling import pool_scores
from .quantile import Chunks, Reduce, boundary_of_fraction
from .rules import NEUTRAL, boundaries_by_group, cap_negatives, check_finite, classes_at

if TYPE_CHECKING:
    from ..config import SelectiveSFTConfig

logger = logging.getLogger(__name__)


def raw_scores(columns: Mapping[str, np.ndarray], args: SelectiveSFTConfig) -> np.ndarray:
    """Scores of tokens from their columns, float32 of the columns' shape, not pooled.

    `influence` is log p_ref - beta log p_policy in nats: with beta 1 that of arXiv 2508.04329 (there with the losses'
    sign) and Token Cleaning (2502.01968). `excess` is the same with beta 1 and `base_logps` of the current model,
    `surprisal` log p_policy, `contrast` log p_ref - log p_noisy (TOSS, 2603.01185), `probe` minus the probability of
    being wrong.
    """

    def column(name: str) -> np.ndarray:
        return columns[name].astype(np.float32, copy=False)

    if args.score == "surprisal":
        return column(BASE_LOGPS)
    if args.score == "probe":
        return column(PROBE_SCORES)
    if args.score == "contrast":
        return column(REF_LOGPS) - column(NOISY_LOGPS)
    if args.score == "given":
        return column(TOKEN_SCORES)
    beta = 1.0 if args.score == "excess" else args.score_base_weight
    return column(REF_LOGPS) - np.float32(beta) * column(BASE_LOGPS)


def vocabulary(tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig) -> tuple[np.ndarray, Words | None]:
    """Ids of the tokens that are never negative, `(k,)` int64, and the words of the tokenizer where scores are pooled
    over them."""
    special = special_ids(tokenizer) if args.protect_special_tokens else np.zeros(0, np.int64)
    return special, Words(tokenizer) if args.pools_words else None


def pools(args: SelectiveSFTConfig) -> bool:
    """Whether a token's score depends on other tokens of its row."""
    return args.score not in ("random", "oracle") and (args.pooling != "token" or args.score_lookahead != 0)


def pooled_scores(
    scores: np.ndarray,
    input_ids: np.ndarray,
    lengths: np.ndarray,
    mask: np.ndarray,
    args: SelectiveSFTConfig,
    words: Words | None,
) -> np.ndarray:
    """`pool_scores` under the settings of `args`; arrays are `(tokens,)`, `lengths` `(documents,)`."""
    if not pools(args):
        return scores
    numbers = None
    if args.pools_words:
        if words is None:
            raise ValueError(f"score_pooling={args.pooling!r} needs the tokenizer's words")
        numbers = words.number(input_ids, lengths)
    return pool_scores(
        scores, mask, _numbered(lengths), numbers, args.pooling, args.score_lookahead, args.score_row_worst
    )


@dataclass
class ScoredTokens:
    """The supervised tokens of some rows, one after another; all arrays `(n,)`.

    `rows` and `documents` number the row and the document of each token, ascending; `protected` are special tokens;
    `ref_logps` (nats) is needed for a gate only.
    """

    scores: np.ndarray
    rows: np.ndarray
    documents: np.ndarray
    protected: np.ndarray
    ref_logps: np.ndarray | None = None


def token_classes(tokens: ScoredTokens, boundary: float | None, args: SelectiveSFTConfig) -> np.ndarray:
    """Classes under all selection settings of `args`, `(n,)` int8.

    Args:
        boundary: what the tokens share (`shared_boundary`), or `None` where each row is ranked on its own.
    """
    own: float | np.ndarray | None = boundary
    if own is None:
        assert args.effective_fraction is not None
        own = boundaries_by_group(tokens.scores, tokens.rows, args.effective_fraction)
    safe = tokens.protected
    if args.gate_reference_prob is not None:
        assert tokens.ref_logps is not None
        safe = safe | (tokens.ref_logps >= np.float32(math.log(args.gate_reference_prob)))
    classes = classes_at(tokens.scores, own, neutral_band=args.neutral_band, protected=safe)
    if args.max_negative_share is not None:
        cap_negatives(classes, tokens.scores, tokens.documents, args.max_negative_share)
    return np.maximum(classes, NEUTRAL) if args.forget_weight == 0 else classes


def shared_boundary(chunks: Chunks, args: SelectiveSFTConfig, reduce: Reduce | None = None) -> float | None:
    """The score below which tokens are negative, whatever their row; `None` when each row has its own boundary.

    Args:
        chunks, reduce: as for `boundary_of_fraction`; not used under a threshold.
    """
    if args.score == "oracle":
        return 0.0  # scores of -1 and 1
    if args.effective_threshold is not None:
        return -args.effective_threshold
    assert args.effective_fraction is not None
    if args.selection_scope == "sequence":
        return None
    return boundary_of_fraction(chunks, args.effective_fraction, reduce)


def add_token_weights(
    dataset: Dataset,
    args: SelectiveSFTConfig,
    special_ids: np.ndarray,
    padding_free: bool,
    words: Words | None = None,
) -> Dataset:
    """`dataset` with the column `token_weights`, selected under the settings of `args`, in bounded memory.

    Args:
        dataset: final rows with `input_ids`, `labels`, the columns of `args.score` (`READ_COLUMNS`) and, when packed,
            `seq_lengths`.
        special_ids: `(k,)` int64, ids of tokens that are never negative.
        padding_free: whether the documents of a packed row are kept apart.
        words: of the tokenizer, for `score_pooling` by words.

    Returns:
        the data set with int8 lists of -1, 0, 1, in a memory-mapped temporary file; 0 for unsupervised tokens
        and, with `forget_weight=0`, for negative ones.

    Raises:
        `ValueError` for a score that is not finite or a mask that is not 0 or 1, naming the row.
    """

    def scored(*names: str) -> Iterator[tuple[TokenChunk, np.ndarray, np.ndarray]]:
        """Chunks, which of their tokens are supervised, and the scores of those."""
        rng = np.random.default_rng(args.seed)  # one number per token of the data, in order: the same in every pass
        for chunk in token_chunks(dataset, list(dict.fromkeys(["labels", *names, *read]))):
            mask = supervised_mask(chunk, padding_free)
            yield chunk, mask, _scores(chunk, mask, args, rng, words)

    read = [*(["input_ids"] if pools(args) else []), *READ_COLUMNS[args.score]]
    read += [REF_LOGPS] if args.gate_reference_prob is not None else []
    boundary = shared_boundary(lambda: (scores for _, _, scores in scored()), args)
    writer = ColumnWriter(WEIGHTS, "int8")
    below = total = 0
    moved = 0.0  # the largest difference between reference and model
    for chunk, mask, scores in scored("input_ids"):
        weights = np.zeros(mask.size, np.int8)
        weights[mask] = token_classes(_tokens(chunk, mask, scores, special_ids), boundary, args)
        writer.write(weights, chunk.lengths)
        total += scores.size
        below += 0 if boundary is None else int((scores < boundary - args.neutral_band).sum())
        if args.score == "influence":
            differences = np.abs(chunk.columns[REF_LOGPS][mask] - chunk.columns[BASE_LOGPS][mask])
            moved = float(differences.max(initial=moved))
    if args.score == "influence" and moved < 1e-6:
        logger.warning(
            "the reference says what the model says of every token, so the scores compare nothing. Is the reference "
            "another checkpoint than the model?"
        )
    elif args.effective_threshold is not None and args.score != "oracle" and total:
        _warn_of_share(below / total, lambda: (scores for _, _, scores in scored()), args)
    return with_column(dataset, WEIGHTS, writer.dataset())


def _warn_of_share(share: float, chunks: Chunks, args: SelectiveSFTConfig) -> None:
    """A threshold that makes nothing or most of the tokens negative is rarely what was meant.

    Args:
        share: of the tokens that score below the boundary, in [0, 1].
    """
    if 0 < share <= 0.5:
        return
    thresholds = {wanted: -boundary_of_fraction(chunks, 1 - wanted) for wanted in (0.01, 0.05, 0.2)}
    choice = ", ".join(f"{threshold:.3g} -> {wanted:.0%}" for wanted, threshold in thresholds.items())
    logger.warning(
        f"negative_threshold={args.effective_threshold:g} makes {f'{share:.1%}' if share else 'none'} of the tokens "
        f"negative. Thresholds and what they would make negative: {choice}"
    )


def row_weights(
    row: dict[str, Any],
    args: SelectiveSFTConfig,
    special_ids: np.ndarray,
    padding_free: bool,
    words: Words | None = None,
) -> np.ndarray:
    """Token weights of one streamed row, `(row length,)` int8, under a rule that needs no other row."""
    columns = {name: np.asarray(row[name]) for name in ("input_ids", "labels", *READ_COLUMNS[args.score])}
    documents = row.get("seq_lengths")
    lengths = np.array([len(row["input_ids"])])
    chunk = TokenChunk(0, lengths, columns, None if documents is None else np.asarray(documents))
    mask = supervised_mask(chunk, padding_free)
    scores = _scores(chunk, mask, args, None, words)
    weights = np.zeros(mask.size, np.int8)
    boundary = shared_boundary(lambda: [scores], args)
    weights[mask] = token_classes(_tokens(chunk, mask, scores, special_ids), boundary, args)
    return weights


def _scores(
    chunk: TokenChunk,
    mask: np.ndarray,
    args: SelectiveSFTConfig,
    rng: np.random.Generator | None,
    words: Words | None,
) -> np.ndarray:
    """Scores of the supervised tokens of a chunk, `(n,)` float32."""
    columns = chunk.columns
    if args.score == "random":
        assert rng is not None
        scores = rng.random(chunk.size, dtype=np.float32)[mask]
    elif args.score == "oracle":
        marked = columns[NEGATIVE_MASK]
        if (wrong := np.flatnonzero((marked != 0) & (marked != 1))).size:
            raise ValueError(
                f"row {chunk.row_of(int(wrong[0]))}: column {NEGATIVE_MASK!r} holds {marked[wrong[0]]}; it must be 0 "
                "or 1 (true: negative)"
            )
        scores = np.where(marked[mask] == 1, np.float32(-1), np.float32(1))
    else:
        raw = raw_scores(columns, args)
        if pools(args):
            lengths = chunk.lengths if chunk.documents is None else chunk.documents
            raw = pooled_scores(raw, columns["input_ids"], lengths, mask, args, words)
        scores = raw[mask]
    if not np.isfinite(scores).all():
        rows = _numbered(chunk.lengths)[mask]
        row = int(rows[np.flatnonzero(~np.isfinite(scores))[0]])
        check_finite(scores[rows == row], f"row {chunk.first_row + row}: score number {{}}")
    return scores


def _tokens(chunk: TokenChunk, mask: np.ndarray, scores: np.ndarray, special_ids: np.ndarray) -> ScoredTokens:
    rows = _numbered(chunk.lengths)[mask]
    documents = rows if chunk.documents is None else _numbered(chunk.documents)[mask]
    protected = np.isin(chunk.columns["input_ids"][mask], special_ids)
    reference = chunk.columns.get(REF_LOGPS)
    return ScoredTokens(scores, rows, documents, protected, None if reference is None else reference[mask])


def _numbered(lengths: np.ndarray) -> np.ndarray:
    return np.repeat(np.arange(len(lengths)), lengths)
