"""Metrics of one evaluation, from the score table alone.

`questions` turns options into one row per question; `summarise` turns those into one row per evaluation of one model.
What compares models (forget gap and ratio) is in `selsft.skills.forgetting`. Rejected: metrics as closures over a
model, as in a callback: they cannot be recomputed when a definition changes.
"""

from __future__ import annotations

import numpy as np
import pandas as pd
from scipy import stats

from ..evaluation.metrics import auc
from ..evaluation.options import NORMALIZATIONS
from .table import CELL, QUESTION

MAX_LABELS = 12
"""A task whose options are at most this many texts (yes, no) has labels; in others, options are told by their slot."""
LOW_ENTROPY = 0.5
"""Answers with less than this share of the gold answers' entropy have collapsed: at two balanced options, the same
answer to 89 % of the questions (the binary entropy of 0.89 is 0.5 bit)."""


def questions(scores: pd.DataFrame, normalization: str = "none") -> pd.DataFrame:
    """One row per question.

    With s_o the score of option o, the sum of its log-probabilities, over its length unless `normalization` is "none".

    Args:
        scores: the table of `read_scores`; a column `text` (see `with_texts`) is used for labels where it is there.
        normalization: see `OptionScores.predictions`.

    Returns:
        The columns of `QUESTION` and: `n_options`; `gold`, `predicted` (argmax s_o, the lowest index on ties),
        `assigned` (-1 where unknown), all int; `correct` float 0 or 1; `confidence` = softmax(s)[gold];
        `margin` = s_gold - max of the others, in nats (per unit of length if normalised); `gold_label`,
        `predicted_label`, strings.
    """
    if normalization not in NORMALIZATIONS:
        raise ValueError(f"normalization={normalization!r} is unknown: use one of {', '.join(NORMALIZATIONS)}")
    table = scores.sort_values([*QUESTION, "option"], ignore_index=True)
    score = _score(table, normalization)
    option = table["option"].to_numpy()
    start = np.flatnonzero(option == 0)
    size = np.diff(np.append(start, len(table)))

    best = np.repeat(np.maximum.reduceat(score, start), size)
    predicted = np.minimum.reduceat(np.where(score == best, option, np.iinfo(np.int32).max), start)
    is_gold = table["is_gold"].to_numpy(dtype=bool)
    gold = option[is_gold]
    others = np.maximum.reduceat(np.where(is_gold, -np.inf, score), start)
    is_assigned = table["is_assigned"].fillna(False).to_numpy(dtype=bool)
    label = _labels(table)
    return (
        table[QUESTION]
        .iloc[start]
        .reset_index(drop=True)
        .assign(
            n_options=size,
            gold=gold,
            predicted=predicted,
            assigned=np.maximum.reduceat(np.where(is_assigned, option, -1), start),
            correct=(predicted == gold).astype(np.float64),
            confidence=_softmax(table, normalization)[is_gold],
            margin=score[is_gold] - others,
            gold_label=label[start + gold],
            predicted_label=label[start + predicted],
        )
    )


def with_texts(scores: pd.DataFrame, examples: pd.DataFrame) -> pd.DataFrame:
    """The score table with the options' texts as a column `text`.

    Args:
        examples: `eval_task`, `split`, `example_id`, `options` (list of strings), as in a study's `examples.parquet`.
    """
    long = examples[["eval_task", "split", "example_id", "options"]].explode("options", ignore_index=True)
    keys = ["eval_task", "split", "example_id"]
    long["option"] = long.groupby(keys, observed=True, sort=False).cumcount().astype(np.int32)
    plain = scores.assign(**{name: scores[name].astype(str) for name in keys})
    found = plain.merge(long.rename(columns={"options": "text"}), how="left", on=[*keys, "option"], validate="m:1")
    return scores.assign(text=found["text"].to_numpy())


def _has_labels(table: pd.DataFrame) -> bool:
    """Whether the options of one task are labels: at most `MAX_LABELS` texts, each for at least four questions."""
    if "text" not in table or table["text"].isna().any():
        return False
    texts = table["text"].nunique()
    return texts <= MAX_LABELS and table["example_id"].nunique() >= 4 * texts


def _labels(table: pd.DataFrame) -> np.ndarray:
    """(rows,) what tells a task's options apart: their texts where these are labels, else their slots."""
    label = table["option"].astype(str).to_numpy(dtype=object, copy=True)
    for rows in table.groupby("eval_task", observed=True, sort=False).indices.values():
        if _has_labels(of_task := table.iloc[rows]):
            label[rows] = of_task["text"]
    return label


def chance(group: pd.DataFrame, scores: pd.DataFrame | None = None) -> float:
    """The accuracy of an answer that ignores the question.

    1/k, averaged over the questions; where the options are labels (see `MAX_LABELS`), the accuracy of always giving
    the offered label that is gold most often, if that is higher by more than two standard errors (the majority rate,
    for labels that are all offered each time).

    Args:
        group: the questions of one task and split, each once.
        scores: the options of the same questions, with `text`; None: the options are told by slot, and chance is 1/k.
    """
    uniform = float((1 / group["n_options"]).mean())
    if scores is None or not _has_labels(scores):
        return uniform
    offered = pd.DataFrame(
        {
            "question": scores["example_id"].astype(str).to_numpy(),
            "label": scores["text"].to_numpy(),
            "gold": scores["is_gold"].to_numpy(dtype=np.float64),
        }
    )
    rate = offered.groupby("label")["gold"].mean()
    answer = offered.assign(rate=offered["label"].map(rate)).sort_values(["question", "rate", "label"])
    majority = float(answer.groupby("question")["gold"].last().mean())
    error = np.sqrt(uniform * (1 - uniform) / len(group))
    return majority if majority > uniform + 2 * error else uniform


