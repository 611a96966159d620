"""How good a score is on judged rows: AUC, precision by threshold, and the threshold for a precision.

Four levels. `token`: wrong tokens against right ones. `onset`: the first tokens of wrong spans against right tokens.
`span`: wrong spans against right words, each by its worst token. `row`: rows with something wrong against rows
without, each by the mean of its three worst tokens. Intervals are over rows, whose tokens are drawn together.
Rejected: accuracy at a threshold, which means nothing where a few per cent of the tokens are wrong; thresholds in nats
by rule, which do not carry over from one data set to another while precisions do (docs/scores.md).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from sklearn.metrics import average_precision_score

from ..data.judged import JudgedRows
from .intervals import bootstrap
from .metrics import auc, auc_interval

LEVELS = ("token", "onset", "span", "row")
WORST_OF_ROW = 3
DRAWS = 1000
LEAST = 20  # flagged examples that a threshold must rest on
_SHARES = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5)


@dataclass
class Examples:
    """What is told apart at one level: `badness` (high = wrong), `wrong` and `rows`, `(n,)` each."""

    badness: np.ndarray
    wrong: np.ndarray
    rows: np.ndarray

    @property
    def both(self) -> bool:
        """Whether there is anything to tell apart."""
        return bool(self.wrong.any()) and not bool(self.wrong.all())


def examples_of(
    rows: JudgedRows, scores: np.ndarray, words: np.ndarray, level: str, keep: np.ndarray | None = None
) -> Examples:
    """The judged examples of a level.

    Args:
        scores: `(tokens,)`, high = useful, as selection sees them.
        words: `(tokens,)` number of each token's word.
        keep: `(rows,)` bool: rows that count; all by default.
    """
    badness = -np.asarray(scores, np.float64)
    kept = np.ones(rows.lengths.size, bool) if keep is None else keep
    if level == "row":
        return _rows(rows, badness, kept)
    known = (rows.wrong >= 0) & kept[rows.row] & ~rows.whole[rows.row]
    right = known & (rows.wrong == 0)
    wrong = known & (rows.wrong == 1)
    if level == "span":
        bad, good = (_worst(badness, key, of) for key, of in ((rows.span, wrong), (words, right)))
        places = np.concatenate([bad, good])
        return Examples(badness[places], np.arange(places.size) < bad.size, rows.row[places])
    if level == "onset":
        wrong = wrong & rows.onset
    places = np.flatnonzero(right | wrong)
    return Examples(badness[places], wrong[places], rows.row[places])


def _worst(badness: np.ndarray, key: np.ndarray, of: np.ndarray) -> np.ndarray:
    """Place of the worst token of each group."""
    places = np.flatnonzero(of)
    order = places[np.lexsort((-badness[places], key[places]))]
    return order[np.unique(key[order], return_index=True)[1]]


def _rows(rows: JudgedRows, badness: np.ndarray, kept: np.ndarray) -> Examples:
    counted = np.flatnonzero(rows.wrong >= 0)
    order = counted[np.lexsort((-badness[counted], rows.row[counted]))]
    own = rows.row[order]
    order = order[np.arange(order.size) - np.searchsorted(own, own) < WORST_OF_ROW]
    sums = np.bincount(rows.row[order], badness[order], minlength=kept.size)
    numbers = np.bincount(rows.row[order], minlength=kept.size)
    chosen = np.flatnonzero(kept & (numbers > 0))
    return Examples(sums[chosen] / numbers[chosen], rows.row_wrong[chosen] == 1, chosen)


def figures(examples: Examples, groups: np.ndarray | None = None) -> dict[str, Any] | None:
    """AUC with its 95 % interval, average precision, precision with as many called wrong as are wrong, and counts;
    `None` where nothing can be told apart.

    Args:
        groups: `(rows,)` what each row belongs to; adds `auc_within`, the mean AUC of the groups with both kinds,
            its 95 % interval over these groups where there are any, and their number, `n_groups`.
    """
    if not examples.both:
        return None
    area = auc_interval(examples.badness, examples.wrong, examples.rows, DRAWS)
    worst = np.argsort(-examples.badness, kind="stable")[: int(examples.wrong.sum())]
    within: dict[str, Any] = {}
    if groups is not None:
        of = groups[examples.rows]
        found = np.array([auc(examples.badness[of == group], examples.wrong[of == group]) for group in np.unique(of)])
        found = found[~np.isnan(found)]
        if found.size:
            mean = bootstrap(lambda times: float(np.average(found, weights=times)), np.arange(found.size), DRAWS)
            within = dict(zip(("auc_within", "auc_within_low", "auc_within_high"), mean, strict=True))
        within["n_groups"] = int(found.size)
    return within | {
        "auc": area.value,
        "auc_low": area.low,
        "auc_high": area.high,
        "ap": float(average_precision_score(examples.wrong, examples.badness)),
        "precision_at_share": float(examples.wrong[worst].mean()),
        "n_rows": int(np.unique(examples.rows).size),
        "n_wrong": int(examples.wrong.sum()),
        "n_right": int((~examples.wrong).sum()),
    }


def judge_scores(
    rows: JudgedRows,
    scores: Mapping[str, np.ndarray],
    words: np.ndarray,
    keep: np.ndarray | None = None,
    groups: np.ndarray | None = None,
) -> dict[str, dict[str, Any]]:
    """score -> level -> `figures`; levels at which nothing can be told apart are absent."""
    return {
        name: {
            level: numbers
            for level in LEVELS
            if (numbers := figures(examples_of(rows, values, words, level, keep), groups)) is not None
        }
        for name, values in scores.items()
    }


def by_threshold(examples: Examples) -> list[dict[str, float]]:
    """Precision and recall where a share of the examples is called wrong: `negative_threshold`, `flagged`,
    `precision`, `recall`."""
    cuts, counts, hits = _cuts(examples)
    lines: list[dict[str, float]] = []
    for share in _SHARES:
        at = min(int(np.searchsorted(counts, share * examples.wrong.size)), cuts.size - 1)
        line = {
            "negative_threshold": float(cuts[at]),
            "flagged": float(counts[at] / examples.wrong.size),
            "precision": float(hits[at] / counts[at]),
            "recall": float(hits[at] / examples.wrong.sum()),
        }
        if line not in lines:
            lines.append(line)
    return lines


@dataclass
class Threshold:
    """A threshold for a precision.

    Attributes:
        target: the precision that was asked for.
        negative_threshold: `None` where no threshold reaches it.
        precision, precision_low, precision_high, recall: at the threshold, or the best that can be reached.
        flagged: number of examples called wrong there.
    """

    target: float
    negative_threshold: float | None
    precision: float
    precision_low: float
    precision_high: float
    recall: float
    flagged: int

    def __str__(self) -> str:
        measured = f"[{self.precision_low:.2f}, {self.precision_high:.2f}], recall {self.recall:.2f}"
        if self.negative_threshold is None:
            return f"no threshold reaches precision {self.target:g}: the best is {self.precision:.2f} {measured}"
        return (
            f"negative_threshold={self.negative_threshold:.4g} for precision {self.target:g}: {self.precision:.2f} "
            f"{measured}"
        )


def threshold_for(examples: Examples, target: float) -> Threshold:
    """The threshold that calls the most examples wrong at a precision of at least `target`.

    It rests on at least `LEAST` flagged examples. A score is negative below minus the threshold, so the cut lies
    halfway to the next example.
    """
    cuts, counts, hits = _cuts(examples)
    enough = counts >= min(LEAST, examples.wrong.size)
    precision = np.where(enough, hits / counts, -1.0)
    reached = np.flatnonzero(precision >= target)
    at = int(reached[-1]) if reached.size else int(np.argmax(precision))
    flagged = examples.badness > cuts[at]

    def of(weights: np.ndarray) -> float:
        total = weights[flagged].sum()
        return float(weights[flagged & examples.wrong].sum() / total) if total else float("nan")

    interval = bootstrap(of, examples.rows, DRAWS)
    return Threshold(
        target,
        float(cuts[at]) if reached.size else None,
        float(precision[at]),
        interval.low,
        interval.high,
        float(hits[at] / examples.wrong.sum()),
        int(counts[at]),
    )


def _cuts(examples: Examples) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Thresholds from strict to lax, and how many examples, and how many wrong ones, lie above each."""
    order = np.argsort(-examples.badness, kind="stable")
    ranked = examples.badness[order]
    ends = np.flatnonzero(np.append(ranked[:-1] != ranked[1:], True))
    below = np.append(ranked, ranked[-1] - 1.0)[ends + 1]
    return (ranked[ends] + below) / 2, ends + 1, np.cumsum(examples.wrong[order])[ends]


def learning_curve(
    rows: JudgedRows, scores: Mapping[float, np.ndarray], words: np.ndarray, level: str
) -> list[dict[str, float]]:
    """AUC by the share of the judged rows that a probe was fitted on, and what twice the rows would bring.

    Args:
        scores: share -> `(tokens,)` out-of-fold scores; with 1.0.

    Returns:
        `share` and `auc`; the line for share 2 is `predicted`: by a straight line over the logarithm of the share.
    """
    curve = []
    for share in sorted(scores):
        examples = examples_of(rows, scores[share], words, level)
        curve.append({"share": share, "auc": auc(examples.badness, examples.wrong)})
    if len(curve) > 1:
        slope, offset = np.polyfit([np.log2(line["share"]) for line in curve], [line["auc"] for line in curve], 1)
        curve.append({"share": 2.0, "auc": float(min(slope + offset, 1.0)), "predicted": True})
    return curve
