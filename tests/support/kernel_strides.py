"""The same values in other places of memory, for every argument of the kernels' functions."""

import random

import torch
from torch import Tensor

from selsft_kernels import linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_call import ALL

FUNCTIONS = ("linear_loss", "logprob", "logits")
LAYOUTS = ("contiguous", "stepped", "sliced", "permuted", "reversed rows", "expanded", "unaligned")


def laid_out(t: Tensor, layout: str) -> Tensor:
    """A tensor shaped like `t`, laid out otherwise; with its values, but for "expanded", which repeats the first."""
    if layout == "stepped":
        wide = t.new_zeros(*t.shape[:-1], 2 * t.shape[-1])
        wide[..., ::2] = t
        return wide[..., ::2]
    if layout == "sliced":
        wide = t.new_zeros(*t.shape[:-1], t.shape[-1] + 3)
        wide[..., 1:-2] = t
        return wide[..., 1:-2]
    if layout == "permuted":
        order = tuple(reversed(range(t.dim())))
        return t.permute(order).contiguous().permute(order)
    if layout == "reversed rows":  # the last but one dimension is the slowest
        return t.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "expanded":
        return t[:1].expand(t.shape)
    if layout == "unaligned":
        place = t.new_zeros(t.numel() + 1)[1:]
        return place.copy_(t.reshape(-1)).view(t.shape)
    return t.contiguous()


def arguments(rng: random.Random, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Tensors of one call, `[B, T, ...]`, each laid out at random."""
    g = torch.Generator().manual_seed(rng.randrange(10**9))
    batch, time, hidden, vocab = rng.randint(1, 3), rng.randint(1, 4), rng.choice([3, 8, 16]), rng.choice([5, 16, 70])

    def normal(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
        return torch.randn(*shape, generator=g).to(dtype)

    target = torch.randint(0, vocab, (batch, time), generator=g)
    target[torch.rand(batch, time, generator=g) < 0.2] = -100
    rows = torch.randperm(batch * time, generator=g)[: rng.randint(1, batch * time)]
    made = {
        "input": normal(batch, time, hidden),
        "weight": normal(vocab, hidden),
        "bias": normal(vocab, dtype=rng.choice([dtype, torch.float32])),
        "lora_a": normal(2, hidden),
        "lora_b": normal(vocab, 2),
        "logits": normal(batch, time, vocab),
        "target": target,
        "token_weight": normal(batch, time, dtype=torch.float32),
        "reference": -normal(batch, time, dtype=torch.float32).abs(),
        "rows": rows,
    }
    return {name: laid_out(t.to(device), layout_of(name, rng)) for name, t in made.items()}


def layout_of(name: str, rng: random.Random) -> str:
    return rng.choice([layout for layout in LAYOUTS if (name, layout) != ("rows", "expanded")])


def run(function: str, given: dict[str, Tensor], *, listed: bool, floor: float | None) -> dict[str, Tensor]:
    """Calls a function on the tensors as they lie, and returns everything that comes out of it."""
    names = {"linear_loss": ("input", "weight", "bias", "lora_a", "lora_b"), "logits": ("logits",)}
    leaves = {n: given[n].detach().requires_grad_() for n in names.get(function, names["linear_loss"])}
    if function == "logits":
        out = selective_cross_entropy(
            leaves["logits"],
            given["target"],
            given["token_weight"],
            reference_logprob=given["reference"],
            forget="npo",
            floor=floor,
            softcap=9.0,
            outputs=ALL,
        )
    else:
        head = {f: leaves[n] for n, f in (("bias", "linear_bias"), ("lora_a", "lora_a"), ("lora_b", "lora_b"))}
        rows = given["rows"] if listed else None
        if function == "logprob":
            out = linear_logprob(
                leaves["input"],
                leaves["weight"],
                given["target"],
                **head,
                active_rows=rows,
                outputs=ALL,
                chunk_size=30,
            )
        else:
            out = linear_selective_cross_entropy(
                leaves["input"],
                leaves["weight"],
                given["target"],
                given["token_weight"],
                **head,
                reference_logprob=given["reference"],
                forget="npo",
                floor=floor,
                active_rows=rows,
                outputs=ALL,
                chunk_size=5,
            )
    loss = (out.logprob * given["token_weight"]).sum() if function == "logprob" else out.loss / 3
    grads = torch.autograd.grad(loss, list(leaves.values()))
    values = {n: v.detach() for n, v in out._asdict().items() if v is not None}
    return {**values, **{f"d_{n}": g for n, g in zip(leaves, grads, strict=True)}}


def check(seed: int, function: str, device: torch.device) -> None:
    """One random case: the arguments as they lie and compact copies of them give the same, up to the order of sums."""
    rng = random.Random(seed)
    given = arguments(rng, rng.choice([torch.float32, torch.float32, torch.bfloat16]), device)
    options = {"listed": rng.random() < 0.4, "floor": rng.choice([None, -2.0])}
    actual = run(function, given, **options)
    expected = run(function, {n: t.clone(memory_format=torch.contiguous_format) for n, t in given.items()}, **options)
    for name, value in expected.items():
        bound = 2e-5 if value.dtype == torch.float32 and given["input"].dtype == torch.float32 else 2e-2
        where = {n: (tuple(t.shape), t.stride()) for n, t in given.items()}
        assert actual[name].shape == value.shape, name
        if value.dtype == torch.bool:
            assert torch.equal(actual[name], value), (name, where)
        else:
            assert torch.allclose(actual[name].float(), value.float(), rtol=bound, atol=bound), (name, where)
