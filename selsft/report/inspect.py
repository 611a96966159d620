"""Rows of tokens as a page to read, select on and mark, and as coloured text on a terminal.

The page holds exact numbers, so that the counts at its sliders are those of training; its script
(`templates/inspect`) draws only the rows in view. Rejected: HTML for every token, which takes a browser minutes;
scores rounded to 16 bits, which move tokens across a threshold.
"""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from ..config import SelectiveSFTConfig
from ..data.columns import BASE_LOGPS, NOISY_LOGPS, PROBE_SCORES, REF_LOGPS, TOKEN_SCORES
from ..selection.pooling import pool_scores
from ..selection.quantile import boundary_of_fraction
from ..selection.rules import classes_at
from .page import HIDDEN, write_page
from .terminal import printable
from .tokens import DOCUMENT, LABELLED, ROLE, SCORED, SPECIAL, START, WORD, TokenRows

INFLUENCE, CONTRAST, WEIGHTED = "influence", "contrast", "weights"
SETTINGS = {
    INFLUENCE: INFLUENCE, CONTRAST: CONTRAST, BASE_LOGPS: "surprisal", PROBE_SCORES: "probe", TOKEN_SCORES: "given",
}  # fmt: skip
"""What the page can colour by -> `SelectiveSFTConfig.score`."""
_SHOWN, _FACETS = 200, 40


def score_names(rows: TokenRows) -> list[str]:
    """What the rows can be coloured by, the best first; `weights` are their own, or 1 for tokens with a label."""
    logps = [name for name in (BASE_LOGPS, REF_LOGPS, NOISY_LOGPS) if name in rows.scores]
    others = sorted(rows.scores.keys() - set(logps), key=lambda name: (name != TOKEN_SCORES, name))
    compared = [
        name
        for name, other in ((CONTRAST, NOISY_LOGPS), (INFLUENCE, BASE_LOGPS))
        if {REF_LOGPS, other} <= rows.scores.keys()
    ]
    names = [*compared, *others, *logps]
    return [*names, WEIGHTED] if rows.weights is not None or not names else names


def score_of(rows: TokenRows, name: str, base_weight: float = 1.0) -> np.ndarray:
    """A score of every token by itself, `(n,)` float32; high is good."""
    if name == INFLUENCE:
        return rows.scores[REF_LOGPS] - np.float32(base_weight) * rows.scores[BASE_LOGPS]
    if name == CONTRAST:
        return rows.scores[REF_LOGPS] - rows.scores[NOISY_LOGPS]
    if name == WEIGHTED:
        return np.ones(len(rows.tokens), np.float32) if rows.weights is None else rows.weights
    return rows.scores[name]


def pooled(
    rows: TokenRows, score: np.ndarray, pooling: str, lookahead: float = 0.0, worst: int | None = None
) -> np.ndarray:
    """Scores as selection pools them, `(n,)` float32 (`selection.pooling`)."""
    documents, words = (np.cumsum(rows.flags & bit > 0) for bit in (DOCUMENT, WORD))
    return pool_scores(score, _scored(rows, score), documents, words, pooling, lookahead, worst)


def boundary_at(rows: TokenRows, score: np.ndarray, fraction: float) -> float:
    """The lowest of the best `fraction` of the scores: what `positive_fraction` makes of these rows."""
    return boundary_of_fraction(lambda: [score[_scored(rows, score)]], fraction)


def default_rule(name: str) -> dict[str, Any]:
    """`score_pooling`, and `negative_threshold` or `positive_fraction`, of a run that sets none of them."""
    if name not in SETTINGS:
        return {"score_pooling": "token", "negative_threshold": None, "positive_fraction": 0.95}
    args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, score=SETTINGS[name])
    return {
        "score_pooling": args.pooling,
        "negative_threshold": args.effective_threshold,
        "positive_fraction": args.effective_fraction,
    }


def _scored(rows: TokenRows, score: np.ndarray) -> np.ndarray:
    return (rows.flags & SCORED > 0) & np.isfinite(score)


def classes(rows: TokenRows, score: np.ndarray, boundary: float, band: float, protect_special: bool) -> np.ndarray:
    """Class of every token as training has it, `(n,)` int8: 1, 0 or -1; 2 for tokens that are not scored."""
    scored = _scored(rows, score)
    special = rows.flags & SPECIAL > 0 if protect_special else None
    with np.errstate(invalid="ignore"):
        found = classes_at(score, np.float32(boundary), neutral_band=np.float32(band), protected=special)
    found[~scored] = 2
    return found


