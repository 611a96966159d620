"""What the demo measures: what a model answers to held-out questions, and how well the scores find the wrong tokens.

Answers are generated and compared as whole responses. Comparing log-likelihoods of options would be cheaper, but they
can rise while the generated text degrades.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from selsft.demo.model import encode
from selsft.demo.world import Fact, Statement, World, accepted
from selsft.training.model import frozen

BATCH = 128
MAX_NEW_TOKENS = 32


@dataclass(frozen=True)
class Scores:
    """One model on the held-out phrasings. All are shares in [0, 1]."""

    exact_match: float
    exact_match_systematic: float
    exact_match_random: float
    exact_match_clean: float
    wrong_assertions: float
    """Of the questions on systematic facts: how often the greedy answer is the systematic wrong one."""
    wrong_probability: float
    """Mean probability of that wrong answer."""
    known_kept: float
    """Exact match on the known facts."""


def greedy(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompts: Sequence[str]) -> list[str]:
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers = [""] * len(prompts)
    with frozen(model):
        for start in range(0, len(order), BATCH):
            rows = order[start : start + BATCH]
            batch = tokenizer(
                [tokenizer.bos_token + prompts[i] for i in rows],
                padding=True,
                add_special_tokens=False,
                return_tensors="pt",
                return_token_type_ids=False,
            )
            out = model.generate(  # type: ignore[misc]  # its own annotation of `self`
                **batch, max_new_tokens=MAX_NEW_TOKENS, do_sample=False
            )
            texts = tokenizer.batch_decode(out[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
            for i, text in zip(rows, texts, strict=True):
                answers[i] = text.strip()
    return answers


def answer_probabilities(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, statements: Sequence[Statement]
) -> list[float]:
    """The probability of each statement's answer, given its question and the words before the answer."""
    probabilities = []
    with frozen(model):
        for start in range(0, len(statements), BATCH):
            chunk = statements[start : start + BATCH]
            rows = [encode(s, tokenizer) for s in chunk]
            width = max(len(row["input_ids"]) for row in rows)
            pad = tokenizer.pad_token_id
            ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in rows])
            logps = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
            for row, row_logps in zip(rows, logps, strict=True):
                before, answer, _ = row["part_lengths"]
                first = row["labels"].count(-100) + before - 1
                probabilities.append(row_logps[first : first + answer].sum().exp().item())
    return probabilities


def evaluate(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, world: World) -> Scores:
    target, known = world.questions(world.target), world.questions(world.known)
    answers = greedy(model, tokenizer, [s.prompt for s in target + known])

    def share(values: Sequence[float]) -> float:
        return float(np.mean(values)) if values else float("nan")

    def right(facts: Sequence[Fact] | None = None) -> float:
        return share([a in accepted(s.fact, s.answer) for s, a in asked if facts is None or s.fact in facts])

    told = list(zip(known, answers[len(target) :], strict=True))
    asked = list(zip(target, answers[: len(target)], strict=True))
    of_kind = {kind: [f for f, k in world.kinds.items() if k == kind] for kind in ("systematic", "random", "clean")}
    myths = world.myths
    wrong = [Statement(s.fact, s.phrasing, myths[s.fact]) for s in target if s.fact in myths]
    return Scores(
        exact_match=right(),
        exact_match_systematic=right(of_kind["systematic"]),
        exact_match_random=right(of_kind["random"]),
        exact_match_clean=right(of_kind["clean"]),
        wrong_assertions=share([a in accepted(s.fact, myths[s.fact]) for s, a in asked if s.fact in myths]),
        wrong_probability=share(answer_probabilities(model, tokenizer, wrong)),
        known_kept=share([a in accepted(s.fact, s.answer) for s, a in told]),
    )


def auc(scores: np.ndarray, positive: np.ndarray) -> float:
    """The area under the ROC curve: the chance that a positive scores above a negative, ties counting half."""
    n_positive, n_negative = int(positive.sum()), int((~positive).sum())
    if not n_positive or not n_negative:
        return float("nan")
    _, inverse, counts = np.unique(scores, return_inverse=True, return_counts=True)
    ranks = (np.cumsum(counts) - (counts - 1) / 2)[inverse]
    return float((ranks[positive].sum() - n_positive * (n_positive + 1) / 2) / (n_positive * n_negative))
