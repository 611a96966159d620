"""A plugin for axolotl: training on the column `token_weights` of tokenised rows.

    plugins: [selsft.integrations.axolotl.SelectivePlugin]
    selsft_forget_weight: 0.25

Positive weights are learned, negative ones forgotten with a bounded term, weights of 0 left alone; the sum is divided
by the number of positive and negative tokens of the optimizer step on all processes. Index t of the column belongs to
token t, with or without sample packing. Evaluation is axolotl's own.

Of selsft this needs the kernels alone, and it works on the logits that the model returns. Rejected: the fused head of
`SelectiveSFTTrainer`, which never holds the logits of a batch, but needs a TRL that axolotl 0.18 excludes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from axolotl.core.trainers import AxolotlTrainer
from axolotl.integrations.base import BasePlugin
from axolotl.monkeypatch.multipack import SUPPORTED_MULTIPACK_MODEL_TYPES
from axolotl.utils.collators import (
    BatchSamplerDataCollatorForSeq2Seq,
    DataCollatorForSeq2Seq,
    V2BatchSamplerDataCollatorForSeq2Seq,
)
from pydantic import BaseModel

from selsft_kernels import FORGET_OBJECTIVES, selective_cross_entropy

WEIGHTS = "token_weights"
_NEEDS_START = "npo"
_SCHEDULES = ("linear", "constant")


class SelectiveArgs(BaseModel):
    """Settings in axolotl's YAML file; meaning and defaults as in `SelectiveSFTConfig`."""

    selsft_forget_objective: str = "unlikelihood"
    selsft_forget_weight: float = 0.25
    selsft_forget_schedule: str = "linear"
    selsft_forget_beta: float = 1.0
    selsft_forget_floor: float | None = None


@dataclass
class SelectiveTrainingArgs:
    """The same settings among axolotl's training arguments."""

    selsft_forget_objective: str = "unlikelihood"
    selsft_forget_weight: float = 0.25
    selsft_forget_schedule: str = "linear"
    selsft_forget_beta: float = 1.0
    selsft_forget_floor: float | None = None


class SelectivePlugin(BasePlugin):
    """What axolotl asks a plugin for."""

    def get_input_args(self) -> str:
        return f"{__name__}.{SelectiveArgs.__name__}"

    def get_training_args_mixin(self) -> str:
        return f"{__name__}.{SelectiveTrainingArgs.__name__}"

    def get_training_args(self, cfg: Any) -> dict[str, Any]:
        return {name: cfg[name] for name in SelectiveArgs.model_fields if cfg[name] is not None}

    def get_trainer_cls(self, cfg: Any) -> type[AxolotlTrainer]:
        """
        Raises:
            `ValueError` for a setting that weights of tokens have no meaning for, or that is not known.
        """
        objectives = [name for name in FORGET_OBJECTIVES if name != _NEEDS_START]
        known = {"selsft_forget_objective": objectives, "selsft_forget_schedule": _SCHEDULES}
        for name, values in known.items():
            if cfg[name] is not None and cfg[name] not in values:
                raise ValueError(f"{name}={cfg[name]!r}: use one of {', '.join(values)}")
        for name in ("batch_flattening", "processor_type", "reward_model", "process_reward_model", "use_eaft"):
            if cfg[name]:
                raise ValueError(
                    f"{name}={cfg[name]!r} with selsft's plugin, which has no meaning: remove one of both"
                )
        for name in ("context_parallel_size", "tensor_parallel_size"):
            if (cfg[name] or 1) > 1:
                raise ValueError(f"{name}={cfg[name]} with selsft's plugin: use data parallelism, FSDP or DeepSpeed")
        return SelectiveTrainer

    def get_collator_cls_and_kwargs(self, cfg: Any, is_eval: bool = False) -> tuple[type, dict[str, Any]]:
        """As axolotl chooses its collator, with token weights."""
        if not (cfg.eval_sample_packing if is_eval else cfg.sample_packing):
            return SelectiveCollator, {}
        separate = (
            cfg.attn_implementation == "flex_attention" or cfg.model_config_type in SUPPORTED_MULTIPACK_MODEL_TYPES
        )
        if separate or (cfg.model_config_type == "llama" and cfg.attn_implementation != "flash_attention_2"):
            return SelectiveV2PackingCollator, {}
        return SelectivePackingCollator, {}


