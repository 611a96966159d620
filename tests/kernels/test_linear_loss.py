"""`linear_selective_cross_entropy` against fp64 autograd: every objective, feature and awkward shape."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from selsft_kernels import backend, linear_loss, linear_selective_cross_entropy, rows
from tests.support import kernel_call as call
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import Problem, problem, relative

# Each is compared with fp64 at a bound that fp32 arithmetic meets and a missing term does not.
TOLERANCE = 2e-5

OBJECTIVES = [
    {"positive": "nll", "forget": "unlikelihood"},
    {"positive": "dft", "forget": "unlikelihood"},
    {"forget": "probability"},
    {"forget": "npo", "beta": 0.3},
    {"forget": "npo", "beta": 2.0},
    {"forget": "wga", "beta": 0.5},
    {"forget": "wga", "beta": 3.0},
    {"forget": "gradient_ascent"},
]


def name_of(options: dict) -> str:
    return "-".join(str(v) for v in options.values())


def assert_matches(p: Problem, actual: dict, tolerance: float = TOLERANCE) -> None:
    expected = oracle.selective(p)
    assert torch.equal(actual["is_top1"], expected.pop("is_top1"))
    for name, value in expected.items():
        assert actual[name].isfinite().all(), name
        assert relative(actual[name], value) < tolerance, name


@pytest.mark.parametrize("floor", [None, -3.0])
@pytest.mark.parametrize("options", OBJECTIVES, ids=name_of)
def test_every_objective(options: dict, floor: float | None) -> None:
    p = problem(rows=40, bias=True, spread=2.0, floor=floor, **options)
    if floor is not None:
        z, _ = oracle.forward(p)
        lp, _ = oracle.log_probabilities(z, p.target)
        negative = (p.token_weight < 0) & oracle.used(p)
        assert 0 < int((lp[negative] < floor).sum()) < int(negative.sum()), "the floor must cut some and not all"
    assert_matches(p, call.linear(p))


@pytest.mark.parametrize("vocab", [2, 7, 257, 500])
@pytest.mark.parametrize("n", [1, 3, 63])
def test_shapes(n: int, vocab: int) -> None:
    p = problem(rows=n, vocab=vocab, seed=n + vocab)
    assert_matches(p, call.linear(p, chunk_size=20))


@pytest.mark.parametrize(
    "features",
    [
        {"bias": True},
        {"softcap": 3.0},
        {"logit_scale": 0.3},
        {"logit_scale": -0.7},
        {"lora": True, "lora_scale": 0.5},
        {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "lora": True, "lora_scale": 2.0},
    ],
    ids=lambda f: "+".join(f),
)
def test_features(features: dict) -> None:
    p = problem(spread=3.0, **features)
    assert_matches(p, call.linear(p, chunk_size=4))


def test_softcap_comes_after_the_scale() -> None:
    p = problem(spread=3.0, softcap=2.0, logit_scale=3.0)
    z = oracle.forward(p)[0]
    raw = p.input.double() @ p.weight.double().T
    assert torch.allclose(z, 2.0 * torch.tanh(3.0 * raw / 2.0))
    assert not torch.allclose(z, 3.0 * 2.0 * torch.tanh(raw / 2.0), atol=0.1)
    assert_matches(p, call.linear(p))


def test_top1_is_the_first_of_equal_logits() -> None:
    weight = torch.tensor([[1.0], [2.0], [2.0], [0.0]])
    out = linear_selective_cross_entropy(
        torch.ones(4, 1), weight, torch.arange(4), torch.ones(4), outputs=("is_top1",)
    )
    assert out.is_top1 is not None and out.is_top1.tolist() == [False, True, False, False]


@pytest.mark.parametrize("chunk_size", [1, 5, 13, 64])
def test_chunks_do_not_change_the_result(chunk_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(bias=True, lora=True)
    whole = call.linear(p)
    monkeypatch.setattr(rows, "_CACHED_ELEMENTS", 80)
    parts = call.linear(p, chunk_size=chunk_size)
    for name, value in whole.items():
        assert relative(parts[name], value) < 1e-6, name


@pytest.mark.parametrize("shift", [80.0, -80.0])
def test_saturated_logits(shift: float) -> None:
    """At |m| of 80, values and gradients are as in fp64, not clamped or infinite."""
    p = problem(rows=6, hidden=4, vocab=9)
    with torch.no_grad():
        p.target.copy_(torch.tensor([0, 0, 0, 1, 1, 1]))
        p.weight.zero_()
        p.weight[0, 0] = shift
        p.input[:, 0] = 1.0
        p.token_weight.copy_(torch.tensor([1.0, -1.0, 0.5, -0.5, 2.0, -2.0]))
    for options in OBJECTIVES:
        p.options = options
        assert_matches(p, call.linear(p))


def test_a_memorised_token_keeps_its_gradient() -> None:
    """p rounds to 1 in fp32: log(1 - p) from a rounded log p would be -inf, and clamped, without a gradient."""
    weight = torch.tensor([[30.0], [0.0], [0.0]], requires_grad=True)
    hidden = torch.ones(1, 1, requires_grad=True)
    out = linear_selective_cross_entropy(hidden, weight, torch.tensor([0]), torch.tensor([-1.0]))
    out.loss.backward()
    assert out.loss.item() == pytest.approx(30.0 - torch.log(torch.tensor(2.0)).item(), rel=1e-6)
    assert weight.grad is not None and weight.grad[0, 0].item() == pytest.approx(1.0)


def test_grad_output_scales_all_gradients() -> None:
    p = problem(bias=True, lora=True)
    one, scaled = call.linear(p), call.linear(p, factor=-0.125)
    for name, value in one.items():
        if name.startswith("d_"):
            assert torch.equal(scaled[name], value * -0.125), name


def test_a_factor_of_one_costs_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    real = torch.mul
    p = problem()
    expected = call.linear(p)["d_weight"]
    for factor, count in ((1.0, 0), (0.5, 2)):
        loss = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight).loss * factor
        calls.clear()
        with monkeypatch.context() as patch:
            patch.setattr(torch, "mul", lambda *a, **k: calls.append(1) or real(*a, **k))
            _, grad = torch.autograd.grad(loss, (p.input, p.weight))
        assert len(calls) == count
        assert torch.allclose(grad, factor * expected)


def test_a_kept_graph_gives_gradients_of_its_own() -> None:
    """A second backward pass would otherwise add to the gradient that the first one handed out."""
    p = problem()
    loss = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight).loss
    first = torch.autograd.grad(loss, p.weight, retain_graph=True)[0]
    before = first.clone()
    second = torch.autograd.grad(loss, p.weight, retain_graph=True)[0]
    second.mul_(2.0)
    assert torch.equal(first, before)


def test_the_loss_can_be_scaled_in_place_and_backward_repeated() -> None:
    p = problem()
    expected = call.linear(p)["d_input"]
    loss = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight).loss
    loss *= 3.0
    for _ in range(2):
        p.input.grad = None
        loss.backward(retain_graph=True)
        assert torch.allclose(p.input.grad, 3.0 * expected)


def test_it_cannot_be_differentiated_twice() -> None:
    p = problem()
    loss = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight).loss
    (grad,) = torch.autograd.grad(loss * p.input.sum(), p.input, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@pytest.mark.parametrize("case", ["no rows", "all ignored", "all weights zero", "no active rows"])
def test_nothing_to_compute_gives_connected_zeros(case: str) -> None:
    p = problem(rows=0 if case == "no rows" else 5, bias=True, lora=True)
    if case == "all ignored":
        p.target.fill_(-100)
    if case == "all weights zero":
        p.token_weight.zero_()
    listed = torch.empty(0, dtype=torch.int64) if case == "no active rows" else None
    result = call.linear(p, active_rows=listed)
    assert result["loss"].item() == 0.0
    for name, parameter in p.parameters().items():
        grad = result[f"d_{name}"]
        assert grad.shape == parameter.shape and not grad.any(), name
    assert result["logprob"].shape == p.target.shape and not result["logprob"].any()


def test_leading_shape_and_strides() -> None:
    """[B, T, H] hidden states that are a slice, as `hidden[:, :-1]` is, and a weight that is a transpose."""
    p = problem(rows=12, hidden=8, vocab=21)
    flat = call.linear(p)
    hidden = torch.zeros(3, 5, 8)
    hidden[:, :-1] = p.input.detach().view(3, 4, 8)
    hidden.requires_grad_()
    weight = p.weight.detach().t().contiguous().t().requires_grad_()
    assert not weight.is_contiguous()
    out = linear_selective_cross_entropy(hidden[:, :-1], weight, p.target.view(3, 4), p.token_weight.view(3, 4))
    out.loss.backward()
    assert out.logprob is not None and out.logprob.shape == (3, 4)
    assert torch.allclose(out.logprob.flatten(), flat["logprob"], atol=1e-6)
    assert hidden.grad is not None and weight.grad is not None
    assert torch.allclose(hidden.grad[:, :-1].reshape(12, 8), flat["d_input"], atol=1e-6)
    assert not hidden.grad[:, -1].any()
    assert torch.allclose(weight.grad, flat["d_weight"], atol=1e-5)


@pytest.mark.parametrize("trained", [(True, False), (False, True), (False, False)])
def test_only_what_needs_a_gradient_gets_one(trained: tuple[bool, bool]) -> None:
    p = problem()
    expected = call.linear(p)
    hidden = p.input.detach().requires_grad_(trained[0])
    weight = p.weight.detach().requires_grad_(trained[1])
    loss = linear_selective_cross_entropy(hidden, weight, p.target, p.token_weight).loss
    assert loss.requires_grad == any(trained)
    if any(trained):
        loss.backward()
    for parameter, name in ((hidden, "d_input"), (weight, "d_weight")):
        assert (parameter.grad is not None) == parameter.requires_grad
        if parameter.grad is not None:
            assert torch.allclose(parameter.grad, expected[name], atol=1e-6)


def test_no_gradient_under_no_grad() -> None:
    p = problem()
    with torch.no_grad():
        out = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight)
    assert not out.loss.requires_grad
    assert relative(out.loss, oracle.selective(p)["loss"]) < TOLERANCE


def test_outputs_are_detached_and_only_those_asked_for() -> None:
    p = problem()
    out = linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight, outputs=("entropy",))
    assert out.logprob is None and out.is_top1 is None
    assert out.entropy is not None and not out.entropy.requires_grad
    assert out.loss.dtype == torch.float32 and out.loss.shape == ()


def test_active_rows_select_rows() -> None:
    """The listed rows count, in any order; a listed row of weight 0 or with an ignored target does not."""
    p = problem(rows=12)
    p.token_weight[3], p.target[5] = 0.0, -100
    index = torch.tensor([9, 3, 1, 5, 8])
    listed = call.linear(p, active_rows=index, chunk_size=2)
    kept = torch.zeros(12, dtype=torch.bool)
    kept[index] = True
    p.token_weight[~kept] = 0.0
    assert_matches(p, listed)


def test_all_rows_listed_equals_none_listed() -> None:
    p = problem(rows=9)
    listed, plain = call.linear(p, active_rows=torch.randperm(9)), call.linear(p)
    for name, value in plain.items():
        assert relative(listed[name], value) < 1e-6, name


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_hidden_states_that_are_not_finite_make_the_loss_nan(poison: float, sign: float) -> None:
    p = problem(rows=4)
    p.token_weight.fill_(sign)
    p.target.fill_(1)
    with torch.no_grad():
        p.input[2, 3] = poison
    assert torch.isnan(call.linear(p)["loss"])


def test_skipped_rows_may_hold_anything() -> None:
    """A NaN in a row of weight 0 must not reach the loss or a gradient, whether the row is listed or not."""
    p = problem(rows=6, bias=True)
    p.target.fill_(2)
    p.token_weight.copy_(torch.tensor([1.0, 0.0, -1.0, 0.5, 1.0, -2.0]))
    with torch.no_grad():
        p.input[1] = 0.0
        assert p.bias is not None
        p.bias.fill_(200.0)
    clean = call.linear(p)
    with torch.no_grad():
        p.input[1] = torch.nan
    dirty = call.linear(p)
    for name, value in clean.items():
        assert torch.equal(dirty[name], value), name
    listed = call.linear(p, active_rows=torch.arange(6))
    for name, value in clean.items():
        assert relative(listed[name], value) < 1e-6, name


def test_rows_of_weight_zero_are_left_out_before_the_first_product(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[int] = []
    real = torch.mm

    def spy(a: torch.Tensor, b: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        seen.append(a.shape[0])
        return real(a, b, **kwargs)

    p = problem(rows=50)
    monkeypatch.setattr(torch, "mm", spy)
    call.linear(p)
    kept = int(oracle.used(p).sum())
    assert kept < 50 and seen and set(seen) == {kept}


def test_a_frozen_head_costs_one_product_less(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes: list[tuple[int, ...]] = []
    real = torch.addmm
    monkeypatch.setattr(torch, "addmm", lambda *a, **k: shapes.append(tuple(a[0].shape)) or real(*a, **k))
    p = problem()
    linear_selective_cross_entropy(p.input, p.weight.detach(), p.target, p.token_weight)
    assert shapes == []
    linear_selective_cross_entropy(p.input, p.weight, p.target, p.token_weight)
    assert shapes == [tuple(p.weight.shape)]


def test_buffers_are_written_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """With every fresh buffer full of NaN the result is the same."""
    p = problem(rows=30, bias=True, lora=True, softcap=5.0)
    expected = call.linear(p, chunk_size=7)

    def poisoned(make):  # type: ignore[no-untyped-def]
        def fill(*args, **kwargs):  # type: ignore[no-untyped-def]
            t = make(*args, **kwargs)
            return t.fill_(torch.nan) if t.is_floating_point() else t

        return fill

    for module, name in ((torch, "empty"), (torch, "empty_like"), (backend, "scratch")):
        monkeypatch.setattr(module, name, poisoned(getattr(module, name)))
    actual = call.linear(p, chunk_size=7)
    for name, value in expected.items():
        assert torch.equal(actual[name], value), name


def test_threads_do_not_share_a_buffer() -> None:
    """The CPU keeps the buffer of the logits for the next call of the same thread."""
    problems = [problem(rows=200, hidden=32, vocab=600, seed=seed) for seed in range(4)]
    expected = [call.linear(p) for p in problems]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            for actual, wanted in zip(pool.map(call.linear, problems), expected, strict=True):
                assert all(torch.equal(actual[name], value) for name, value in wanted.items())


@pytest.mark.parametrize("shift", [0.0, 1e4, -1e4])
def test_logits_of_any_size(shift: float) -> None:
    """What stands in the target's place is as large as the largest other logit, so neither sum over- or underflows."""
    p = problem(rows=8, hidden=4, vocab=30, spread=40.0, bias=True)
    with torch.no_grad():
        assert p.bias is not None
        p.bias.mul_(20.0).add_(shift)
    tolerance = TOLERANCE if shift == 0 else 2e-3  # fp32 logits at 1e4 are spaced by 1e-3
    expected, actual = oracle.selective(p), call.linear(p)
    for name in ("loss", "logprob", "entropy", "d_input", "d_weight", "d_bias"):
        assert relative(actual[name], expected[name]) < tolerance, name


