"""The most negative tokens of scored rows in context, whatever their class."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from ..data.chunks import TokenChunk
from ..data.columns import BASE_LOGPS, REF_LOGPS


@dataclass
class TokenInContext:
    """A token with its score, its log-probabilities (nats), and the text around it."""

    row: int
    position: int
    score: float
    base: float | None
    reference: float | None
    before: str
    token: str
    after: str


class WorstTokens:
    """A running list of the tokens with the lowest scores.

    Args:
        special: ids of tokens that are never listed.
        count: length of the list.
        context: tokens shown before a token, and a third of it after.

    Attributes:
        tokens: the lowest scores first; equal scores in the order of the data.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, special: np.ndarray, count: int, context: int):
        self.tokenizer, self.special, self.count, self.context = tokenizer, special, count, context
        self.tokens: list[TokenInContext] = []

    def add(self, chunk: TokenChunk, mask: np.ndarray, scores: np.ndarray) -> None:
        """Add a chunk with `input_ids` and, where they were computed, `base_logps` and `ref_logps`.

        Args:
            mask: `(tokens,)` bool: the supervised tokens.
            scores: `(tokens,)` float32.
        """
        candidates = np.flatnonzero(mask & ~np.isin(chunk.columns["input_ids"], self.special))
        if self.count and len(self.tokens) == self.count:
            candidates = candidates[scores[candidates] < self.tokens[-1].score]
        lowest = candidates[np.argsort(scores[candidates], kind="stable")[: self.count]]
        self.tokens += [self._in_context(chunk, int(token), float(scores[token])) for token in lowest]
        self.tokens = sorted(self.tokens, key=lambda token: token.score)[: self.count]

    def _in_context(self, chunk: TokenChunk, token: int, score: float) -> TokenInContext:
        row = chunk.row_of(token)
        start = int(chunk.lengths[: row - chunk.first_row].sum())
        end = start + int(chunk.lengths[row - chunk.first_row])
        ids, after = chunk.columns["input_ids"], token + 1
        parts = ids[max(start, token - self.context) : token], ids[token:after], ids[after:end][: self.context // 3]
        before, itself, behind = (str(self.tokenizer.decode(part.tolist())) for part in parts)
        base, reference = (
            float(chunk.columns[name][token]) if name in chunk.columns else None for name in (BASE_LOGPS, REF_LOGPS)
        )
        return TokenInContext(row, token - start, score, base, reference, before, itself, behind)
