"""Reads every row as training will, before anything is trained: tokens, lengths, templates.

A row that cannot be tokenised, or is longer than the model's context, would otherwise stop the run after the reference
was trained. The counts of tokens are what a budget is made of. Rejected: checking a sample, which misses the one row.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.judged import judged_rows, tokenize_rows
from ..data.spans import has_marks, without_marks
from ..data.tokenizers import set_up
from ..data.validation import read_model_facts, validate_rows
from ..errors import InputError, one_line
from ..records import write_json
from .split import LINE, TRAINED

CHECK, KEPT = "check.json", "kept.parquet"
_READ = {
    "max_length",
    "truncation_mode",
    "completion_only_loss",
    "assistant_only_loss",
    "dataset_text_field",
    "packing",
}
_MORE = ("tools", "chat_template_kwargs")


def check(parts: Path, model: str, flags: dict[str, Any], folder: Path) -> str:
    """Write `check.json` (rows, tokens, supervised tokens and longest row of each part, warnings) and `kept.parquet`
    (which rows of `train.parquet` have a label after truncation); returns a remark.

    Args:
        parts: folder of the split.
        model: folder or id.
        flags: of training; those that decide tokens are read.

    Raises:
        `InputError` naming the part, the row and the remedy.
    """
    facts = read_model_facts(
        model, revision=flags.get("model_revision"), trust_remote_code=bool(flags.get("trust_remote_code")),
        chat_template_path=flags.get("chat_template_path"),
    )  # fmt: skip
    args = SelectiveSFTConfig(
        str(folder), use_cpu=True, bf16=False, **{key: flags[key] for key in _READ if key in flags}
    )
    tokenizer, template = facts.tokenizer, set_up(facts.tokenizer, flags)
    found: dict[str, Any] = {"context": facts.context, "parts": {}, "warnings": []}
    for path in sorted(parts.glob("*.parquet")):
        part = path.stem
        if part == "rows":
            continue
        rows = Dataset.from_parquet(str(path))
        with _named_as_in_the_data(rows, part):
            glued = validate_rows(rows, facts, args, what=f"the {part} rows")
            if part == "marked":  # the rows of `train`, with what is wrong in them
                continue
            lengths, labels = _tokens(rows, part, tokenizer, args, template)
            if part.startswith(("judged", "eval")) and has_marks(rows, args.dataset_text_field):
                judged_rows(rows, tokenizer, args, template)
            found["parts"][part], kept = _counts(part, lengths, labels, args)
        if part == "train":
            pq.write_table(pa.table({"row": np.flatnonzero(kept)}), folder / KEPT)
            glued = glued and _in_the_data(glued, rows, part)
            found["warnings"] = _warnings(rows, found["parts"][part], tokenizer, args, glued)
    write_json(folder / CHECK, found)
    counts = ", ".join(f"{name} {part['tokens']:,} tokens" for name, part in found["parts"].items())
    return "\n  ".join([counts, *(f"warning: {warning}" for warning in found["warnings"])])


@contextlib.contextmanager
def _named_as_in_the_data(rows: Dataset, part: str) -> Iterator[None]:
    """Messages about a row of a part give its number in the user's data, where it is one of them."""

    try:
        yield
    except InputError as error:
        raise InputError(_in_the_data(str(error), rows, part)) from error


def _in_the_data(message: str, rows: Dataset, part: str) -> str:
    def named(match: re.Match[str]) -> str:
        if LINE in rows.column_names:
            return f"row {rows[int(match.group(1))][LINE]} of the data"
        return f"row {match.group(1)} of the {part} rows"

    return re.sub(rf"\brow (\d+)\b(?: of the {part} rows)?", named, message, count=1)


def _tokens(
    rows: Dataset, part: str, tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig, template: str | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """Lengths `(rows,)`, and which tokens of each row have a label, before truncation."""
    used = [name for name in rows.column_names if name in (*TRAINED, *_MORE, args.dataset_text_field)]
    plain = without_marks(rows).select_columns(used)
    try:
        prepared = tokenize_rows(plain, tokenizer, args, template)
    except Exception as error:  # of templates and tokenizers, in a worker that does not say which row it was
        for number in range(len(plain)):
            try:
                tokenize_rows(plain.select([number]), tokenizer, args, template)
            except Exception as own:
                raise InputError(f"row {number} cannot be made tokens of: {one_line(own)}") from own
        raise InputError(f"the {part} rows cannot be made tokens of: {one_line(error)}") from error
    lengths, labels = [], []
    for batch in prepared.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        column = batch["labels"].combine_chunks()
        sizes = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        flat = column.flatten().to_numpy(zero_copy_only=False) != -100
        lengths.append(sizes)
        labels += np.split(flat, np.cumsum(sizes)[:-1])
    return np.concatenate([np.zeros(0, np.int64), *lengths]), labels


def _counts(
    part: str, lengths: np.ndarray, labels: list[np.ndarray], args: SelectiveSFTConfig
) -> tuple[dict[str, Any], np.ndarray]:
    """What `check.json` says of a part, and which of its rows have a label after truncation, `(rows,)` bool."""
    limit = args.max_length
    cut = lengths if limit is None else np.minimum(lengths, limit)
    if (empty := np.flatnonzero(lengths == 0)).size:
        raise InputError(f"row {empty[0]} has no tokens: remove it")
    end = args.truncation_mode == "keep_end"
    supervised = np.array(
        [int(mask[-limit:].sum() if end and limit else mask[:limit].sum()) for mask in labels], np.int64
    )
    if not supervised.any():
        raise InputError(
            f"no {part} row has a token to learn within max_length={limit}: the prompts alone are longer, raise it"
        )
    kept = supervised > 0
    found = {
        "rows": len(lengths),
        "tokens": int(cut[kept].sum()),
        "supervised": int(supervised.sum()),
        "longest": int(lengths.max()),
        "truncated": int((cut < lengths).sum()),
        "without_label": int((~kept).sum()),
    }
    return found, kept


def _warnings(
    rows: Dataset,
    counts: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    args: SelectiveSFTConfig,
    glued: str | None,
) -> list[str]:
    """What is legal and rarely meant."""
    found = []
    if counts["truncated"]:
        found.append(
            f"{counts['truncated']} of {counts['rows']} rows are longer than max_length={args.max_length} and are cut"
        )
    if counts["without_label"]:
        found.append(f"{counts['without_label']} rows have nothing to learn within that length and are left out")
    if glued is not None:
        found.append(glued)
    elif tokenizer.chat_template and "prompt" in rows.column_names and isinstance(rows[0]["prompt"], str):
        found.append(
            "the model has a chat template, which plain prompts do not use: if it is a chat model, write "
            "prompt and completion as lists of messages"
        )
    return found
