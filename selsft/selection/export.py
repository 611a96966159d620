"""What a selection makes of scored rows, for other trainers: masked labels, token weights, or spans of the text.

The classes are those of a training on the same folder: the same score, threshold and pooling (`chosen`, `select`). Ids
and all other columns of the user's rows go along (`data.source_rows`). Rejected: marking characters by decoding the
tokens, which loses those that are no whole character and what a chat template adds.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from datasets import Dataset, Features, List, Value, concatenate_datasets
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.alignment import Alignment
from ..data.chunks import class_counts
from ..data.columns import WEIGHTS
from ..data.judged import tokenize_rows
from ..data.scored_folder import load_scores, read_manifest
from ..data.source_rows import SOURCE_ROW, read_source_rows
from ..data.spans import CORRECTED, SPANS, text_places
from ..data.tokenizers import load_tokenizer, set_up, tokenizer_sha256
from ..errors import InputError
from ..records import RUN, read_json
from .chosen import warn_unverified
from .select import select_tokens, selection_args

FORMS = ("labels", "weights", "spans")
_CONVERSATIONS = ("messages", "conversations", "prompt", "completion")
_SETTINGS = ("chat_template_path", "assistant_only_loss")
_TOKENS = ("max_length", "truncation_mode", "completion_only_loss", "assistant_only_loss", "dataset_text_field")


def export(
    scored: Path, form: str, options: dict[str, Any], model: str | None = None, trust_remote_code: bool = False
) -> tuple[Dataset, dict[str, Any]]:
    """Rows for other trainers.

    Args:
        scored: folder of `selsft score`.
        form: `"labels"`: `input_ids`, `attention_mask` and `labels`, -100 for all but positive tokens; rows without a
            label are left out. `"weights"`: the same with all labels, and `token_weights` of -1, 0 and 1. `"spans"`:
            the user's own rows with `spans` of weight -1 (negative) and 0 (neutral), in characters.
        options: selection settings of `SelectiveSFTConfig`.
        model: whose tokenizer made the rows; by default the one that the folder names.

    Returns:
        the rows, with the columns of the user's rows, and `rows`, `tokens` (supervised), `positive`, `neutral`,
        `negative`, `left_out` (rows) and `unmarked` (negative tokens outside of all text, such as those of a chat
        template, which no span can reach).

    Raises:
        `InputError` for another tokenizer than that of the scores, for a folder whose judged rows speak against
        selecting by it, and for `"spans"` where the text is not known.
    """
    if form not in FORMS:
        raise InputError(f"form={form!r} is unknown: use one of {', '.join(FORMS)}")
    tokenizer, template = _tokenizer(scored, model, trust_remote_code)
    args = selection_args(scored, options)
    warn_unverified(args)
    weighted = select_tokens(load_scores(scored), tokenizer, args)
    source = read_source_rows(scored)
    if source is not None and len(source) != len(weighted):
        raise InputError(
            f"{str(scored)!r} has {len(weighted)} scored rows and {len(source)} source rows: score it again"
        )
    classes = class_counts(weighted)
    counts: dict[str, Any] = {"rows": len(weighted), "tokens": sum(classes.values()), **classes}
    if form == "spans":
        if source is None:
            raise InputError(
                f"{str(scored)!r} does not know the text of its rows, which were streamed or packed: export labels or "
                "weights, or score the rows unpacked"
            )
        rows, counts["unmarked"] = _with_spans(source, weighted, scored, tokenizer, template)
        return rows, counts | {"left_out": 0}
    rows = weighted.map(
        _masked if form == "labels" else _masks,
        batched=True,
        remove_columns=[name for name in weighted.column_names if name not in ("input_ids", "labels", WEIGHTS)],
        desc="Exporting",
    )
    rows = rows.remove_columns(WEIGHTS) if form == "labels" else rows
    names = ["input_ids", "attention_mask", "labels", *([WEIGHTS] if form == "weights" else [])]
    rows = rows.select_columns(names)
    if source is not None:
        rows = concatenate_datasets([rows, _without(source, names)], axis=1)
    else:
        rows = rows.add_column(SOURCE_ROW, np.arange(len(rows)))
    if form == "labels":
        rows = rows.filter(lambda labels: any(label != -100 for label in labels), input_columns="labels")
    return rows, counts | {"left_out": len(weighted) - len(rows), "unmarked": 0}


def write_rows(rows: Dataset, file: IO[bytes], ending: str) -> None:
    """Write rows as Parquet, or as one JSON object on a line (`.jsonl`)."""
    if ending != ".jsonl":
        rows.to_parquet(file)
        return
    for row in rows:
        file.write((json.dumps(row, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace"))


def _without(source: Dataset, names: list[str]) -> Dataset:
    return source.remove_columns([name for name in source.column_names if name in names])


def _masked(batch: dict[str, Any]) -> dict[str, Any]:
    rows = zip(batch["labels"], batch[WEIGHTS], strict=True)
    labels = [np.where(np.asarray(weights) > 0, row, -100).astype(np.int32) for row, weights in rows]
    return {"labels": labels, **_masks(batch)}


def _masks(batch: dict[str, Any]) -> dict[str, Any]:
    return {"attention_mask": [np.ones(len(ids), np.int8) for ids in batch["input_ids"]]}


def _tokenizer(scored: Path, model: str | None, trust_remote_code: bool) -> tuple[PreTrainedTokenizerBase, str | None]:
    """The tokenizer that made the rows, and the template that they were rendered with."""
    manifest = read_manifest(scored)
    flags = read_json(scored / RUN).get("config") or {}
    name = model or manifest.get("model")
    tokenizer = load_tokenizer(name, trust_remote_code)
    template = set_up(tokenizer, {key: flags.get(key, manifest["identity"].get(key)) for key in _SETTINGS})
    wanted = manifest["identity"]["tokenizer_sha256"]
    if tokenizer_sha256(tokenizer, template) != wanted:
        raise InputError(f"the tokenizer of {name!r} is not that of the scores: give --model_name_or_path one that is")
    return tokenizer, template


# Spans


def _with_spans(
    source: Dataset, weighted: Dataset, scored: Path, tokenizer: PreTrainedTokenizerBase, template: str | None
) -> tuple[Dataset, int]:
    """The user's rows with spans, and the number of negative tokens outside of their text."""
    if taken := {SPANS, CORRECTED} & set(source.column_names):
        raise InputError(f"the scored rows have the column {min(taken)!r} already: rename it and score them again")
    identity = read_manifest(scored)["identity"]
    flags = {key: identity[key] for key in _TOKENS}
    if not {flags["dataset_text_field"], *_CONVERSATIONS} & set(source.column_names):
        raise InputError(
            f"the rows of {str(scored)!r} were tokenised already and have no text to mark characters of: export "
            "labels or weights"
        )
    args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, **flags)
    prepared = tokenize_rows(source, tokenizer, args, template)
    alignment = Alignment(tokenizer)
    unmarked = 0

    def mark(row: dict[str, Any], number: int) -> dict[str, Any]:
        nonlocal unmarked
        example, own = prepared[number], weighted[number]
        try:
            found, outside = _spans_of(example, own, args, tokenizer, template, alignment)
        except ValueError as error:
            raise InputError(f"row {number} of the scored rows: {error}") from error
        unmarked += outside
        return _marked(row, found)

    features = _features(source.features)
    rows = source.map(mark, with_indices=True, features=features, load_from_cache_file=False, desc="Exporting")
    return rows, unmarked


