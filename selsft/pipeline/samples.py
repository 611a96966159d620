"""Rows and answers that a page shows: texts, not figures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from datasets import Dataset
from transformers import AutoTokenizer

from ..data.columns import WEIGHTS
from ..report.tokens import SCORED, read_rows

_ROWS, _TOKENS, _ANSWERS = 12, 400, 12


def coloured_rows(selected: Path, table: Path, model: str) -> list[dict[str, Any]]:
    """The scored rows with most negative tokens: `line`, `negative`, and `pieces` of (text, class), where class 2 is
    for what is not learned at all."""
    if not table.is_file():
        return []
    rows = pq.read_table(table, columns=["line", "row", "negative"]).to_pylist()
    rows = [row for row in rows if row["row"] is not None and row["negative"]][:_ROWS]
    if not rows:
        return []
    data = Dataset.from_parquet(str(selected)).select([row["row"] for row in rows])
    tokens = read_rows(
        data.select_columns(["input_ids", "labels", WEIGHTS]), AutoTokenizer.from_pretrained(model), 2**62
    )
    assert tokens.weights is not None
    found = []
    for number, row in enumerate(rows):
        pieces: list[list[Any]] = []
        start, end = int(tokens.offsets[number]), int(tokens.offsets[number + 1])
        for place in range(start, min(end, start + _TOKENS)):
            weight = tokens.weights[place]
            kind = (int(weight > 0) - int(weight < 0)) if tokens.flags[place] & SCORED else 2
            text = tokens.pieces[tokens.tokens[place]]
            if pieces and pieces[-1][1] == kind:
                pieces[-1][0] += text
            else:
                pieces.append([text, kind])
        found.append(
            {"line": row["line"], "negative": row["negative"], "pieces": pieces, "cut": end - start > _TOKENS}
        )
    return found


def changed_answers(tables: dict[str, Path]) -> list[dict[str, Any]]:
    """Held-out questions that models answer differently, with the answers of all of them.

    Args:
        tables: model -> its table of rows, with its first seed.
    """
    rows = {name: pq.read_table(path).to_pydict() for name, path in tables.items() if path.is_file()}
    rows = {name: table for name, table in rows.items() if "answer" in table}
    if len(rows) < 2:
        return []
    of = {name: {row: index for index, row in enumerate(table["row"])} for name, table in rows.items()}
    first = next(iter(rows))
    found = []
    for row in rows[first]["row"]:
        if not all(row in places for places in of.values()):
            continue
        answers = {name: table["answer"][of[name][row]] for name, table in rows.items()}
        if len(set(answers.values())) == 1:
            continue
        right = {name: bool(table["exact_match"][of[name][row]]) for name, table in rows.items()}
        table, place = rows[first], of[first][row]
        found.append(
            {
                "row": row,
                "question": table.get("question", [""] * len(table["row"]))[place],
                "wanted": table["reference"][place],
                "answers": answers,
                "right": right,
            }
        )
    found.sort(key=lambda each: (-len(set(each["right"].values())), each["row"]))
    return found[:_ANSWERS]
