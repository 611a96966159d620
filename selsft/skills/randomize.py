"""Labels for the forgetting stage: which option of each training question is called right.

`uniform` is the draw of Zhang et al. (arXiv 2409.02228): any option, the right one included, so that about 1/k of the
labels stay right. `flip` is their other variant. `uniform_wrong` and `shuffle` separate the effects of the draw: the
first never keeps a right label, the second keeps the frequency of each label. Rejected: one generator for all of them,
with which leaving out one example would change the labels of the others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import numpy as np

from ..evaluation.examples import MultipleChoiceExample
from .table import RANDOM_LABELS
from .tasks import fixed_labels, rng


def assign_labels(
    examples: Sequence[MultipleChoiceExample], mode: str, seed: int, epoch: int | None = None
) -> np.ndarray:
    """The label of each example, `(n,)` int64.

    Args:
        mode: `"uniform"`: each option equally likely. `"flip"`: the other option of two, the next one (cyclically) of
            more. `"uniform_wrong"`: each wrong option equally likely. `"shuffle"`: the labels of the task distributed
            anew among the questions with as many options; a label is a text where all questions choose from the same
            ones (yes/no), else the option's place.
        seed: with the example's id it decides the draw, whatever other examples there are (not so for `"shuffle"`).
        epoch: for a draw that is new in each epoch; `None` for a fixed one. `"flip"` draws nothing.
    """
    if mode not in RANDOM_LABELS:
        raise ValueError(f"mode={mode!r} is unknown: use one of {', '.join(RANDOM_LABELS)}")
    if mode == "shuffle":
        return _shuffled(examples, seed, epoch)
    labels = []
    for example in examples:
        size, generator = len(example.options), rng("label", mode, seed, epoch, example.id)
        if mode == "flip":
            labels.append((example.gold + 1) % size)
        elif mode == "uniform":
            labels.append(generator.randrange(size))
        else:
            labels.append((example.gold + generator.randrange(1, size)) % size)
    return np.array(labels, np.int64)


def _shuffled(examples: Sequence[MultipleChoiceExample], seed: int, epoch: int | None) -> np.ndarray:
    kinds: dict[object, list[int]] = defaultdict(list)
    fixed = fixed_labels(examples) is not None
    for index, example in enumerate(examples):
        # questions that choose from the same texts, or from as many places
        kinds[tuple(sorted(example.options)) if fixed else len(example.options)].append(index)
    labels = np.zeros(len(examples), np.int64)
    for kind, members in kinds.items():
        golds: list[str | int] = [
            example.options[example.gold] if fixed else example.gold for example in (examples[i] for i in members)
        ]
        rng("shuffle", seed, epoch, kind).shuffle(golds)
        for index, gold in zip(members, golds, strict=True):
            labels[index] = examples[index].options.index(gold) if isinstance(gold, str) else gold
    return labels


def match_rate(examples: Sequence[MultipleChoiceExample], labels: np.ndarray) -> float:
    """Share of the labels that are the right ones: 1/k on average under `uniform`, never exactly."""
    return float(np.mean([example.gold == label for example, label in zip(examples, labels, strict=True)]))