def _spans_of(
    example: dict[str, Any],
    own: dict[str, Any],
    args: SelectiveSFTConfig,
    tokenizer: PreTrainedTokenizerBase,
    template: str | None,
    alignment: Alignment,
) -> tuple[dict[int, list[list[float]]], int]:
    """For each text of a row (by its message, or -1) its spans; and negative tokens outside of all texts."""
    whole, texts, special = text_places(example, args.dataset_text_field, tokenizer, template)
    ids, kept, weights = example["input_ids"], own["input_ids"], np.asarray(own[WEIGHTS])
    start = len(ids) - len(kept) if args.truncation_mode == "keep_end" else 0
    if ids[start : start + len(kept)] != kept:
        raise ValueError("its tokens are not those of its text: score the rows again")
    supervised = np.asarray(own["labels"]) != -100
    supervised[0] = False
    values = np.ones(len(ids))
    values[start : start + len(kept)] = np.where(supervised, weights, 1)
    starts, ends = alignment.characters(ids, whole, special)
    found: dict[int, list[list[float]]] = {message: [] for message, *_ in texts}
    outside = 0
    borders = np.flatnonzero(np.diff(values, prepend=np.nan, append=np.nan))
    for first, after in itertools.pairwise(borders):
        if values[first] > 0:
            continue
        reached = np.zeros(after - first, bool)
        for message, left, right, shift in texts:
            inside = (starts[first:after] < right) & (ends[first:after] > left) & (ends > starts)[first:after]
            if not inside.any():
                continue
            reached |= inside
            low, high = max(int(starts[first:after][inside].min()), left), min(int(ends[first:after].max()), right)
            found[message].append([low - left + shift, high - left + shift, float(values[first])])
        outside += int((~reached).sum()) if values[first] < 0 else 0
    return found, outside


def _marked(row: dict[str, Any], found: dict[int, list[list[float]]]) -> dict[str, Any]:
    """The row with its spans beside its text, or in its messages."""
    if -1 in found:
        return {**row, SPANS: found[-1]}
    done, made = 0, {}
    for name in _CONVERSATIONS:
        if isinstance(row.get(name), list):
            made[name] = [{**message, SPANS: found.get(done + i, [])} for i, message in enumerate(row[name])]
            done += len(row[name])
    return {**row, **made}


def _features(features: Features) -> Features:
    spans = List(List(Value("float64")))
    found = dict(features)
    conversations = [name for name in _CONVERSATIONS if _is_list(found.get(name))]
    for name in conversations:
        if isinstance(struct := getattr(found[name], "feature", None), Mapping):
            found[name] = List({**struct, SPANS: spans})
    return Features(found if conversations else {**found, SPANS: spans})


def _is_list(kind: Any) -> bool:
    return kind is not None and not isinstance(kind, Value)
