"""These tests run the Triton kernels: on a GPU, or on the CPU with `TRITON_INTERPRET=1` set from the start."""

from pathlib import Path
from typing import Any

import pytest
import torch

from selsft_kernels import backend


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = Path(__file__).parent
    gpu = torch.cuda.is_available()
    no_kernels = pytest.mark.skip(reason="needs a CUDA device, or TRITON_INTERPRET=1 in the environment")
    no_gpu = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if here not in item.path.parents:
            continue
        if not (backend.HAS_TRITON and (gpu or backend.INTERPRETED)):
            item.add_marker(no_kernels)
        elif item.get_closest_marker("gpu") and not gpu:
            item.add_marker(no_gpu)


if backend.INTERPRETED:
    from triton.runtime import interpreter

    _patch_tensor = interpreter._patch_lang_tensor

    def _patch_tensor_and_index(tensor: Any, scope: Any) -> None:
        """Triton 3.6 makes loop bounds by `int(array)` of arrays with one element, which numpy 2.4 refuses."""
        _patch_tensor(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: self.handle.data.item())

    interpreter._patch_lang_tensor = _patch_tensor_and_index


@pytest.fixture
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() and not backend.INTERPRETED else "cpu")


@pytest.fixture
def short_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels go along a row in several steps also for the small vocabularies of these tests: 64 bytes at a time."""
    from selsft_kernels import fold_triton, gather_triton, rows_triton

    monkeypatch.setattr(rows_triton, "_MAX_LANES", 4)
    monkeypatch.setattr(fold_triton, "_MAX_LANES", 4)
    monkeypatch.setattr(gather_triton, "_MAX_BLOCK", 8)
