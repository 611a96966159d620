"""Which tokens spell which characters of a text.

A token covers a character when it spells any part of it: all tokens of an emoji that falls apart into bytes cover the
emoji. The vocabulary gives the bytes of every token; where these bytes, joined, are the text, their lengths are exact
offsets. That holds for byte-level BPE (Llama 3, Qwen, SmolLM) and for SentencePiece vocabularies with byte fallback
(Llama 2, Gemma, Mistral), with special tokens and a dummy prefix. Where they are not the text (a normaliser changed
it, or a token is unknown), the fast tokenizer's offsets are used, corrected where they are known to be wrong.

Rejected: the tokenizer's offsets throughout. They would tokenise every text a second time, count a dummy prefix as
part of the first letter, leave combining marks that NFC composed to no token, and lose spaces under `trim_offsets`.
Rejected: decoding prefixes, which is quadratic; the tests use it as the oracle.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Sequence
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerBase

CharacterRange = tuple[int, int]


class Alignment:
    """Maps ranges of characters to tokens, for one tokenizer.

    Args:
        tokenizer: fast or slow; a slow one works as long as the bytes of its tokens are the text.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._prepared = False

    def __getstate__(self) -> dict[str, Any]:
        """Without the tables, so that workers and fingerprints of `datasets` see the tokenizer alone."""
        return {"tokenizer": self.tokenizer, "_prepared": False}

    def _prepare(self) -> None:
        self._prepared = True
        self._bytes = token_bytes(self.tokenizer)
        self._lengths = np.array([len(piece or b"") for piece in self._bytes], np.int64)
        mask = self.tokenizer("a", return_special_tokens_mask=True)["special_tokens_mask"]
        ids = self.tokenizer("a")["input_ids"]
        head = mask.index(0) if 0 in mask else 0
        tail = mask[::-1].index(0) if 0 in mask else 0
        self._head, self._tail = ids[:head], ids[len(ids) - tail :]
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        marks = "q\u0307\u0323"  # in an order that every normal form of Unicode changes
        self._rewrites_marks = normalizer is not None and marks not in normalizer.normalize_str(marks)

    def tokens(
        self, input_ids: Sequence[int], text: str, ranges: Sequence[CharacterRange], special: bool = False
    ) -> list[np.ndarray]:
        """Indices of the tokens that cover each range.

        Args:
            input_ids: the tokens of `text`, `(n,)`.
            text: what was tokenised.
            ranges: start and end (exclusive) in characters of `text`.
            special: whether the tokenizer put its own special tokens around the text (BOS, EOS).

        Returns:
            one int64 array of indices into `input_ids` per range, ascending; empty where no token covers it.

        Raises:
            `ValueError` when the tokens cannot be aligned with the text.
        """
        if not self._prepared:
            self._prepare()
        ids = np.asarray(input_ids, np.int64)
        spelled = self._spelled(input_ids, text, special)
        if spelled is not None:
            shift, size = spelled
            ends = np.cumsum(self._lengths[ids]) - shift
            starts = ends - self._lengths[ids]
            if size != len(text):  # offsets of bytes
                ranges = [(len(text[:start].encode()), len(text[:end].encode())) for start, end in ranges]
        else:
            starts, ends = self._offsets(ids, text, special)
            if self._rewrites_marks and not unicodedata.is_normalized("NFC", text):
                ranges = [_whole_characters(text, start, end) for start, end in ranges]
        return [np.flatnonzero((starts < end) & (ends > start) & (ends > starts)) for start, end in ranges]

    def characters(self, input_ids: Sequence[int], text: str, special: bool = False) -> tuple[np.ndarray, np.ndarray]:
        """Start and end (exclusive) of each token in characters of `text`, two `(n,)` int64; equal where a token
        spells nothing of it. A token that spells part of a character has all of it. Arguments and errors as for
        `tokens`."""
        if not self._prepared:
            self._prepare()
        ids = np.asarray(input_ids, np.int64)
        spelled = self._spelled(input_ids, text, special)
        if spelled is None:
            return self._offsets(ids, text, special)
        shift, size = spelled
        ends = np.cumsum(self._lengths[ids]) - shift
        starts = np.clip(ends - self._lengths[ids], 0, size)
        ends = np.clip(ends, 0, size)
        data = np.frombuffer(text.encode(), np.uint8)
        number = np.cumsum((data & 0xC0) != 0x80) - 1  # of the character of each byte
        number = np.append(number, len(text))
        spells = starts < ends
        return number[starts], np.where(spells, number[np.maximum(ends - 1, 0)] + 1, number[starts])

    def _spelled(self, input_ids: Sequence[int], text: str, special: bool) -> tuple[int, int] | None:
        """Number of bytes that the tokens spell before the text, and the length of the text in bytes; `None` where
        the bytes of the tokens are not the text."""
        table = self._bytes
        ids = list(input_ids)
        head = tail = 0
        if special:
            if ids[: len(self._head)] == self._head:
                head = len(self._head)
            if self._tail and ids[len(ids) - len(self._tail) :] == self._tail:
                tail = len(self._tail)
        try:
            body = b"".join(map(table.__getitem__, ids[head : len(ids) - tail]))  # type: ignore[arg-type]
            before = sum(len(table[index] or b"") for index in ids[:head])
        except (IndexError, TypeError):
            return None
        data = text.encode()
        if body == data:
            return before, len(data)
        if body == b" " + data:  # the dummy prefix of SentencePiece and of `add_prefix_space`
            return before + 1, len(data)
        return None

    def _offsets(self, ids: np.ndarray, text: str, special: bool) -> tuple[np.ndarray, np.ndarray]:
        """Start and end of each token in characters, from the fast tokenizer."""
        if not getattr(self.tokenizer, "is_fast", False):
            raise ValueError(
                f"the tokens of {type(self.tokenizer).__name__} do not spell the text, and it gives no offsets: use "
                "a fast tokenizer, or bring token_weights with tokenised rows"
            )
        encoded = self.tokenizer(
            text, add_special_tokens=special, return_offsets_mapping=True, return_special_tokens_mask=True
        )
        if encoded["input_ids"] != ids.tolist():
            raise ValueError(
                "the tokens of the row are not those of its text, so characters cannot be found in them: bring "
                "token_weights with tokenised rows"
            )
        starts, ends = np.array(encoded["offset_mapping"], np.int64).reshape(-1, 2).T.copy()
        own = np.array(encoded["special_tokens_mask"], bool) & (starts == ends)
        pieces = [self._bytes[index] or b"" for index in ids] if self._bytes else [b""] * len(ids)
        end = 0  # of the text covered so far
        for index in np.flatnonzero(~own).tolist():
            start, stop, piece = int(starts[index]), int(ends[index]), pieces[index]
            if piece and piece.isspace() and stop > start and not text[start:stop].replace("▁", " ").isspace():
                starts[index] = ends[index] = start  # a dummy prefix, which spells nothing of the text
                continue
            if start > end:  # characters that no token has: spaces in front of a word, or composed ones behind another
                if end == 0 or (piece[:1].isspace() and text[end:start].isspace()):
                    starts[index] = start = end
                else:
                    ends[(ends == end) & (starts < end)] = start
            end = max(end, stop, start)
        ends[(ends == end) & (starts < end)] = len(text)
        return starts, ends