class _Weighted:
    """Adds `token_weights` to the batch of the collator that follows in the order of classes: float32 of the shape of
    `labels`, 0 where the label is -100 and for the first token of a document, which has no past."""

    packs = False

    def __call__(self, features: list[Any], return_tensors: str | None = None) -> dict[str, Any]:
        if not self.packs:
            groups = [[row] for row in features]
        else:
            groups = features if isinstance(features[0], list) else [features]
        if not any(WEIGHTS in row for group in groups for row in group):
            return super().__call__(features, return_tensors)  # type: ignore[misc]
        rows = [np.concatenate([_weights(row) for row in group]) for group in groups]
        bare = [[{k: v for k, v in row.items() if k != WEIGHTS} for row in group] for group in groups]
        batch = super().__call__(bare if self.packs else [group[0] for group in bare], return_tensors)  # type: ignore[misc]
        labels = batch["labels"]
        weights = torch.zeros(labels.shape, dtype=torch.float32)
        left = self.tokenizer.padding_side == "left"  # type: ignore[attr-defined]
        for into, row in zip(weights, rows, strict=True):
            into[len(into) - len(row) if left else 0 :][: len(row)] = torch.from_numpy(row)
        batch[WEIGHTS] = weights.masked_fill(labels == -100, 0.0)
        return batch


def _weights(row: dict[str, Any]) -> np.ndarray:
    weights, tokens = np.array(row.get(WEIGHTS, ()), np.float32), len(row["input_ids"])
    if len(weights) != tokens:
        raise ValueError(
            f"{WEIGHTS} has {len(weights)} values in a row of {tokens} tokens: give every row one value per token, "
            "and rows that fit into sequence_len"
        )
    weights[:1] = 0.0
    return weights


@dataclass
class SelectiveCollator(_Weighted, DataCollatorForSeq2Seq):
    """Padded rows."""


@dataclass
class SelectivePackingCollator(_Weighted, BatchSamplerDataCollatorForSeq2Seq):
    """Packed rows, for attention that reads documents off the position ids."""

    packs = True


@dataclass
class SelectiveV2PackingCollator(_Weighted, V2BatchSamplerDataCollatorForSeq2Seq):
    """Packed rows with a number for each document in the attention mask."""

    packs = True


class SelectiveTrainer(AxolotlTrainer):
    """axolotl's trainer with the selective loss, where rows have token weights.

    Logs `forget_weight`, `negative_fraction` and `negative_prob`, the mean probability of the negative tokens.
    """

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **kwargs)
        self.model_accepts_loss_kwargs = True  # the loss is divided by the tokens of the step, not by micro-batches
        self._sums = torch.zeros(3, device=self.args.device)  # positives, negatives, probability of the negatives

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if WEIGHTS not in self._signature_columns:
            self._signature_columns += [WEIGHTS]

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list, Any]:
        """Counts tokens with a weight over the optimizer step and all processes."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        found = [(batch[WEIGHTS][:, 1:] != 0).sum() for batch in batches if WEIGHTS in batch]
        if len(found) not in (0, len(batches)):
            raise ValueError(f"only {len(found)} of {len(batches)} batches have {WEIGHTS}: give it to every row")
        if not found:
            return batches, items
        count = torch.stack(found).sum().to(device)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            count = self.accelerator.reduce(count, reduction="sum")
        return batches, count.clamp(min=1)

    def forget_weight(self) -> float:
        """lambda at this optimizer step."""
        share = min(self.state.global_step / self.state.max_steps, 1.0) if self.state.max_steps > 0 else 1.0
        return self.args.selsft_forget_weight * (share if self.args.selsft_forget_schedule == "linear" else 1.0)

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        inputs = dict(inputs)
        weights = inputs.pop(WEIGHTS, None)
        if weights is None or not model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args = self.args
        labels = inputs.pop("labels")
        outputs = model(**inputs)
        weights = weights[:, 1:].to(outputs.logits.device)
        found = selective_cross_entropy(
            outputs.logits[:, :-1],
            labels[:, 1:].to(weights.device),
            # not 0 where lambda starts at 0: such tokens would be missing from what is logged
            torch.where(weights < 0, weights * max(self.forget_weight(), 1e-30), weights),
            forget=args.selsft_forget_objective,
            beta=args.selsft_forget_beta,
            floor=args.selsft_forget_floor,
        )
        negative = weights < 0
        assert found.logprob is not None
        stats = torch.stack([(weights > 0).sum(), negative.sum(), (found.logprob.exp() * negative).sum()])
        self._sums += stats.detach().to(self._sums)
        items = num_items_in_batch if num_items_in_batch is not None else (weights != 0).sum().clamp(min=1)
        loss = found.loss / items
        if args.average_tokens_across_devices and num_items_in_batch is not None:
            loss = loss * self.accelerator.num_processes  # which DDP averages over
        return (loss, outputs) if return_outputs else loss

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if self.model.training and "loss" in logs:
            positives, negatives, probability = self.accelerator.reduce(self._sums.clone(), reduction="sum").tolist()
            self._sums.zero_()
            logs["forget_weight"] = self.forget_weight()
            logs["negative_fraction"] = negatives / max(positives + negatives, 1)
            if negatives:
                logs["negative_prob"] = probability / negatives
        super().log(logs, *args, **kwargs)
