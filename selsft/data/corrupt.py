"""Rules that damage clean text, which gives errors whose places are known.

A probe trained on them needs no human judgement (`scoring/probe.py`). On learner essays it does as well as one trained
on 60 judged sentences, and leaving out any one kind costs little, so the mix needs no tuning (docs/scores.md).
Rejected: replacements sampled from the model itself, which are too likely to look wrong (AUC .62 against .76).
"""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from typing import Any

from datasets import Dataset

from ..errors import InputError
from .spans import SPANS, WEIGHT

KINDS = ("swap", "delete", "double", "inflect", "spell", "function", "replace", "insert", "case")
ANSWER = "answer"  # by itself only: every other row gets the answer of another one, and rows are judged as a whole
_WORD = re.compile(r"\w+(?:['’]\w+)*|[^\w\s]+")
_PREPOSITIONS = "in on at to for of with from by about into over".split()
_DETERMINERS = "the a an this some his their".split()
_ALPHABET = "abcdefghijklmnopqrstuvwxyz"
_FORMS = [
    group.split()
    for group in (
        "is are was were be been being|has have had having|do does did done doing|this these|that those|much many|"
        "he him his|she her|they them their there|i me my|we us our|it its|who which what whose|"
        "can could may might will would should|very much too|good well|more most|other another others|"
        "go goes went gone going|make makes made making|say says said|get gets got|take takes took taken|"
        "think thinks thought|know knows knew known|see sees saw seen|come comes came|find finds found|"
        "give gives gave given|become becomes became|person people|child children|man men|woman women"
    ).split("|")
]
Spans = list[tuple[int, int, float]]


def corrupt_text(
    text: str, kinds: Sequence[str], rng: random.Random, vocabulary: Sequence[str], share: float = 0.08
) -> tuple[str, Spans]:
    """A damaged text and what is wrong in it: `(start, end, weight)` in its characters, -1 wrong, 0 unknown.

    Where a word is missing, no word that is there is wrong: the next one is unknown.

    Args:
        kinds: of `KINDS`; one is drawn for each edit. `swap` exchanges two words, `function` replaces a preposition
            or determiner, `replace` takes a word of `vocabulary`, `insert` adds a function word.
        share: of the words to damage; at least one is.
    """
    words = [match.span() for match in _WORD.finditer(text)]
    wanted = max(1, round(share * len(words) + rng.random() - 0.5))
    order = list(range(len(words)))
    rng.shuffle(order)
    edits: dict[int, tuple[int, int, str, int, float]] = {}  # start, end, new text, characters of it that are right
    used: set[int] = set()
    for index in order:
        if len(edits) >= wanted:
            break
        if used & {index - 1, index, index + 1}:
            continue
        kind = rng.choice(list(kinds))
        following = words[index + 1] if index + 1 < len(words) and index + 1 not in used else None
        if edit := _damage(text, words[index], following, kind, rng, vocabulary):
            edits[index] = edit
            used |= {index, index + 1} if kind in ("swap", "delete") else {index}
    made, spans, done = "", [], 0
    for start, end, new, right, weight in sorted(edits.values()):
        made += text[done:start]
        spans.append((len(made) + max(right, 0), len(made) + len(new) + min(right, 0), weight))
        made += new
        done = end
    return made + text[done:], spans


def corrupt_rows(dataset: Dataset, kinds: Sequence[str] = KINDS, seed: int = 0, text_field: str = "text") -> Dataset:
    """Rows with one kind of damage each, as a judged sample (docs/spans.md).

    Args:
        dataset: clean rows: `text_field`, `prompt` and `completion`, or `messages`, of which the last answer of an
            assistant is damaged. Other columns are dropped.
        kinds: of `KINDS`, which rows take in turn, or `ANSWER` by itself.

    Raises:
        `InputError` for an unknown kind, and for rows without text.
    """
    swapped = list(kinds) == [ANSWER]
    unknown = [kind for kind in kinds if kind not in KINDS]
    if not kinds or (unknown and not swapped):
        raise InputError(
            f"probe_corruptions={','.join(kinds)!r}: use some of {', '.join(KINDS)}, or {ANSWER!r} by itself"
        )
    rng = random.Random(seed)
    answers = [_answer(row, number, text_field) for number, row in enumerate(dataset)]
    vocabulary = [word for text in answers for word in text.split() if word.isalpha()] or ["the"]
    rows = []
    for number, (row, text) in enumerate(zip(dataset, answers, strict=True)):
        if swapped:
            other = answers[rng.randrange(len(answers))] if number % 2 else text
            rows.append(_with_answer(row, other, {WEIGHT: 1.0 if other.strip() == text.strip() else -1.0}, text_field))
        else:
            new, spans = corrupt_text(text, [kinds[number % len(kinds)]], rng, vocabulary)
            rows.append(_with_answer(row, new, {SPANS: [list(span) for span in spans]}, text_field))
    return Dataset.from_list(rows)


