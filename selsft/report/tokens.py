"""Rows of tokens as a page or a terminal shows them: text, kind and numbers of each token.

Any float column with one value per token is a score. A token's text is what it adds when it is decoded after another
one, so that the joined texts of a row are the row's text; where several tokens make one character, the first has it
and the others are empty. Rejected: the offsets of a tokenizer, since a folder of scores holds token ids and no text.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..data.columns import BASE_LOGPS, NEGATIVE_MASK, REF_LOGPS, WEIGHTS
from ..data.tokenizers import special_ids
from ..data.words import Words
from ..errors import InputError

LABELLED, SCORED, SPECIAL, ROLE, START, WORD, DOCUMENT = 1, 2, 4, 8, 16, 32, 64
"""Bits of `TokenRows.flags`: has a label; is also predicted from a past; a special token; names a chat role; a token
that the tokenizer puts in front of every text; the first of a word, as pooling has it; the first of a document."""
_ROLES = {"system", "developer", "user", "human", "assistant", "model", "tool", "ipython", "function", "observation"}
_MASKS = ("completion_mask", "assistant_masks")  # of data sets that TRL has prepared, in the place of labels
_BROKEN = "\ufffd"


@dataclass
class TokenRows:
    """Rows of a data set, one after another.

    Attributes:
        pieces: distinct texts of tokens.
        tokens: `(n,)` int32, the piece of each token.
        offsets: `(rows + 1,)` int64, where each row starts.
        flags: `(n,)` uint8, see `LABELLED`.
        scores: `{column: (n,) float32}`, NaN where a token has none; nats for log-probabilities.
        weights: `(n,)` float32, or None without the columns `token_weights` and `negative_mask`.
        numbers: `(rows,)` int64, each row's number in the data set.
        facts: `{column: one value per row}` of the columns that hold one value per row.
    """

    pieces: list[str]
    tokens: np.ndarray
    offsets: np.ndarray
    flags: np.ndarray
    scores: dict[str, np.ndarray]
    weights: np.ndarray | None
    numbers: np.ndarray
    facts: dict[str, list[Any]] = field(default_factory=dict)

    def text(self, start: int, end: int) -> str:
        """Text of the tokens `start` to `end` (exclusive)."""
        return "".join(self.pieces[piece] for piece in self.tokens[start:end])


def read_rows(data: Dataset, tokenizer: PreTrainedTokenizerBase, max_tokens: int, seed: int = 0) -> TokenRows:
    """The rows of a data set that holds tokens; a random draw of them, in order, beyond `max_tokens` tokens.

    Args:
        data: with `input_ids`; `labels`, or one of TRL's masks, or neither: every token has a label; `seq_lengths` of
            packed documents; any other columns.

    Raises:
        `InputError` for data without `input_ids`, and for ids that the tokenizer does not know.
    """
    if "input_ids" not in data.column_names:
        raise InputError(
            f"the data has the columns {', '.join(map(repr, data.column_names))} and no 'input_ids': give a folder of "
            "`selsft score`, or rows that are tokenised"
        )
    counts = [_lengths(table["input_ids"]) for table in _tables(data, ["input_ids"])]
    lengths = np.concatenate([np.zeros(0, np.int64), *counts])
    numbers = np.arange(len(data))
    if lengths.sum() > max_tokens:
        order = np.random.default_rng(seed).permutation(len(data))
        fits = int(np.searchsorted(np.cumsum(lengths[order]), max_tokens, side="right"))
        numbers = np.sort(order[: max(fits, 1)])
        data, lengths = data.select(numbers), lengths[numbers]
    columns: dict[str, np.ndarray] = {}
    facts: dict[str, list[Any]] = {}
    for name in data.column_names:
        parts = [table[name].combine_chunks() for table in _tables(data, [name])]
        kind = parts[0].type if parts else pa.null()
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind)):
            if pa.types.is_primitive(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind):
                facts[name] = [value for part in parts for value in part.to_pylist()]
        elif pa.types.is_primitive(kind.value_type) and (
            name == "seq_lengths" or np.array_equal(np.concatenate([_lengths(part) for part in parts]), lengths)
        ):
            flat = (part.flatten().cast(_wide(kind.value_type)).to_numpy(zero_copy_only=False) for part in parts)
            columns[name] = np.concatenate(list(flat))
    ids, offsets = (
        columns.pop("input_ids").astype(np.int64),
        np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
    )
    if len(ids) and (worst := int(ids.max())) >= len(tokenizer):
        raise InputError(
            f"the data has the token id {worst}, and the tokenizer {len(tokenizer)} tokens: give the model whose "
            "tokenizer made the data, --model_name_or_path"
        )
    starts = np.cumsum(columns["seq_lengths"]) if "seq_lengths" in columns else offsets
    pieces, tokens = _spell(ids, offsets, tokenizer)
    return TokenRows(
        pieces, tokens, offsets, _flags(ids, offsets, starts, columns, pieces, tokens, tokenizer),
        {name: values for name, values in columns.items() if values.dtype == np.float32 and name != WEIGHTS},
        _weights(columns), numbers, facts,
    )  # fmt: skip


def _tables(data: Dataset, names: list[str]) -> Iterator[pa.Table]:
    yield from data.select_columns(names).with_format("arrow").iter(batch_size=4096)


def _lengths(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return pc.fill_null(pc.list_value_length(column), 0).to_numpy(zero_copy_only=False).astype(np.int64)


def _wide(kind: pa.DataType) -> pa.DataType:
    return pa.float32() if pa.types.is_floating(kind) else pa.int64()


def _weights(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    if WEIGHTS in columns:
        return columns[WEIGHTS].astype(np.float32)
    return 1 - 2 * columns[NEGATIVE_MASK].astype(np.float32) if NEGATIVE_MASK in columns else None


def _flags(ids, offsets, starts, columns, pieces, tokens, tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    flags = np.zeros(len(ids), np.uint8)
    masks = [columns[name] != 0 for name in _MASKS if name in columns]
    labelled = columns["labels"] != -100 if "labels" in columns else masks[0] if masks else np.ones(len(ids), bool)
    flags[labelled] |= LABELLED
    scored = labelled.copy()
    begins = [start for start in {*offsets.tolist(), *starts.tolist()} if start < len(ids)]
    scored[begins] = False
    flags[np.flatnonzero(np.diff(Words(tokenizer).number(ids, np.diff(offsets)), prepend=-1))] |= WORD
    flags[begins] |= WORD | DOCUMENT
    for name in (BASE_LOGPS, REF_LOGPS):
        if name in columns:
            scored &= np.isfinite(columns[name])
    flags[scored] |= SCORED
    special = np.isin(ids, special_ids(tokenizer))
    flags[special] |= SPECIAL
    begin = tokenizer("a")["input_ids"][0]
    first = offsets[:-1][np.diff(offsets) > 0]
    if begin in tokenizer.all_special_ids:
        flags[first[ids[first] == begin]] |= START
    for index in np.flatnonzero(special):
        flags[index + 1 : _end_of_role(int(index) + 1, special, pieces, tokens)] |= ROLE
    return flags


def _end_of_role(start: int, special: np.ndarray, pieces: list[str], tokens: np.ndarray) -> int:
    """Where a role's name ends that stands between a special token and a line break or another special token."""
    name = ""
    for place in range(start, min(start + 6, len(tokens))):
        piece = pieces[tokens[place]]
        if special[place] or piece.startswith("\n"):
            return place if name in _ROLES else start
        name += piece
    return start