def _whole_characters(text: str, start: int, end: int) -> CharacterRange:
    """The range with its combining marks and those letters that its marks belong to: normalisers compose and reorder
    them, and the tokenizer's offsets do not say which is which."""
    while start > 0 and unicodedata.category(text[start])[0] == "M":
        start -= 1
    while end < len(text) and unicodedata.category(text[end])[0] == "M":
        end += 1
    return start, end


def token_bytes(tokenizer: PreTrainedTokenizerBase) -> list[bytes | None]:
    """The bytes that each id of the vocabulary spells; `None` for unused ids, an empty list for vocabularies whose
    tokens do not spell text by themselves (WordPiece)."""
    decoder = _decoder(tokenizer)
    if "ByteLevel" in decoder:
        alphabet = _byte_alphabet()

        def spell(token: str) -> bytes:
            try:
                return bytes([alphabet[character] for character in token])
            except KeyError:
                return token.encode()

    elif "▁" in decoder or "Metaspace" in decoder:
        fallback = {f"<0x{value:02X}>": bytes([value]) for value in range(256)}

        def spell(token: str) -> bytes:
            return fallback.get(token) or token.replace("▁", " ").encode()

    else:
        return []
    vocabulary = tokenizer.get_vocab()
    added = {index: token.content for index, token in tokenizer.added_tokens_decoder.items()}
    table: list[bytes | None] = [None] * (max([*vocabulary.values(), *added]) + 1)
    for token, index in vocabulary.items():
        table[index] = spell(token)
    for index, content in added.items():
        table[index] = content.encode()
    return table


def _decoder(tokenizer: PreTrainedTokenizerBase) -> str:
    """Description of how tokens become text."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # a slow tokenizer of SentencePiece
        return "Metaspace" if any("▁" in token for token in tokenizer.get_vocab()) else ""
    if backend.decoder is None:
        return ""
    return json.dumps(json.loads(backend.decoder.__getstate__()), ensure_ascii=False)


def _byte_alphabet() -> dict[str, int]:
    """The characters that byte-level BPE writes for bytes (GPT-2): itself where it is visible, else from U+0100 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [value for value in range(256) if value not in visible]
    return {chr(value): value for value in visible} | {chr(256 + n): value for n, value in enumerate(hidden)}
