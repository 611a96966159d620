"""The Triton path of the losses against fp64 autograd: objectives, shapes, features, edges."""

import pytest
import torch

from selsft_kernels import (
    FORGET_OBJECTIVES,
    POSITIVE_OBJECTIVES,
    backend,
    linear_selective_cross_entropy,
    selective_cross_entropy,
)
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem, problem, relative
from tests.support.kernel_targets import OUTSIDE, check_outside

TOLERANCE = 2e-5

# NumPy, inside the interpreter
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*encountered in:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]

OBJECTIVES = [
    {"positive": "nll", "forget": "unlikelihood"},
    {"positive": "dft", "forget": "probability"},
    {"forget": "npo", "beta": 0.3},
    {"forget": "wga", "beta": 3.0},
    {"forget": "gradient_ascent"},
]


def test_the_list_of_objectives_is_complete() -> None:
    assert {o.get("positive", "nll") for o in OBJECTIVES} == set(POSITIVE_OBJECTIVES)
    assert {o["forget"] for o in OBJECTIVES} == set(FORGET_OBJECTIVES)


def assert_matches(p: Problem, actual: dict) -> None:
    expected = oracle.selective(p)
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in expected.items():
        assert actual[name].isfinite().all(), name
        assert relative(actual[name], value) < TOLERANCE, name


def assert_logits_match(p: Problem, z: torch.Tensor, **overrides: bool) -> None:
    actual = call.logits(p, z, **overrides)
    leaf = z.double().requires_grad_()
    transformed = oracle.head_transform(leaf, p.options)
    lp, l1mp = oracle.log_probabilities(transformed, p.target)
    loss = oracle.token_losses(lp, l1mp, p, transformed).sum()
    expected = oracle.statistics(transformed.detach(), lp.detach(), p.target, oracle.used(p))
    expected |= {"loss": loss.detach(), "d_logits": torch.autograd.grad(loss, leaf)[0]}
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in expected.items():
        assert relative(actual[name], value) < TOLERANCE, name


def test_this_is_the_triton_path(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from selsft_kernels import rows

    assert backend.use_triton(device)
    monkeypatch.setattr(rows, "loss_rows", None)
    call.linear(problem(rows=2, device=device))


@pytest.mark.parametrize("floor", [None, -3.0])
@pytest.mark.parametrize("options", OBJECTIVES, ids=lambda o: "-".join(map(str, o.values())))
def test_every_objective(options: dict, floor: float | None, device: torch.device) -> None:
    p = problem(rows=24, vocab=23, spread=2.0, floor=floor, seed=2, device=device, **options)
    if floor is not None:
        lp, _ = oracle.log_probabilities(oracle.forward(p)[0], p.target)
        negative = (p.token_weight < 0) & oracle.used(p)
        assert 0 < int((lp[negative] < floor).sum()) < int(negative.sum()), "the floor must cut some and not all"
    assert_matches(p, call.linear(p))


@pytest.mark.parametrize("vocab", [7, 257, 500])
@pytest.mark.parametrize("rows", [1, 3, 63])
def test_shapes(rows: int, vocab: int, device: torch.device) -> None:
    p = problem(rows=rows, vocab=vocab, seed=rows + vocab, device=device)
    assert_matches(p, call.linear(p, chunk_size=40))


@pytest.mark.parametrize("vocab", [64, 65, 127, 200])
def test_several_blocks_a_row(vocab: int, device: torch.device, short_blocks: None) -> None:
    """Block edges: the vocabulary ends on one, one after, one before; every block's maximum is above the last."""
    p = problem(rows=8, vocab=vocab, bias=True, softcap=30.0, device=device)
    with torch.no_grad():
        assert p.bias is not None
        p.bias += torch.linspace(0, 20, vocab, device=device)
        p.target[:3] = torch.tensor([0, vocab - 1, vocab // 2], device=device)
    assert_matches(p, call.linear(p))


@pytest.mark.parametrize(
    "features",
    [
        {"bias": True},
        {"softcap": 3.0},
        {"logit_scale": -0.7},
        {"lora": True, "lora_scale": 0.5},
        {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "lora": True, "lora_scale": 2.0},
    ],
    ids=lambda f: "+".join(f),
)
def test_features(features: dict, device: torch.device, short_blocks: None) -> None:
    p = problem(rows=7, vocab=70, spread=3.0, device=device, **features)
    assert_matches(p, call.linear(p, chunk_size=4))


@pytest.mark.parametrize("shift", [80.0, -80.0])
def test_saturated_logits(shift: float, device: torch.device) -> None:
    p = problem(rows=4, hidden=4, vocab=9, device=device)
    with torch.no_grad():
        p.target.copy_(torch.tensor([0, 0, 1, 1]))
        p.weight.zero_()
        p.weight[0, 0] = shift
        p.input[:, 0] = 1.0
        p.token_weight.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5]))
    for options in OBJECTIVES:
        p.options = options
        assert_matches(p, call.linear(p))


