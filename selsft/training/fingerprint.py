"""A hash of a model's weights, by which scores, caches and records name the model that made them.

A base model has the same hash with and without PEFT around it, so that runs with different adapters share cached
scores. Sharded weights are gathered tensor by tensor; weights that are not there (on the meta device) are refused,
since all empty models have one hash. Rejected: hashing the files of a checkpoint, which says nothing about a model in
memory.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator

import torch
from peft.mapping import PEFT_TYPE_TO_PREFIX_MAPPING

from .model import Model, whole

# The trainer aligns these with the tokenizer, or they say where a model came from
_NOT_IN_HASH = (
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
_ADAPTER_PARTS = (*set(PEFT_TYPE_TO_PREFIX_MAPPING.values()), "modules_to_save", "prompt_encoder")
_WRAPPERS = ("base_layer", "original_module", "token_adapter")


def model_fingerprint(model: Model, adapter: str | None = "*") -> str:
    """SHA-256 of the weights and of the configuration that decides what is computed from them.

    With sharded weights (FSDP2, ZeRO-3) all processes must call this together, and all get the hash of the whole.

    Args:
        adapter: `"*"` for all weights, a name for the base and that adapter, `None` for the base alone.

    Raises:
        `ValueError` when the model has weights on the meta device, which have no values to hash.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for key in _NOT_IN_HASH:
        config.pop(key, None)
    digest.update(repr(sorted((key, value) for key, value in config.items() if not key.startswith("_"))).encode())
    for name, tensor in sorted(_weights(model, adapter), key=lambda item: item[0]):
        with whole(tensor) as full:
            if full.is_meta:
                raise ValueError(f"weight {name!r} is on the meta device: a model without weights has no hash")
            flat = full.detach().cpu().contiguous().view(-1)
            digest.update(f"{name} {full.dtype} {tuple(full.shape)}".encode())
            digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


def _weights(model: Model, adapter: str | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The tensors that are hashed, those of the base under the names that they have without PEFT.

    A weight of an adapter keeps its full name: adapters on the parameters of experts (`target_parameters`) lie in each
    other, and only the wrappers tell their factors apart.
    """
    for full, tensor in model.state_dict(keep_vars=True).items():
        parts = full.replace("base_model.model.", "").split(".")
        if not any(part.startswith(_ADAPTER_PARTS) for part in parts):
            yield ".".join(part for part in parts if part not in _WRAPPERS), tensor
        elif adapter == "*" or adapter in parts:
            yield ".".join(parts), tensor
