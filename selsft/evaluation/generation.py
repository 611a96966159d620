"""Greedy answers to held-out prompts: exact match, whether the model stops by itself, and how long its answers are.

Comparing log-likelihoods of options is cheaper, but they can rise while the generated text degrades, which a
forgetting loss may well cause. Rejected: sampling; the published evaluation samples at temperature 1 without a seed,
and its noise is larger than most differences between methods.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import GenerationConfig, PreTrainedTokenizerBase, StoppingCriteriaList

from ..scoring.batching import BatchBudget
from ..training.model import Model, frozen
from .kept import Kept


@dataclass(frozen=True)
class Answer:
    """`ended`: whether the model closed the answer with an end token before `max_new_tokens`; `tokens` without it."""

    text: str
    ended: bool
    tokens: int


def greedy_answers(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int = 128,
    batch_tokens: int = 8192,
    kept: Kept | None = None,
) -> list[Answer]:
    """The greedy continuation of each prompt of token ids, up to an end token or `max_new_tokens`.

    Batches hold prompts of similar length, padded on the left, longest first. The model's own sampling settings are
    not used; its end tokens are, beside the tokenizer's.
    """
    kept = kept or Kept()
    own = model.generation_config.eos_token_id
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    config = GenerationConfig(
        max_new_tokens=max_new_tokens, do_sample=False, eos_token_id=sorted(ends) or None, pad_token_id=pad
    )
    device = next(model.parameters()).device

    def work(indices) -> list[tuple[str, bool, int]]:
        width = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), width), pad or 0)
        mask = torch.zeros(len(indices), width, dtype=torch.long)
        for row, i in enumerate(indices):
            ids[row, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, width - len(prompts[i]) :] = 1

        def count(input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            """A criterion that never stops: it is called after each token."""
            kept.progress(len(input_ids))
            return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

        out: Any = model.generate(  # type: ignore[operator]
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            generation_config=config,
            stopping_criteria=StoppingCriteriaList([count]),
        )
        answers = []
        for tokens in out[:, width:].tolist():
            stop = next((n for n, token in enumerate(tokens) if token in ends), None)
            text = str(tokenizer.decode(tokens[:stop], skip_special_tokens=True)).strip()
            answers.append((text, stop is not None, len(tokens[:stop])))
        return answers

    batches = BatchBudget(batch_tokens).batches(np.array([len(prompt) + max_new_tokens for prompt in prompts]))
    with frozen(model):
        sizes = [len(indices) * max_new_tokens for indices in batches]
        found = kept.rows("answers", "Generating answers, tokens", prompts, batches, work, sizes)
    return [Answer(*answer) for answer in found]


def exact_match(answers: Sequence[Answer], references: Sequence[Sequence[str]]) -> list[bool]:
    """Whether each answer, without outer blanks, is one of its references."""
    return [answer.text in accepted for answer, accepted in zip(answers, references, strict=True)]