@pytest.mark.parametrize("m", [25.0, 15.0, 3.0, 0.0, -3.0, -15.0, -25.0])
def test_small_values_keep_their_relative_precision(m: float, device: torch.device) -> None:
    """log p near 0 and log(1 - p) near 0: `log(1 + e)` in fp32 would return 0 for e below 6e-8."""
    hidden = torch.ones(2, 1, device=device)
    weight = torch.tensor([[m], [0.0], [-1000.0]], device=device)
    target = torch.zeros(2, dtype=torch.int64, device=device)
    exact = torch.tensor(m, dtype=torch.float64)
    for sign in (1.0, -1.0):
        out = linear_selective_cross_entropy(hidden, weight, target, torch.full((2,), sign, device=device))
        expected = 2 * torch.log1p(torch.exp(-sign * exact)) if sign * m > -20 else -2 * sign * exact
        assert out.loss.item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_top1_is_the_first_of_equal_logits(bias: bool, device: torch.device) -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]], device=device)
    extra = {}
    if bias:
        weight, extra = torch.zeros_like(weight), {"linear_bias": weight.flatten()}
    hidden, target, ones = (
        torch.ones(4, 1, device=device),
        torch.arange(4, device=device),
        torch.ones(4, device=device),
    )
    out = linear_selective_cross_entropy(hidden, weight, target, ones, outputs=("is_top1",), **extra)
    assert out.is_top1 is not None and out.is_top1.tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    "options", [{}, {"softcap": 5.0}, {"logit_scale": -1.0}], ids=["plain", "softcap", "negative"]
)
@pytest.mark.parametrize("path", ["linear", "logits"])
def test_top1_of_equal_logits_in_other_blocks(
    path: str, options: dict, device: torch.device, short_blocks: None
) -> None:
    """Equal logits to the left of the target, to its right, in its own tile and in others."""
    vocab, target = 100, torch.tensor([0, 20, 50, 55, 99], device=device)
    z = torch.zeros(5, vocab, device=device)
    for row, places in enumerate([[0, 99], [3, 20], [50, 51], [55, 99], [98, 99]]):
        z[row, places] = 2.0
    z *= options.get("logit_scale", 1.0)
    ones = torch.ones(5, device=device)
    if path == "logits":
        out = selective_cross_entropy(z, target, ones, outputs=("is_top1",), **options)
    else:
        eye = torch.eye(5, device=device)
        out = linear_selective_cross_entropy(eye, z.T.contiguous(), target, ones, outputs=("is_top1",), **options)
    assert out.is_top1 is not None and out.is_top1.tolist() == [True, False, True, True, False]


@pytest.mark.parametrize("cap", [0.5, 3.0, 50.0])
@pytest.mark.parametrize("vocab", [2, 3, 9])
def test_what_stands_for_the_target_adds_nothing_under_a_softcap(vocab: int, cap: float, device: torch.device) -> None:
    """In the target's place stands the lowest logit there is, -cap, whose exponential is subtracted again."""
    p = problem(rows=12, vocab=vocab, spread=2 * cap, softcap=cap, device=device)
    assert_matches(p, call.linear(p))


def test_forgotten_rows_have_no_gradient(device: torch.device, short_blocks: None) -> None:
    """Below the floor a row is filled with zeros; nothing of its logits stays in the buffer."""
    p = problem(rows=6, vocab=70, floor=-1e-3, device=device)
    p.token_weight.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0, -0.5, -2.0]))
    p.target.clamp_(min=0)
    result = call.linear(p)
    assert_matches(p, result)
    assert result["d_input"][[1, 3]].any() and not result["d_input"][[0, 2, 4, 5]].any()


