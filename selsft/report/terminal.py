"""What `selsft score` prints: counts of tokens, quantiles of the scores, and the most negative tokens in context.

Text of a data set is printed escaped: a control character in it could move the cursor or recolour the
screen; rich's markup is not interpreted. One pass over memory-mapped rows, in bounded memory: quantiles come from
a histogram whose bins are 1/2048 of the score wide (the ends are exact), the most negative tokens from a running list.
Rejected: an average score per row, which hides the token to blame; a sample, which misses the tails.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from datasets import Dataset
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.chunks import supervised_mask, token_chunks
from ..data.columns import TOKEN_COLUMNS, WEIGHTS
from ..selection.quantile import from_ordered_bits, ordered_bits
from ..selection.weights import add_token_weights, pooled_scores, raw_scores, vocabulary
from ..selection.worst import TokenInContext, WorstTokens

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CONTEXT = 12  # tokens shown before a token, and a third of it after


@dataclass
class Summary:
    """`numbers` is what also goes into `selsft_run.json`."""

    numbers: dict[str, Any]
    worst: list[TokenInContext]


class ScoreHistogram:
    """Counts of float32 numbers by their upper 20 bits: sign, exponent and 11 bits of the fraction."""

    def __init__(self):
        self.counts = np.zeros(2**20, np.int64)
        self.lowest, self.highest, self.total, self.sum = np.inf, -np.inf, 0, 0.0

    def add(self, scores: np.ndarray) -> None:
        """Count `(n,)` float32 scores, all finite."""
        self.counts += np.bincount(ordered_bits(scores) >> 12, minlength=len(self.counts))
        self.lowest, self.highest = scores.min(initial=self.lowest), scores.max(initial=self.highest)
        self.total, self.sum = self.total + len(scores), self.sum + float(scores.sum(dtype=np.float64))

    def below(self, score: float) -> float:
        """Share of the scores below `score`, to the bin; exact beyond both ends."""
        if not self.total or score <= self.lowest:
            return 0.0
        if score > self.highest:
            return 1.0
        return float(self.counts[: ordered_bits(np.array([score], np.float32))[0] >> 12].sum() / self.total)

    def quantile(self, q: float) -> float:
        """The score at rank `q * (total - 1)`, rounded down, to 1/4096 of its size; exact at 0 and 1."""
        rank = int(q * (self.total - 1))
        if rank in (0, self.total - 1):
            return float(self.lowest if rank == 0 else self.highest)
        key = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        middle = from_ordered_bits(np.array([key << 12 | 0x800], np.uint32))[0]  # of the bin
        return float(np.clip(middle, self.lowest, self.highest))


def summarize(scored: Dataset, tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig, show: int) -> Summary:
    """Numbers and the `show` most negative tokens of scored rows, one document each.

    Args:
        scored: with `input_ids`, `labels` and the columns of the score.
        args: the selection whose shares are counted, and whether special tokens are shown.
    """
    special, words = vocabulary(tokenizer, args)
    there = [name for name in TOKEN_COLUMNS if name in scored.column_names]
    weighted = add_token_weights(scored, args, special, padding_free=False, words=words)
    histogram, tokens, signs = ScoreHistogram(), 0, np.zeros(3, np.int64)
    worst = WorstTokens(tokenizer, special, show, CONTEXT)
    for chunk in token_chunks(weighted, ["input_ids", "labels", *there, WEIGHTS]):
        mask = supervised_mask(chunk, padding_free=False)
        scores = pooled_scores(
            raw_scores(chunk.columns, args), chunk.columns["input_ids"], chunk.lengths, mask, args, words
        )
        histogram.add(scores[mask])
        tokens += chunk.size
        signs += [(chunk.columns[WEIGHTS][mask] * sign > 0).sum() for sign in (1, 0, -1)]
        worst.add(chunk, mask, scores)
    signs[1] = histogram.total - signs[0] - signs[2]
    share = signs / max(histogram.total, 1)
    numbers = {
        "rows": len(scored),
        "tokens": tokens,
        "scored_tokens": histogram.total,
        "mean_score": histogram.sum / histogram.total if histogram.total else None,
        "quantiles": {str(q): histogram.quantile(q) for q in QUANTILES if histogram.total},
        "share": dict(zip(("positive", "neutral", "negative"), map(float, share), strict=True)),
    }
    return Summary(numbers, worst.tokens)


def printable(text: str) -> str:
    """`text` with everything that a terminal would act on written as an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def _probability(logp: float | None) -> str:
    return "" if logp is None else f"{np.exp(logp):.1e}"


