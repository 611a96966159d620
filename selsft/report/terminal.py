"""What `selsft score` shows: how many tokens, how the scores are spread, and the most negative tokens in context.

Text of a data set reaches the terminal escaped: a control character in it could move the cursor or recolour the
screen, and rich's markup is not interpreted. One pass over memory-mapped rows, in bounded memory: quantiles come from
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
from ..data.columns import BASE_LOGPS, REF_LOGPS, WEIGHTS
from ..data.tokenizers import special_ids
from ..selection.weights import add_token_weights
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
        bits = np.ascontiguousarray(scores, np.float32).view(np.uint32)
        # Order-preserving: negative numbers turned around, positive ones above them
        keys = np.where(bits >> 31, ~bits, bits | 0x80000000) >> 12
        self.counts += np.bincount(keys, minlength=len(self.counts))
        self.lowest, self.highest = scores.min(initial=self.lowest), scores.max(initial=self.highest)
        self.total, self.sum = self.total + len(scores), self.sum + float(scores.sum(dtype=np.float64))

    def quantile(self, q: float) -> float:
        """The score at rank `q * (total - 1)`, rounded down, to 1/4096 of its size; exact at 0 and 1."""
        rank = int(q * (self.total - 1))
        if rank in (0, self.total - 1):
            return float(self.lowest if rank == 0 else self.highest)
        key = int(np.searchsorted(np.cumsum(self.counts), rank, side="right"))
        bits = np.uint32((key << 12) | 0x800)  # the middle of the bin
        bits = bits & np.uint32(0x7FFFFFFF) if bits >> 31 else ~bits
        return float(np.clip(np.uint32(bits).view(np.float32), self.lowest, self.highest))


def summarize(scored: Dataset, tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig, show: int) -> Summary:
    """Numbers and the `show` most negative tokens of scored rows, one document each.

    Args:
        scored: with `input_ids`, `labels`, `base_logps` and `ref_logps`.
        args: the selection whose shares are counted, and whether special tokens are shown.
    """
    special = special_ids(tokenizer) if args.protect_special_tokens else np.zeros(0, np.int64)
    names = ["input_ids", "labels", BASE_LOGPS, REF_LOGPS]
    weighted = add_token_weights(scored, args, special, padding_free=False)
    histogram, tokens, signs = ScoreHistogram(), 0, np.zeros(3, np.int64)
    worst = WorstTokens(tokenizer, special, show, CONTEXT)
    for chunk in token_chunks(weighted, [*names, WEIGHTS]):
        mask = supervised_mask(chunk, padding_free=False)
        scores = chunk.columns[REF_LOGPS] - chunk.columns[BASE_LOGPS]
        histogram.add(scores[mask])
        tokens += chunk.size
        signs += [(chunk.columns[WEIGHTS][mask] * sign > 0).sum() for sign in (1, 0, -1)]
        worst.add(chunk, mask)
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
    return Summary(numbers, worst.found)


def printable(text: str) -> str:
    """`text` with everything that a terminal would act on written as an escape sequence."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


def print_summary(summary: Summary, seconds: float, folder: str, console: Console | None = None) -> None:
    """Two tables on standard output."""
    console = console or Console(highlight=False, soft_wrap=False)
    numbers = summary.numbers
    table = Table(title="Scores: log-probability under the reference minus under the model, nats", show_header=False)
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
            f"{found.score:+.2f}", f"{np.exp(found.base):.1e}", f"{np.exp(found.reference):.1e}", str(found.row), text
        )
    console.print(tokens)
