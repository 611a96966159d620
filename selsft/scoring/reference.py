"""What "the reference" can be, and how to run it beside the model that is trained.

A reference is a frozen model that says how likely a token *should* be. It may be a folder or Hub id of a model, a LoRA
adapter of the trained model's own base (one model in memory, the adapter is switched), a model that the caller has
loaded, or the base below the trained adapter. Rejected: always loading a second model, which doubles the memory of the
most common case, an adapter trained with PEFT on clean data.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
from collections.abc import Iterator
from typing import Any, cast

import torch
from peft import PeftConfig, PeftModel
from peft.utils import PeftType
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from .._compat import create_model_from_path, find_adapter_config_file, use_adapter
from ..training.model import Model, frozen

REFERENCE_ADAPTER = "selsft_reference"
BASE = "base"


class Reference:
    """A frozen reference. `use(policy)` yields the model to call, in evaluation mode and with the right adapter.

    Args:
        policy (`PreTrainedModel` or `PeftModel`): the model that is trained, with its adapter if it has one.
        source (`str`, `PreTrainedModel` or `PeftModel`): see `SelectiveSFTConfig.reference_model`.
        tokenizer (`PreTrainedTokenizerBase`): tokenizer of the trained model; the reference must have the same.
        init_kwargs (`dict`): for `from_pretrained` of the reference.

    Attributes:
        model: the reference where it is a model of its own, else `None`.
        adapter: name of the reference's adapter on the policy; `None` for a model of its own and for the bare base.
        injected: whether the adapter is put into a policy without PEFT for the time of `use` only.

    Raises:
        `ValueError` when the reference is the trained model itself, when its vocabulary differs, when an adapter does
        not fit, or when `"base"` is asked of a model without adapter.
    """

    def __init__(
        self,
        policy: Model,
        source: str | Model,
        tokenizer: PreTrainedTokenizerBase,
        init_kwargs: dict[str, Any] | None = None,
    ):
        self.model: Model | None = None
        self.adapter: str | None = None
        self.injected = False
        self.name = source if isinstance(source, str) else (source.config._name_or_path or "(loaded model)")
        init_kwargs = dict(init_kwargs or {})
        if not isinstance(source, str):
            if source is policy:
                raise ValueError(
                    "reference_model is the model that is trained: all scores would be 0. Pass another model, or "
                    "reference_model='base' to compare with the base below an adapter"
                )
            if not (os.path.isdir(self.name) and _same_tokenizer(self.name, tokenizer, {})):
                _check_embeddings(policy, source, self.name)
            self.model = source
        elif source == BASE:
            if not isinstance(policy, PeftModel):
                raise ValueError(
                    "reference_model='base' needs a model with a PEFT adapter: without one the base is the model "
                    "itself and all scores would be 0. Pass peft_config, or another reference"
                )
        elif find_adapter_config_file(source) is not None:
            self.adapter = REFERENCE_ADAPTER
            self.injected = not isinstance(policy, PeftModel)
            if isinstance(policy, PeftModel):
                with _adapter_errors(source), same_trainable(policy):
                    policy.load_adapter(source, REFERENCE_ADAPTER, is_trainable=False)
        else:
            compared = _same_tokenizer(source, tokenizer, init_kwargs)  # before the weights are loaded
            self.model = create_model_from_path(source, **init_kwargs)
            if not compared:  # equal tokenizers may come with embeddings padded to different heights
                _check_embeddings(policy, self.model, source)
        if self.model is not None:
            self.model.requires_grad_(False)

    @contextlib.contextmanager
    def use(self, policy: Model) -> Iterator[Model]:
        """The model to call for reference log-probabilities, without gradients and in evaluation mode."""
        if self.model is not None:
            with frozen(self.model):
                yield self.model
        elif self.injected:
            with _with_adapter(policy, self.name) as model, frozen(model):
                yield model
        else:
            with same_trainable(policy), frozen(policy), use_adapter(cast(PeftModel, policy), self.adapter):
                yield policy

    def fingerprint(self, model: Model) -> str:
        """Hash of the weights that the reference runs on; `model` is what `use` has yielded."""
        return model_fingerprint(model, adapter="*" if self.model is not None else self.adapter)

    def release(self, policy: Model) -> None:
        """Take the reference out of memory and leave the policy as it was."""
        if self.adapter is not None and not self.injected:
            with same_trainable(policy):
                policy.delete_adapter(self.adapter)
        self.model = None


@contextlib.contextmanager
def _with_adapter(policy: Model, source: str) -> Iterator[PeftModel]:
    """The adapter's layers are put into the policy in place, and taken out again."""
    with same_trainable(policy):
        with _adapter_errors(source):
            model = PeftModel.from_pretrained(policy, source, adapter_name=REFERENCE_ADAPTER)
        try:
            yield model
        finally:
            model.unload()


