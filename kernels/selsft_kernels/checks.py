"""Argument checks of the public functions. Every error names the argument, what it is, and what to pass instead.

Shapes, dtypes, devices and option names are checked on every call, from what the host knows already. The *contents*
of `target` and `active_rows` are checked on CPU tensors only: on a GPU that would make the host wait for the device.
There, a target outside the vocabulary makes the loss NaN, which is loud, and reads no memory that is not ours.

Numbers are compared and not passed to `math.isfinite`: under `torch.compile(dynamic=True)` they are symbols, which it
does not take. A NaN fails every comparison.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .objectives import FORGET, FORGET_OBJECTIVES, POSITIVE_OBJECTIVES

FLOAT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
OUTPUTS = ("logprob", "entropy", "is_top1")


def operands(input: Tensor, weight: Tensor) -> torch.dtype:
    """Checks the hidden states and the head; returns the dtype of the matrix products, autocast's if it is on."""
    for name, tensor in (("input", input), ("linear_weight", weight)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; pass float32, bfloat16 or float16")
    if input.dim() < 1:
        raise ValueError("input has no dimension; pass [..., H]")
    if weight.dim() != 2:
        raise ValueError(f"linear_weight has shape {tuple(weight.shape)}; pass [V, H]")
    if weight.shape[1] != input.shape[-1]:
        raise ValueError(
            f"linear_weight has shape {tuple(weight.shape)} and input {tuple(input.shape)}; make the last sizes equal"
        )
    vocabulary(weight.shape[0], "linear_weight")
    same_device("linear_weight", weight, input)
    if torch.is_autocast_enabled(input.device.type):
        return torch.get_autocast_dtype(input.device.type)
    if input.dtype != weight.dtype:
        raise ValueError(
            f"input is {input.dtype} and linear_weight is {weight.dtype}; cast one, or call under torch.autocast"
        )
    return input.dtype


def vocabulary(size: int, name: str) -> None:
    if size < 2:
        raise ValueError(f"{name} has a vocabulary of {size}; the log-odds of a token need at least 2")


def same_device(name: str, tensor: Tensor, input: Tensor, of: str = "input") -> None:
    if tensor.device != input.device:
        raise ValueError(f"{name} is on {tensor.device} and {of} on {input.device}; move it with .to({of}.device)")


def per_token(name: str, tensor: Tensor, like: Tensor, dtype: torch.dtype, of: str = "input") -> None:
    """`tensor` must have one entry of `dtype` for each row of `like`."""
    if tensor.shape != like.shape[:-1]:
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)}; {of} {tuple(like.shape)} needs {tuple(like.shape[:-1])}"
        )
    if tensor.dtype != dtype:
        raise ValueError(f"{name} has dtype {tensor.dtype}; pass {dtype}, for example {name}.to({dtype})")
    same_device(name, tensor, like, of)


def bias_vector(bias: Tensor | None, weight: Tensor) -> None:
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise ValueError(f"linear_bias has shape {tuple(bias.shape)}; pass [{weight.shape[0]}]")
    if bias.dtype not in FLOAT_DTYPES:
        raise ValueError(f"linear_bias has dtype {bias.dtype}; pass float32, bfloat16 or float16")
    same_device("linear_bias", bias, weight, "linear_weight")


def lora(a: Tensor | None, b: Tensor | None, weight: Tensor) -> None:
    if a is None and b is None:
        return
    if a is None or b is None:
        raise ValueError(f"lora_a and lora_b come together; lora_{'a' if a is None else 'b'} is None")
    vocab, hidden = weight.shape
    if a.dim() != 2 or a.shape[1] != hidden:
        raise ValueError(f"lora_a has shape {tuple(a.shape)}; pass [r, {hidden}]")
    if b.shape != (vocab, a.shape[0]):
        raise ValueError(f"lora_b has shape {tuple(b.shape)}; pass [{vocab}, {a.shape[0]}]")
    for name, tensor in (("lora_a", a), ("lora_b", b)):
        if tensor.dtype not in FLOAT_DTYPES:
            raise ValueError(f"{name} has dtype {tensor.dtype}; pass float32, bfloat16 or float16")
        same_device(name, tensor, weight, "linear_weight")


