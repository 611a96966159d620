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
from ..data.judged import judged_rows
from ..data.rows import check_dataset
from ..data.spans import CORRECTED, has_marks, without_marks
from ..errors import check_type
from ..scoring.frozen import use_start
from ..training.model import Model
from ..training.validation import MODEL_WANTED, MODELS
from .generation import exact_match, greedy_answers
from .kept import Kept
from .likelihood import answer_logps, kl_to_base, text_perplexity
from .load import load_model
from .overlap import chrf, word_f1
from .pairs import pair_margins
from .rows import ANSWERS, HeldOut, prepare


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
    check_type("args", args, SelectiveSFTConfig, "a SelectiveSFTConfig")
    for name, each in (("model", model), ("base_model", base_model if base_model is not None else "")):
        check_type(name, each, MODELS, MODEL_WANTED)
    if tokenizer is not None:
        check_type("tokenizer", tokenizer, PreTrainedTokenizerBase, "that of the model")
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
    kept: Kept | None = None,
) -> Evaluation:
    """NLL of the answers, by marks too; preference on minimal pairs; exact match, word F1 and chrF of greedy answers
    with the rate and length of ended ones; and the KL divergence to the base on the prompts.

    Args:
        base: model to compare with; by default the base below an adapter, and none for a full model.
        max_new_tokens: 0 leaves out generation.
        kept: what an evaluation that was cut off has finished.

    Returns:
        `nll` is nats per token over all labels, `nll_row` the mean over rows of their own means. Where rows mark what
        is wrong in them (docs/spans.md), `nll_right` and `nll_wrong` are over the tokens that are judged right and
        wrong. `preference` is the share of minimal pairs (`pairs`) whose right text is likelier, `margin` by how many
        nats. `eos_rate` is the share of answers that ended before `max_new_tokens`, `answer_tokens` their mean length.
        `kl_to_base` is the mean over rows of the mean over the positions of the prompt. Rows that are one text have
        neither.
    """
    marked = has_marks(data, args.dataset_text_field)
    plain = without_marks(data, args.dataset_text_field) if marked else data
    if marked and CORRECTED in data.column_names:
        plain = plain.add_column(CORRECTED, data[CORRECTED])
    held = prepare(model, tokenizer, plain, args)
    model = held.trainer.model
    logps = answer_logps(held, batch_tokens, kept)
    sums, counts = (
        np.array(each) for each in zip(*((-np.nansum(row), (~np.isnan(row)).sum()) for row in logps), strict=True)
    )
    columns: dict[str, Any] = {"row": held.indices, "nll": sums, "tokens": counts}
    scored = counts > 0
    metrics: dict[str, Any] = {
        "rows": len(logps),
        "rows_without_label": held.skipped,
        "tokens": int(counts.sum()),
        "nll": float(sums.sum() / counts.sum()),
        "nll_row": float((sums[scored] / counts[scored]).mean()),
    }
    if marked:
        found = _by_marks(data, held, logps, tokenizer, args)
        columns |= found
        for kind in ("right", "wrong"):
            if total := found[f"{kind}_tokens"].sum():
                metrics[f"nll_{kind}"] = float(found[f"nll_{kind}"].sum() / total)
    margins = pair_margins(model, tokenizer, plain, args, batch_tokens, kept)
    if margins is not None:
        margins = margins[held.indices]
        columns |= {"margin": margins, "preference": np.where(np.isnan(margins), np.nan, (np.sign(margins) + 1) / 2)}
        metrics |= {name: float(np.nanmean(columns[name])) for name in ("preference", "margin")}
        metrics["pairs"] = int((~np.isnan(margins)).sum())
    if held.has_prompts and max_new_tokens:
        answers = greedy_answers(
            model, tokenizer, held.prompts, max_new_tokens=max_new_tokens, batch_tokens=batch_tokens, kept=kept
        )
        exact, f1 = exact_match(answers, held.references), word_f1(answers, held.references)
        character = chrf(answers, held.references)
        columns |= {
            "question": [str(tokenizer.decode(prompt, skip_special_tokens=True)).strip() for prompt in held.prompts],
            "answer": [answer.text for answer in answers],
            "reference": [accepted[0] if accepted else "" for accepted in held.references],
            "exact_match": exact,
            "word_f1": f1,
            **({} if character is None else {"chrf": character}),
            "ended": [answer.ended for answer in answers],
            "answer_tokens": [answer.tokens for answer in answers],
        }
        metrics |= {
            "exact_match": float(np.mean(exact)),
            "accepts": ANSWERS if ANSWERS in data.column_names else "completion",
            "word_f1": float(np.mean(f1)),
            **({} if character is None else {"chrf": float(np.mean(character))}),
            "eos_rate": float(np.mean(columns["ended"])),
            "answer_tokens": float(np.mean(columns["answer_tokens"])),
        }
    divergence = _divergence(held, model, base, batch_tokens, kept)
    if divergence is not None:
        columns["kl_to_base"] = divergence
        metrics["kl_to_base"] = float(np.mean(divergence))
    return Evaluation(metrics, pa.table(columns))


def _by_marks(
    data: Dataset, held: HeldOut, logps: list[np.ndarray], tokenizer: PreTrainedTokenizerBase, args: SelectiveSFTConfig
) -> dict[str, np.ndarray]:
    """Sums of the negative log-likelihood over tokens judged right and wrong, `(rows,)` each, and their numbers."""
    judged = judged_rows(data, tokenizer, args, held.trainer.chat_template)
    ends = np.cumsum(judged.lengths)
    of = {
        int(row): judged.wrong[end - size : end]
        for row, end, size in zip(judged.index, ends, judged.lengths, strict=True)
    }
    found = {name: np.zeros(len(logps)) for name in ("nll_right", "nll_wrong", "right_tokens", "wrong_tokens")}
    for index, (row, values) in enumerate(zip(held.indices, logps, strict=True)):
        wrong = of.get(row, np.zeros(0, np.int8))
        if len(wrong) != len(values):
            continue
        for kind, verdict in (("right", 0), ("wrong", 1)):
            chosen = values[(wrong == verdict) & ~np.isnan(values)]
            found[f"nll_{kind}"][index], found[f"{kind}_tokens"][index] = -chosen.sum(), chosen.size
    return found


def _divergence(
    held: HeldOut, model: Model, base: Model | None, batch_tokens: int, kept: Kept | None
) -> list[float] | None:
    if not all(held.prompts):
        return None
    if base is not None:
        return kl_to_base(model, base, held.prompts, batch_tokens, kept)
    if isinstance(model, PeftModel):
        return kl_to_base(model, _Base(model), held.prompts, batch_tokens, kept)  # type: ignore[arg-type]
    return None


class _Base:
    """The base below a model's adapter, called like a model of its own."""

    def __init__(self, model: PeftModel):
        self.model, self.modules, self.eval = model, model.modules, model.eval

    def __call__(self, **inputs):
        with use_start(self.model, at_base=True) as base:
            return base(**inputs)


def evaluate_text(
    model: Model, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str], block: int, kept: Kept | None = None
) -> dict[str, float]:
    """Perplexity of neutral text, as metrics: what fine-tuning may have damaged besides."""
    return {
        f"text_{name}": value for name, value in text_perplexity(model, tokenizer, texts, block, kept=kept).items()
    }
