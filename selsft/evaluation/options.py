"""Log-likelihood of the options of multiple-choice questions, as lm-evaluation-harness computes it, in fewer forwards.

The harness runs one forward per option and takes the log-softmax of every position. Here an option whose input is a
prefix of another option's of the same question is read from that one's forward (a causal model cannot tell the
difference), which makes one-token answers such as yes/no cost one forward per question, and only the positions that
predict an option go through the head (`selsft_kernels.linear_logprob`). Rejected: the harness itself (40 more
dependencies, no hidden states, no training split), and a key-value cache of the prompt, which needs left padding and
position ids that not every architecture takes. Over the suite of 21 tasks with two options shared inputs save 35 % of
the tokens, and a cache would save 46 %.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, cast

import numpy as np
import torch
from accelerate.utils import tqdm
from peft import PeftModel
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from selsft_kernels import linear_logprob

from ..scoring.batching import BatchBudget
from ..training.head import read_lm_head
from ..training.model import Model, base_model, frozen
from .examples import MultipleChoiceExample, Pair, encode_pair

NORMALIZATIONS = ("none", "chars", "bytes", "tokens")


@dataclass(frozen=True)
class OptionScores:
    """Scores of all options of n questions, option after option; the options of question i are
    `offsets[i]:offsets[i + 1]`.

    Args:
        offsets: `(n + 1,)` int64.
        logprob: `(options,)` float64, nats, summed over the tokens of the option, without EOS.
        n_tokens, n_chars, n_bytes: `(options,)` int32, length of the option; characters and UTF-8 bytes without the
            delimiter, tokens as scored.
        gold: `(n,)` int64, index within the question.
        question_states: `(n, d)` float32, hidden state at the last token of the question, if asked for.
        option_states: `(options, d)` float32, hidden state at the last token of each option, if asked for.
    """

    offsets: np.ndarray
    logprob: np.ndarray
    n_tokens: np.ndarray
    n_chars: np.ndarray
    n_bytes: np.ndarray
    gold: np.ndarray
    question_states: torch.Tensor | None = None
    option_states: torch.Tensor | None = None

    def predictions(self, normalization: str = "none") -> np.ndarray:
        """`(n,)` int64: the best option of each question, the first of equals.

        Args:
            normalization: what the sum is divided by: `"none"` (the harness's `acc`), `"chars"` (its `acc_norm`),
                `"bytes"` (its `acc_bytes`) or `"tokens"`.
        """
        if normalization not in NORMALIZATIONS:
            raise ValueError(f"normalization={normalization!r} is unknown: use one of {', '.join(NORMALIZATIONS)}")
        scores = self.logprob if normalization == "none" else self.logprob / getattr(self, f"n_{normalization}")
        return np.array([scores[start:end].argmax() for start, end in itertools.pairwise(self.offsets)], np.int64)

    def accuracy(self, normalization: str = "none") -> float:
        """Share of the questions whose best option is the gold one."""
        return float((self.predictions(normalization) == self.gold).mean())


class _Request(NamedTuple):
    """One option in the forward pass of row `row`."""

    row: int
    first: int  # position of its first token
    tokens: list[int]


def model_max_length(config: PretrainedConfig) -> int:
    """Context length of a model; 2048 where its configuration does not say, as in the harness."""
    config = config.get_text_config()
    for name in ("n_positions", "max_position_embeddings", "n_ctx"):
        if getattr(config, name, None):
            return int(getattr(config, name))
    return 2048


def count_tokens(
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MultipleChoiceExample],
    max_length: int,
    states: bool = False,
) -> int:
    """Tokens that `score_options` sends through the model, with hidden states or without, padding aside."""
    return sum(map(len, _plan(tokenizer, examples, max_length, keep_last=states)[0]))


def score_options(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    examples: Sequence[MultipleChoiceExample],
    *,
    batch_tokens: int = 8192,
    batch_size: int | None = None,
    max_length: int | None = None,
    layer: int | None = None,
    description: str = "Scoring options",
    progress: bool = True,
) -> OptionScores:
    """Score every option of every example.

    The model runs in evaluation mode; afterwards every module is in its former mode.

    Args:
        batch_tokens: rows times padded length of one forward pass. A longer row is a batch of its own.
        batch_size: most rows in a forward pass; unlimited by default.
        max_length: tokens that the model takes; longer prompts lose their start. Default: what the model was made for.
        layer: also return hidden states, those of this index into the model's `hidden_states` (0: embeddings, -1: the
            last, after the final norm in most families, -5: the fifth to last).
        progress: show a bar (never with `TQDM_DISABLE` set).

    Raises:
        `ValueError` for an option that is longer than the model's context, or a layer that the model does not have.

    Source: `HFLM._loglikelihood_tokens` of lm-evaluation-harness 0.4.13, with the differences that the module and
    `encode_pair` name. Sums agree with it to 1e-4 (tests/evaluation/test_options.py).
    """
    limit = max_length or model_max_length(base_model(model).config)
    rows, requests, question_at = _plan(tokenizer, examples, limit, keep_last=layer is not None)
    logprob = np.zeros(len(requests))
    by_row: list[list[int]] = [[] for _ in rows]
    for index, request in enumerate(requests):
        by_row[request.row].append(index)
    asked: list[list[int]] = [[] for _ in rows]
    for question, (row, _) in enumerate(question_at):
        asked[row].append(question)
    question_states: list[torch.Tensor] = [torch.empty(0)] * len(question_at)
    option_states: list[torch.Tensor] = [torch.empty(0)] * len(requests)

    quiet = not progress or bool(os.environ.get("TQDM_DISABLE"))
    with frozen(model), tqdm(total=len(rows), desc=description, leave=False, disable=quiet) as bar:
        for indices in BatchBudget(batch_tokens, batch_size).batches(np.array([len(row) for row in rows])):
            batch = indices.tolist()
            width = max(len(rows[row]) for row in batch)
            # Padding on the right, behind everything that a causal model looks at. Any token will do.
            ids = torch.tensor([rows[row] + [0] * (width - len(rows[row])) for row in batch])
            served = [index for row in batch for index in by_row[row]]
            starts = {row: place * width for place, row in enumerate(batch)}  # in the flat grid of the batch
            firsts = np.array([starts[requests[index].row] + requests[index].first for index in served])
            counts = np.array([len(requests[index].tokens) for index in served])
            predicting = np.concatenate([np.arange(n) + first - 1 for first, n in zip(firsts, counts, strict=True)])
            targets = torch.tensor([token for index in served for token in requests[index].tokens])
            logps, states = _forward(model, ids, torch.from_numpy(predicting), targets, layer)
            logprob[served] = np.add.reduceat(logps.double().cpu().numpy(), np.cumsum(counts) - counts)
            if states is not None:
                questions = [question for row in batch for question in asked[row]]
                ends = [starts[question_at[q][0]] + question_at[q][1] for q in questions]
                at = torch.tensor([*(firsts + counts - 1), *ends], device=states.device)
                picked = states[at].float().cpu()
                for index, state in zip(served, picked[: len(served)], strict=True):
                    option_states[index] = state
                for question, state in zip(questions, picked[len(served) :], strict=True):
                    question_states[question] = state
            bar.update(len(batch))

    texts = [option for example in examples for option in example.options]
    with_states = layer is not None and bool(examples)
    return OptionScores(
        offsets=np.cumsum([0, *(len(example.options) for example in examples)]),
        logprob=logprob,
        n_tokens=np.array([len(request.tokens) for request in requests], np.int32),
        n_chars=np.array([len(text) for text in texts], np.int32),
        n_bytes=np.array([len(text.encode()) for text in texts], np.int32),
        gold=np.array([example.gold for example in examples], np.int64),
        question_states=torch.stack(question_states) if with_states else None,
        option_states=torch.stack(option_states) if with_states else None,
    )


def _plan(
    tokenizer: PreTrainedTokenizerBase, examples: Sequence[MultipleChoiceExample], limit: int, keep_last: bool
) -> tuple[list[list[int]], list[_Request], list[tuple[int, int]]]:
    """Inputs of the forward passes, what each option reads from them, and where each question ends: `(row, position)`.

    The last token of an option predicts nothing here, so it is part of the input only where its state is wanted.
    """
    rows: list[list[int]] = []
    requests: list[_Request] = []
    question_at = []
    for example in examples:
        pairs = [encode_pair(tokenizer, example.prompt, example.completion(i)) for i in range(len(example.options))]
        inputs, firsts = [], []
        for number, pair in enumerate(pairs):
            ids = _fit(pair, limit if keep_last else limit + 1, example.id, number)
            firsts.append(len(ids) - len(pair.continuation))
            inputs.append(ids if keep_last else ids[:-1])
        place: dict[int, int] = {}
        longest: list[int] = []  # options of this question that have a row of their own
        for number in sorted(range(len(inputs)), key=lambda i: -len(inputs[i])):
            ids = inputs[number]
            host = next((other for other in longest if inputs[other][: len(ids)] == ids), None)
            if host is None:
                place[number] = len(rows)
                rows.append(ids)
                longest.append(number)
            else:
                place[number] = place[host]
        requests += [_Request(place[i], firsts[i], pair.continuation) for i, pair in enumerate(pairs)]
        question_at.append((place[0], firsts[0] - 1))
    return rows, requests, question_at


def _fit(pair: Pair, limit: int, name: str, number: int) -> list[int]:
    """The last `limit` tokens, at least one of them of the context."""
    if len(pair.continuation) >= limit:
        raise ValueError(
            f"example {name!r}: option {number} has {len(pair.continuation)} tokens, more than a context of {limit} "
            "leaves room for: raise max_length, or drop the example"
        )
    return [*pair.context, *pair.continuation][-limit:]


def _forward(
    model: Model, ids: torch.Tensor, predicting: torch.Tensor, targets: torch.Tensor, layer: int | None
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """One batch.

    Args:
        ids: `(batch, width)`.
        predicting: `(m,)` flat positions in the grid of `ids` that predict `targets`, `(m,)`.

    Returns:
        log-probabilities `(m,)` float32, and the hidden states of `layer` as `(batch * width, d)`.
    """
    base = base_model(model)
    prompt_learning = isinstance(model, PeftModel) and model.active_peft_config.is_prompt_learning
    head = base.get_output_embeddings()
    whole = prompt_learning or head is None or base.base_model is base
    run = model if whole else cast(PreTrainedModel, base.base_model)
    ids = ids.to(cast(torch.Tensor, base.get_input_embeddings().weight).device)
    kept = {} if layer is None else {"output_hidden_states": True}
    # No attention mask, as in the harness: nothing attends to the padding
    out = run(input_ids=ids, use_cache=False, **kept)
    width = ids.size(1)

    def flat(states: torch.Tensor) -> torch.Tensor:
        return states[:, -width:].flatten(0, 1)  # without the virtual tokens of prompt learning

    if whole:
        logits = flat(out.logits)
        chosen = logits[predicting.to(logits.device)].float().log_softmax(-1)
        logps = chosen.gather(-1, targets.to(logits.device)[:, None]).squeeze(-1)
    else:
        lm_head = read_lm_head(head)
        device = lm_head.weight.device
        hidden = flat(out.last_hidden_state).to(device)[predicting.to(device)]
        if hidden.dtype != lm_head.weight.dtype and not torch.is_autocast_enabled(device.type):
            hidden = hidden.to(lm_head.weight.dtype)
        scored = linear_logprob(hidden, lm_head.weight, targets.to(device), **lm_head.keywords(base))
        logps = cast(torch.Tensor, scored.logprob)
    if layer is None:
        return logps, None
    count = len(out.hidden_states)
    if not -count <= layer < count:
        raise ValueError(f"layer={layer}: the model has {count} hidden states, so use {-count} to {count - 1}")
    return logps, flat(out.hidden_states[layer])
