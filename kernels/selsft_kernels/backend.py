"""Which implementation a tensor takes: the Triton kernels or their twins in torch.

Every module of kernels `x_triton.py` has a twin `x.py` with functions of the same names. Triton on every GPU that has
it (CUDA, ROCm, XPU), and on CPU tensors when `TRITON_INTERPRET=1` is in the environment from the start, which is how
the kernels are tested without a GPU. Torch everywhere else.

Triton is imported when a kernel is first needed, so that whoever wants the names of the objectives or the CPU path
does not wait for a compiler.
"""

import ctypes
import importlib
import importlib.util
import mmap
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

HAS_TRITON = importlib.util.find_spec("triton") is not None  # Triton ships for Linux (and partly Windows) only
INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(device: torch.device) -> bool:
    if device.type in ("cuda", "xpu"):
        return HAS_TRITON
    return INTERPRETED and device.type == "cpu"


def implementation(name: str, device: torch.device) -> Any:
    """The module `name` (`"rows"`, `"fold"`, `"gather"` or `"scale"`) that works on tensors of `device`."""
    return _module(f".{name}_triton" if use_triton(device) else f".{name}")


@cache
def _module(name: str) -> Any:
    return importlib.import_module(name, __package__)


_kept = threading.local()
_KEPT_BYTES = 96 * 2**20
_LARGE = 8 * 2**20


def scratch(shape: tuple[int, int], dtype: torch.dtype, device: torch.device) -> Tensor:
    """An uninitialised buffer for the time of one call.

    On a CPU, its memory is kept for the thread's next call if it is at most 96 MiB: new pages from the system cost as
    much as a tenth of the products that fill them. GPUs have an allocator for that.
    """
    size = shape[0] * shape[1] * dtype.itemsize
    if device.type != "cpu" or size > _KEPT_BYTES:
        return torch.empty(shape, device=device, dtype=dtype)
    memory: Tensor | None = getattr(_kept, "memory", None)
    if memory is None or memory.numel() < size:
        memory = _kept.memory = in_large_pages(torch.empty(size, dtype=torch.uint8))
    return memory[:size].view(dtype).view(shape)


def in_large_pages(t: Tensor) -> Tensor:
    """`t`, a new tensor, in pages of 2 MiB where Linux is willing.

    The gradient of a head is a new tensor in every call. In pages of 4 KiB the faults of its first use take a tenth of
    the products that fill it.
    """
    size = t.numel() * t.element_size()
    if t.device.type == "cpu" and sys.platform == "linux" and size >= _LARGE and type(t) is Tensor:
        start = t.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE
        # Advice: nothing depends on whether it is taken.
        ctypes.CDLL(None).madvise(
            ctypes.c_void_p(start), ctypes.c_size_t(t.data_ptr() + size - start), mmap.MADV_HUGEPAGE
        )
    return t


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside an operator: no autocast, and kernels go to `device`, which need not be the current one.

    Triton launches on the current device whatever its arguments are on; with a model split over GPUs those differ.
    """
    with ExitStack() as entered:
        if torch.is_autocast_enabled(device.type):  # entering a context takes longer than a small product
            entered.enter_context(torch.autocast(device.type, enabled=False))
        if device.type in ("cuda", "xpu"):
            entered.enter_context(torch.get_device_module(device).device(device))
        yield
