"""The scored rows as a table that goes back to the user's own rows: what to look at, clean or drop.

Every row of the data is in it, also those that were not scored because something was trained, judged or evaluated on
them. Rejected: a table of scored rows alone, whose numbers are those of a part.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from datasets import Dataset

from ..data.chunks import supervised_mask, token_chunks
from ..data.columns import TOKEN_COLUMNS, WEIGHTS
from ..data.scored_folder import load_scores
from ..errors import InputError
from ..evaluation.judged import WORST_OF_ROW
from ..records import replaced
from ..selection.select import SELECTED, selection_args
from ..selection.weights import pooled_scores, raw_scores, vocabulary
from .check import KEPT
from .split import LINE, PART, ROWS

TABLE = "rows.csv"


def write_triage(
    selected: Path, scored: Path, checked: Path, parts: Path, folder: Path, model: str, options: dict
) -> str:
    """Write `rows.csv` and `rows.parquet`, worst rows first; returns a remark.

    One line per row of the data: the user's own columns that hold one value, `line` (from 1), `part`, `judged`, and
    for scored rows `row` (number in the scored folder), `tokens` that are supervised, `negative` (share of them),
    `worst_span` (the run of negative tokens, else the token, with the lowest sum of scores), `worst_score` (that
    sum), and `score` (mean of the three lowest scores).
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    args = selection_args(scored / "scored", options)
    _, words = vocabulary(tokenizer, args)
    rows = Dataset.from_parquet(str(selected / SELECTED))
    scores = load_scores(scored / "scored")
    there = [name for name in TOKEN_COLUMNS if name in scores.column_names]
    found: list[tuple] = []
    weighted = token_chunks(rows, ["input_ids", "labels", WEIGHTS])
    for chunk, weights in zip(token_chunks(scores, ["input_ids", "labels", *there]), weighted, strict=True):
        mask = supervised_mask(chunk, padding_free=False)
        ids = chunk.columns["input_ids"]
        flat = pooled_scores(raw_scores(chunk.columns, args), ids, chunk.lengths, mask, args, words)
        negative = weights.columns[WEIGHTS] < 0
        ends = np.cumsum(chunk.lengths)
        for start, end in zip(ends - chunk.lengths, ends, strict=True):
            found.append(_row(ids[start:end], flat[start:end], mask[start:end], negative[start:end], tokenizer))
    kept = pq.read_table(checked / KEPT)["row"].to_numpy()
    if len(kept) != len(found):
        raise InputError(f"{len(found)} rows are scored and {len(kept)} were read: run again with --from check")
    lines = np.asarray(pq.read_table(parts / "train.parquet", columns=[LINE])[LINE])[kept]
    table = _joined(pq.read_table(parts / ROWS), lines, found)
    with replaced(folder / "rows.parquet") as file:
        pq.write_table(table, file)
    with replaced(folder / TABLE) as file:
        text = csv.writer(_Text(file))
        text.writerow(table.column_names)
        text.writerows(zip(*(column.to_pylist() for column in table.columns), strict=True))
    some = sum(bool(row[1]) for row in found)
    return f"{some:,} of {len(found):,} scored rows have a negative token: {TABLE}"


def _row(ids: np.ndarray, scores: np.ndarray, mask: np.ndarray, negative: np.ndarray, tokenizer) -> tuple:
    """Supervised tokens, share negative, worst span, its score, score of the row."""
    counted = np.flatnonzero(mask)
    if not counted.size:
        return 0, 0.0, "", None, None
    own = scores[counted]
    worst = counted[int(np.argmin(own))]
    start, end, lowest = worst, worst + 1, float(scores[worst])
    marked = negative & mask
    if marked.any():
        edges = np.diff(np.concatenate([[False], marked, [False]]).astype(np.int8))
        runs = list(zip(np.flatnonzero(edges == 1), np.flatnonzero(edges == -1), strict=True))
        sums = [float(scores[a:b].sum()) for a, b in runs]
        (start, end), lowest = runs[int(np.argmin(sums))], min(sums)
    text = str(tokenizer.decode(ids[start:end].tolist()))
    pooled = float(np.sort(own)[:WORST_OF_ROW].mean())
    return int(counted.size), float(marked.sum() / counted.size), text, lowest, pooled


def _joined(rows: pa.Table, lines: np.ndarray, found: list[tuple]) -> pa.Table:
    names = ("tokens", "negative", "worst_span", "worst_score", "score")
    where = {int(line): index for index, line in enumerate(lines)}
    order = sorted(
        range(len(rows)),
        key=lambda line: (
            line not in where,
            *((-found[where[line]][1], found[where[line]][4] or 0) if line in where else ()),
        ),
    )
    rows = rows.take(order)
    numbers = [where.get(line) for line in rows[LINE].to_pylist()]
    part = rows[PART].to_pylist()
    table = rows.drop_columns([LINE, PART])
    taken = {"line", "part", "judged", "row", *names}
    table = table.rename_columns([f"own_{name}" if name in taken else name for name in table.column_names])
    new = {
        "line": [line + 1 for line in rows[LINE].to_pylist()],
        "part": part,
        "judged": [name.startswith("judged") for name in part],
        "row": numbers,
        **{
            name: [None if number is None else found[number][place] for number in numbers]
            for place, name in enumerate(names)
        },
    }
    for name, values in new.items():
        table = table.append_column(name, pa.array(values))
    return table


class _Text:
    """What `csv` needs of a file of bytes."""

    def __init__(self, file):
        self.file = file

    def write(self, text: str) -> None:
        self.file.write(text.encode("utf-8", "replace"))
