"""How the demo shows itself: tables and sentences, on the terminal and in a page.

rich draws both, and its export escapes the text, so the page is self-contained and an answer that looks like HTML
stays an answer. A template of our own would only repeat that.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import asdict

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selsft.demo.experiment import ARMS, Sample, SeedResult

COLUMNS = {
    "exact_match": "exact match",
    "exact_match_systematic": "…on systematic",
    "wrong_assertions": "says the wrong answer",
    "wrong_probability": "p(wrong answer)",
    "known_kept": "known facts kept",
}
TOKENS = {
    "auc": "AUC of the score, all response tokens",
    "auc_answers": "AUC of the score, answer tokens",
    "wrong_share": "wrong tokens, share of the response tokens",
    "negative_share": "negative tokens, share of the response tokens",
    "precision": "precision: negatives that are wrong",
    "recall": "recall: wrong tokens that are negative",
    "recall_systematic": "recall, systematic wrong answers",
    "recall_random": "recall, random wrong answers",
    "true_target": "negatives in true statements of target facts",
    "true_known": "negatives in known facts the reference forgot",
}
NEGATIVE, WRONG, BOTH = "bold red", "underline", "bold red underline"


def _spread(values: Sequence[float], digits: int = 3) -> str:
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    return f"{np.mean(values):.{digits}f} ± {np.std(values, ddof=1):.{digits}f}"


def _title(text: str, results: Sequence[SeedResult]) -> str:
    seeds = ", ".join(str(r.seed) for r in results)
    return f"{text} (seed {seeds})" if len(results) == 1 else f"{text} (seeds {seeds}: mean ± standard deviation)"


def intro(result: SeedResult) -> RenderableType:
    n = result.sizes
    text = (
        f"A toy: a Llama of {n['parameters']:,} parameters, pretrained here from nothing. The noise is injected: "
        f"{n['wrong training statements']} of {n['training statements']} training statements give a wrong answer on "
        f"purpose, so the wrong tokens are known. {n['systematically wrong facts']} of {n['target facts']} facts are "
        "wrong always in the same way, as the base model already believes; others are wrong at random. "
        f"Tested on {n['held-out questions']} questions in phrasings that no split shows for these facts."
    )
    return Panel(Text(text), title="selsft demo", title_align="left")


def score_table(results: Sequence[SeedResult]) -> Table:
    table = Table(title=_title("Greedy answers to held-out phrasings", results), title_justify="left")
    table.add_column("model", no_wrap=True)
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for arm in ARMS:
        row = [_spread([getattr(r.scores[arm], key) for r in results]) for key in COLUMNS]
        table.add_row(arm, *row, end_section=arm == "reference")
    return table


def token_table(results: Sequence[SeedResult]) -> Table:
    table = Table(title=_title("Scores against the known mask", results), title_justify="left", show_header=False)
    table.add_column("what")
    table.add_column("value", justify="right")
    for key, label in TOKENS.items():
        table.add_row(label, _spread([getattr(r.tokens, key) for r in results]))
    return table


def paired_table(results: Sequence[SeedResult]) -> Table:
    """Differences between arms of the same seed: the spread over seeds is larger than what the arms differ by."""
    table = Table(title="Paired differences, one number per seed", title_justify="left")
    table.add_column("arms")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for later, earlier in ((3, 2), (4, 2), (4, 3)):
        cells = []
        for key in COLUMNS:
            differences = (
                getattr(r.scores[ARMS[later]], key) - getattr(r.scores[ARMS[earlier]], key) for r in results
            )
            cells.append(" ".join(f"{d:+.3f}" for d in differences))
        table.add_row(f"{ARMS[later]} − {ARMS[earlier]}", *cells)
    return table


def sentence(sample: Sample, brackets: bool = False) -> Text:
    """One training sentence. Without colours the negative tokens stand in [brackets]."""
    text = Text()
    text.append(sample.prompt.replace("\n", " "), style="dim")
    for piece, negative, wrong in sample.pieces:
        lead = piece[: len(piece) - len(piece.lstrip())]
        text.append(lead)
        word = piece[len(lead) :]
        text.append(
            f"[{word}]" if brackets and negative else word,
            style=BOTH if negative and wrong else NEGATIVE if negative else WRONG if wrong else "",
        )
    return text


def sentences(result: SeedResult, brackets: bool = False) -> RenderableType:
    legend = Text("Training sentences, drawn at random in each group: ")
    legend.append("[negative]" if brackets else "negative", style=NEGATIVE)
    legend.append(" for the trainer")
    if not brackets:
        legend.append(", ")
        legend.append("wrong", style=WRONG)
        legend.append(" on purpose")
    lines: list[Text] = [legend]
    for group in dict.fromkeys(s.group for s in result.samples):
        lines.append(Text(group, style="italic cyan"))
        lines += [Text("  ") + sentence(s, brackets) for s in result.samples if s.group == group]
    return Group(*lines)


def timing_line(results: Sequence[SeedResult]) -> Text:
    seconds = {arm: sum(r.seconds.get(arm, 0.0) for r in results) for arm in ARMS}
    return Text("Seconds: " + ", ".join(f"{arm} {value:.1f}" for arm, value in seconds.items()))


def render(console: Console, results: Sequence[SeedResult]) -> None:
    """Print everything. Lines are only blank where rich would otherwise run two tables together."""
    console.print(intro(results[0]))
    console.print(token_table(results))
    console.print(score_table(results))
    if len(results) > 1:
        console.print(paired_table(results))
    console.print(sentences(results[0], brackets=console.color_system is None))
    console.print(timing_line(results))


def page(results: Sequence[SeedResult], width: int = 110) -> Console:
    """A console that has recorded the report, for `save_html` and `save_svg`."""
    console = Console(record=True, file=io.StringIO(), width=width, force_terminal=True, color_system="truecolor")
    render(console, results)
    return console


def as_rows(results: Sequence[SeedResult]) -> list[dict[str, object]]:
    """One flat row per seed and model, for the CSV file."""
    return [{"seed": r.seed, "model": arm, **asdict(r.scores[arm])} for r in results for arm in ARMS]