@pytest.mark.parametrize("options", [{}, {"positive": "dft", "floor": -3.0, "softcap": 4.0}], ids=["plain", "others"])
def test_positives_gated_by_entropy(options: dict) -> None:
    """Rows on both sides of the gate, and negative tokens that it does not touch."""
    p = problem(rows=40, vocab=23, spread=3.0, entropy_gate=2.1, seed=3, **options)
    entropy = oracle.selective(p)["entropy"][oracle.used(p) & (p.token_weight > 0)]
    assert 0 < int((entropy < 2.1).sum()) < entropy.numel()
    assert_matches(p, call.linear(p, chunk_size=16))


@pytest.mark.parametrize("options", [{}, {"positive": "dft", "floor": -2.0, "entropy_gate": 2.1, "softcap": 4.0}])
def test_anchor_to_the_reference(options: dict) -> None:
    """Rows of weight 0 stay out of it; below the floor it is all that there is."""
    p = problem(rows=40, vocab=23, spread=3.0, anchor=0.7, seed=4, **options)
    p.reference[:5] = torch.tensor([-1e-4, -1e-6, -20.0, -3.0, -0.5])
    assert_matches(p, call.linear(p, chunk_size=16))


Z_LOSS = [
    {},
    {"bias": True, "softcap": 3.0, "logit_scale": 1.7, "lora": True, "lora_scale": 2.0},
    {"logit_scale": -0.7, "floor": -1e-3},
    {"positive": "dft", "forget": "npo", "entropy_gate": 2.1, "anchor": 0.7},
]


