"""How much of an answer is what was asked for: word F1 and chrF, for free text that exact match is blind to.

Both compare with the nearest of the accepted answers. Word F1 is that of SQuAD (Rajpurkar et al. 2016): words without
case, punctuation and articles. chrF (Popović 2015) is that of sacrebleu, from 0 to 1. Rejected: BLEU, which is 0 for
most single short answers.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from .generation import Answer

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_SIGNS = str.maketrans("", "", string.punctuation)


def word_f1(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[float]:
    """The harmonic mean of the shares of words that answer and reference have in common."""
    return [
        max((_f1(answer.text, text) for text in accepted), default=0.0)
        for answer, accepted in zip(answers, references, strict=True)
    ]


def _f1(answer: str, reference: str) -> float:
    words, wanted = (
        Counter(_ARTICLES.sub(" ", text.lower().translate(_SIGNS)).split()) for text in (answer, reference)
    )
    common = (words & wanted).total()
    if not words or not wanted:
        return float(words == wanted)
    return 2 * common / (words.total() + wanted.total())


def chrf(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[float] | None:
    """chrF of each answer; `None` where sacrebleu is not installed (`selsft[metrics]`)."""
    try:
        from sacrebleu.metrics import CHRF
    except ImportError:
        return None
    metric = CHRF()
    return [
        metric.sentence_score(answer.text, [text for text in accepted if text] or [""]).score / 100
        for answer, accepted in zip(answers, references, strict=True)
    ]
