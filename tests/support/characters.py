"""The oracle for characters and tokens: what appears when one more token is decoded."""

from __future__ import annotations

import unicodedata

import numpy as np

NORMAL_FORMS = {"qwen": "NFC", "unigram": "NFKC"}


def tokens_of_characters(tokenizer, ids, text: str, family: str = "") -> list[set[int]]:
    """For each character of `text` the tokens that spell it, by decoding every prefix of `ids`.

    A token spells the characters that its decoding adds; one that leaves a character unfinished (U+FFFD) spells a part
    of it. A text that the tokenizer normalises is looked at as normalised, and each of its characters is mapped to
    what appears between the normalised texts before and after it.
    """
    form = NORMAL_FORMS.get(family)
    normal = unicodedata.normalize(form, text) if form else text
    spelled: list[set[int]] = [set() for _ in normal]
    prefixes = [_decoded(tokenizer, ids[: token + 1], normal) for token in range(len(ids))]
    dummy = _indent(prefixes[-1]) - _indent(normal)  # a space that the tokenizer puts in front of any text
    done = 0
    for token, decoded in enumerate(prefixes):
        now, unfinished = _matched(decoded[min(dummy, _indent(decoded)) :], normal)
        now = max(now, done)  # byte fallback takes back a run of bytes of which the last is unfinished
        for character in range(done, min(now + unfinished, len(normal))):
            spelled[character].add(token)
        done = now
    if not form:
        return spelled
    found = [
        set().union(*spelled[slice(*_normalised(text, normal, character, form))]) for character in range(len(text))
    ]
    if unicodedata.is_normalized("NFC", text):
        return found
    clusters: list[list[int]] = []  # a letter and its marks are one
    for character in range(len(text)):
        if clusters and unicodedata.category(text[character])[0] == "M":
            clusters[-1].append(character)
        else:
            clusters.append([character])
    return [set().union(*(found[c] for c in cluster)) for cluster in clusters for _ in cluster]


def _decoded(tokenizer, ids, text: str) -> str:
    """Without a BOS token that is not in the text."""
    decoded = tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    bos = tokenizer.bos_token
    return decoded.removeprefix(bos) if bos and not text.startswith(bos) else decoded


def _indent(text: str) -> int:
    return len(text) - len(text.lstrip(" "))


def _matched(decoded: str, text: str) -> tuple[int, int]:
    """How many characters of `text` are decoded, and whether a part of the next one is. Spaces that the text does not
    have (a dummy prefix after a special token) are passed over."""
    done = 0
    for character in decoded:
        if done < len(text) and text[done] == character:
            done += 1
        elif character != " ":
            return done, 1
    return done, 0


def _normalised(text: str, normal: str, character: int, form: str) -> tuple[int, int]:
    def normalise(part: str) -> str:
        return unicodedata.normalize(form, part)

    def common(part: str, other: str) -> int:
        return next((n for n, pair in enumerate(zip(part, other)) if pair[0] != pair[1]), min(len(part), len(other)))  # noqa: B905

    start = common(normalise(text[:character]), normal)
    behind = common(normalise(text[character + 1 :])[::-1], normal[::-1])
    return start, max(len(normal) - behind, start)


def weights_of(tokenizer, ids, text: str, spans, family: str = "", default: float = 1.0) -> np.ndarray:
    """Token weights of spans in `text`, a token for itself: the lowest weight of the spans that have a character of
    it."""
    spelled = tokens_of_characters(tokenizer, ids, text, family)
    weights = np.full(len(ids), default, np.float32)
    for token in range(len(ids)):
        own = [weight for start, end, weight in spans for c in range(start, end) if token in spelled[c]]
        if own:
            weights[token] = min(own)
    return weights
