"""Peak memory of a step, from the profiler: the logits of the batch never exist, and no gradient exists twice."""

import pytest
import torch

from selsft.bench.measure import _cpu_peak
from selsft_kernels import linear_logprob, linear_loss, linear_selective_cross_entropy
from tests.support.kernel_oracle import problem

ROWS, HIDDEN, VOCAB, CHUNK = 400, 16, 4096, 4
LOGITS = 4 * ROWS * VOCAB
BUFFER = 4 * CHUNK * VOCAB
HEAD = 4 * VOCAB * HIDDEN
STATES = 4 * ROWS * HIDDEN


def training_peak(*, trained: bool) -> int:
    p = problem(ROWS, HIDDEN, VOCAB)
    hidden, weight = p.input.detach().requires_grad_(), p.weight.detach().requires_grad_(trained)

    def step() -> None:
        out = linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight, chunk_size=CHUNK)
        (out.loss / 3).backward()

    step()
    hidden.grad = weight.grad = None
    return _cpu_peak(step)


def test_a_frozen_head_needs_a_chunk_of_logits_and_the_gradient() -> None:
    assert training_peak(trained=False) < 1.2 * (BUFFER + 2 * STATES) < LOGITS / 10


def test_the_gradient_of_the_head_exists_once(monkeypatch: pytest.MonkeyPatch) -> None:
    once = training_peak(trained=True)
    assert once < 1.2 * (BUFFER + 2 * STATES + HEAD)
    monkeypatch.setattr(linear_loss, "graph_is_kept", lambda: True)
    assert training_peak(trained=True) > once + 0.5 * HEAD


def test_scoring_needs_a_tile() -> None:
    p = problem(ROWS, HIDDEN, VOCAB)

    def step() -> None:
        with torch.no_grad():
            linear_logprob(p.input, p.weight, p.target, chunk_size=64)

    step()
    assert _cpu_peak(step) < 4 * ROWS * 64 + 12 * STATES < LOGITS / 10
