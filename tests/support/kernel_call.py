"""Runs the public functions on an `oracle.Problem` and returns what `oracle.selective` returns."""

from typing import Any

import torch
from torch import Tensor

from selsft_kernels import linear_logprob, linear_selective_cross_entropy, selective_cross_entropy
from tests.support.kernel_oracle import Problem

ALL = ("logprob", "entropy", "is_top1")


def linear(p: Problem, factor: float = 1.0, **overrides: Any) -> dict[str, Tensor]:
    leaves = _leaves(p)
    out = linear_selective_cross_entropy(
        leaves["input"],
        leaves["weight"],
        p.target,
        p.token_weight,
        linear_bias=leaves.get("bias"),
        lora_a=leaves.get("lora_a"),
        lora_b=leaves.get("lora_b"),
        reference_logprob=p.reference,
        outputs=ALL,
        **{**p.options, **overrides},
    )
    return _collect(out, out.loss * factor, leaves)


def logprob(p: Problem, upstream: Tensor, **overrides: Any) -> dict[str, Tensor]:
    leaves = _leaves(p)
    out = linear_logprob(
        leaves["input"],
        leaves["weight"],
        p.target,
        linear_bias=leaves.get("bias"),
        lora_a=leaves.get("lora_a"),
        lora_b=leaves.get("lora_b"),
        outputs=ALL,
        **{**p.options, **overrides},
    )
    assert out.logprob is not None
    return _collect(out, (out.logprob * upstream).sum(), leaves)


def logits(p: Problem, z: Tensor, **overrides: Any) -> dict[str, Tensor]:
    leaf = z.detach().clone().requires_grad_()
    out = selective_cross_entropy(
        leaf * 1,  # not a leaf, so that the gradient may be written over it
        p.target,
        p.token_weight,
        reference_logprob=p.reference,
        outputs=ALL,
        **{**p.options, **overrides},
    )
    return _collect(out, out.loss, {"logits": leaf})


def _leaves(p: Problem) -> dict[str, Tensor]:
    return {name: t.detach().clone().requires_grad_() for name, t in p.parameters().items()}


def _collect(out: Any, loss: Tensor, leaves: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(loss, list(leaves.values()))
    result = {name: value.detach() for name, value in out._asdict().items() if value is not None}
    result["loss"] = loss.detach()
    return result | {f"d_{name}": grad for name, grad in zip(leaves, grads, strict=True)}
