"""Which tokens make a word, from token ids alone.

A word is a run of letters and digits (with an apostrophe inside) or a run of other visible signs; a CJK character is a
word of its own. A token belongs to the word of its first visible character. The vocabulary is read once; the tokens of
a data set then cost a few array operations, so that scores can be pooled over words in a stream.
Rejected: finding words in the text, which scored rows no longer have.
"""

from __future__ import annotations

import re
import unicodedata

import numpy as np
from transformers import PreTrainedTokenizerBase

from .alignment import token_bytes
from .tokenizers import special_ids

_CJK = re.compile("[\u2e80-\u2fdf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]")
_APOSTROPHE = re.compile(r"(?<=\w)['’](?=\w)|^['’](?=\w)")
# Kinds of a character; a token that continues the bytes of a character belongs to the word before it
_CONTINUES, _LETTER, _SIGN, _ALONE = range(4)


class Words:
    """The words of one tokenizer's tokens.

    Args:
        tokenizer: its vocabulary says what each token spells.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        pieces = token_bytes(tokenizer) or _word_pieces(tokenizer)
        size = max(len(pieces), max(special_ids(tokenizer), default=0) + 1)
        self._first, self._last = np.full((2, size), _ALONE, np.uint8)
        self._spaced, self._ends = np.zeros((2, size), bool)  # begins with white space; another word follows
        self._joins = np.zeros(size, bool)  # an apostrophe and a letter
        for index, piece in enumerate(pieces):
            if piece:
                self._read(index, piece)
        for index in special_ids(tokenizer):
            self._first[index] = self._last[index] = _ALONE

    def _read(self, index: int, piece: bytes) -> None:
        text = piece.decode("utf-8", errors="ignore")
        words = text.strip()
        self._spaced[index], self._ends[index] = text[:1].isspace(), text[-1:].isspace()
        continues = 0x80 <= piece[0] < 0xC0
        if not words:  # white space, or bytes of a character: from U+3000 on of a sign that is a word of its own
            lead = _ALONE if piece[-1] >= 0xE3 else _SIGN if piece[-1] == 0xE2 else _LETTER
            self._first[index] = self._last[index] = _CONTINUES if continues else lead
            return
        self._first[index] = _CONTINUES if continues else _kind(words[0])
        self._last[index] = _kind(words[-1])
        kinds = {_kind(character) for character in _APOSTROPHE.sub("", words)}
        self._ends[index] |= len(words.split()) > 1 or len(kinds) > 1
        self._joins[index] = words[0] in "'’" and words[1:2].isalnum()

    def number(self, input_ids: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Number of each token's word, `(tokens,)` int64, ascending from 0; a row begins a word.

        Args:
            input_ids: `(tokens,)`, the rows one after another.
            lengths: `(rows,)` tokens of each row.
        """
        ids = np.asarray(input_ids, np.int64)
        if not ids.size:
            return np.zeros(0, np.int64)
        ids = np.minimum(ids, len(self._first) - 1)  # embeddings may be padded beyond the vocabulary
        first, last = self._first[ids], self._last[ids]
        known = np.maximum.accumulate(np.where(last == _CONTINUES, 0, np.arange(ids.size)))
        last = np.concatenate([[_ALONE], last[known][:-1]])  # of the token before, or of where its character began
        begins = (first != last) & ~(self._joins[ids] & (last == _LETTER)) & (first != _CONTINUES)
        begins |= (first == _ALONE) | self._spaced[ids] | np.concatenate([[True], self._ends[ids][:-1]])
        starts = np.cumsum(lengths) - lengths
        begins[starts[lengths > 0]] = True
        return np.cumsum(begins) - 1


def _kind(character: str) -> int:
    if _CJK.match(character):
        return _ALONE
    mark = unicodedata.category(character)[0] == "M"
    return _LETTER if character.isalnum() or character == "_" or mark else _SIGN


def _word_pieces(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """WordPiece: a token without `##` begins a word."""
    table: list[bytes | None] = [None] * (max(tokenizer.get_vocab().values()) + 1)
    for token, index in tokenizer.get_vocab().items():
        table[index] = (token[2:] if token.startswith("##") else " " + token).encode()
    return table
