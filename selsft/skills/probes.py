"""Linear probes: whether the hidden states still tell the right option when the model no longer says it.

A logistic regression with an L2 penalty reads the state at an option's last token and predicts whether the option is
right; it is fitted on the task's training questions and scored on its test questions, as in the paper. What the paper
leaves open: the penalty is chosen by the log loss on a fifth of the training *questions* (all options of a question
stay on one side, else its logit would be judged by its siblings); a question counts as right if its gold option
has the highest logit (the lowest index on ties). Two references make the number readable: the same probe with the gold
option of each training question drawn at random (ten draws: where one direction dominates, each draw lands on one side
of it), and the probe on the base model.

Rejected: a probe by early stopping as in the paper, whose outcome depends on the step size.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import special
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegression

from .hidden import Hidden
from .table import ALL_TASKS, END, QUESTION

PENALTIES = (1e2, 1e1, 1e0, 1e-1, 1e-2, 1e-3, 1e-4)
MIN_QUESTIONS = 20
"""Fewer training questions leave less than four to choose the penalty by: no probe."""


@dataclass(frozen=True)
class Probe:
    """logit(h) = (h - mean) @ weight + bias, with weight (d,) and mean (d,) float64."""

    weight: np.ndarray
    bias: float
    mean: np.ndarray

    def logits(self, states: np.ndarray) -> np.ndarray:
        """(m,) for states (m, d)."""
        return (states - self.mean) @ self.weight + self.bias


def fit(states: np.ndarray, targets: np.ndarray, penalty: float) -> Probe:
    """Minimise mean log loss + penalty/2 |w|², w on features scaled to unit variance, the bias free.

    Args:
        states: (m, d).
        targets: (m,) 0 or 1.
    """
    mean, scale = states.mean(axis=0), states.std(axis=0)
    scale = np.where(scale > 1e-12 * max(float(scale.max()), 1e-300), scale, np.inf)  # constant features get weight 0
    model = LogisticRegression(C=1 / (penalty * len(states)), max_iter=500, tol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", ConvergenceWarning
        )  # under the weakest penalties 500 steps are enough to choose
        model.fit((states - mean) / scale, targets)
    return Probe(model.coef_[0] / scale, float(model.intercept_[0]), mean)


def choose(states: np.ndarray, targets: np.ndarray, question: np.ndarray, seed: int = 0) -> float:
    """The penalty of `PENALTIES` with the lowest log loss on a fifth of the questions, held out from the fit.

    Args:
        states, targets: as of `fit`.
        question: (m,) which question each row belongs to.
    """
    names = np.unique(question)
    held = np.random.default_rng(seed).permutation(names)[: max(1, len(names) // 5)]
    inner = np.isin(question, held)
    losses = []
    for penalty in PENALTIES:
        logits = fit(states[~inner], targets[~inner], penalty).logits(states[inner])
        losses.append(-special.log_expit(np.where(targets[inner] > 0, logits, -logits)).mean())
    return PENALTIES[int(np.argmin(losses))]


def answers(logits: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """(n,) the option with the highest logit of each question, the lowest index on ties; counts (n,) options each."""
    start = np.cumsum(counts) - counts
    best = np.repeat(np.maximum.reduceat(logits, start), counts)
    option = np.arange(len(logits)) - np.repeat(start, counts)
    return np.minimum.reduceat(np.where(logits == best, option, np.iinfo(np.int64).max), start)


def shuffled(counts: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """(sum of counts,) 0 or 1: one option of each question, drawn at random, as if it were gold."""
    flags = np.zeros(int(counts.sum()))
    flags[np.cumsum(counts) - counts + rng.integers(counts)] = 1
    return flags


def probe_questions(train: Hidden, test: Hidden, controls: int = 10, seed: int = 0) -> pd.DataFrame:
    """Fit on one model's training states, score its test states.

    Returns:
        One row per test question: the columns of `QUESTION` (step is the end of the stage); `correct`, 0 or 1;
        `confidence`, softmax of the question's logits at the gold option; `control`, the share of `controls` probes
        with shuffled training labels (the same penalty) that are right; `n_options`, `penalty`, `n_train`, `layer`.

    Raises:
        ValueError: too few training questions, a question in both splits, or states of different models.
    """
    if train.model != test.model or train.eval_task != test.eval_task:
        raise ValueError(f"{train.path} and {test.path} are not of the same model and task")
    if both := set(train.example_ids) & set(test.example_ids):
        raise ValueError(
            f"{test.path}: {len(both)} questions are in both splits, as {min(both)!r}; the probe needs disjoint ones"
        )
    if len(train.example_ids) < MIN_QUESTIONS:
        raise ValueError(f"{train.path}: {len(train.example_ids)} training questions, a probe needs {MIN_QUESTIONS}")
    states, targets = train.options(), train.is_gold().astype(np.float64)
    question = np.repeat(np.arange(len(train.option_counts)), train.option_counts)
    penalty = choose(states, targets, question, seed)
    held_out = test.options()
    logits = fit(states, targets, penalty).logits(held_out)
    rng = np.random.default_rng([seed, 1])
    control = np.zeros(len(test.example_ids))
    for _ in range(controls):
        random = fit(states, shuffled(train.option_counts, rng), penalty)
        control += (answers(random.logits(held_out), test.option_counts) == test.gold) / controls
    start = np.cumsum(test.option_counts) - test.option_counts
    likelihood = np.exp(logits - np.repeat(np.maximum.reduceat(logits, start), test.option_counts))
    rows = pd.DataFrame({"example_id": test.example_ids})
    rows = rows.assign(
        **test.model._asdict(), eval_task=test.eval_task, split="test", step=END,
        correct=(answers(logits, test.option_counts) == test.gold).astype(np.float64),
        confidence=likelihood[start + test.gold] / np.add.reduceat(likelihood, start),
        control=control, n_options=test.option_counts, penalty=penalty, n_train=len(train.example_ids),
        layer=test.layer,
    )  # fmt: skip
    return rows[[*QUESTION, "correct", "confidence", "control", "n_options", "penalty", "n_train", "layer"]]


def probe_all(hidden: Iterable[Hidden], own_task: bool = True) -> tuple[pd.DataFrame, list[str]]:
    """`probe_questions` of every model and task with states of both splits.

    Args:
        own_task: only tasks that the model was trained on (or any, for base models and those trained on all).

    Returns:
        The rows of all probes, which `forgetting.Ends` takes like those of `metrics.questions`, so that probe
        accuracies are compared between stages by the same code; and why probes were left out, one line each.
    """
    pairs: dict[tuple, dict[str, Hidden]] = {}
    for states in hidden:
        if not own_task or states.model.label_task in ("", ALL_TASKS, states.eval_task):
            pairs.setdefault((states.model, states.eval_task), {})[states.split] = states
    rows, left_out = [], []
    for (model, task), splits in sorted(pairs.items()):
        what = f"{model.run}, {model.stage}, {task}"
        if set(splits) != {"train", "test"}:
            left_out.append(f"{what}: states of the {'/'.join(splits)} split only")
        elif len(splits["train"].example_ids) < MIN_QUESTIONS:
            n = len(splits["train"].example_ids)
            left_out.append(f"{what}: {n} training questions, a probe needs {MIN_QUESTIONS}")
        else:
            rows.append(probe_questions(splits["train"], splits["test"]))
    names = [*QUESTION, "correct", "confidence", "control", "n_options", "penalty", "n_train", "layer"]
    return (pd.concat(rows, ignore_index=True) if rows else pd.DataFrame(columns=names)), left_out
