"""The frozen models of a run: the policy as it is at the start of training, and its reference.

A reference is a frozen model that says how likely a token *should* be. It may be a folder or Hub id of a model, a LoRA
adapter of the policy's own base (one model in memory, the adapter is switched), a model that the caller has loaded, or
the base below the policy's adapter. Rejected: always loading a second model, which doubles the memory of the most
common case, an adapter trained with PEFT on clean data.

Where both are adapters of one model, PEFT can also run a batch whose rows use different adapters (`adapter_names`), so
that one forward pass of twice the rows gives both (`mixed`). It is not the default: it saves nothing but the start of
a second pass. On batches of 2,000 tokens it was 5 % slower than two passes, on batches of 64 tokens 15 to 50 % faster
(CPU, docs/scoring.md), it needs twice the memory, and the last bit of a score then depends on how it was computed.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, broadcast_object_list
from peft import LoraConfig, PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import PeftType
from transformers import AutoTokenizer, DataCollator, PreTrainedTokenizerBase

from .._compat import (
    create_model_from_path,
    find_adapter_config_file,
    prepare_deepspeed,
    prepare_fsdp2,
    use_adapter,
)
from ..config import SelectiveSFTConfig
from ..data.chunks import TokenChunk
from ..data.columns import BASE_LOGPS, REF_LOGPS
from ..training.fingerprint import model_fingerprint
from ..training.head import add_selective_head, read_lm_head
from ..training.model import Model, base_model, copied, frozen, whole, whole_shape
from .batching import BatchBudget
from .logprobs import forward_logps, hidden_states, score_chunk

logger = logging.getLogger(__name__)

REFERENCE_ADAPTER = "selsft_reference"
BASE = "base"
_BASE_ROWS = "__base__"  # PEFT's name for rows without an adapter


@dataclass(frozen=True)
class StateColumns:
    """Columns read from the policy's hidden states in the forward pass that scores it.

    Args:
        names: the columns.
        layers: which hidden states, as `output_hidden_states` counts them (0 is the embeddings). Those of the other
            layers are not kept, and these no longer than one batch.
        columns: takes the states, layer -> `(batch, seq_len, hidden)` (virtual tokens of prompt learning come
            first), the log-probabilities of the labels, `(batch, seq_len)`, and the batch; returns column ->
            `(batch, seq_len)`. Index t belongs to token t.
    """

    names: Sequence[str]
    layers: Sequence[int]
    columns: Callable[[dict[int, torch.Tensor], torch.Tensor, dict[str, Any]], dict[str, torch.Tensor]]


class FrozenModels:
    """Loads, places, switches, hashes and runs the policy at the start of training and its reference.

    Args:
        policy: the model that is trained, with its adapter if it has one, as it is at the start. On its device and
            not yet sharded.
        source: see `SelectiveSFTConfig.reference_model`; `None` when no reference is asked for.
        tokenizer: of the policy; the reference must have the same.
        collator: the collator that training uses.
        base: whether log-probabilities under the policy at the start are asked for.
        online: whether batches are scored between training steps. Then the reference, and a copy of the policy where
            training changes it, stay in memory; else everything happens inside `ready`.
        mixed: one forward pass for both sides where PEFT can do that.
        state_columns: more columns of the policy's forward pass.
        adapter_name: of the reference on the policy, where it is an adapter; another one for a second reference.

    Attributes:
        columns: what `score` can give.
        sharded: whether the weights are spread over processes, so that all of them must run every forward pass.
        state_columns: may be set later, before the pass that gives them.

    Raises:
        `ValueError` for a reference that does not fit the policy, and for a launcher's setting or an adapter that
        scoring cannot work with.
    """

    def __init__(
        self,
        policy: Model,
        source: str | Model | None,
        tokenizer: PreTrainedTokenizerBase,
        args: SelectiveSFTConfig,
        accelerator: Accelerator,
        collator: DataCollator,
        *,
        base: bool = True,
        online: bool = False,
        mixed: bool = False,
        state_columns: StateColumns | None = None,
        adapter_name: str = REFERENCE_ADAPTER,
    ):
        self.policy, self.args, self.accelerator, self.collator = policy, args, accelerator, collator
        self.columns = [*([BASE_LOGPS] if base else []), *([REF_LOGPS] if source is not None else [])]
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        plugin = getattr(accelerator.state, "fsdp_plugin", None)
        # Only the main process has loaded weights; the others get theirs when a model is sharded
        self._empty_elsewhere = self.sharded and plugin is not None and bool(plugin.cpu_ram_efficient_loading)
        self._mixed, self.state_columns, self._adapter_name = mixed, state_columns, adapter_name
        self._one_pass = False
        self._live = self._start = policy  # what `reference` and `start` switch
        self._budget = BatchBudget.of(args, policy)
        self.at_base = self._agreed(lambda: starts_at_base(policy))
        self.own: Model | None = None  # the reference where it is a model of its own
        self.adapter: str | None = None  # its name on the policy where it is an adapter that the policy can hold
        self.injected = False  # whether it is an adapter that is put into a plain policy while it is used
        self.name = ""
        add_selective_head(base_model(policy))
        read_lm_head(policy.get_output_embeddings())  # refuses an adapter that cannot be followed
        if source is None:
            self._keep_start(online)
            return
        self.name = source if isinstance(source, str) else (source.config._name_or_path or "(loaded model)")
        self._check(source, online)
        self._load(source, tokenizer)
        if self.own is not None:
            self.own.requires_grad_(False)
            add_selective_head(base_model(self.own))
            if not online:
                self.reference_sha256  # noqa: B018 (before it is sharded)
            self.own = self._prepare(self.own)
            self._budget = BatchBudget.of(args, policy, self.own)
        self._keep_start(online)

    # ------------------------------------------------------------ loading

    def _check(self, source: str | Model, online: bool) -> None:
        """Raise for a reference that cannot be used, before it is loaded, whichever command asks."""
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        plain = not isinstance(self.policy, PeftModel)
        adapter = isinstance(source, str) and source != BASE and find_adapter_config_file(source) is not None
        starts = BASE_LOGPS in self.columns
        reasons = [
            (self.sharded and plugin is not None and plugin.fsdp_version == 1,
             "fsdp_version=1 cannot switch adapters or hold a reference: set fsdp_version: 2"),
            (source is self.policy, "reference_model is the model that is trained: all scores would be 0. Pass "
             "another model, or reference_model='base' to compare with the base below an adapter"),
            (source == BASE and plain, "reference_model='base' needs a model with a PEFT adapter: without one the "
             "base is the model itself and all scores would be 0. Pass peft_config, or another reference"),
            (online and adapter and plain, "a LoRA reference cannot be kept on a model that is trained in full, "
             "since its base changes: use precompute_scores=True, or train with peft_config"),
            (online and starts and not plain and not self.at_base, "the model comes with a trained "
             "adapter, which changes while it trains further: use precompute_scores=True, or merge the adapter first"),
        ]  # fmt: skip
        for holds, reason in reasons:
            if holds:
                raise ValueError(reason)

    def _load(self, source: str | Model, tokenizer: PreTrainedTokenizerBase) -> None:
        policy = self.policy
        init_kwargs = {
            "trust_remote_code": self.args.trust_remote_code,
            **cast(dict, self.args.reference_model_init_kwargs or {}),
        }
        if not isinstance(source, str):
            if not (os.path.isdir(self.name) and _same_tokenizer(self.name, tokenizer, {})):
                _check_embeddings(policy, source, self.name)
            self.own = source
        elif source == BASE:
            return
        elif find_adapter_config_file(source) is not None:
            self.adapter = self._adapter_name
            self.injected = not isinstance(policy, PeftModel)
            if isinstance(policy, PeftModel):
                with _adapter_errors(source), same_trainable(policy):
                    policy.load_adapter(source, self._adapter_name, is_trainable=False)
        else:
            compared = _same_tokenizer(source, tokenizer, init_kwargs)  # before the weights are loaded
            self.own = create_model_from_path(source, **init_kwargs)
            if not compared:  # equal tokenizers may come with embeddings padded to different heights
                _check_embeddings(policy, self.own, source)

    def _prepare(self, model: Model) -> Model:
        """Put a frozen model where the accelerator wants it: sharded, or on the device."""
        accelerator = self.accelerator
        model.requires_grad_(False)
        if accelerator.distributed_type == DistributedType.DEEPSPEED:
            return prepare_deepspeed(model, accelerator)
        if accelerator.distributed_type == DistributedType.FSDP:
            return cast(Model, prepare_fsdp2(model, accelerator))
        if not accelerator.verify_device_map(model) and not getattr(model, "is_quantized", False):
            model.to(accelerator.device)
        return model

    def _keep_start(self, online: bool) -> None:
        if online and BASE_LOGPS in self.columns and not self.at_base:
            self._start = self._prepare(copied(self.policy))

    def release(self) -> None:
        """Free the reference's memory and restore the policy."""
        if self.adapter is not None and not self.injected:
            with same_trainable(self.policy):
                cast(PeftModel, self.policy).delete_adapter(self.adapter)
        self.own = None

    # ------------------------------------------------------------ provenance

    @functools.cached_property
    def policy_sha256(self) -> str:
        """Hash of the weights of the policy at the start of training."""
        adapter = self.policy.active_adapter if isinstance(self.policy, PeftModel) else "*"
        return self._agreed(lambda: model_fingerprint(self.policy, None if self.at_base else adapter))

    @functools.cached_property
    def reference_sha256(self) -> str:
        """Hash of the weights that the reference runs on."""
        if self.own is not None:
            own = self.own
            return self._agreed(lambda: model_fingerprint(own))
        if self.injected:
            with _with_adapter(self.policy, self.name, self._adapter_name) as model:
                return self._agreed(lambda: model_fingerprint(model, self.adapter))
        return self._agreed(lambda: model_fingerprint(self.policy, self.adapter))

    def sha256(self, column: str) -> str:
        """Hash of the weights that a column comes from. Not inside `ready`."""
        return self.policy_sha256 if column == BASE_LOGPS else self.reference_sha256

    def precision(self, column: str) -> dict[str, str]:
        """The dtypes that decide the numbers of a column: that of the weights, and that of the forward pass."""
        model = self.own if column == REF_LOGPS and self.own is not None else self.policy
        return {
            "dtype": str(base_model(model).dtype).removeprefix("torch."),
            "mixed_precision": str(self.accelerator.mixed_precision),
        }

    def _agreed(self, value: Callable[[], Any]) -> Any:
        """A value that only a process with weights can compute, in all of them."""
        if not self._empty_elsewhere:
            return value()
        found = [value() if self.accelerator.is_main_process else None]
        return broadcast_object_list(found)[0]

    # ------------------------------------------------------------ forward passes

    @contextlib.contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, `score` can be called. A policy that training will shard is replaced by a sharded copy, and an
        adapter of the reference is put into a plain policy, for this long."""
        model = self.policy
        with contextlib.ExitStack() as stack:
            stands_in = self.sharded and (BASE_LOGPS in self.columns or self.own is None)
            if stands_in:
                model = copied(model)
            if self.injected:
                model = (
                    _inject(model, self.name, self._adapter_name)
                    if stands_in
                    else stack.enter_context(_with_adapter(model, self.name, self._adapter_name))
                )
            self._live = self._start = self._prepare(model) if stands_in else model
            reason = self._mixed and self._cannot_mix()
            if reason:
                logger.warning(f"base and reference are scored in two forward passes: {reason}")
            self._one_pass = self._mixed and not reason
            try:
                yield
            finally:
                self._live = self._start = self.policy

    def score(
        self,
        chunk: TokenChunk,
        columns: Collection[str],
        *,
        joint: bool = False,
        progress: Callable[[int], object] | None = None,
    ) -> dict[str, np.ndarray]:
        """Columns of consecutive rows, flat `(tokens,)` float32: `base_logps` under the policy, with what
        `state_columns` gives, and `ref_logps` under the reference.

        Args:
            columns: which of `self.columns`.
            joint, progress: see `score_chunk`; sharded weights are always scored jointly.
        """
        run = functools.partial(
            score_chunk, chunk, collator=self.collator, accelerator=self.accelerator, joint=joint or self.sharded
        )
        budget, both = self._budget, [BASE_LOGPS, REF_LOGPS]
        if self._one_pass and set(columns) == set(both):
            with frozen(self._live):
                return run(both, self._both, budget=budget.halved(), progress=progress)
        found: dict[str, np.ndarray] = {}
        if BASE_LOGPS in columns:
            names = [BASE_LOGPS, *(self.state_columns.names if self.state_columns is not None else [])]
            with self.start() as model:
                found |= run(names, lambda x: self.policy_columns(model, x), budget=budget, progress=progress)
        if REF_LOGPS in columns:
            told = None if found else progress  # a token counts once
            with self.reference() as model:
                found |= run([REF_LOGPS], lambda x: {REF_LOGPS: self.logps(model, x)}, budget=budget, progress=told)
        return found

    @contextlib.contextmanager
    def start(self) -> Iterator[Model]:
        """The policy as it was at the start of training, in evaluation mode."""
        # An injected reference has turned the policy into one whose adapter can be switched off
        with use_start(self._start, self.at_base or (self.injected and isinstance(self._start, PeftModel))) as model:
            yield model

    @contextlib.contextmanager
    def reference(self) -> Iterator[Model]:
        """The model to call for log-probabilities under the reference, in evaluation mode."""
        if self.own is not None or self.injected:
            model = self.own if self.own is not None else self._live
            with frozen(model):
                yield model
        else:
            with same_trainable(self._live), frozen(self._live):
                with use_adapter(cast(PeftModel, self._live), self.adapter):
                    yield self._live

    def logps(self, model: Model, inputs: dict[str, Any]) -> torch.Tensor:
        """`forward_logps` in the precision of the run."""
        with self.accelerator.autocast():
            return forward_logps(model, inputs)

    def policy_columns(self, model: Model, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """`base_logps` of a batch, and the columns of `state_columns`."""
        if (more := self.state_columns) is None:
            return {BASE_LOGPS: self.logps(model, inputs)}
        with hidden_states(model, more.layers) as states:
            logps = self.logps(model, inputs)
            return {BASE_LOGPS: logps, **more.columns(states, logps, inputs)}

    def _both(self, inputs: dict[str, Any]) -> dict[str, torch.Tensor]:
        """One forward pass of twice the rows; the first half without the adapter that the second half has."""
        rows = len(inputs["input_ids"])
        twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        twice["adapter_names"] = [name for name in self._adapters() for _ in range(rows)]
        base, reference = self.logps(self._live, twice).split(rows)
        return {BASE_LOGPS: base, REF_LOGPS: reference}

    def _adapters(self) -> tuple[str, str]:
        """Names of the adapters of both sides, as PEFT has them for the rows of a batch."""
        active = self._live.active_adapter if isinstance(self._live, PeftModel) else _BASE_ROWS
        return _BASE_ROWS if self.at_base or self.injected else active, self.adapter or _BASE_ROWS

    def _cannot_mix(self) -> str | None:
        """Why one forward pass cannot serve both sides; `None` when it can."""
        policy, names = self._live, self._adapters()
        if not isinstance(policy, PeftModel) or names[0] == names[1]:
            return "they are not adapters of one model"
        if self.sharded:
            return "the weights are sharded"
        if self._budget.padding_free:
            return "rows that are concatenated cannot use different adapters"
        if self.state_columns is not None:
            return "hidden states are read for one side only"
        for name in set(names) - {_BASE_ROWS}:
            config = policy.peft_config[name]
            if not isinstance(config, LoraConfig):
                return f"adapter {name!r} is not LoRA"
            for setting in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"):  # fmt: skip  # noqa: E501
                if getattr(config, setting, None):
                    return f"adapter {name!r} has {setting}"
        if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
            return "the head has an adapter"
        return None


@contextlib.contextmanager
def _with_adapter(policy: Model, source: str, name: str) -> Iterator[PeftModel]:
    """The adapter's layers are put into the policy in place, and taken out again."""
    with same_trainable(policy):
        model = _inject(policy, source, name)
        try:
            yield model
        finally:
            model.unload()


def _inject(policy: Model, source: str, name: str) -> PeftModel:
    with _adapter_errors(source):
        return PeftModel.from_pretrained(policy, source, adapter_name=name)


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
    ups = []
    for name, parameter in policy.named_parameters():
        if ("lora_B." in name or "lora_embedding_B." in name) and policy.active_adapter in name.split("."):
            with whole(parameter) as full:
                ups.append(bool(full.detach().any()))
    return bool(ups) and not any(ups)


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
        whole_shape(cast(torch.nn.Embedding, model.get_input_embeddings()).weight)[0] for model in (policy, reference)
    )
    if ours != theirs:
        raise ValueError(
            f"reference_model {name!r} has a vocabulary of {theirs} tokens, the trained model {ours}: use a reference "
            "with the same tokenizer"
        )
