"""The Triton path of scoring against fp64: tiles, statistics, gradients by recompute."""

import pytest
import torch

from selsft_kernels import backend, linear_logprob
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import problem, relative

TOLERANCE = 2e-5

# NumPy, inside the interpreter
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]


def check(p: oracle.Problem, **overrides: object) -> None:
    n = p.target.shape[0]
    upstream = torch.randn(n, generator=torch.Generator().manual_seed(9)).to(p.input.device)
    actual = call.logprob(p, upstream, **overrides)
    z, leaves = oracle.forward(p)
    keep = oracle.used(p, weighted=False)
    lp = oracle.log_probabilities(z, p.target)[0]
    grads = torch.autograd.grad((lp * upstream)[keep].sum(), list(leaves.values()))
    expected = oracle.statistics(z.detach(), lp.detach(), p.target, keep)
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in (expected | {f"d_{k}": g for k, g in zip(leaves, grads, strict=True)}).items():
        assert relative(actual[name], value) < TOLERANCE, name


@pytest.mark.parametrize("vocab", [7, 257, 500])
@pytest.mark.parametrize("rows", [1, 3, 63])
def test_shapes(rows: int, vocab: int, device: torch.device) -> None:
    check(problem(rows=rows, vocab=vocab, seed=rows + vocab, device=device), chunk_size=300)


@pytest.mark.parametrize("chunk_size", [1, 64, 100])
def test_tiles_and_blocks(chunk_size: int, device: torch.device, short_blocks: None) -> None:
    """Tiles narrower than, as wide as, and wider than a block; the maximum grows from tile to tile."""
    vocab = 9 if chunk_size == 1 else 150
    p = problem(rows=5, vocab=vocab, bias=True, device=device)
    with torch.no_grad():
        assert p.bias is not None
        p.bias += torch.linspace(0, 20, vocab, device=device)
    check(p, chunk_size=chunk_size)


def test_all_features(device: torch.device) -> None:
    p = problem(rows=5, spread=3.0, bias=True, lora=True, softcap=3.0, logit_scale=-1.7, lora_scale=2.0, device=device)
    check(p, chunk_size=10)


def test_top1_is_the_first_of_equal_logits(device: torch.device) -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]], device=device)
    hidden, target = torch.ones(4, 1, device=device), torch.arange(4, device=device)
    for chunk_size in (1, 2, 4):
        out = linear_logprob(hidden, weight, target, outputs=("is_top1",), chunk_size=chunk_size)
        assert out.is_top1 is not None and out.is_top1.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0}, {"logit_scale": -1.0}], ids=["plain", "softcap", "negative"]
)
@pytest.mark.parametrize("chunk_size", [30, 100])
def test_top1_of_equal_logits_in_other_tiles(
    chunk_size: int, options: dict, device: torch.device, short_blocks: None
) -> None:
    vocab, target = 100, torch.tensor([0, 20, 50, 55, 99], device=device)
    z = torch.zeros(5, vocab, device=device)
    for row, places in enumerate([[0, 99], [3, 20], [50, 51], [55, 99], [98, 99]]):
        z[row, places] = 2.0
    z *= options.get("logit_scale", 1.0)
    eye = torch.eye(5, device=device)
    out = linear_logprob(eye, z.T.contiguous(), target, outputs=("is_top1",), chunk_size=chunk_size, **options)
    assert out.is_top1 is not None and out.is_top1.tolist() == [True, False, True, True, False]


def test_hidden_states_that_are_not_finite_give_nan(device: torch.device) -> None:
    p = problem(rows=3, device=device)
    p.target.fill_(1)
    with torch.no_grad():
        p.input[0, 0], p.input[2, 0] = torch.inf, torch.nan
    logprob = linear_logprob(p.input, p.weight, p.target).logprob
    assert logprob is not None and logprob.isnan().tolist() == [True, False, True]


def test_the_kernels_agree_with_their_twins(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(rows=6, vocab=90, bias=True, lora=True, device=device)
    upstream = torch.ones(6, device=device)
    kernels = call.logprob(p, upstream, chunk_size=40)
    monkeypatch.setattr(backend, "use_triton", lambda device: False)
    for name, value in call.logprob(p, upstream, chunk_size=40).items():
        assert relative(kernels[name], value) < 2e-6, name


def test_a_target_outside_the_vocabulary_reads_nothing_and_gives_nan(device: torch.device) -> None:
    """On a GPU the check of the values is left to the kernel, which must not read beyond the head."""
    from selsft_kernels.gather_triton import select_rows, take_rows
    from selsft_kernels.head import make_head

    hidden, weight = torch.ones(3, 4, device=device), torch.ones(5, 4, device=device)
    target = torch.tensor([4, 5, -1], device=device)
    work = select_rows(target, torch.ones(3, device=device), None, None, -100)
    head = make_head(weight, None, None, None, None, 1.0, 1.0, torch.float32)
    _, z = take_rows(hidden, work, 0, 3, head)
    assert z[0].item() == 4.0 and z[1:].isnan().all()
