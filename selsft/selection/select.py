"""From scores to token weights, without a model: `select_tokens`, and the stage `select` of a run.

A stage of its own, although the trainer could select: the weights can be inspected before they train a model, and
another threshold reads a file instead of building a trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.chunks import supervised_mask, token_chunks
from ..data.columns import BASE_LOGPS, READ_COLUMNS, TOKEN_COLUMNS, WEIGHTS
from ..data.rows import check_dataset
from ..data.scored_folder import load_scores
from ..errors import InputError, input_errors
from ..records import write_json
from .chosen import use_folder, warn_unverified
from .weights import add_token_weights, pooled_scores, raw_scores, vocabulary
from .worst import WorstTokens

SELECTED, COUNTS = "selected.parquet", "selection.json"
WORST, CONTEXT = 200, 24


def select_tokens(
    scored: Dataset, tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig | None = None
) -> Dataset:
    """Scored rows with the column `token_weights`: -1 forget, 0 leave out, 1 learn.

    Args:
        scored: one document a row, with `input_ids`, `labels` and the columns of `args.score` (`load_scores`).
        tokenizer: of the policy, for its special tokens.
        args: settings of the selection (`negative_threshold`, `positive_fraction`, ...); the defaults when `None`.

    Returns:
        the rows with one int8 list more, mapped into memory; with `forget_weight=0` negative tokens have 0. A
        `train_dataset` for `SelectiveSFTTrainer`.

    Raises:
        `ValueError` for a score that is not finite, naming the row.
    """
    check_dataset("scored", scored)
    args = args if args is not None else SelectiveSFTConfig("unused", use_cpu=True, bf16=False)
    if args.score == "excess":
        raise InputError("score='excess' selects in every step, against the model in training: use another score")
    if gone := [
        name for name in ("input_ids", "labels", *READ_COLUMNS[args.score]) if name not in scored.column_names
    ]:
        raise InputError(
            f"scored has no column {gone[0]!r}, which score={args.score!r} reads: give load_scores(FOLDER)"
        )
    special, words = vocabulary(tokenizer, args)
    return add_token_weights(scored, args, special, padding_free=False, words=words)


def selection_args(scored: Path, options: dict[str, Any]) -> SelectiveSFTConfig:
    """Settings of a selection: those given, and what the folder of scores was given by judged rows (`chosen`)."""
    args = SelectiveSFTConfig("unused", use_cpu=True, bf16=False, **{"go_on": True, **options})
    use_folder(args, scored)
    return args


def select(
    scored: Path,
    model: str,
    options: dict[str, Any],
    folder: Path,
    start_logps: bool = False,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """Write `selected.parquet` (`input_ids`, `labels`, `token_weights`) and `selection.json`.

    Args:
        scored: folder of `selsft score`.
        model: folder or id, for its tokenizer.
        options: selection settings of `SelectiveSFTConfig`.
        start_logps: whether `base_logps` goes into the file, for `npo`.

    Returns:
        what `selection.json` says: tokens, shares, boundary, and the most negative tokens.
    """
    with input_errors():
        args = selection_args(scored, options)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        warn_unverified(args)
        weighted = select_tokens(load_scores(scored), tokenizer, args)
    counts = {"tokens": 0, "trained": 0, "positive": 0, "neutral": 0, "negative": 0}
    special, words = vocabulary(tokenizer, args)
    worst = WorstTokens(tokenizer, special, WORST, CONTEXT)
    there = [name for name in TOKEN_COLUMNS if name in weighted.column_names]
    for chunk in token_chunks(weighted, ["input_ids", "labels", *there]):
        mask, weights = supervised_mask(chunk, padding_free=False), chunk.columns[WEIGHTS]
        counts["tokens"] += mask.size
        counts["trained"] += int(mask.sum())
        counts["positive"] += int((weights[mask] > 0).sum())
        counts["negative"] += int((weights[mask] < 0).sum())
        raw = raw_scores(chunk.columns, args)
        worst.add(chunk, mask, pooled_scores(raw, chunk.columns["input_ids"], chunk.lengths, mask, args, words))
    counts["neutral"] = counts["trained"] - counts["positive"] - counts["negative"]
    columns = ["input_ids", "labels", WEIGHTS] + ([BASE_LOGPS] if start_logps else [])
    weighted.select_columns(columns).to_parquet(str(folder / SELECTED))
    shown = [
        {"score": each.score, "row": each.row, "before": each.before, "text": each.token, "after": each.after}
        for each in worst.tokens
    ]
    record = {**counts, "rows": len(weighted), "worst": shown}
    write_json(folder / COUNTS, record)
    return record