def _spell(ids: np.ndarray, offsets: np.ndarray, tokenizer: PreTrainedTokenizerBase) -> tuple[list[str], np.ndarray]:
    """The distinct texts of tokens, and the text of each token."""

    def decode(some: list[int]) -> str:
        return str(tokenizer.decode(some, skip_special_tokens=False, clean_up_tokenization_spaces=False))

    plain = tokenizer("a", add_special_tokens=False)["input_ids"]
    anchor = plain[-1]
    front = len(decode([anchor]))

    def behind(some: list[int]) -> str:
        return decode([anchor, *some])[front:]

    places: dict[str, int] = {}

    def place(text: str) -> int:
        return places.setdefault(text, len(places))

    known, inverse = np.unique(ids, return_inverse=True)
    texts = [behind([int(one)]) for one in known]
    tokens = np.array([place(text) for text in texts], np.int32)[inverse]
    broken = np.array([_BROKEN in text for text in texts], bool)[inverse] if len(ids) else np.zeros(0, bool)
    seen: dict[tuple[int, ...], list[int]] = {}
    for start, end in _runs(broken, offsets):
        run = tuple(ids[start:end].tolist())
        if run not in seen:
            seen[run] = [place(text) for text in _characters(list(run), behind)]
        tokens[start:end] = seen[run]
    if behind(plain[:1]).startswith(" "):  # SentencePiece puts a space in front of a text
        special, spelt = {int(one) for one in tokenizer.all_special_ids}, list(places)
        for start, end in itertools.pairwise(offsets):
            first = next((at for at in range(start, end) if int(ids[at]) not in special), None)
            if first is not None:
                tokens[first] = place(spelt[tokens[first]].removeprefix(" "))
    return list(places), tokens


def _runs(broken: np.ndarray, offsets: np.ndarray) -> Iterator[tuple[int, int]]:
    """Where consecutive tokens of one row each hold a part of a character."""
    if not broken.any():
        return
    first = np.zeros(len(broken) + 1, bool)
    first[offsets] = True
    edges = np.diff(np.concatenate([[False], broken, [False]]).astype(np.int8))
    for start, end in zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True):
        cuts = [start, *(start + 1 + np.flatnonzero(first[start + 1 : end])), end]
        yield from itertools.pairwise(cuts)


def _characters(run: list[int], decode) -> list[str]:
    """Texts of a run: each character, or part of one, goes to the first of its tokens."""
    texts: list[str] = []
    while run:
        size = next((n for n in range(1, len(run) + 1) if _BROKEN not in decode(run[:n])), len(run))
        texts += [decode(run[:size]), *[""] * (size - 1)]
        run = run[size:]
    return texts
