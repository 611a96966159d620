"""The mathematics written out in fp64 with autograd: what every path of the kernels is tested against.

Nothing here is shared with the package. Log-probabilities come from `log_softmax` over all columns and `log(1 - p)`
from the other columns, in plain form. Gradients come from autograd, never from a formula.
"""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

PARAMETERS = ("input", "weight", "bias", "lora_a", "lora_b")


@dataclass
class Problem:
    """Tensors of one call, and the options that both the package and the oracle take."""

    input: Tensor
    weight: Tensor
    target: Tensor
    token_weight: Tensor
    reference: Tensor
    bias: Tensor | None = None
    lora_a: Tensor | None = None
    lora_b: Tensor | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def parameters(self) -> dict[str, Tensor]:
        return {name: getattr(self, name) for name in PARAMETERS if getattr(self, name) is not None}


def problem(
    rows: int = 13,
    hidden: int = 12,
    vocab: int = 37,
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    bias: bool = False,
    lora: bool = False,
    spread: float = 1.0,
    seed: int = 0,
    **options: Any,
) -> Problem:
    """Random tensors; about 1 in 6 rows of weight 0 and 1 in 6 ignored, the others half positive, half negative."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return (scale * torch.randn(*shape, generator=g)).to(device, dtype).requires_grad_()

    target = torch.randint(0, vocab, (rows,), generator=g)
    token_weight = torch.randn(rows, generator=g)
    lot = torch.randint(0, 6, (rows,), generator=g)
    token_weight[(lot == 0) & (rows > 2)] = 0.0
    target[(lot == 1) & (rows > 2)] = -100
    return Problem(
        normal(rows, hidden),
        normal(vocab, hidden, scale=spread * hidden**-0.5),
        target.to(device),
        token_weight.to(device),
        (-3 * torch.rand(rows, generator=g)).to(device),
        normal(vocab) if bias else None,
        normal(3, hidden) if lora else None,
        normal(vocab, 3, scale=0.2) if lora else None,
        options,
    )


def used(p: Problem, *, weighted: bool = True) -> Tensor:
    keep = p.target != -100
    return keep & (p.token_weight != 0) if weighted else keep


def forward(
    p: Problem, dtype: torch.dtype = torch.float64, logits: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """`(logits [N, V], parameters)`, computed in `dtype` from leaves in `dtype`."""
    leaves = {name: t.detach().to(dtype).requires_grad_() for name, t in p.parameters().items()}
    z = leaves["input"] @ leaves["weight"].T if logits is None else logits
    if "lora_a" in leaves:
        z = z + p.options.get("lora_scale", 1.0) * (leaves["input"] @ leaves["lora_a"].T) @ leaves["lora_b"].T
    if "bias" in leaves:
        z = z + leaves["bias"]
    return head_transform(z, p.options), leaves


def head_transform(z: Tensor, options: dict[str, Any]) -> Tensor:
    z = z * options.get("logit_scale", 1.0)
    softcap = options.get("softcap")
    return z if softcap is None else softcap * torch.tanh(z / softcap)


def log_probabilities(z: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """`(log p, log(1 - p))` of the target; the latter from the other columns."""
    column = target.clamp(min=0).unsqueeze(1)
    total = z.logsumexp(1)
    others = z.scatter(1, column, -torch.inf)
    return z.gather(1, column).squeeze(1) - total, others.logsumexp(1) - total


def token_losses(lp: Tensor, l1mp: Tensor, p: Problem, z: Tensor | None = None) -> Tensor:
    """`|w| L` of each row, what is under a stop-gradient is detached. An entropy gate and a z-loss need z."""
    positive, forget = p.options.get("positive", "nll"), p.options.get("forget", "unlikelihood")
    beta, floor = p.options.get("beta", 1.0), p.options.get("floor")
    reference = p.reference.to(lp.dtype)
    keep = {"nll": -lp, "dft": -lp.exp().detach() * lp}[positive]
    both = (lp, l1mp)
    if floor is not None:
        bottom = torch.tensor(floor, dtype=lp.dtype, device=lp.device)
        below = lp < floor
        lp = torch.where(below, bottom, lp)
        l1mp = torch.where(below, torch.log1p(-bottom.exp()), l1mp)
    drop = {
        "unlikelihood": -l1mp,
        "probability": lp.exp(),
        "npo": 2 / beta * torch.logaddexp(torch.zeros_like(lp), beta * (lp - reference)),
        "wga": (beta * lp).exp() / beta,
        "gradient_ascent": lp,
    }[forget]
    value = torch.where(p.token_weight > 0, keep, drop) * p.token_weight.abs().to(lp.dtype)
    if p.options.get("entropy_gate") is not None:
        assert z is not None
        share = (torch.distributions.Categorical(logits=z.detach()).entropy() / p.options["entropy_gate"]).clamp(max=1)
        value = torch.where(p.token_weight > 0, value * share, value)
    if p.options.get("anchor") is not None:
        q = torch.stack([reference, torch.log1p(-reference.exp())]).exp()
        value = value + p.options["anchor"] * (q * (q.log() - torch.stack(both))).nan_to_num(0.0).sum(0)
    if p.options.get("z_loss") is not None:
        assert z is not None
        value = value + p.options["z_loss"] * z.logsumexp(1) ** 2
    return value[used(p)]


def selective(p: Problem, dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    """Loss, log-probabilities, entropy, top-1 and the gradients of all parameters."""
    z, leaves = forward(p, dtype)
    lp, l1mp = log_probabilities(z, p.target)
    loss = token_losses(lp, l1mp, p, z).sum()
    grads = torch.autograd.grad(loss, list(leaves.values()), retain_graph=False, allow_unused=True)
    result = {"loss": loss.detach(), **statistics(z.detach(), lp.detach(), p.target, used(p))}
    for (name, leaf), grad in zip(leaves.items(), grads, strict=True):
        result[f"d_{name}"] = torch.zeros_like(leaf) if grad is None else grad
    return result


def statistics(z: Tensor, lp: Tensor, target: Tensor, keep: Tensor) -> dict[str, Tensor]:
    all_lp = z.log_softmax(1)
    entropy = -(all_lp.exp() * all_lp).sum(1)
    return {
        "logprob": torch.where(keep, lp, 0.0),
        "entropy": torch.where(keep, entropy, 0.0),
        "is_top1": (z.argmax(1) == target) & keep,
    }


def relative(actual: Tensor, expected: Tensor) -> float:
    """Largest error over the largest expected entry; the absolute error where these are all below fp64's rounding."""
    if not expected.numel():
        return 0.0
    expected = expected.double()
    scale, error = expected.abs().max().item(), (actual.double() - expected).abs().max().item()
    return error / scale if scale > 1e-15 else error
