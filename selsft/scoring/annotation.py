"""From a reference to token columns: scores the rows of the trainer and turns the scores into token weights.

The trainer asks for one of two things: `annotate` adds the columns to a whole data set before training (cached on
disk), `annotate_batch` to one batch within a step (streamed data, or `precompute_scores=False`). Both run the same
forward pass and the same selection. Rejected: doing this in the trainer, whose overrides would drown in it.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from datasets import Dataset, IterableDataset
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from .._compat import get_config_model_id
from ..config import SelectiveSFTConfig
from ..data.chunks import with_column
from ..data.columns import BASE_LOGPS, REF_LOGPS, WEIGHTS
from ..data.tokenizers import special_ids
from ..selection.excess import weigh_batches
from ..selection.weights import add_token_weights, row_weights
from ..training.collator import DataCollatorForSelectiveSFT
from ..training.head import add_selective_head
from ..training.model import Model, base_model, frozen
from .batching import BatchBudget
from .cache import LogpCache
from .logprobs import cached_logps, forward_logps
from .reference import Reference, model_fingerprint, starts_at_base, use_start


class TokenAnnotator:
    """Adds `base_logps`, `ref_logps` and `token_weights`.

    Args:
        model: the policy, whose base has a selective head; it must still be as it is at the start of training.
        source: see `SelectiveSFTConfig.reference_model`; `None` when the rows bring their own scores or weights.
        collator: the collator that training uses.
        tokenizer: of the policy.
        prepare: puts a frozen model where the accelerator wants it (sharded, on the device) and returns it.
        online: whether batches are scored one by one; then the reference stays in memory.

    Raises:
        `ValueError` for a reference or an accelerate setting that scoring cannot work with.
    """

    def __init__(
        self,
        model: Model,
        source: str | Model | None,
        args: SelectiveSFTConfig,
        accelerator: Accelerator,
        collator: DataCollatorForSelectiveSFT,
        tokenizer: PreTrainedTokenizerBase,
        prepare: Callable[[Model], Model],
        online: bool = False,
    ):
        self.model, self.args, self.accelerator, self.collator = model, args, accelerator, collator
        self.special_ids = special_ids(tokenizer) if args.protect_special_tokens else np.zeros(0, np.int64)
        self.at_base = starts_at_base(model)
        self.sharded = accelerator.distributed_type in (DistributedType.FSDP, DistributedType.DEEPSPEED)
        self.reference: Reference | None = None
        self._reference_digest: str | None = None
        if source is not None:
            self._check_fsdp()
            options = {"trust_remote_code": args.trust_remote_code, **_as_dict(args.reference_model_init_kwargs)}
            self.reference = Reference(model, source, tokenizer, options)
            if self.reference.model is not None:
                add_selective_head(base_model(self.reference.model))
                if not online:
                    self._reference_digest = self.reference.fingerprint(self.reference.model)  # before it is sharded
                self.reference.model = prepare(self.reference.model)
        if self.sharded and self.reference is not None and self.reference.injected:
            raise ValueError(
                "a LoRA reference of a model that is trained in full cannot be sharded: merge the adapter into a "
                "model of its own, or train with peft_config"
            )
        self.prepare = prepare
        if online:
            self._prepare_online()

    def annotate(self, dataset: Dataset, given: list[str]) -> Dataset:
        """`dataset` with the columns that a run needs.

        Args:
            dataset: final rows, with `input_ids`, `labels` and, when packed, `seq_lengths`.
            given: token columns that the rows have already.
        """
        reference = self.reference
        needs_base = BASE_LOGPS not in given and self._compares_with_start
        policy = self.model
        if self.sharded and (needs_base or (reference is not None and reference.model is None)):
            # The policy is sharded when training starts, so until then a sharded copy stands in for it
            policy = self.prepare(copy.deepcopy(self.model))
        if needs_base:
            digest = model_fingerprint(self.model, adapter=None if self.at_base else "*")
            with use_start(policy, self.at_base) as model:
                name = get_config_model_id(self.model.config)
                dataset = with_column(dataset, BASE_LOGPS, self._logps(dataset, model, digest, name, "base"))
        if reference is not None:
            with reference.use(policy) as model:
                digest = self._reference_digest or reference.fingerprint(
                    self.model if policy is not self.model else model
                )
                rows = self._logps(dataset, model, digest, reference.name, "reference")
            dataset = with_column(dataset, REF_LOGPS, rows)
            reference.release(self.model)
        if WEIGHTS in given:
            return self.mask_special_tokens(dataset)
        if self.args.score == "excess":  # its weights are made in every step
            return dataset
        return add_token_weights(dataset, self.args, self.special_ids, self.collator.padding_free)

    @property
    def _compares_with_start(self) -> bool:
        """Whether the run needs the log-probabilities under the model as it is at the start of training."""
        scored = self.reference is not None and self.args.score == "influence"
        return scored or self.args.forget_objective == "npo"

    def annotate_batch(self, batch: dict[str, Any]) -> None:
        """Add `token_weights`, `active_rows` and `base_logps` to a collated batch, in place."""
        self.score_batch(batch)
        weigh_batches([batch], [batch[BASE_LOGPS]], self.args, self.special_ids)

    def score_batch(self, batch: dict[str, Any]) -> None:
        """Add what a streamed batch lacks, in place: `ref_logps`, and `base_logps` where the start of training
        matters."""
        assert self.reference is not None
        inputs = self._on_device(batch)
        if self._compares_with_start:
            with use_start(self._start, self.at_base) as model:
                batch[BASE_LOGPS] = self._forward(model, inputs)
        with self.reference.use(self.model) as model:
            batch[REF_LOGPS] = self._forward(model, inputs)

    def current_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of a batch under the model as it is now, in evaluation mode (no dropout, so that a score
        is a property of model and token and not of a draw); `(batch, seq_len)` as `forward_logps` gives them."""
        with frozen(self.model):
            return self._forward(self.model, self._on_device(batch))

    def _on_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}

    def weigh_stream(self, dataset: IterableDataset) -> IterableDataset:
        """Streamed rows with the weights that their own columns say, under a rule that needs no other rows."""
        return dataset.map(
            lambda row: {WEIGHTS: row_weights(row, self.args, self.special_ids, self.collator.padding_free)}
        )

    def mask_special_tokens(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Keep given weights, but neither forget nor learn a special token of a negative span; with `forget_weight=0`
        no token is negative."""
        ignore = self.args.forget_weight == 0
        if not ignore and not self.special_ids.size:
            return dataset

        def masked(row):
            weights = np.asarray(row[WEIGHTS], dtype=np.float32)
            safe = np.isin(row["input_ids"], self.special_ids) | ignore
            return {WEIGHTS: np.where(safe, np.maximum(weights, 0), weights)}

        options = {"desc": "Protecting special tokens"} if isinstance(dataset, Dataset) else {}
        return dataset.map(masked, **options)

    def _forward(self, model: Model, inputs: dict[str, Any]) -> torch.Tensor:
        with self.accelerator.autocast():
            return forward_logps(model, inputs)

    def _logps(self, dataset: Dataset, model: Model, digest: str, name: str, role: str) -> Dataset:
        return cached_logps(
            dataset,
            lambda inputs: self._forward(model, inputs),
            self.collator,
            self.accelerator,
            budget=BatchBudget.of(self.args, model),
            cache=LogpCache(self.args.scoring_cache_dir),
            model_hash=digest,
            model_name=name,
            description=f"Scoring train dataset ({role})",
        )

    def _check_fsdp(self) -> None:
        plugin = getattr(self.accelerator.state, "fsdp_plugin", None)
        if self.accelerator.distributed_type != DistributedType.FSDP or plugin is None:
            return
        if plugin.fsdp_version == 1:
            raise ValueError("fsdp_version=1 cannot switch adapters or hold a reference: set fsdp_version: 2")
        if plugin.cpu_ram_efficient_loading:
            raise ValueError(
                "fsdp_cpu_ram_efficient_loading=True leaves the weights of all processes but one empty until training "
                "starts, and scores are computed before: set it to false"
            )

    def _prepare_online(self) -> None:
        args = self.args
        ranked = args.positive_fraction is not None and args.score == "influence"
        if ranked and (args.selection_scope == "global" or self.collator.padding_free):
            raise ValueError(
                f"positive_fraction={args.positive_fraction} ranks the tokens of the whole dataset, which one batch "
                "cannot show: use negative_threshold, or selection_scope='sequence' without padding_free, or "
                "precompute_scores=True on data that is not streamed"
            )
        if self.reference is not None and self.reference.injected:
            raise ValueError(
                "a LoRA reference cannot be kept on a model that is trained in full, since its base changes: use "
                "precompute_scores=True, or train with peft_config"
            )
        if not self._compares_with_start:
            return
        # Scores compare with the model at the start of training: its base where an adapter is trained, else a copy
        if self.at_base:
            self._start = self.model
        elif isinstance(self.model, PeftModel):
            raise ValueError(
                "the model comes with a trained adapter, which changes while it trains further: use "
                "precompute_scores=True, or merge the adapter first"
            )
        else:
            self._start = self.prepare(cast(Model, copy.deepcopy(self.model).requires_grad_(False)))


def _as_dict(value: dict[str, Any] | str | None) -> dict[str, Any]:
    assert not isinstance(value, str)  # `TrainingArguments.__post_init__` parses JSON from the command line
    return dict(value or {})
