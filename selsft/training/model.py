"""The model that is trained, with or without PEFT around it, and evaluation mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import cast

import torch
from peft import PeftModel
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
