"""Spans from a text and its corrections: what the corrections change is wrong.

Words of the text and of a correction are aligned by `difflib` (longest common blocks). A word is a run of letters and
digits, a single punctuation mark, or a single CJK character; white space is ignored. A word that is replaced or
deleted is changed; where a correction inserts words, the next word is in doubt, since nothing that is there is wrong
(Bryant et al., ERRANT, puts a missing word there too). With n corrections, a word that at least three quarters of them
change is wrong; any other word that is changed or in doubt is unknown (weight 0); the rest is right. With one
correction, changed is wrong; with four, as in JFLEG (Napoles et al., 2017), three or four changes are.

Rejected: an edit distance in Python, whose table takes milliseconds a sentence; characters instead of words, which
find parts of the old word in the new one.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from difflib import SequenceMatcher

from ..errors import InputError

_CJK = "\u2e80-\u2fdf\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
_UNIT = re.compile(rf"[{_CJK}]|(?:(?![{_CJK}])\w)+(?:['’](?:(?![{_CJK}])\w)+)*|[^\w\s]")


def spans_of_corrections(text: str, corrections: Sequence[str]) -> list[tuple[int, int, float]]:
    """What `corrections` say about `text`: `(start, end, weight)` in characters, in order, not overlapping; weight -1
    is wrong and 0 unknown."""
    if wrong := [each for each in corrections if not isinstance(each, str)]:
        raise InputError(f"corrected: {wrong[0]!r} is not text: give the corrected answer, or a list of them")
    words = _words(text)
    units = [text[start:end] for start, end in words]
    changes, doubts = [0] * len(words), [0] * len(words)
    for correction in corrections:
        other = [correction[start:end] for start, end in _words(correction)]
        for kind, first, last, _, _ in SequenceMatcher(None, units, other, autojunk=False).get_opcodes():
            if kind in ("replace", "delete"):
                for index in range(first, last):
                    changes[index] += 1
            elif kind == "insert" and first < len(words):
                doubts[first] += 1
    spans: list[tuple[int, int, float]] = []
    previous = -1
    for index, (start, end) in enumerate(words):
        if not changes[index] and not doubts[index]:
            continue
        weight = -1.0 if 4 * changes[index] >= 3 * len(corrections) else 0.0
        if spans and previous == index - 1 and spans[-1][2] == weight:
            spans[-1] = (spans[-1][0], end, weight)
        else:
            spans.append((start, end, weight))
        previous = index
    return spans


def _words(text: str) -> list[tuple[int, int]]:
    """Start and end of each word; a combining mark belongs to the word before it."""
    words: list[tuple[int, int]] = []
    open_word = False
    for match in _UNIT.finditer(text):
        start, end = match.span()
        mark = unicodedata.category(text[start])[0] == "M"
        if words and words[-1][1] == start and (mark or (open_word and text[start].isalnum())):
            words[-1] = (words[-1][0], end)
        else:
            words.append((start, end))
        open_word = mark
    return words
