"""What the demo shows: the same tables and sentences on the terminal and in a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np
from rich.console import Console, Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from selsft.demo.experiment import ARMS, Sample, SeedResult
from selsft.report.page import write_page

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


class Figures(NamedTuple):
    """A table as texts; the first column names its rows."""

    title: str
    headings: list[str]
    rows: list[list[str]]


def intro(result: SeedResult) -> str:
    n = result.sizes
    return (
        f"A toy: a Llama of {n['parameters']:,} parameters, pretrained here from scratch. The noise is injected: "
        f"{n['wrong training statements']} of {n['training statements']} training statements give a wrong answer on "
        f"purpose, so the wrong tokens are known. {n['systematically wrong facts']} of {n['target facts']} facts are "
        "always wrong in the same way, as the base model already believes; others are wrong at random. "
        f"Tested on {n['held-out questions']} questions in phrasings that no split shows for these facts."
    )


def figures(results: Sequence[SeedResult]) -> list[Figures]:
    """Scores against the known mask, answers, and, of several seeds, the differences between arms of one seed, since
    seeds differ by more than arms do."""
    tokens = [[label, _spread([getattr(r.tokens, key) for r in results])] for key, label in TOKENS.items()]
    answers = [[arm, *(_spread([getattr(r.scores[arm], key) for r in results]) for key in COLUMNS)] for arm in ARMS]
    shown = [
        Figures(_title("Scores against the known mask", results), ["", "value"], tokens),
        Figures(_title("Greedy answers to held-out phrasings", results), ["model", *COLUMNS.values()], answers),
    ]
    if len(results) == 1:
        return shown
    paired = []
    for later, earlier in ((ARMS[3], ARMS[2]), (ARMS[4], ARMS[2]), (ARMS[4], ARMS[3])):
        pairs = [(r.scores[later], r.scores[earlier]) for r in results]
        cells = (" ".join(f"{getattr(a, key) - getattr(b, key):+.3f}" for a, b in pairs) for key in COLUMNS)
        paired.append([f"{later} − {earlier}", *cells])
    return [*shown, Figures("Paired differences, one number per seed", ["arms", *COLUMNS.values()], paired)]


def _on_terminal(shown: Figures) -> Table:
    table = Table(title=shown.title, title_justify="left", show_header=bool(shown.headings[0]))
    for index, heading in enumerate(shown.headings):
        table.add_column(heading, justify="right" if index else "left", no_wrap=heading == "model")
    for row in shown.rows:
        table.add_row(*row, end_section=row[0] == "reference")
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
    for group, samples in _by_group(result.samples).items():
        lines.append(Text(group, style="italic cyan"))
        lines += [Text("  ") + sentence(sample, brackets) for sample in samples]
    return Group(*lines)


def _by_group(samples: Sequence[Sample]) -> dict[str, list[Sample]]:
    return {group: [s for s in samples if s.group == group] for group in dict.fromkeys(s.group for s in samples)}


def timing(results: Sequence[SeedResult]) -> str:
    seconds = {arm: sum(r.seconds.get(arm, 0.0) for r in results) for arm in ARMS}
    return "Seconds: " + ", ".join(f"{arm} {value:.1f}" for arm, value in seconds.items())


def render(console: Console, results: Sequence[SeedResult]) -> None:
    """Print everything."""
    console.print(Panel(Text(intro(results[0])), title="selsft demo", title_align="left"))
    for shown in figures(results):
        console.print(_on_terminal(shown))
    console.print(sentences(results[0], brackets=console.color_system is None))
    console.print(Text(timing(results)))


def write_report(path: Path, results: Sequence[SeedResult]) -> Path:
    """Write the page; returns its path."""
    content = {"intro": intro(results[0]), "figures": figures(results), "timing": timing(results)}
    return write_page(path, "demo.html", content | {"groups": _by_group(results[0].samples)})


def as_rows(results: Sequence[SeedResult]) -> list[dict[str, object]]:
    """One flat row per seed and model, for the CSV file."""
    return [{"seed": r.seed, "model": arm, **asdict(r.scores[arm])} for r in results for arm in ARMS]
