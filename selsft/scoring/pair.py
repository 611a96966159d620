"""The model at the start of training and its reference, side by side on the same rows.

Where both are adapters of one model, one copy of its weights is in memory and the adapter is switched once per shard.
PEFT can also run a batch whose rows use different adapters (`adapter_names`), so that one forward pass of twice the
rows gives both (`mixed`). It is not the default: it spares nothing but the start of a second pass. On batches of 2,000
tokens it was 5 % slower than two passes, on batches of 64 tokens 15 to 50 % faster (CPU, docs/scoring.md), it needs
twice the memory, and the last bit of a score then depends on how it was computed.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from peft import LoraConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import DataCollator, PreTrainedTokenizerBase

from ..config import SelectiveSFTConfig
from ..data.chunks import TokenChunk
from ..data.columns import BASE_LOGPS, REF_LOGPS
from ..training.head import add_selective_head, read_lm_head
from ..training.model import Model, base_model, frozen
from .batching import BatchBudget
from .logprobs import forward_logps, score_chunk
from .reference import Reference, model_fingerprint, starts_at_base, use_start

logger = logging.getLogger(__name__)

BASE_ROWS = "__base__"  # PEFT's name for rows without an adapter

# Scores one shard: flat `(tokens,)` float32, `base_logps` under the model and `ref_logps` under the reference, as far
# as they were asked for. The second argument is told the number of tokens of each batch.
Score = Callable[[TokenChunk, Callable[[int], object] | None], dict[str, np.ndarray]]


class ModelPair:
    """
    Args:
        policy: the model as it is at the start of training, on its device; it must not be sharded yet.
        source: see `SelectiveSFTConfig.reference_model`; `None` when the reference's side is not asked for.
        base: whether the model's side is asked for.
        prepare: puts a frozen model where the accelerator wants it (sharded, on the device) and returns it.
        mixed: one forward pass for both sides, where PEFT can do that; else two on the same rows.

    Attributes:
        policy_sha256: hash of the weights of the model at the start of training.
        base_sha256, ref_sha256: hashes of the weights of either side, `None` for a side not asked for.
        sharded: whether the weights are spread over processes, so that all of them must run every forward pass.

    Raises:
        `ValueError` for a reference that does not fit, and for FSDP settings that scoring cannot work with.
    """

    def __init__(
        self,
        policy: Model,
        source: str | Model | None,
        tokenizer: PreTrainedTokenizerBase,
        args: SelectiveSFTConfig,
        accelerator: Accelerator,
        collator: DataCollator,
        prepare: Callable[[Model], Model],
        *,
        base: bool = True,
        mixed: bool = False,
    ):
        self._policy, self._args, self._accelerator, self._prepare_frozen = policy, args, accelerator, prepare
        self._collator, self._with_base, self._mixed = collator, base, mixed
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self._at_base = starts_at_base(policy)
        add_selective_head(base_model(policy))
        read_lm_head(policy.get_output_embeddings())  # refuses an adapter that cannot be followed
        # Before a reference's adapter is loaded into the policy
        self.policy_sha256 = model_fingerprint(policy, None if self._at_base else "*")
        self.base_sha256 = self.policy_sha256 if base else None
        self.ref_sha256: str | None = None
        self.reference: Reference | None = None
        if source is None:
            return
        options = {"trust_remote_code": args.trust_remote_code, **cast(dict, args.reference_model_init_kwargs or {})}
        self.reference = Reference(policy, source, tokenizer, options)
        if (own := self.reference.model) is not None:
            add_selective_head(base_model(own))
            self.ref_sha256 = self.reference.fingerprint(own)
            self.reference.model = prepare(own)
        else:
            with self.reference.use(policy) as model:
                self.ref_sha256 = self.reference.fingerprint(model)
        if self.sharded and self.reference.injected:
            raise ValueError(
                "a LoRA reference of a model without adapter cannot be sharded: merge the adapter into a model of "
                "its own, or add --use_peft"
            )

    @property
    def reference_dtype(self) -> str | None:
        if self.reference is None:
            return None
        model = self.reference.model if self.reference.model is not None else self._policy
        return str(base_model(model).dtype).removeprefix("torch.")

    @contextlib.contextmanager
    def ready(self) -> Iterator[Score]:
        """Yields the function that scores a shard; the models stay in place until the end."""
        reference = self.reference
        with contextlib.ExitStack() as stack:
            policy = self._policy
            if self.sharded and (self._with_base or (reference is not None and reference.model is None)):
                policy = self._prepare_frozen(cast(Model, copy.deepcopy(policy)))
            if reference is not None and reference.injected:
                policy = stack.enter_context(reference.use(policy))
            own = None if reference is None else reference.model
            budget = BatchBudget.of(self._args, *(m for m in (policy, own) if m is not None))
            names = self._adapters(policy)
            refusal = self._mixed and _cannot_mix(policy, names, budget, self.sharded)
            if refusal:
                logger.warning(f"base and reference are scored in two forward passes: {refusal}")
            one_pass = self._mixed and not refusal

            def score(chunk: TokenChunk, progress: Callable[[int], object] | None = None) -> dict[str, np.ndarray]:
                found: dict[str, np.ndarray] = {}
                if one_pass:
                    half = dataclasses.replace(budget, tokens=max(budget.tokens // 2, 1))
                    with frozen(policy):
                        base, ref = self._run(chunk, half, lambda x: self._both(policy, names, x), 2, progress)
                    return {BASE_LOGPS: base, REF_LOGPS: ref}
                if self._with_base:
                    with self._use_base(policy) as model:
                        (found[BASE_LOGPS],) = self._run(
                            chunk, budget, lambda x: [self._forward(model, x)], 1, progress
                        )
                if reference is not None:
                    told = None if found else progress  # a token counts once
                    with self._use_reference(policy) as model:
                        (found[REF_LOGPS],) = self._run(chunk, budget, lambda x: [self._forward(model, x)], 1, told)
                return found

            yield score

    def _use_base(self, policy: Model) -> contextlib.AbstractContextManager[Model]:
        # An injected reference has turned the policy into one whose adapter can be switched off
        injected = self.reference is not None and self.reference.injected
        return use_start(policy, self._at_base or injected)

    def _use_reference(self, policy: Model) -> contextlib.AbstractContextManager[Model]:
        assert self.reference is not None
        return _evaluating(policy) if self.reference.injected else self.reference.use(policy)

    def _adapters(self, policy: Model) -> tuple[str, str]:
        """Names of the adapters of both sides, as PEFT has them for the rows of a batch."""
        reference = self.reference
        injected = reference is not None and reference.injected
        active = cast(PeftModel, policy).active_adapter if isinstance(policy, PeftModel) else BASE_ROWS
        base = BASE_ROWS if self._at_base or injected else active
        return base, (reference.adapter or BASE_ROWS) if reference is not None else BASE_ROWS

    def _run(self, chunk, budget: BatchBudget, forward, models: int, progress) -> list[np.ndarray]:
        return score_chunk(
            chunk, forward, self._collator, self._accelerator, budget,
            models=models, joint=self.sharded, progress=progress,
        )  # fmt: skip

    def _forward(self, model: Model, inputs: dict[str, Any]) -> torch.Tensor:
        with self._accelerator.autocast():
            return forward_logps(model, inputs)

    def _both(self, model: Model, names: Sequence[str], inputs: dict[str, Any]) -> tuple[torch.Tensor, ...]:
        """One forward pass of twice the rows; the first half without the adapter that the second half has."""
        rows = len(inputs["input_ids"])
        twice = {k: torch.cat([v, v]) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
        twice["adapter_names"] = [name for name in names for _ in range(rows)]
        return self._forward(model, twice).split(rows)


@contextlib.contextmanager
def _evaluating(model: Model) -> Iterator[Model]:
    with frozen(model):
        yield model


def _cannot_mix(policy: Model, names: tuple[str, str], budget: BatchBudget, sharded: bool) -> str | None:
    """Why one forward pass cannot serve both sides; `None` when it can."""
    if not isinstance(policy, PeftModel) or names[0] == names[1]:
        return "they are not adapters of one model"
    if sharded:
        return "the weights are sharded"
    if budget.padding_free:
        return "rows that are concatenated cannot use different adapters"
    for name in set(names) - {BASE_ROWS}:
        config = policy.peft_config[name]
        if not isinstance(config, LoraConfig):
            return f"adapter {name!r} is not LoRA"
        for setting in ("use_dora", "modules_to_save", "trainable_token_indices", "target_parameters", "alora_invocation_tokens"):  # fmt: skip  # noqa: E501
            if getattr(config, setting, None):
                return f"adapter {name!r} has {setting}"
    if isinstance(policy.get_output_embeddings(), BaseTunerLayer):
        return "the head has an adapter"
    return None