def _answer(row: Mapping[str, Any], number: int, text_field: str) -> str:
    for name in ("completion", "messages"):
        value = row.get(name)
        if isinstance(value, str):
            return value
        if isinstance(value, list) and value and isinstance(value[-1].get("content"), str):
            return value[-1]["content"]
    if isinstance(row.get(text_field), str):
        return row[text_field]
    raise InputError(f"row {number} of the clean rows has no {text_field!r}, 'completion' or 'messages' with text")


def _with_answer(row: Mapping[str, Any], text: str, mark: dict[str, Any], text_field: str) -> dict[str, Any]:
    """The row with another answer and what is known about it."""
    for name in ("completion", "messages"):
        value = row.get(name)
        if isinstance(value, str):
            return {"prompt": row.get("prompt", ""), name: text, **mark}
        if isinstance(value, list):
            plain = [{"role": turn["role"], "content": turn["content"], **dict.fromkeys(mark)} for turn in value[:-1]]
            answer = {"role": value[-1]["role"], "content": text, **mark}
            return ({"prompt": row["prompt"]} if name == "completion" else {}) | {name: [*plain, answer]}
    return {text_field: text, **mark}


def _damage(
    text: str,
    word: tuple[int, int],
    following: tuple[int, int] | None,
    kind: str,
    rng: random.Random,
    vocabulary: Sequence[str],
) -> tuple[int, int, str, int, float] | None:
    """One edit, or `None` where the kind does not fit the word. Of the new text the first `right` characters (the last
    ones, where negative) are right."""
    start, end = word
    old = text[start:end]
    if not old[0].isalpha():
        return None
    lower = old.lower()
    next_word = text[following[0] : following[1]] if following else ""
    new: str | None = None
    if kind in ("swap", "delete"):
        if not following or not next_word[0].isalpha() or next_word.lower() == lower:
            return None
        if kind == "delete":
            return start, following[1], _cased(old, next_word), 0, 0.0
        moved = old if old == "I" else lower
        return start, following[1], _cased(old, next_word) + text[end : following[0]] + moved, 0, -1.0
    if kind == "double":
        return end, end, " " + lower, 1, -1.0
    if kind == "insert":
        return start, start, rng.choice(_PREPOSITIONS + _DETERMINERS) + " ", -1, -1.0
    if kind == "inflect":
        new = _inflected(old, rng)
    elif kind == "spell":
        new = _misspelt(old, rng)
    elif kind == "function":
        group = next((group for group in (_PREPOSITIONS, _DETERMINERS) if lower in group), None)
        new = _cased(old, rng.choice([other for other in group if other != lower])) if group else None
    elif kind == "replace":
        new = _cased(old, rng.choice(vocabulary))
    elif kind == "case":
        new = old[0].swapcase() + old[1:]
    return (start, end, new, 0, -1.0) if new and new != old else None


def _cased(old: str, new: str) -> str:
    return new[:1].upper() + new[1:] if old[:1].isupper() else new


def _inflected(word: str, rng: random.Random) -> str | None:
    lower = word.lower()
    others = [other for group in _FORMS if lower in group for other in group if other != lower]
    if others:
        return _cased(word, rng.choice(others))
    if len(lower) < 3 or not lower.isascii() or not lower.isalpha():
        return None
    stem = lower
    for ending in ("ing", "ed", "ies", "es", "s", "ly"):
        if lower.endswith(ending) and len(lower) - len(ending) >= 3:
            stem = lower.removesuffix(ending) + ("y" if ending == "ies" else "")
            break
    bare = stem.removesuffix("e")
    forms = [stem] if lower.endswith("ly") else [stem, stem + "s", bare + "ed", bare + "ing"]
    return _cased(word, rng.choice([form for form in forms if form != lower] or [stem + "s"]))


def _misspelt(word: str, rng: random.Random) -> str | None:
    if len(word) < 4 or not word.isalpha():
        return None
    at = rng.randrange(1, len(word))
    vowel = "aeiou" if word[at] in "aeiou" else _ALPHABET
    return rng.choice(
        [
            word[:at] + word[at + 1 :],
            word[:at] + word[at] + word[at:],
            word[: at - 1] + word[at] + word[at - 1] + word[at + 1 :] if at > 1 else word[:at] + word[at + 1 :],
            word[:at] + rng.choice(vowel) + word[at + 1 :],
        ]
    )
