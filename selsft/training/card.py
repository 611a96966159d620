"""The model card: TRL's, with what was selected and what came of it.

TRL writes the card from a template of its own, which knows nothing of tokens and calls a base that is no model of the
Hub `None`. Rejected: a template in TRL's folder of templates, the only place where TRL looks for one.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..config import SelectiveSFTConfig
from ..records import replaced

PROCEDURE = "## Training procedure\n"


def public_name(source: str | Path | None) -> str:
    """What a card may say of a model: its id on the Hub, or the name of its folder without the path."""
    return "" if source is None else Path(source).resolve().name if Path(source).exists() else str(source)


def describe(args: SelectiveSFTConfig, reference: str, weights: str) -> dict[str, str]:
    """Heading and text of each line about the selection.

    Args:
        reference: name of the reference, or empty.
        weights: column of the data that said which tokens are negative, or empty when a score did.
    """
    found = {}
    if weights:
        found["Selection"] = f"by the column `{weights}` or marks of the data"
    else:
        beta = f", score_base_weight {args.score_base_weight:g}" if args.score == "influence" else ""
        found["Score"] = f"`{args.score}`, pooled by {args.pooling}{beta}"
        if args.effective_fraction is not None:
            found["Rule"] = f"the best {args.effective_fraction:.0%} positive ({args.selection_scope})"
        elif args.effective_threshold is not None:
            found["Rule"] = f"negative below a score of {-args.effective_threshold:g}"
    if reference:
        found["Reference"] = reference
    if args.forget_weight:
        weight = f"weight {args.forget_weight:g}, {args.forget_schedule}, {args.forget_normalization}"
        found["Negative tokens"] = f"forgotten with `{args.forget_objective}` ({weight})"
    else:
        found["Negative tokens"] = "ignored"
    return found


def results(log_history: list[dict[str, Any]]) -> dict[str, str]:
    """Share of negatives and last losses, from what a trainer has logged; what was not logged is left out."""
    shares = [row["negative_fraction"] for row in log_history if "negative_fraction" in row]
    found = {"Share of negatives": f"{sum(shares) / len(shares):.2%} of the trained tokens"} if shares else {}
    names = {
        "train_loss": "train loss", "positive_loss": "last loss of positive tokens",
        "forget_loss": "last loss of negative tokens", "negative_prob": "last mean probability of negative tokens",
        "eval_loss": "eval loss",
    }  # fmt: skip
    last = {name: row[name] for row in log_history for name in names if name in row}
    if last:
        found["Results"] = ", ".join(f"{label} {last[name]:.4g}" for name, label in names.items() if name in last)
    return found


def complete(path: Path, base: str, model: str, lines: dict[str, str]) -> None:
    """Write names in the place of `None` into TRL's card, and `lines` above its training procedure.

    Args:
        base: name of the model that was trained.
        model: name of the result, for the lines that load it.
    """
    text = path.read_text(encoding="utf-8")
    text = text.replace("[None](https://huggingface.co/None)", f"`{base}`").replace('model="None"', f'model="{model}"')
    table = "".join(f"| {name} | {value.replace('|', chr(92) + '|')} |\n" for name, value in lines.items())
    section = f"## Training data, tokens and results\n\n| | |\n|---|---|\n{table}\n"
    before, heading, after = text.partition(PROCEDURE)
    with replaced(path) as file:
        file.write((before + section + heading + after if heading else f"{text.rstrip()}\n\n{section}").encode())