def print_judged(record: dict[str, Any] | None, selection: dict[str, Any], console: Console | None = None) -> None:
    """Print what judged rows say about a score and its baselines.

    Args:
        record: content of `judged.json`; `None` without judged rows.
        selection: the selection that the folder will record (`ScoringRun.selection`).
    """
    console = console or Console(highlight=False, soft_wrap=True)
    if record is None:
        console.print(
            f"score={selection['score']} is unverified: nothing says whether it finds what is wrong. Mark the errors "
            "in 100 rows or more and give them with --judged",
            markup=False,
        )
        return
    lines = []
    for sample in ("judged", "test"):
        if sample not in record:
            continue
        table = Table(title=f"How well scores find what is wrong: {sample} rows, 95 % intervals over rows")
        for name in ("score", "level", "AUC", "interval", "AP", "at share", "wrong", "rows"):
            table.add_column(name, justify="left" if name in ("score", "level") else "right", no_wrap=True)
        for score, levels in record[sample].items():
            for level, found in levels.items():
                interval = f"{found['auc_low']:.3f} to {found['auc_high']:.3f}"
                numbers = f"{found['auc']:.3f}", interval, f"{found['ap']:.3f}", f"{found['precision_at_share']:.3f}"
                table.add_row(score, level, *numbers, str(found["n_wrong"]), str(found["n_rows"]))
        console.print(table)
        found = record[sample][record["score"]].get(record["level"], {})
        if "auc_within" in found:
            lines.append(
                f"AUC within {found['n_groups']} groups of {sample} rows: {found['auc_within']:.3f} "
                f"({found['auc_within_low']:.3f} to {found['auc_within_high']:.3f})"
            )
    table = Table(title=f"{record['score']} by threshold, judged rows")
    for name in ("negative_threshold", "flagged", "precision", "recall"):
        table.add_column(name, justify="right")
    for line in record["by_threshold"]:
        table.add_row(
            f"{line['negative_threshold']:.4g}", *(f"{line[key]:.2f}" for key in ("flagged", "precision", "recall"))
        )
    console.print(table)
    if probe := record.get("probe"):
        lines.append(f"the probe was fitted on {probe['rows']} rows ({probe['labels']})")
    if curve := record.get("learning_curve"):
        steps = [f"{line['share']:g}: {line['auc']:.3f}" for line in curve if not line.get("predicted")]
        steps += [f"predicted for {line['share']:g}: {line['auc']:.3f}" for line in curve if line.get("predicted")]
        lines.append(f"AUC by the share of the judged rows that it is fitted on: {', '.join(steps)}")
    lines += [selection[key] for key in ("threshold", "refusal") if selection[key]]
    for line in lines:
        console.print(line, markup=False)


def print_summary(summary: Summary, seconds: float, folder: str, console: Console | None = None) -> None:
    """Two tables on standard output."""
    console = console or Console(highlight=False, soft_wrap=False)
    numbers = summary.numbers
    table = Table(title="Scores", show_header=False)
    table.add_row("rows", f"{numbers['rows']:,}")
    table.add_row("tokens, of which scored", f"{numbers['tokens']:,}, {numbers['scored_tokens']:,}")
    quantiles = "  ".join(f"{float(q):.0%} {value:+.2f}" for q, value in numbers["quantiles"].items())
    table.add_row("quantiles of the score", quantiles or "no token is scored")
    share = numbers["share"]
    table.add_row(", ".join(share), "  ".join(f"{value:.1%}" for value in share.values()))
    table.add_row("seconds, with loading", f"{seconds:.1f}")
    table.add_row("saved to", Text(printable(folder)))
    console.print(table)
    if not summary.worst:
        return
    tokens = Table(title=f"The {len(summary.worst)} most negative tokens")
    for name in ("score", "p model", "p reference", "row"):
        tokens.add_column(name, justify="right", no_wrap=True)
    tokens.add_column("token in context", overflow="fold")
    for found in summary.worst:
        text = Text(printable(found.before))
        text.append(f"[{printable(found.token)}]", style="bold red")
        text.append(printable(found.after))
        tokens.add_row(
            f"{found.score:+.2f}", _probability(found.base), _probability(found.reference), str(found.row), text
        )
    console.print(tokens)
