"""The stage `select`: scores in, token weights out, no model needed.

A stage of its own, though the trainer would select by itself: the weights can be looked at before they train a model,
and another threshold reads a file instead of building a trainer.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import AutoTokenizer

from ..config import SelectiveSFTConfig
from ..data.chunks import supervised_mask, token_chunks
from ..data.columns import BASE_LOGPS, REF_LOGPS, WEIGHTS
from ..data.tokenizers import special_ids
from ..errors import input_errors
from ..records import write_json
from .weights import add_token_weights

SELECTED, COUNTS, WORST = "selected.parquet", "selection.json", 200


def select(
    scored: Dataset, model: str, options: dict[str, Any], folder: Path, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Write `selected.parquet` (`input_ids`, `labels`, `token_weights`, and `base_logps` for `npo`) and
    `selection.json`.

    Args:
        scored: rows with `base_logps` and `ref_logps`, as `selsft score` saves them.
        model: folder or id, for its tokenizer.
        options: selection settings of `SelectiveSFTConfig`, with `forget_weight` and `forget_objective`.

    Returns:
        what `selection.json` says: tokens, shares, boundary, and the most negative tokens.
    """
    with input_errors():
        args = SelectiveSFTConfig(output_dir=str(folder), use_cpu=True, bf16=False, **options)
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        special = special_ids(tokenizer) if args.protect_special_tokens else np.zeros(0, np.int64)
        weighted = add_token_weights(scored, args, special, padding_free=False)
    counts = {"tokens": 0, "trained": 0, "positive": 0, "neutral": 0, "negative": 0}
    for chunk in token_chunks(weighted, ["labels", WEIGHTS]):
        mask, weights = supervised_mask(chunk, padding_free=False), chunk.columns[WEIGHTS]
        counts["tokens"] += mask.size
        counts["trained"] += int(mask.sum())
        counts["positive"] += int((weights[mask] > 0).sum())
        counts["negative"] += int((weights[mask] < 0).sum())
    counts["neutral"] = counts["trained"] - counts["positive"] - counts["negative"]
    columns = ["input_ids", "labels", WEIGHTS] + ([BASE_LOGPS] if args.forget_objective == "npo" else [])
    weighted.select_columns(columns).to_parquet(str(folder / SELECTED))
    found = {**counts, "rows": len(weighted), "worst": _worst(scored, tokenizer, special)}
    write_json(folder / COUNTS, found)
    return found


def _worst(scored: Dataset, tokenizer, special: np.ndarray) -> list[dict[str, Any]]:
    """The tokens with the lowest scores, in context, whatever the threshold makes of them."""
    lowest: list[tuple[float, int, int]] = []
    for chunk in token_chunks(scored, ["input_ids", "labels", BASE_LOGPS, REF_LOGPS]):
        eligible = supervised_mask(chunk, padding_free=False) & ~np.isin(chunk.columns["input_ids"], special)
        flat = np.flatnonzero(eligible)
        scores = (chunk.columns[REF_LOGPS] - chunk.columns[BASE_LOGPS])[flat]
        best = np.argsort(scores, kind="stable")[:WORST]
        starts = np.concatenate([[0], np.cumsum(chunk.lengths)])
        for index, score in zip(flat[best], scores[best], strict=True):
            row = chunk.row_of(int(index))
            lowest.append((float(score), row, int(index - starts[row - chunk.first_row])))
        lowest = sorted(lowest)[:WORST]
    found = []
    for score, row, position in lowest:
        ids = scored[row]["input_ids"]
        before, token, after = ids[max(0, position - 24) : position], ids[position : position + 1], ids[position + 1 :]
        found.append(
            {
                "score": score,
                "row": row,
                "before": str(tokenizer.decode(before)),
                "text": str(tokenizer.decode(token)),
                "after": str(tokenizer.decode(after[:8])),
            }
        )
    return found