def write_inspection(path: Path, rows: TokenRows, about: dict[str, Any], settings: dict[str, Any]) -> Path:
    """Write the page of some rows; returns its path.

    Args:
        about: `title`, `lines` (facts as texts), `total` (rows of the data set), `judged` (rows of a judged sample, as
            they are in its file), `measured` (content of a folder's `judged.json`).
        settings: `score` (one of `score_names`), `negative_threshold` or `positive_fraction` and the other one None,
            `neutral_band`, `score_base_weight`, `score_pooling`, `score_lookahead`, `score_row_worst`,
            `protect_special_tokens`.
    """
    digest = hashlib.sha256(
        rows.tokens.tobytes() + rows.offsets.tobytes() + "\0".join(rows.pieces).encode("utf-8", "surrogatepass")
    )
    data = {
        "key": digest.hexdigest()[:16],
        "hidden": HIDDEN.pattern,
        "bits": {
            "LABELLED": LABELLED, "SCORED": SCORED, "SPECIAL": SPECIAL, "ROLE": ROLE, "START": START, "WORD": WORD,
            "DOCUMENT": DOCUMENT,
        },
        "facts_rows": len(rows.numbers),
        "pieces": rows.pieces,
        "tokens": _packed(rows.tokens.astype(np.uint32)),
        "offsets": _packed(rows.offsets.astype(np.uint32)),
        "flags": _packed(rows.flags),
        "numbers": _packed(rows.numbers.astype(np.uint32)),
        "scores": score_names(rows),
        "columns": {name: _packed(values) for name, values in rows.scores.items()},
        "weights": None if rows.weights is None else _packed(rows.weights),
        "facts": {name: [_short(value) for value in values] for name, values in rows.facts.items()},
        "facets": [name for name, values in rows.facts.items() if _is_facet(values)],
        "judged": about["judged"],
        "settings": settings,
        "names": SETTINGS,
        "defaults": {name: default_rule(name) for name in score_names(rows)},
    }  # fmt: skip
    content = {**about, "data": data, "tables": _measured(about["measured"])}
    return write_page(path, "inspect/page.html", content)


def _packed(values: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(values).astype(values.dtype.newbyteorder("<")).tobytes()).decode()


def _short(value: Any) -> Any:
    """A value as JSON has it."""
    if value is None or isinstance(value, bool | int):
        return value
    if isinstance(value, float):
        return value if np.isfinite(value) else None
    return str(value)[:_SHOWN]


def _is_facet(values: list[Any]) -> bool:
    """Whether a column sorts the rows into a few kinds, as their source does."""
    distinct = {value for value in values if not isinstance(value, float)}
    return 2 <= len(distinct) <= _FACETS and len(distinct) <= len(values) / 2


def _measured(judged: dict[str, Any]) -> list[dict[str, Any]]:
    """Rows of a table from `judged.json`: how well each score finds what people marked."""
    return [
        {"sample": sample, "score": score, "level": level, **numbers}
        for sample, scores in judged.items() if isinstance(scores, dict)
        for score, levels in scores.items() if isinstance(levels, dict)
        for level, numbers in levels.items() if isinstance(numbers, dict) and numbers.get("auc") is not None
    ]  # fmt: skip


def print_rows(rows: TokenRows, found: np.ndarray, show: int, console: Console | None = None) -> None:
    """Print the rows with the largest share of negatives: negative tokens red, or in [brackets] without colours.

    Args:
        found: of `classes`.
    """
    console = console or Console(highlight=False, markup=False, soft_wrap=True)
    starts, ends = rows.offsets[:-1], rows.offsets[1:]
    counts = np.concatenate([[0], np.cumsum(found == -1)])
    scored = np.concatenate([[0], np.cumsum(found != 2)])
    negative, total = counts[ends] - counts[starts], scored[ends] - scored[starts]
    whole = negative.sum(), max(total.sum(), 1)
    console.print(f"{whole[0]:,} of {whole[1]:,} scored tokens are negative ({whole[0] / whole[1]:.1%})")
    order = np.argsort(-negative / np.maximum(total, 1), kind="stable")[:show]
    for row in order:
        facts = [f"{name} {values[row]}" for name, values in rows.facts.items()]
        head = f"row {rows.numbers[row]}  {negative[row]} of {total[row]} negative"
        console.print(Text(printable("  ".join([head, *facts]))[:_SHOWN], style="bold"))
        console.print(_coloured(rows, found, int(starts[row]), int(ends[row]), console.color_system is None))


def _coloured(rows: TokenRows, found: np.ndarray, start: int, end: int, brackets: bool) -> Text:
    text = Text()
    for token in range(start, end):
        piece = rows.pieces[rows.tokens[token]]
        body = piece.lstrip()
        text.append(printable(piece[: len(piece) - len(body)]).replace("\\n", "\n").replace("\\t", "\t"))
        kind = int(found[token])
        shown = "\n".join(map(printable, body.split("\n")))
        if kind == -1 and brackets:
            shown = f"[{shown}]"
        text.append(shown, style={-1: "bold red", 0: "yellow", 2: "dim"}.get(kind, ""))
    return text
