"""What the demo measures: what a model answers to held-out questions.

Answers are generated and compared as whole responses. Log-likelihoods of options would be cheaper to compare, but they
can rise while the generated text degrades.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from datasets import Dataset

from selsft.demo.model import encode
from selsft.demo.world import Statement, World, accepted
from selsft.evaluation.generation import greedy_answers

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


def questions(world: World, tokenizer: Any) -> Dataset:
    """The held-out questions, about target facts and then known ones: `prompt`, `kind` (of the fact), `accepted`
    responses, and for systematic facts the `asserted` responses that give the wrong answer, with its tokens in
    context (`input_ids`) and where they are (`first`, `tokens`)."""
    rows = []
    for statement in world.questions([*world.target, *world.known]):
        fact, wrong = statement.fact, world.myths.get(statement.fact)
        row: dict[str, Any] = {"prompt": statement.prompt, "kind": world.kinds.get(fact, "known")}
        row |= {"accepted": sorted(accepted(fact, statement.answer)), "asserted": []}
        row |= {"input_ids": [], "first": 0, "tokens": 0}
        if wrong is not None:
            encoded = encode(Statement(fact, statement.phrasing, wrong), tokenizer)
            before, answer, _ = encoded["part_lengths"]
            row |= {"asserted": sorted(accepted(fact, wrong)), "input_ids": encoded["input_ids"]}
            row |= {"first": encoded["labels"].count(-100) + before - 1, "tokens": answer}
        rows.append(row)
    return Dataset.from_list(rows)


def answers(model: Any, tokenizer: Any, rows: Dataset, _args: Any) -> dict[str, np.ndarray]:
    """The fields of `Scores` for each of the `questions`, NaN where one does not apply (`workflow.arms.Measure`)."""
    prompts = [
        tokenizer(tokenizer.bos_token + prompt, add_special_tokens=False)["input_ids"] for prompt in rows["prompt"]
    ]
    given = [answer.text for answer in greedy_answers(model, tokenizer, prompts, max_new_tokens=MAX_NEW_TOKENS)]
    kinds = np.array(rows["kind"])

    def among(column: str, of: np.ndarray) -> np.ndarray:
        hits = [answer in texts for answer, texts in zip(given, rows[column], strict=True)]
        return np.where(of, hits, np.nan)

    myths = kinds == "systematic"
    probability = np.full(len(rows), np.nan)
    probability[myths] = answer_probabilities(model, tokenizer.pad_token_id, rows.select(np.flatnonzero(myths)))
    return {
        "exact_match": among("accepted", kinds != "known"),
        **{f"exact_match_{kind}": among("accepted", kinds == kind) for kind in ("systematic", "random", "clean")},
        "wrong_assertions": among("asserted", myths),
        "wrong_probability": probability,
        "known_kept": among("accepted", kinds == "known"),
    }


def answer_probabilities(model: Any, pad: int, rows: Dataset) -> list[float]:
    """The probability of each row's wrong answer, given its question and the words before the answer."""
    probabilities = []
    for start in range(0, len(rows), BATCH):
        chunk = rows.select(range(start, min(start + BATCH, len(rows)))).to_list()
        width = max(len(row["input_ids"]) for row in chunk)
        ids = torch.tensor([row["input_ids"] + [pad] * (width - len(row["input_ids"])) for row in chunk])
        logps = model(input_ids=ids).logits.log_softmax(-1)[:, :-1].gather(-1, ids[:, 1:, None]).squeeze(-1)
        for row, row_logps in zip(chunk, logps, strict=True):
            probabilities.append(row_logps[row["first"] : row["first"] + row["tokens"]].sum().exp().item())
    return probabilities
