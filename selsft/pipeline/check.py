"""Reads every row as training will, before anything is trained: tokens, lengths, templates.

A row that cannot be tokenised, or is longer than the model's context, would otherwise stop the run after the reference
was trained. The counts of tokens are what a budget is made of. Rejected: checking a sample, which misses the one row.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from datasets import Dataset
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.judged import judged_rows, tokenize_rows
from ..data.spans import has_marks, without_marks
from ..data.tokenizers import set_up
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
    trust = bool(flags.get("trust_remote_code"))
    tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust, revision=flags.get("model_revision"))
    config = AutoConfig.from_pretrained(model, trust_remote_code=trust, revision=flags.get("model_revision"))
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    args = SelectiveSFTConfig(
        str(folder), use_cpu=True, bf16=False, **{key: flags[key] for key in _READ if key in flags}
    )
    template = set_up(tokenizer, flags)
    found: dict[str, Any] = {"context": context, "parts": {}, "warnings": []}
    for path in sorted(parts.glob("*.parquet")):
        if path.stem in ("rows", "marked"):
            continue
        rows = Dataset.from_parquet(str(path))
        lengths, labels = _tokens(rows, path.stem, tokenizer, args, template)
        if path.stem.startswith(("judged", "eval")) and has_marks(rows, args.dataset_text_field):
            _check_marks(rows, path.stem, tokenizer, args, template)
        found["parts"][path.stem], kept = _counts(path.stem, rows, lengths, labels, args, context)
        if path.stem == "train":
            pq.write_table(pa.table({"row": np.flatnonzero(kept)}), folder / KEPT)
            found["warnings"] = _warnings(rows, found["parts"]["train"], tokenizer, args)
    write_json(folder / CHECK, found)
    counts = ", ".join(f"{name} {part['tokens']:,} tokens" for name, part in found["parts"].items())
    return "\n  ".join([counts, *(f"warning: {warning}" for warning in found["warnings"])])


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
                raise InputError(f"{_row(rows, part, number)} cannot be made tokens of: {one_line(own)}") from own
        raise InputError(f"the {part} rows cannot be made tokens of: {one_line(error)}") from error
    lengths, labels = [], []
    for batch in prepared.select_columns(["input_ids", "labels"]).with_format("arrow").iter(batch_size=1000):
        column = batch["labels"].combine_chunks()
        sizes = pc.list_value_length(column).to_numpy(zero_copy_only=False)
        flat = column.flatten().to_numpy(zero_copy_only=False) != -100
        lengths.append(sizes)
        labels += np.split(flat, np.cumsum(sizes)[:-1])
    return np.concatenate([np.zeros(0, np.int64), *lengths]), labels


def _check_marks(rows: Dataset, part: str, tokenizer, args: SelectiveSFTConfig, template: str | None) -> None:
    """Marks are read late, by the scores or the evaluation, so they are read here too."""
    try:
        judged_rows(rows, tokenizer, args, template)
    except InputError as error:
        raise InputError(f"{part} rows: {error}") from error


def _counts(
    part: str,
    rows: Dataset,
    lengths: np.ndarray,
    labels: list[np.ndarray],
    args: SelectiveSFTConfig,
    context: int | None,
) -> tuple[dict[str, Any], np.ndarray]:
    limit = args.max_length
    cut = lengths if limit is None else np.minimum(lengths, limit)
    if context is not None and (long := np.flatnonzero(cut > context)).size:
        number = int(long[0])
        raise InputError(
            f"{_row(rows, part, number)} has {lengths[number]} tokens, more than the model's context of {context}: "
            f"set --max_length {context}"
        )
    if (empty := np.flatnonzero(lengths == 0)).size:
        raise InputError(f"{_row(rows, part, int(empty[0]))} has no tokens: remove it")
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


def _row(rows: Dataset, part: str, number: int) -> str:
    if LINE in rows.column_names:
        return f"row {rows[number][LINE]} of the data"
    return f"row {number} of the {part} rows"


def _warnings(rows: Dataset, counts: dict[str, Any], tokenizer, args: SelectiveSFTConfig) -> list[str]:
    """What is legal and rarely meant."""
    found = []
    if counts["truncated"]:
        found.append(
            f"{counts['truncated']} of {counts['rows']} rows are longer than max_length={args.max_length} and are cut"
        )
    if counts["without_label"]:
        found.append(f"{counts['without_label']} rows have nothing to learn within that length and are left out")
    names = set(rows.column_names)
    if {"prompt", "completion"} <= names and isinstance(rows[0]["prompt"], str):
        some = rows.select(range(min(len(rows), 1000)))
        glued = sum(
            bool(prompt and completion) and not prompt[-1].isspace() and not completion[0].isspace()
            for prompt, completion in zip(some["prompt"], some["completion"], strict=True)
        )
        if glued > len(some) / 2:
            found.append(
                "prompts end and completions begin without a space or line break, so their words are glued together"
            )
        if tokenizer.chat_template:
            found.append(
                "the model has a chat template, which plain prompts do not use: if it is a chat model, write "
                "prompt and completion as lists of messages"
            )
    return found