def chances(found: pd.DataFrame, scores: pd.DataFrame) -> dict[tuple[str, str], float]:
    """`chance` of every (eval_task, split) of a study: {(eval_task, split): c}. Arguments as of `summarise`."""
    keys = ["eval_task", "split"]
    once = found.drop_duplicates([*keys, "example_id"]).groupby(keys, observed=True)
    options = dict(list(scores.drop_duplicates([*keys, "example_id", "option"]).groupby(keys, observed=True)))
    return {(str(key[0]), str(key[1])): chance(group, options[key]) for key, group in once}


def summarise(scores: pd.DataFrame, normalization: str = "none") -> pd.DataFrame:
    """One row per evaluation of one model (`CELL`): accuracy and its like, and what tells collapse from forgetting.

    Returns:
        The columns of `CELL` and, over the questions: `n`, `n_options` (mean), `chance`, `accuracy`, `confidence`,
        `margin` (means); `agreement`, the share of questions answered with the assigned option, `match_rate`, the
        share of assigned options that are gold (NaN where none are assigned); `auc`, of softmax(s) between gold and
        other options; `auc_within`, the same between questions whose offered label (or slot) o is gold and those
        where it is not, averaged over o by pairs: a model that always prefers "yes" but prefers it more where it is
        right keeps `auc_within` high while its accuracy falls to chance; `entropy`, that of the predicted labels, in
        nats; `entropy_ratio`, over that of the gold labels (NaN where these are constant); `top_label`, `top_share`,
        the commonest prediction; `collapsed`, `entropy_ratio < LOW_ENTROPY`.
    """
    found = questions(scores, normalization)
    by_chance = chances(found, scores)
    options = scores.sort_values([*QUESTION, "option"], ignore_index=True)
    probability = _softmax(options, normalization)
    label = _labels(options)
    is_gold = options["is_gold"].to_numpy(dtype=bool)
    option_rows = options.groupby(CELL, observed=True, sort=False).indices
    rows = []
    for key, group in found.groupby(CELL, observed=True, sort=True):
        at = option_rows[key]
        p, gold = probability[at], is_gold[at]
        known = group[group["assigned"] >= 0]
        entropy, top, share = _entropy(group["predicted_label"])
        gold_entropy, _, _ = _entropy(group["gold_label"])
        ratio = entropy / gold_entropy if gold_entropy > 0 else float("nan")
        rows.append(
            dict(
                zip(CELL, key, strict=True),
                n=len(group),
                n_options=group["n_options"].mean(),
                chance=by_chance[str(key[CELL.index("eval_task")]), str(key[CELL.index("split")])],
                accuracy=group["correct"].mean(),
                confidence=group["confidence"].mean(),
                margin=group["margin"].mean(),
                agreement=(known["assigned"] == known["predicted"]).mean() if len(known) else float("nan"),
                match_rate=(known["assigned"] == known["gold"]).mean() if len(known) else float("nan"),
                auc=auc(p, gold),
                auc_within=_auc_within(p, gold, label[at]),
                entropy=entropy,
                entropy_ratio=ratio,
                top_label=top,
                top_share=share,
                collapsed=bool(ratio < LOW_ENTROPY),
            )
        )
    return pd.DataFrame(rows)


def _score(options: pd.DataFrame, normalization: str) -> np.ndarray:
    score = options["logprob"].to_numpy(dtype=np.float64)
    return score if normalization == "none" else score / options[f"n_{normalization}"].to_numpy()


def _softmax(options: pd.DataFrame, normalization: str) -> np.ndarray:
    """(rows,) the probability of each option within its question; `options` sorted by question and option."""
    score = _score(options, normalization)
    start = np.flatnonzero(options["option"].to_numpy() == 0)
    size = np.diff(np.append(start, len(options)))
    likelihood = np.exp(score - np.repeat(np.maximum.reduceat(score, start), size))
    return likelihood / np.repeat(np.add.reduceat(likelihood, start), size)


def _auc_within(p: np.ndarray, gold: np.ndarray, label: np.ndarray) -> float:
    """`auc` between the options of one label, averaged over labels with the number of pairs as weight."""
    total = pairs = 0.0
    for one in pd.unique(label):
        of = label == one
        n = float((of & gold).sum()) * float((of & ~gold).sum())
        if n:
            total += n * auc(p[of], gold[of])
            pairs += n
    return total / pairs if pairs else float("nan")


def _entropy(labels: pd.Series) -> tuple[float, str, float]:
    """Entropy of the labels' distribution in nats, the commonest label (the first by name on ties), its share."""
    share = labels.value_counts(normalize=True)
    top = min(share.index[share == share.max()], key=str)
    return float(stats.entropy(share.to_numpy())), str(top), float(share.max())
