"""What scores promise before anything is trained on them: whether they say anything, and what a threshold would take.

Rejected: training first and looking afterwards. Ten minutes of training on data of which nothing was selected look in
every figure like success.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from transformers import AutoTokenizer

from ..data.chunks import supervised_mask, token_chunks
from ..data.columns import BASE_LOGPS, REF_LOGPS, TOKEN_COLUMNS
from ..data.scored_folder import load_scores, read_manifest
from ..evaluation.judged import Threshold
from ..evaluation.judging import JUDGED
from ..records import read_json, write_json
from ..report.terminal import ScoreHistogram
from ..selection.select import COUNTS, selection_args
from ..selection.weights import pooled_scores, raw_scores, vocabulary

OUTLOOK = "outlook.json"
TOO_MUCH = 0.5  # share of negative tokens above which hardly anybody means it
_SHARES = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3)
_BINS = 60


@dataclass
class Outlook:
    """
    Attributes:
        score, threshold: as selected by; `threshold` is `None` for a share.
        tokens, negative: supervised tokens, and the share of them that is negative.
        lowest: the lowest score of a token that may be negative.
        moved: `mean` and `sd` of log p_ref - log p_policy, nats; `None` without a reference.
        thresholds: `negative_threshold` and the `negative` share that it would give, by itself.
        edges, counts: a histogram of the scores between their 0.1 and 99.9 % quantiles.
        judged: content of the folder's `judged.json`, and the threshold that was chosen; empty without judged rows.
        refusal: what judged rows say against the score.
    """

    score: str
    threshold: float | None
    tokens: int
    negative: float
    lowest: float
    moved: dict[str, float] | None
    thresholds: list[dict[str, float]]
    edges: list[float]
    counts: list[int]
    judged: dict[str, Any]
    refusal: str | None

    @classmethod
    def read(cls, folder: Path) -> Outlook:
        return cls(**read_json(folder / OUTLOOK))

    def lines(self) -> list[str]:
        """The outlook in words."""
        found = []
        if self.moved is not None:
            found.append(
                f"the reference finds a token {self.moved['mean']:+.3f} nats more likely than the model on average, "
                f"with a standard deviation of {self.moved['sd']:.3f}"
                + ("; it has hardly moved" if self.moved["sd"] < 0.1 else "")
            )
        found.append(judged_line(self.judged, self.score))
        if threshold := self.judged.get("threshold"):
            found.append(str(Threshold(**threshold)) + _on_test(self.judged.get("test_threshold")))
        if self.thresholds:
            options = ", ".join(
                f"{each['negative_threshold']:g} -> {each['negative']:.1%}" for each in self.thresholds
            )
            found.append(f"negative_threshold -> negative tokens: {options}")
        rule = "chosen share" if self.threshold is None else f"negative_threshold={self.threshold:g}"
        found.append(f"{rule}: {self.negative:.2%} of {self.tokens:,} supervised tokens are negative")
        return found


def _on_test(found: dict[str, Any] | None) -> str:
    if not found or found["precision"] is None:
        return ""
    return (
        f"; on rows that nothing was fitted on precision {found['precision']:.2f} and recall {found['recall']:.2f}, "
        f"{found['flagged']} flagged"
    )


def judged_line(judged: dict[str, Any], score: str) -> str:
    """What judged rows say of a score, in one sentence."""
    sample = "test" if judged.get("test") else "judged"
    levels = judged.get(sample, {}).get(judged.get("score", score), {})
    numbers = levels.get(judged.get("level"))
    if not numbers:
        return f"score={score} is unverified: no judged rows say whether it finds what is wrong (--judged FILE)"
    seen = "rows that nothing was fitted on" if sample == "test" else "judged rows, out of fold"
    return (
        f"score={score} tells wrong {judged['level']}s from right ones with AUC {numbers['auc']:.2f} "
        f"[{numbers['auc_low']:.2f}, {numbers['auc_high']:.2f}] on {numbers['n_rows']} {seen}"
    )


def outlook(
    selected: Path, scored: Path, model: str, options: dict[str, Any], chosen: dict[str, Any] | None = None
) -> Outlook:
    """Write `outlook.json` into the folder of a selection, and return it.

    Args:
        scored: folder of the scores.
        model: folder or id, for its tokenizer.
        options: selection settings.
        chosen: `threshold` and `test_threshold` for a precision (`evaluation.judging.choose_threshold`).
    """
    args = selection_args(scored, options)
    tokenizer, rows = AutoTokenizer.from_pretrained(model), load_scores(scored)
    special, words = vocabulary(tokenizer, args)
    histogram, total = ScoreHistogram(), 0
    sums = np.zeros(3)  # number, sum and sum of squares of log p_ref - log p_policy
    there = [name for name in TOKEN_COLUMNS if name in rows.column_names]
    for chunk in token_chunks(rows, ["input_ids", "labels", *there]):
        mask, ids = supervised_mask(chunk, padding_free=False), chunk.columns["input_ids"]
        scores = pooled_scores(raw_scores(chunk.columns, args), ids, chunk.lengths, mask, args, words)
        histogram.add(scores[mask & ~np.isin(ids, special)])
        total += int(mask.sum())
        if {BASE_LOGPS, REF_LOGPS} <= chunk.columns.keys():
            moved = (chunk.columns[REF_LOGPS] - chunk.columns[BASE_LOGPS])[mask].astype(np.float64)
            sums += [moved.size, moved.sum(), (moved**2).sum()]
    share = histogram.total / max(total, 1)
    thresholds: dict[float, float] = {}
    for wanted in _SHARES if histogram.total else ():
        threshold = float(f"{-histogram.quantile(wanted):.2g}")
        thresholds[threshold] = histogram.below(-threshold) * share
    low, high = (histogram.quantile(q) if histogram.total else 0.0 for q in (0.001, 0.999))
    edges = np.linspace(low, max(high, low + 1e-6), _BINS + 1)
    counts = np.diff([histogram.below(edge) for edge in edges]) * histogram.total
    found = read_json(selected / COUNTS)
    mean = sums[1] / max(sums[0], 1)
    result = Outlook(
        args.score,
        args.effective_threshold if args.positive_fraction is None else None,
        total,
        found["negative"] / max(found["trained"], 1),
        float(histogram.lowest),
        {"mean": mean, "sd": float(np.sqrt(max(sums[2] / sums[0] - mean**2, 0)))} if sums[0] else None,
        [{"negative_threshold": key, "negative": value} for key, value in thresholds.items() if value > 0],
        edges.round(5).tolist(),
        counts.round().astype(int).tolist(),
        read_json(scored / JUDGED) | (chosen or {}),
        (read_manifest(scored).get("selection") or {}).get("refusal"),
    )
    write_json(selected / OUTLOOK, asdict(result))
    return result


def reasons_to_stop(found: Outlook) -> list[str]:
    """Why training would not answer anything, each with the settings that would change it; empty when it would."""
    others = [each for each in found.thresholds if 0.01 <= each["negative"] <= 0.2][::2]
    options = ", ".join(
        f"--negative_threshold {each['negative_threshold']:g} ({each['negative']:.1%})" for each in others
    )
    reasons = []
    if found.refusal:
        reasons.append(
            f"{found.refusal}, so what it selects is noise. Judge more rows, try another --score, or train the "
            "reference longer (--reference.num_train_epochs)"
        )
    if found.negative == 0:
        reasons.append(
            f"nothing is selected: the lowest score is {found.lowest:.3g}"
            + (f" and the boundary {-found.threshold:.3g}" if found.threshold is not None else "")
            + f". These select something: {options or '--positive_fraction 0.9'}; a reference that is trained longer "
            "(--reference.num_train_epochs) spreads the scores"
        )
    elif found.negative > TOO_MUCH:
        reasons.append(
            f"{found.negative:.0%} of the tokens are negative, more than half. These select less: "
            f"{options or '--positive_fraction 0.9'}"
        )
    return reasons
