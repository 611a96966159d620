"""All measures of one model on held-out data, with a value for every row, so that two models compare in pairs.

`selsft evaluate` saves them as `metrics.json` (means) and `rows.parquet` (a value per row). Rejected: means alone,
with which a difference of two models has no interval.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
from datasets import Dataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.rows import check_dataset
from ..scoring.frozen import use_start
from ..training.model import Model
from .generation import exact_match, greedy_answers
from .likelihood import answer_nll, kl_to_base, text_perplexity
from .load import load_model
from .rows import HeldOut, prepare


@dataclass
class Evaluation:
    """Attributes:
    metrics: means over the rows; a measure that was not taken is absent.
    rows: one row per held-out row, in the data's order.
    """

    metrics: dict[str, Any] = field(default_factory=dict)
    rows: pa.Table | None = None


def evaluate(
    model: str | Path | Model,
    dataset: Dataset,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    args: SelectiveSFTConfig | None = None,
    base_model: str | Path | Model | None = None,
    max_new_tokens: int = 128,
    batch_tokens: int = 8192,
) -> Evaluation:
    """Measures of a model on held-out rows, with a value for each row, so that two models compare in pairs.

    Args:
        model: folder or Hub id of a model or adapter, or a loaded model (then with its `tokenizer`).
        dataset: prompt-completion pairs, conversations, plain text, or tokenised rows with labels. A column `answers`
            (a list of texts) says what counts as an exact match.
        args: settings that decide tokens and precision, as in training.
        base_model: what the KL divergence compares with; by default the base below an adapter, none for a full model.
        max_new_tokens: longest greedy answer; 0 generates nothing.
        batch_tokens: tokens of a forward pass, padding included.

    Returns:
        `metrics`, the means, and `rows`, a table with one row per held-out row; `evaluate_rows` has their names.

    Raises:
        `ValueError` for a loaded model without a tokenizer, and when no row has a token to score.
    """
    check_dataset("dataset", dataset)
    args = args if args is not None else SelectiveSFTConfig("unused")
    kwargs = {"trust_remote_code": args.trust_remote_code, **cast(dict, args.model_init_kwargs or {})}
    if isinstance(model, str | Path):
        model, own = load_model(str(model), kwargs)
        tokenizer = tokenizer if tokenizer is not None else own
    if tokenizer is None:
        raise ValueError("tokenizer=None: a loaded model needs its tokenizer, give it")
    base = load_model(str(base_model), kwargs)[0] if isinstance(base_model, str | Path) else base_model
    if base is not None:
        base = cast(Any, base).to(args.device)
    return evaluate_rows(
        model, tokenizer, dataset, args, base=base, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens
    )


def evaluate_rows(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    data: Dataset,
    args: SelectiveSFTConfig,
    *,
    base: Model | None = None,
    max_new_tokens: int = 128,
    batch_tokens: int = 8192,
) -> Evaluation:
    """NLL of the answers, exact match by greedy generation with the rate and length of ended answers, and the KL
    divergence to the base on the prompts.

    Args:
        base: model to compare with; by default the base below an adapter, and none for a full model.
        max_new_tokens: 0 leaves out generation.

    Returns:
        `nll` is nats per token over all labels, `nll_row` the mean over rows of their own means. `eos_rate` is the
        share of answers that ended before `max_new_tokens`, `answer_tokens` their mean length. `kl_to_base` is the
        mean over rows of the mean over the positions of the prompt. Rows that are one text have neither.
    """
    held = prepare(model, tokenizer, data, args)
    model = held.trainer.model
    nll = answer_nll(held, batch_tokens)
    sums, counts = np.array([total for total, _ in nll]), np.array([count for _, count in nll])
    columns: dict[str, Any] = {"row": held.indices, "nll": sums, "tokens": counts}
    scored = counts > 0
    metrics: dict[str, Any] = {
        "rows": len(nll),
        "rows_without_label": held.skipped,
        "tokens": int(counts.sum()),
        "nll": float(sums.sum() / counts.sum()),
        "nll_row": float((sums[scored] / counts[scored]).mean()),
    }
    if held.has_prompts and max_new_tokens:
        answers = greedy_answers(
            model, tokenizer, held.prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens
        )
        exact = exact_match(answers, held.references)
        columns |= {
            "answer": [answer.text for answer in answers],
            "reference": [accepted[0] if accepted else "" for accepted in held.references],
            "exact_match": exact,
            "ended": [answer.ended for answer in answers],
            "answer_tokens": [answer.tokens for answer in answers],
        }
        metrics |= {
            "exact_match": float(np.mean(exact)),
            "eos_rate": float(np.mean(columns["ended"])),
            "answer_tokens": float(np.mean(columns["answer_tokens"])),
        }
    divergence = _divergence(held, model, base, batch_tokens)
    if divergence is not None:
        columns["kl_to_base"] = divergence
        metrics["kl_to_base"] = float(np.mean(divergence))
    return Evaluation(metrics, pa.table(columns))


def _divergence(held: HeldOut, model: Model, base: Model | None, batch_tokens: int) -> list[float] | None:
    if not all(held.prompts):
        return None
    if base is not None:
        return kl_to_base(model, base, held.prompts, batch_tokens)
    if isinstance(model, PeftModel):
        return kl_to_base(model, _Base(model), held.prompts, batch_tokens)  # type: ignore[arg-type]
    return None


class _Base:
    """The base below a model's adapter, called like a model of its own."""

    def __init__(self, model: PeftModel):
        self.model, self.modules, self.eval = model, model.modules, model.eval

    def __call__(self, **inputs):
        with use_start(self.model, at_base=True) as base:
            return base(**inputs)


def evaluate_text(
    model: Model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block: int
) -> dict[str, float]:
    """Perplexity of neutral text, as metrics: what fine-tuning may have damaged besides."""
    return {f"text_{name}": value for name, value in text_perplexity(model, tokenizer, texts, block).items()}
