"""What only a GPU can show: real sizes, half precision, memory, synchronisation, the real compiler.

Error bounds are the errors of plain PyTorch in the same dtype on the same tensors, both against fp64.
"""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F

from selsft_kernels import (
    backend,
    linear_logprob,
    linear_selective_cross_entropy,
    selective_cross_entropy,
)
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem

pytestmark = pytest.mark.gpu

SHAPES = [(576, 49152), (2048, 128256), (4096, 128256), (3584, 152064), (2304, 256000), (2048, 50257), (1024, 262144)]


def case(rows: int, hidden: int, vocab: int, dtype: torch.dtype, device: torch.device) -> Problem:
    """Hidden states that are aligned with their target for half of the rows, so that p covers (0, 1)."""
    g = torch.Generator(device).manual_seed(rows + hidden + vocab)
    weight = torch.randn(vocab, hidden, generator=g, device=device) * hidden**-0.5
    target = torch.randint(0, vocab, (rows,), generator=g, device=device)
    pull = 16 * torch.rand(rows, 1, generator=g, device=device)
    hidden_states = torch.randn(rows, hidden, generator=g, device=device) + pull * weight[target]
    return Problem(
        hidden_states.to(dtype).requires_grad_(),
        weight.to(dtype).requires_grad_(),
        target,
        torch.randn(rows, generator=g, device=device).sign(),
        torch.zeros(rows, device=device),
    )


def run(p: Problem, function: Callable[[Problem, dict], torch.Tensor]) -> dict[str, torch.Tensor]:
    leaves = {k: t.detach().clone().requires_grad_() for k, t in p.parameters().items()}
    loss = function(p, leaves)
    grads = torch.autograd.grad(loss, list(leaves.values()))
    return {"loss": loss.detach()} | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}


def ours(p: Problem, leaves: dict) -> torch.Tensor:
    return linear_selective_cross_entropy(leaves["input"], leaves["weight"], p.target, p.token_weight).loss


def naive(p: Problem, leaves: dict) -> torch.Tensor:
    lp, l1mp = oracle.log_probabilities(F.linear(leaves["input"], leaves["weight"]).float(), p.target)
    return oracle.token_losses(lp, l1mp, p).sum()


def rms(actual: torch.Tensor, expected: torch.Tensor) -> float:
    return (actual.double() - expected).square().mean().sqrt().item()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("hidden", "vocab"), SHAPES)
def test_gradients_are_as_exact_as_those_of_plain_pytorch(
    hidden: int, vocab: int, dtype: torch.dtype, device: torch.device
) -> None:
    p = case(384, hidden, vocab, dtype, device)
    expected = oracle.selective(p)
    actual, plain = run(p, ours), run(p, naive)
    for name in ("d_input", "d_weight"):
        assert rms(actual[name], expected[name]) < 1.5 * rms(plain[name], expected[name]), name


@pytest.mark.parametrize(("hidden", "vocab"), [(4096, 128256), (2048, 128256)])
def test_log_probabilities_are_five_times_as_exact_as_those_of_trl(
    hidden: int, vocab: int, device: torch.device
) -> None:
    module = pytest.importorskip("trl.kernels.chunked_logprob")
    p = case(1024, hidden, vocab, torch.bfloat16, device)
    with torch.no_grad():
        exact = oracle.log_probabilities(oracle.forward(p)[0], p.target)[0]
        actual = linear_logprob(p.input, p.weight, p.target).logprob
        trl = module.ChunkedLogProbFunction.apply(p.input, p.weight, None, p.target, 1.0, 32768, None, 1.0, ())[0]
    assert actual is not None
    assert rms(actual, exact) <= rms(trl, exact) / 5


def test_two_runs_are_equal_bit_by_bit(device: torch.device) -> None:
    p = case(3000, 2048, 128256, torch.bfloat16, device)
    first, second = run(p, ours), run(p, ours)
    for name, value in first.items():
        assert torch.equal(value, second[name]), name


