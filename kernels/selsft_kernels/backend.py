"""Which implementation a tensor takes: the Triton kernels or their twins in torch.

Triton on every GPU that has it (CUDA, ROCm, XPU), and on CPU tensors when `TRITON_INTERPRET=1` is in the environment
from the start, which is how the kernels are tested without a GPU. Torch everywhere else.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

try:
    import triton  # noqa: F401
except ImportError:  # Triton ships for Linux (and partly Windows) only
    HAS_TRITON = False
else:
    HAS_TRITON = True

INTERPRETED = HAS_TRITON and os.environ.get("TRITON_INTERPRET") == "1"


def use_triton(device: torch.device) -> bool:
    if device.type in ("cuda", "xpu"):
        return HAS_TRITON
    return INTERPRETED and device.type == "cpu"


@contextmanager
def computing_on(device: torch.device) -> Iterator[None]:
    """Inside an operator: no autocast, and kernels go to `device`, which need not be the current one.

    Triton launches on the current device whatever its arguments are on; with a model split over GPUs those differ.
    """
    with torch.autocast(device.type, enabled=False):
        if device.type in ("cuda", "xpu"):
            with torch.get_device_module(device).device(device):
                yield
        else:
            yield