@pytest.mark.parametrize("listed", [False, True])
def test_dead_rows_leave_the_products(
    listed: bool, device: torch.device, short_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from selsft_kernels import linear_loss

    p = problem(rows=12, vocab=70, floor=-1e-3, bias=True, device=device)
    p.target.clamp_(min=0)
    p.token_weight.copy_(torch.tensor([-1.0, 1.0, -1.0, 1.0, -0.5, -2.0] * 2))
    p.token_weight[6:] = -1.0  # a chunk without one living row
    seen: list[int] = []
    inner = linear_loss.add_gradients

    def counted(grads, d_raw, *arguments, **options):  # type: ignore[no-untyped-def]
        seen.append(d_raw.shape[0])
        inner(grads, d_raw, *arguments, **options)

    monkeypatch.setattr(linear_loss, "add_gradients", counted)
    rows = torch.arange(12, device=device) if listed else None
    assert_matches(p, call.linear(p, chunk_size=6, active_rows=rows, dead_below=0.0))
    assert seen == [2, 0]
    seen.clear()
    assert_matches(p, call.linear(p, chunk_size=6, active_rows=rows))
    assert seen == [6, 6]  # by default the host does not look


def test_a_masked_vocabulary_entry_is_allowed(device: torch.device) -> None:
    """-inf at columns other than the target, also all of a lane: probability 0, and nothing becomes NaN."""
    z = torch.zeros(2, 40, device=device)
    z[:, 8:24] = -torch.inf
    z.requires_grad_()
    target, weight = torch.tensor([0, 39], device=device), torch.tensor([1.0, -1.0], device=device)
    out = selective_cross_entropy(z, target, weight, outputs=("entropy", "is_top1"))
    out.loss.backward()
    expected = torch.log(torch.tensor(24.0))
    assert out.entropy is not None and torch.allclose(out.entropy.cpu(), expected.expand(2))
    assert z.grad is not None and z.grad.isfinite().all() and not z.grad[:, 8:24].any()


@pytest.mark.parametrize("options", [{}, {"positive": "dft", "floor": -3.0, "softcap": 4.0}], ids=["plain", "others"])
def test_positives_gated_by_entropy(options: dict, device: torch.device) -> None:
    """Rows on both sides of the gate, and negative tokens that it does not touch."""
    p = problem(rows=40, vocab=23, spread=3.0, entropy_gate=2.1, seed=3, device=device, **options)
    entropy = oracle.selective(p)["entropy"][oracle.used(p) & (p.token_weight > 0)]
    assert 0 < int((entropy < 2.1).sum()) < entropy.numel()
    assert_matches(p, call.linear(p, chunk_size=16))
    z = 3 * torch.randn(40, 23, generator=torch.Generator().manual_seed(1)).to(device)
    assert_logits_match(p, z)


@pytest.mark.parametrize("options", [{}, {"positive": "dft", "floor": -2.0, "entropy_gate": 2.1, "softcap": 4.0}])
def test_anchor_to_the_reference(options: dict, device: torch.device) -> None:
    """Rows of weight 0 stay out of it; below the floor it is all that there is."""
    p = problem(rows=40, vocab=23, spread=3.0, anchor=0.7, seed=4, device=device, **options)
    p.reference[:5] = torch.tensor([-1e-4, -1e-6, -20.0, -3.0, -0.5])
    assert_matches(p, call.linear(p, chunk_size=16))
    z = 3 * torch.randn(40, 23, generator=torch.Generator().manual_seed(1)).to(device)
    assert_logits_match(p, z)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"bias": True, "softcap": 3.0, "logit_scale": 1.7},
        {"positive": "dft", "forget": "npo", "entropy_gate": 2.1, "anchor": 0.7, "logit_scale": -0.7, "floor": -1e-3},
    ],
    ids=lambda o: "+".join(o),
)
def test_z_loss(options: dict, device: torch.device, short_blocks: None) -> None:
    """Also below the floor, where it is all that there is; rows of weight 0 stay out of it."""
    p = problem(rows=40, vocab=70, spread=3.0, z_loss=0.02, seed=4, device=device, **options)
    assert_matches(p, call.linear(p, chunk_size=16))
    if p.bias is None:
        z = 3 * torch.randn(40, 70, generator=torch.Generator().manual_seed(1)).to(device)
        assert_logits_match(p, z)


