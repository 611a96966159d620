"""What `selsft score` shows: how many tokens, how the scores are spread, and the most negative tokens in context.

Text of a data set reaches the terminal escaped: a control character in it could move the cursor or recolour the
screen, and rich's markup is not interpreted. Rejected: an average score per row, which hides the token to blame.
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

from ..annotation import special_ids
from ..collator import BASE_LOGPS, REF_LOGPS, WEIGHTS
from ..scoring import trained_tokens
from ..trainer import SelectiveSFTTrainer

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)
CONTEXT = 12  # tokens shown before a token, and a third of it after


@dataclass
class TokenInContext:
    """A token with its score, its log-probabilities (nats), and the text around it."""

    row: int
    position: int
    score: float
    base: float
    reference: float
    before: str
    token: str
    after: str


@dataclass
class Summary:
    """`numbers` is what also goes into `selsft_run.json`."""

    numbers: dict[str, Any]
    worst: list[TokenInContext]


def summarize(dataset: Dataset, trainer: SelectiveSFTTrainer, show: int) -> Summary:
    """Numbers and the `show` most negative tokens of the scored rows of `trainer`."""
    tokenizer: PreTrainedTokenizerBase = trainer._tokenizer
    columns = dataset.with_format("numpy")
    base, reference, weights = (
        np.concatenate([np.asarray(row, np.float32) for row in columns[name][:]])
        for name in (BASE_LOGPS, REF_LOGPS, WEIGHTS)
    )
    rows = trained_tokens(dataset, trainer.padding_free)
    trained = np.concatenate(rows)
    scores = reference - base
    counted, chosen = scores[trained], weights[trained]
    share = {
        "positive": float((chosen > 0).mean()) if chosen.size else 0.0,
        "neutral": float((chosen == 0).mean()) if chosen.size else 0.0,
        "negative": float((chosen < 0).mean()) if chosen.size else 0.0,
    }
    numbers = {
        "rows": len(dataset),
        "tokens": int(trained.size),
        "scored_tokens": int(trained.sum()),
        "mean_score": float(counted.mean()) if counted.size else None,
        "quantiles": {str(q): float(np.quantile(counted, q)) for q in QUANTILES if counted.size},
        "share": share,
    }
    ids = np.concatenate([np.asarray(row) for row in columns["input_ids"][:]])
    eligible = trained
    if trainer.args.protect_special_tokens:
        eligible = trained & ~np.isin(ids, special_ids(tokenizer))
    candidates = np.flatnonzero(eligible)
    order = candidates[np.argsort(scores[candidates], kind="stable")[:show]]
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    worst = []
    for flat in order:
        row = int(np.searchsorted(starts, flat, side="right")) - 1
        position = int(flat - starts[row])
        before, token, after = _context(dataset[row], position, tokenizer)
        score, p, q = (float(values[flat]) for values in (scores, base, reference))
        worst.append(TokenInContext(row, position, score, p, q, before, token, after))
    return Summary(numbers, worst)


def _context(row: dict[str, Any], position: int, tokenizer: PreTrainedTokenizerBase) -> tuple[str, str, str]:
    """Text before, of and after a token, within its own document of a packed row."""
    ends = np.cumsum(row.get("seq_lengths") or [len(row["input_ids"])])
    end = int(ends[np.searchsorted(ends, position, side="right")])
    start = max((int(e) for e in ends if e <= position), default=0)
    ids = row["input_ids"]
    parts = ids[max(start, position - CONTEXT) : position], ids[position : position + 1], ids[position + 1 : end]
    before, token, after = (str(tokenizer.decode(part)) for part in (parts[0], parts[1], parts[2][: CONTEXT // 3]))
    return before, token, after


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