def test_more_logits_than_an_int32_counts(device: torch.device) -> None:
    """N * V = 2.57e9: the last row, alone and in the batch, gives the same; also with the gradient in place."""
    rows, vocab = 20000, 128256
    z = torch.randn(rows, vocab, device=device, dtype=torch.bfloat16).requires_grad_()
    target = torch.arange(rows, device=device)
    weight = torch.zeros(rows, device=device)
    weight[[0, -1]] = torch.tensor([1.0, -1.0], device=device)
    last = z.detach()[-1:].clone().requires_grad_()
    selective_cross_entropy(last, target[-1:], weight[-1:]).loss.backward()
    loss = selective_cross_entropy(z.view_as(z), target, weight, inplace_backward=True).loss
    loss.backward()
    assert z.grad is not None and last.grad is not None
    assert torch.equal(z.grad[-1], last.grad[0]) and z.grad[0].any() and not z.grad[1:-1].any()


def test_inductor(device: torch.device) -> None:
    p = case(512, 1024, 32000, torch.bfloat16, device)
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda x, w: linear_selective_cross_entropy(x * 2, w, p.target, p.token_weight).loss / 3, fullgraph=True
    )
    actual = run(p, lambda p, leaves: compiled(leaves["input"], leaves["weight"]))
    expected = run(p, lambda p, leaves: ours(p, {**leaves, "input": leaves["input"] * 2}) / 3)
    for name, value in expected.items():
        assert oracle.relative(actual[name], value) < 1e-5, name


def test_nothing_waits_for_the_device(device: torch.device) -> None:
    """With the rows prepared on the host, forward and backward never synchronise."""
    p = case(4096, 1024, 32000, torch.bfloat16, device)
    p.token_weight[::2] = 0.0
    rows = torch.arange(1, 4096, 2).to(device)

    def step() -> None:
        out = linear_selective_cross_entropy(
            p.input, p.weight, p.target, p.token_weight, active_rows=rows, outputs=("logprob", "entropy", "is_top1")
        )
        (out.loss / 7).backward()
        scores = linear_logprob(p.input, p.weight, p.target, active_rows=rows)
        assert scores.logprob is not None
        scores.logprob.sum().backward()

    step()  # compiles the kernels
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        with pytest.raises(RuntimeError):
            p.token_weight.sum().item()  # the mode does see a synchronisation
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize(("rows", "limit"), [(8192, 0.36e9), (32768, 0.56e9)])
def test_extra_memory_with_a_frozen_head(rows: int, limit: float, device: torch.device) -> None:
    p = case(rows, 4096, 128256, torch.bfloat16, device)
    weight, hidden = p.weight.detach(), p.input.detach().requires_grad_()
    del p.input, p.weight
    index = torch.arange(rows, device=device)
    for _ in range(2):
        hidden.grad = None
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight, active_rows=index).loss.backward()
        extra = torch.cuda.max_memory_allocated() - before
    assert extra <= limit


def test_a_target_outside_the_vocabulary_makes_the_loss_nan(device: torch.device) -> None:
    p = case(64, 128, 1000, torch.bfloat16, device)
    for bad in (1000, -1, 2**40):
        p.target[3] = bad
        assert torch.isnan(ours(p, p.parameters()))


def test_a_training_run_follows_the_torch_path(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """30 steps of Adam on a small model with a trained head, half of the tokens negative: same losses, in fp32."""

    def train() -> list[float]:
        g = torch.Generator(device).manual_seed(0)
        tokens = torch.randint(0, 500, (16, 33), generator=g, device=device)
        weight = torch.randn(16, 32, generator=g, device=device)
        torch.manual_seed(0)
        body = torch.nn.Sequential(torch.nn.Embedding(500, 64), torch.nn.Linear(64, 64), torch.nn.Tanh()).to(device)
        head = torch.nn.Linear(64, 500).to(device)
        optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=1e-2)
        losses = []
        for _ in range(30):
            out = linear_selective_cross_entropy(
                body(tokens[:, :-1]), head.weight, tokens[:, 1:].contiguous(), weight, linear_bias=head.bias
            )
            optimizer.zero_grad()
            (out.loss / weight.numel()).backward()
            optimizer.step()
            losses.append(out.loss.item() / weight.numel())
        return losses

    kernels = train()
    monkeypatch.setattr(backend, "use_triton", lambda device: False)
    twins = train()
    assert kernels[-1] < 0.8 * kernels[0]
    assert kernels == pytest.approx(twins, rel=1e-3)


def test_a_model_split_over_gpus(device: torch.device) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    p = case(64, 128, 1000, torch.bfloat16, torch.device("cuda", 1))
    assert torch.cuda.current_device() == 0
    actual, plain = run(p, ours), run(p, naive)
    assert oracle.relative(actual["d_input"], plain["d_input"]) < 0.02