@pytest.mark.parametrize("options", Z_LOSS, ids=lambda o: "+".join(o))
def test_z_loss(options: dict) -> None:
    """Also below the floor, where it is all that there is; rows of weight 0 stay out of it."""
    p = problem(rows=40, vocab=23, spread=3.0, z_loss=0.02, seed=4, **options)
    assert_matches(p, call.linear(p, chunk_size=16))
    without = call.linear(p, chunk_size=16, z_loss=None)
    assert relative(without["d_weight"], call.linear(p)["d_weight"]) > 100 * TOLERANCE


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_z_loss_pulls_where_no_function_of_the_log_odds_does(dtype: torch.dtype) -> None:
    """All logits equal and large: the likelihood of a certain token has no gradient, and the z-loss that of Z^2."""
    hidden, head = torch.ones(1, 1, dtype=dtype), torch.full((4, 1), 64.0, dtype=dtype, requires_grad=True)
    weight = torch.tensor([1e-30])
    loss = linear_selective_cross_entropy(hidden, head, torch.tensor([2]), weight, z_loss=0.5).loss
    loss.backward()
    total = 64.0 + torch.log(torch.tensor(4.0))
    assert loss.item() == pytest.approx(0.5 * total.item() ** 2, rel=1e-5)
    assert head.grad is not None and torch.allclose(head.grad.float(), (total / 4).expand(4, 1), rtol=8e-3)