@pytest.mark.parametrize("case", ["no rows", "all ignored", "all weights zero"])
def test_nothing_to_compute_gives_connected_zeros(case: str, device: torch.device) -> None:
    p = problem(rows=0 if case == "no rows" else 3, bias=True, lora=True, device=device)
    if case == "all ignored":
        p.target.fill_(-100)
    if case == "all weights zero":
        p.token_weight.zero_()
    result = call.linear(p)
    assert result["loss"].item() == 0.0
    for name, parameter in p.parameters().items():
        assert result[f"d_{name}"].shape == parameter.shape and not result[f"d_{name}"].any(), name


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hidden_states_that_are_not_finite_make_the_loss_nan(poison: float, sign: float, device: torch.device) -> None:
    p = problem(rows=3, floor=-2.0, device=device)
    p.token_weight.fill_(sign)
    p.target.fill_(1)
    with torch.no_grad():
        p.input[2, 3] = poison
    assert torch.isnan(call.linear(p)["loss"])


def test_skipped_rows_may_hold_anything(device: torch.device) -> None:
    """Rows 1 (weight 0) and 2 (ignored) are listed, hold NaN, and touch nothing; a bias of 200 overflows exp."""
    p = problem(rows=4, bias=True, device=device)
    p.target.copy_(torch.tensor([2, 2, -100, 5]))
    p.token_weight.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    with torch.no_grad():
        p.input[1:3] = torch.nan
        assert p.bias is not None
        p.bias.fill_(200.0)
    listed = call.linear(p, active_rows=torch.arange(4, device=device))
    assert not listed["d_input"][1:3].any() and not listed["logprob"][1:3].any()
    with torch.no_grad():
        p.input[1:3] = 0.0
    expected = oracle.selective(p)
    for name in ("loss", "d_input", "d_weight", "d_bias", "entropy"):
        assert relative(listed[name], expected[name]) < TOLERANCE, name


def test_buffers_are_written_before_they_are_read(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """With every fresh buffer full of NaN, padding included, the result is the same."""
    p = problem(rows=9, vocab=70, bias=True, lora=True, softcap=5.0, device=device)
    expected = call.linear(p, chunk_size=4)

    def poisoned(make):  # type: ignore[no-untyped-def]
        def fill(*args, **kwargs):  # type: ignore[no-untyped-def]
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return fill

    for module, name in ((torch, "empty"), (torch, "empty_like"), (backend, "scratch")):
        monkeypatch.setattr(module, name, poisoned(getattr(module, name)))
    actual = call.linear(p, chunk_size=4)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_strided_operands(device: torch.device) -> None:
    """Hidden states that are a slice, and a weight that is a transpose, as a tied Conv1D head has."""
    p = problem(rows=6, hidden=8, vocab=21, device=device)
    flat = call.linear(p)
    wide = torch.zeros(6, 16, device=device)
    wide[:, ::2] = p.input.detach()
    weight = p.weight.detach().t().contiguous().t().requires_grad_()
    hidden = wide[:, ::2].requires_grad_()
    assert not weight.is_contiguous() and not hidden.is_contiguous()
    out = linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight)
    grads = torch.autograd.grad(out.loss, (hidden, weight))
    for grad, name in zip(grads, ("d_input", "d_weight"), strict=True):
        assert relative(grad, flat[name]) < 1e-6


@pytest.mark.parametrize("inplace_backward", [False, True])
@pytest.mark.parametrize("vocab", [7, 65, 500])
def test_logits(vocab: int, inplace_backward: bool, device: torch.device, short_blocks: None) -> None:
    p = problem(rows=5, vocab=vocab, floor=-4.0, softcap=6.0, logit_scale=1.5, device=device)
    z = 3 * torch.randn(5, vocab, generator=torch.Generator().manual_seed(1)).to(device)
    assert_logits_match(p, z, inplace_backward=inplace_backward)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("weight", [1.0, -1.0])
