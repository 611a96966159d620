"""The tensors of one case of the benchmark, the same for every implementation."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

SHAPES = ((576, 49152), (2048, 128256), (4096, 128256), (3584, 152064), (2304, 256000))  # (H, V)
ROWS = (2048, 8192, 32768)
IGNORED = (0, 50, 80)  # percent
MAIN_SHAPE, MAIN_ROWS = (4096, 128256), 8192
CPU_SHAPES, CPU_ROWS = ((256, 8192),), (256,)
SYNTHETIC = "synthetic"


@dataclass(frozen=True)
class Case:
    """`hidden` [N, H] and `weight` [V, H]; half of the used rows are negative.

    `rows` are the used rows, as a collator would prepare them on the host; `target` is -100 elsewhere.
    """

    hidden: Tensor
    weight: Tensor
    target: Tensor
    token_weight: Tensor
    rows: Tensor
    ignored: int
    data: str = SYNTHETIC

    @property
    def size(self) -> tuple[int, int, int]:
        """`(N, H, V)`."""
        n, h = self.hidden.shape
        return n, h, self.weight.shape[0]

    @property
    def device(self) -> torch.device:
        return self.hidden.device

    def flops(self, products: int) -> float:
        """Arithmetic of `products` products of the used rows with the head: what has to be done, by whatever means."""
        _, hidden, vocab = self.size
        return 2.0 * products * self.rows.numel() * hidden * vocab


def make_case(n: int, h: int, v: int, ignored: int, device: torch.device, dtype: torch.dtype) -> Case:
    """Synthetic, but not white noise: hidden states point at their target to a varying degree, so p covers (0, 1).

    An implementation that skips small gradients (cut-cross-entropy) is fast in proportion to how peaked the
    distributions are; on real hidden states its time differs.
    """
    g = torch.Generator(device).manual_seed(n + h + v + ignored)
    weight = torch.randn(v, h, generator=g, device=device, dtype=dtype).mul_(h**-0.5)
    target = torch.randint(0, v, (n,), generator=g, device=device)
    pull = (16 * torch.rand(n, 1, generator=g, device=device)).to(dtype)
    hidden = torch.randn(n, h, generator=g, device=device, dtype=dtype) + pull * weight[target]
    return _case(hidden, weight, target, ignored, g, SYNTHETIC)


def load_case(path: Path, n: int, ignored: int, device: torch.device, dtype: torch.dtype) -> Case:
    """The first n hidden states of a model on text, and its head, as `save_states` stored them.

    Raises:
        ValueError: The file has fewer rows.
    """
    from safetensors import safe_open

    with safe_open(path, "pt", device=str(device)) as file:
        hidden, weight, scale, target = map(file.get_tensor, ("hidden", "weight", "scale", "target"))
        name = file.metadata()["model"]
    if n > hidden.shape[0]:
        raise ValueError(f"{path} has {hidden.shape[0]} rows, not {n}; save more")
    g = torch.Generator(device).manual_seed(n)
    return _case(hidden[:n].to(dtype), (weight * scale).to(dtype), target[:n].clone(), ignored, g, name)


def save_states(path: Path, model: str, hidden: Tensor, weight: Tensor, target: Tensor) -> None:
    """Stores hidden states [N, H], the head [V, H] and the targets [N] of `model` for `load_case`.

    bf16, and the head in 8 bits with a scale a row, so that those of a small model can be carried along. What has to
    be real is how peaked the distributions are.
    """
    from safetensors.torch import save_file

    scale = weight.float().abs().amax(1, keepdim=True).clamp_(min=1e-12) / 127
    tensors = {
        "hidden": hidden.to(torch.bfloat16),
        "weight": (weight.float() / scale).round_().to(torch.int8),
        "scale": scale,
        "target": target,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, path, metadata={"model": model})


def _case(hidden: Tensor, weight: Tensor, target: Tensor, ignored: int, g: torch.Generator, data: str) -> Case:
    n, device = target.shape[0], target.device
    skipped = torch.randperm(n, generator=g, device=device)[: n * ignored // 100]
    target[skipped] = -100
    token_weight = torch.rand(n, generator=g, device=device).sub_(0.5).sign_()
    token_weight[token_weight == 0] = 1.0
    token_weight[skipped] = 0.0
    return Case(hidden, weight, target, token_weight, (target != -100).nonzero().squeeze(1), ignored, data)
