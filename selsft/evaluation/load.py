"""The model to evaluate: a full model, or a LoRA adapter on its base.

transformers can load an adapter's folder too, but hides the adapter in the base's layers, where neither PEFT nor the
KL divergence to the base can switch it off.
"""

from __future__ import annotations

from typing import Any

from peft import PeftConfig, PeftModel
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .._compat import create_model_from_path, find_adapter_config_file
from ..training.model import Model


def load_model(
    name: str, init_kwargs: dict[str, Any], base: str | None = None
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Model and tokenizer of a folder or Hub id.

    Args:
        base: for an adapter, its base, when it is no longer where the adapter's configuration says.
    """
    options = {key: init_kwargs[key] for key in ("revision", "trust_remote_code") if init_kwargs.get(key)}
    if find_adapter_config_file(name) is None:
        return create_model_from_path(name, **init_kwargs), AutoTokenizer.from_pretrained(name, **options)
    base = base or PeftConfig.from_pretrained(name).base_model_name_or_path
    if base is None:
        raise ValueError(f"the adapter {name!r} does not say what its base is: give --base_model_name_or_path")
    try:
        model = create_model_from_path(base, **init_kwargs)
    except OSError as error:
        raise ValueError(
            f"the adapter {name!r} has the base {base!r}, which cannot be loaded "
            f"({str(error).splitlines()[0]}): give --base_model_name_or_path"
        ) from error
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **options)
    except (OSError, ValueError):
        tokenizer = AutoTokenizer.from_pretrained(base, **options)
    return PeftModel.from_pretrained(model, name), tokenizer