def test_a_logit_of_the_target_that_is_not_finite_makes_the_loss_nan(
    value: float, weight: float, device: torch.device
) -> None:
    """Plain arithmetic would give log p = 0 for +inf, and so a loss of 0."""
    p = problem(rows=2, vocab=9, device=device)
    p.target.fill_(3)
    p.token_weight.fill_(weight)
    z = torch.zeros(2, 9, device=device)
    z[1, 3] = value
    assert torch.isnan(call.logits(p, z)["loss"])


def test_skipped_rows_of_logits_may_hold_anything(device: torch.device) -> None:
    p = problem(rows=4, vocab=9, device=device)
    p.target.copy_(torch.tensor([2, 2, -100, 5]))
    p.token_weight.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5]))
    z = torch.randn(4, 9, device=device)
    z[1:3] = torch.nan
    result = call.logits(p, z)
    assert result["loss"].isfinite() and result["d_logits"][[0, 3]].isfinite().all()
    for name in ("d_logits", "logprob", "entropy", "is_top1"):
        assert not result[name][1:3].any(), name


def test_logits_are_left_alone_in_the_forward_pass(device: torch.device) -> None:
    z = torch.randn(3, 40, device=device).requires_grad_()
    before = z.detach().clone()
    target, weight = torch.tensor([1, 2, 3], device=device), torch.ones(3, device=device)
    selective_cross_entropy(z, target, weight).loss.backward()
    assert torch.equal(z.detach(), before)


@pytest.mark.parametrize("bad", OUTSIDE)
def test_a_target_outside_the_vocabulary_is_nan(
    bad: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_outside(bad, device, monkeypatch)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    """At most 1.5 times the error of plain PyTorch; in the interpreter, which cuts bf16 off, 3 times."""
    from tests.kernels.test_precision import naive, rms

    slack = 3.0 if backend.INTERPRETED and dtype == torch.bfloat16 else 1.5
    p = problem(rows=32, hidden=64, vocab=300, dtype=dtype, spread=2.0, bias=True, device=device)
    expected, plain, ours = oracle.selective(p), naive(p), call.linear(p, chunk_size=20)
    for name in ("logprob", "d_input", "d_weight", "d_bias"):
        assert ours[name].dtype == plain[name].dtype
        assert rms(ours[name], expected[name]) < slack * rms(plain[name], expected[name]), name


def test_the_factor_is_not_rounded_to_the_dtype_of_the_gradient(device: torch.device) -> None:
    """The factor lies between two numbers of the dtype; rounded first, every entry would be off by the same share.

    In fp16 where the kernels are interpreted: the interpreter cuts bf16 off, which is off by as much.
    """
    dtype, factor, bound = torch.bfloat16, 1 / 3, 5e-4
    if backend.INTERPRETED:
        dtype, factor, bound = torch.float16, 1 + 25.49 * 2**-10, 2e-4
    p = problem(rows=20, dtype=dtype, device=device)
    grad, scaled = (call.linear(p, factor=f)["d_input"].double() for f in (1.0, factor))
    some = grad != 0
    assert ((scaled[some] / factor / grad[some]).mean() - 1).abs() < bound


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("factor", [1.0, -0.25])
def test_scaling_in_place(
    factor: float, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every element once, also where a program takes several blocks and the last one is not full."""
    from selsft_kernels import scale_triton

    monkeypatch.setattr(scale_triton, "_BLOCK", 16)
    monkeypatch.setattr(scale_triton, "_PROGRAMS", 0.02)
    grad = torch.arange(1.0, 151.0, device=device).to(dtype).view(10, 15)
    expected = (grad.float() * factor).to(dtype)
    scale_triton.scale_in_place(grad, torch.tensor([factor], device=device))
    assert torch.equal(grad, expected)


def test_compiles_without_a_graph_break(device: torch.device) -> None:
    p = problem(rows=4, bias=True, device=device)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(hidden: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight).loss / 2

    loss = step(p.input, p.weight)
    grads = torch.autograd.grad(loss, (p.input, p.weight))
    p.bias = None
    expected = oracle.selective(p)
    for actual, name in zip((loss.detach(), *grads), ("loss", "d_input", "d_weight"), strict=True):
        assert relative(actual, expected[name] / 2) < TOLERANCE