@pytest.mark.parametrize("dead", [11, 16, 40])
@pytest.mark.parametrize("prompt", [False, True])
def test_rows_without_a_gradient_do_not_go_through_the_products(
    prompt: bool, dead: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows below the floor, spread over chunks; a whole chunk of them; all rows. The results are those of all rows."""
    p = problem(rows=40, vocab=23, hidden=12, bias=True, lora=True, floor=-1e-3, seed=5)
    p.target.clamp_(min=0)
    p.token_weight.fill_(1.0)
    p.token_weight[:dead] = -1.0  # every one of them is below the floor
    if prompt:
        p.token_weight[1::5] = 0.0
    seen: list[int] = []
    inner = linear_loss.add_gradients

    def counted(grads, d_raw, *arguments, **options):
        seen.append(d_raw.shape[0])
        inner(grads, d_raw, *arguments, **options)

    monkeypatch.setattr(linear_loss, "add_gradients", counted)
    actual = call.linear(p, chunk_size=16)
    assert_matches(p, actual)
    assert not actual["d_input"][:dead].any()
    used = int((p.token_weight != 0).sum())
    assert sum(seen) == int((p.token_weight > 0).sum()) if dead != 11 else sum(seen) < used
    monkeypatch.setattr(linear_loss, "_LIVING_SHARE", -1.0)
    for name, value in call.linear(p, chunk_size=16).items():
        assert torch.allclose(actual[name].double(), value.double(), atol=1e-6), name


def test_a_nan_is_not_a_row_without_a_gradient() -> None:
    factor, nothing = torch.tensor([0.0, torch.nan, 0.0, 0.0, 1e-40]), rows.RowStats()
    alive = linear_loss.living_rows(5, factor, nothing, None)
    assert alive is not None and alive.tolist() == [1, 4]
    assert linear_loss.living_rows(3, torch.ones(3), nothing, None) is None
    assert linear_loss.living_rows(3, None, nothing, None) is None
    alive = linear_loss.living_rows(5, None, rows.RowStats(grad=factor, others=torch.ones(5)), 0.5)
    assert alive is None
    alive = linear_loss.living_rows(
        5, None, rows.RowStats(grad=factor, others=torch.tensor([0, 0, 0.5, -0.6, 0])), 0.5
    )
    assert alive is not None and alive.tolist() == [1, 3]


@pytest.mark.parametrize("prompt", [False, True])
def test_rows_under_a_bound_leave_the_products(prompt: bool) -> None:
    """What is lost is within the bound that the docstring states, and nothing is where the bound is 0."""
    p = problem(rows=40, vocab=23, spread=6.0, seed=6, logit_scale=1.5)
    p.target.clamp_(min=0)
    p.token_weight.fill_(1.0)
    if prompt:
        p.token_weight[::5] = 0.0
    with torch.no_grad():  # the model is sure of half of its targets
        p.target[::2] = (p.input @ p.weight.T).argmax(1)[::2]
    whole, none = call.linear(p, dead_below=0.0), call.linear(p)
    for name, value in none.items():
        assert torch.equal(whole[name], value), name
    bound = 0.05
    cut = call.linear(p, dead_below=bound)
    gone = (cut["d_input"] == 0).all(1) & oracle.used(p)
    assert int(gone.sum()) > 10 and none["d_input"][gone].any()
    reach = 2 * bound * 1.5
    lost = (cut["d_input"] - none["d_input"]).norm(dim=1)
    assert 0 < lost.max() <= reach * p.weight.norm(dim=1).max()
    lost = (cut["d_weight"] - none["d_weight"]).norm(dim=1).sum()
    assert 0 < lost <= reach * p.input[gone].norm(dim=1).sum()
    assert torch.equal(cut["loss"], none["loss"]) and torch.equal(cut["logprob"], none["logprob"])