@contextlib.contextmanager
def same_trainable(policy: Model) -> Iterator[None]:
    """Leave `requires_grad` of every parameter as it was. Loading, switching and removing adapters set it, and PEFT
    0.18 freezes the trained adapter when a frozen one is loaded: training would then change nothing."""
    trainable = {id(parameter) for parameter in policy.parameters() if parameter.requires_grad}
    try:
        yield
    finally:
        for parameter in policy.parameters():
            parameter.requires_grad_(id(parameter) in trainable)


@contextlib.contextmanager
def _adapter_errors(source: str) -> Iterator[None]:
    try:
        yield
    except (RuntimeError, ValueError) as error:
        base = PeftConfig.from_pretrained(source).base_model_name_or_path
        raise ValueError(
            f"reference_model={source!r} is an adapter of {base!r} that does not fit the trained model: "
            f"{str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def use_start(policy: Model, at_base: bool) -> Iterator[Model]:
    """The model as it was at the start of training.

    Args:
        at_base: what `starts_at_base` has said then. A fresh adapter is switched off: LoRA with B = 0 is the identity,
            and untrained virtual tokens of prompt learning would only add noise.
    """
    with frozen(policy):
        if at_base:
            with use_adapter(cast(PeftModel, policy), None):
                yield policy
        else:
            yield policy


def starts_at_base(policy: Model) -> bool:
    """Whether the policy has an adapter that is untrained, so that the model equals its base."""
    if not isinstance(policy, PeftModel):
        return False
    config = policy.active_peft_config
    if config.is_prompt_learning:
        return True
    if config.peft_type != PeftType.LORA:
        return False
    ups = [
        parameter
        for name, parameter in policy.named_parameters()
        if ("lora_B." in name or "lora_embedding_B." in name) and f".{policy.active_adapter}" in name
    ]
    return bool(ups) and all(not parameter.detach().any() for parameter in ups)


def model_fingerprint(model: Model, adapter: str | None = "*") -> str:
    """SHA-256 of the weights and of the configuration that decides what is computed from them.

    Args:
        adapter: `"*"` for all weights, a name for the base and that adapter, `None` for the base alone. The base has
            the same hash with and without PEFT around it, so that runs with other adapters share cached scores.
    """
    digest = hashlib.sha256()
    config = model.config.to_dict()
    for key in _NOT_IN_HASH:
        config.pop(key, None)
    digest.update(repr(sorted((key, value) for key, value in config.items() if not key.startswith("_"))).encode())
    for name, tensor in sorted((_plain_name(name), tensor) for name, tensor in model.state_dict().items()):
        is_adapter = any(part in name for part in _ADAPTER_PARTS)
        if is_adapter and adapter != "*" and (adapter is None or f".{adapter}" not in name):
            continue
        flat = tensor.detach().cpu().contiguous().view(-1)
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return digest.hexdigest()


# The trainer aligns these with the tokenizer, or they say where a model came from
_NOT_IN_HASH = (
    "transformers_version", "architectures", "dtype", "torch_dtype", "use_cache", "pad_token_id", "bos_token_id",
    "eos_token_id", "output_router_logits", "router_aux_loss_coef",
)  # fmt: skip
_ADAPTER_PARTS = ("lora_", "modules_to_save", "prompt_encoder", "trainable_tokens_")


def _plain_name(name: str) -> str:
    """Name of a weight without the wrappers of PEFT."""
    return name.replace("base_model.model.", "").replace(".base_layer.", ".").replace(".original_module.", ".")


def _same_tokenizer(source: str, tokenizer: PreTrainedTokenizerBase, init_kwargs: dict[str, Any]) -> bool:
    """Raise when the tokenizer at `source` differs from `tokenizer`; `False` when there is none to compare."""
    options = {key: init_kwargs[key] for key in ("revision", "trust_remote_code", "token") if key in init_kwargs}
    try:
        other = AutoTokenizer.from_pretrained(source, **options)
    except (OSError, ValueError):
        return False
    ours, theirs = tokenizer.get_vocab(), other.get_vocab()
    if ours != theirs:
        token = next((t for t in ours if theirs.get(t) != ours[t]), None) or next(t for t in theirs if t not in ours)
        raise ValueError(
            f"reference_model={source!r} has another tokenizer than the trained model: {len(theirs)} tokens against "
            f"{len(ours)}, and token {token!r} is {theirs.get(token)} there, {ours.get(token)} here. Scores compare "
            "the same token under two models: use a reference with the same tokenizer"
        )
    return True


def _check_embeddings(policy: Model, reference: Model, name: str) -> None:
    ours, theirs = (
        cast(torch.nn.Embedding, model.get_input_embeddings()).weight.shape[0] for model in (policy, reference)
    )
    if ours != theirs:
        raise ValueError(
            f"reference_model {name!r} has a vocabulary of {theirs} tokens, the trained model {ours}: use a reference "
            "with the same tokenizer"
        )
