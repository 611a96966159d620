"""The model that is trained, with or without PEFT around it: evaluation mode, copies, and weights that are sharded.

FSDP2 shards a weight as a DTensor, ZeRO-3 leaves a parameter of no size and keeps its part elsewhere. ZeRO-3 may do so
when a model is loaded, so also before training. Rejected: gathering the whole model where one weight is asked for,
which may not fit into memory.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from typing import cast

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

Model = PreTrainedModel | PeftModel


def base_model(model: Model) -> PreTrainedModel:
    """The causal language model below PEFT."""
    return cast(PreTrainedModel, model.get_base_model() if isinstance(model, PeftModel) else model)


@contextlib.contextmanager
def frozen(model: torch.nn.Module) -> Iterator[None]:
    """No gradients and evaluation mode inside; afterwards every module is in its own mode again, also those that a
    user has put into evaluation mode while the model trains."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextlib.contextmanager
def whole(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The full tensor, where it is sharded. All processes must call this together."""
    if isinstance(tensor, DTensor):
        yield tensor.full_tensor()
    elif hasattr(tensor, "ds_id"):
        import deepspeed

        with deepspeed.zero.GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor


def whole_shape(tensor: torch.Tensor) -> tuple[int, ...]:
    """The shape of the full tensor, without gathering it."""
    return tuple(getattr(tensor, "ds_shape", tensor.shape))


def copied(model: Model) -> Model:
    """A deep copy. What ZeRO-3 has partitioned is partitioned in it too; one whole weight at a time is in memory.

    All processes must call this together.
    """
    memo = {}
    for parameter in model.parameters():
        if hasattr(parameter, "ds_id"):  # its methods are closures over the parameter, which `deepcopy` would share
            with whole(parameter) as full:
                own = torch.nn.Parameter(full.detach().clone(), parameter.requires_grad)
            parameter.convert_to_zero_parameters(param_list=[own])
            memo[id(parameter)] = own
    return copy.deepcopy(model, memo)
