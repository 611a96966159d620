"""How many kernels the loss launches: a gather, a row kernel and two or three products a chunk, and little else."""

from collections import Counter
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from selsft_kernels import backend, gather_triton, linear_loss, rows_triton, scale_triton
from tests.support import kernel_oracle as oracle
from tests.support.kernel_oracle import problem, relative

# What launches nothing: views, allocations, and attributes
FREE = {
    "slice", "select", "view", "_unsafe_view", "reshape", "t", "transpose", "unsqueeze", "squeeze", "expand", "detach",
    "alias", "empty", "empty_like", "empty_strided", "new_empty", "as_strided",
}  # fmt: skip


class Launches(TorchDispatchMode):
    """Counts the operators of torch that launch something, and the Triton kernels, by name."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.inside = False
        for module in (gather_triton, rows_triton, scale_triton):
            for name in [name for name in vars(module) if name.endswith("_kernel")]:
                monkeypatch.setattr(module, name, Counted(getattr(module, name), name, self))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not self.inside and name not in FREE:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


class Counted:
    """A kernel that counts its launches."""

    def __init__(self, kernel: Any, name: str, launches: Launches) -> None:
        self.kernel, self.name, self.launches = kernel, name, launches

    def __getitem__(self, grid: Any) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launches.counts[self.name] += 1
            self.launches.inside = True
            try:
                self.kernel[grid](*args, **kwargs)
            finally:
                self.launches.inside = False

        return launch


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("chunks", [1, 3])
def test_launches_of_a_step(chunks: int, trained: bool, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    p = problem(rows=30, vocab=40, device=device)
    rows = oracle.used(p).nonzero().squeeze(1)
    launches, one = Launches(monkeypatch), torch.ones((), device=device)
    settings = linear_loss._Settings(
        positive="nll", forget="unlikelihood", beta=1.0, floor=None, entropy_gate=None, anchor=None, z_loss=None,
        softcap=None, logit_scale=1.0, lora_scale=1.0, entropy=True, is_top1=True,
        chunk_size=-(-len(rows) // chunks), dead_below=None, compute_dtype=torch.float32,
        weight_grad_dtype=torch.float32,
        ignore_index=-100,
    )  # fmt: skip
    needs = [True, trained, False, False, False]
    tensors = (p.input.detach(), p.weight.detach(), None, None, None, p.target, p.token_weight, None, rows)
    monkeypatch.setattr("selsft_kernels.checks.contents", lambda *_: None)  # looks at tensors on a CPU only
    with launches:
        loss, _, _, _, d_rows, d_weight, *_ = linear_loss.linear_loss_op._init_fn(*tensors, *settings, needs)
        with backend.computing_on(device):
            d_input = linear_loss.spread_scaled(d_rows, rows, one, torch.float32, p.input.shape)
    products = {name: launches.counts.pop(name) for name in ("mm", "addmm") if name in launches.counts}
    assert sum(products.values()) == (3 if trained else 2) * chunks
    counts = +launches.counts
    assert counts["gather_kernel"] == counts["loss_rows_kernel"] == chunks and counts["scale_rows_kernel"] == 1
    # Three statistics go to their places in tensors of zeros; the sum of the loss; the zeros of the gradient.
    rest = {name: n for name, n in counts.items() if not name.endswith("_kernel")}
    assert sum(rest.values()) <= 8, rest

    expected = oracle.selective(p)
    assert relative(loss, expected["loss"]) < 2e-5 and relative(d_input, expected["d_input"]) < 2e-5
    assert not trained or relative(d_weight, expected["d_weight"]) < 2e-5