def objective(
    positive: str,
    forget: str,
    beta: float,
    floor: float | None,
    reference: Tensor | None,
    entropy_gate: float | None,
    anchor: float | None,
    z_loss: float | None,
) -> None:
    if positive not in POSITIVE_OBJECTIVES:
        raise ValueError(f"positive={positive!r} is not one of {POSITIVE_OBJECTIVES}")
    if forget not in FORGET_OBJECTIVES:
        raise ValueError(f"forget={forget!r} is not one of {FORGET_OBJECTIVES}")
    if not 0 < beta < math.inf:
        raise ValueError(f"beta={beta} must be a finite number above 0")
    if floor is not None and not -math.inf < floor < 0:
        raise ValueError(f"floor={floor} is a log-probability and must be finite and below 0, for example -10.0")
    if FORGET[forget].needs_reference and reference is None:
        raise ValueError(
            f"reference_logprob is None; forget={forget!r} needs the reference's log-probability of the targets"
        )
    if entropy_gate is not None and not 0 < entropy_gate < math.inf:
        raise ValueError(f"entropy_gate={entropy_gate} must be None or an entropy in nats above 0, for example 3.0")
    if z_loss is not None and not 0 < z_loss < math.inf:
        raise ValueError(f"z_loss={z_loss} must be None or a finite number above 0, for example 1e-4")
    if anchor is not None:
        if not 0 < anchor < math.inf:
            raise ValueError(f"anchor={anchor} must be None or a finite number above 0")
        if reference is None:
            raise ValueError(
                f"reference_logprob is None; anchor={anchor} needs the log-probability of the targets to stay close to"
            )


def head_options(softcap: float | None, logit_scale: float) -> None:
    if softcap is not None and not 0 < softcap < math.inf:
        raise ValueError(f"softcap={softcap} must be None or a finite number above 0")
    if not -math.inf < logit_scale < math.inf or logit_scale == 0:
        raise ValueError(f"logit_scale={logit_scale} must be finite and not 0")


def output_names(outputs: Sequence[str]) -> tuple[str, ...]:
    if isinstance(outputs, str):
        raise ValueError(f"outputs={outputs!r} is a string; pass a tuple, for example ({outputs!r},)")
    for name in outputs:
        if name not in OUTPUTS:
            raise ValueError(f"outputs has {name!r}, which is not one of {OUTPUTS}")
    return tuple(outputs)


def size_option(name: str, value: int | None) -> None:
    if value is not None and value < 1:
        raise ValueError(f"{name}={value} must be None or at least 1")


def bound(name: str, value: float | None) -> None:
    if value is not None and not 0 <= value < math.inf:
        raise ValueError(f"{name}={value} must be None or a finite number of at least 0")


def row_indices(rows: Tensor | None, input: Tensor) -> None:
    if rows is None:
        return
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"active_rows is {rows.dtype} of shape {tuple(rows.shape)}; pass int64 indices of shape [M]")
    same_device("active_rows", rows, input)


def contents(target: Tensor, rows: Tensor | None, vocab: int, ignore_index: int) -> None:
    """Checks the values in `target` [N] and `active_rows` [M]; on CPU tensors only (see above)."""
    if target.device.type != "cpu":
        return
    low, high = extent(target)
    if low < 0 or high >= vocab:
        bad = ((target < 0) | (target >= vocab)) & (target != ignore_index)
        if bad.any():
            raise ValueError(
                f"target has the value {int(target[bad][0])}; it must be in [0, {vocab}) or ignore_index="
                f"{ignore_index}"
            )
    if rows is None or rows.numel() == 0:
        return
    total = target.numel()
    low, high = extent(rows)
    if low < 0 or high >= total:
        raise ValueError(f"active_rows has the value {low if low < 0 else high}; it must be in [0, {total})")
    seen = torch.zeros(total, dtype=torch.bool)
    seen[rows] = True
    if int(seen.sum()) != rows.numel():
        raise ValueError("active_rows names a row twice; pass each index once")


def extent(values: Tensor) -> tuple[int, int]:
    """The least and the greatest value; `(0, 0)` of none."""
    if values.numel() == 0:
        return 0, 0
    low, high = torch.aminmax(values)
    return int(low), int(high)
