"""`SelectiveSFTTrainer`: TRL's `SFTTrainer` that learns the positive tokens and forgets the negative ones.

A subclass of overrides only, each of which says what it changes; without a reference and without weights none of them
does anything, and training is `SFTTrainer`'s bit for bit. Two alternatives were rejected: a callback or
`compute_loss_func`, which see neither the hidden states nor the whole optimizer step, and a trainer of our own, which
would have to follow every feature of TRL's.
"""

from __future__ import annotations

import copy
import textwrap
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset, concatenate_datasets
from peft import PeftConfig, PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainingArguments
from trl import SFTTrainer
from trl.data_utils import get_dataset_column_names

from ._compat import DataCollatorForLanguageModeling, get_config_model_id
from .collator import (
    ACTIVE_ROWS,
    BASE_LOGPS,
    REF_LOGPS,
    TOKEN_COLUMNS,
    WEIGHTS,
    DataCollatorForSelectiveSFT,
    active_rows,
)
from .columns import add_message_weights, has_message_weights, token_columns, truncate_and_pack
from .config import SelectiveSFTConfig
from .head import STATS, SelectiveHead, add_selective_head
from .reference import Reference, model_fingerprint, starts_at_base, use_start
from .schedules import forget_weight_at
from .scoring import LogpCache, cached_logps, forward_logps, trained_tokens
from .selection import select_token_weights


class SelectiveSFTTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning that takes [`~trl.SFTTrainer`]'s place.

    A token is *positive* or *negative* by its score under a reference model, or by a `token_weights` column or a
    `weight` of its message. Positive tokens are trained with likelihood, negative ones with a bounded forgetting term
    (arXiv 2508.04329), in one fused loss that never builds the logits of the batch. `eval_loss` stays the plain
    negative log-likelihood of all labels, comparable with `SFTTrainer`'s.

    Args:
        model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.SFTTrainer`], like all other arguments up to `formatting_func`.
        args ([`SelectiveSFTConfig`], *optional*):
            A [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] is taken too, with the selective defaults.
        reference_model (`str`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*, keyword only):
            The reference, when it is loaded already; takes the place of `args.reference_model`.

    Train data may bring, besides everything that `SFTTrainer` accepts:
        - `token_weights` (`list[float]`), with `input_ids`: a signed weight for each token;
        - `weight` (`float`) in the messages of a conversation;
        - `base_logps` and `ref_logps` (`list[float]`), with `input_ids`: scores computed before (`selsft score`).

    Raises:
        `ValueError` when two sources of weights are given, or with a feature that a selective loss has no meaning for.

    Example:

    ```python
    >>> from selsft import SelectiveSFTConfig, SelectiveSFTTrainer

    >>> trainer = SelectiveSFTTrainer(
    ...     model="Qwen/Qwen3-0.6B",
    ...     args=SelectiveSFTConfig("out", reference_model="my-org/clean-adapter"),
    ...     train_dataset=dataset,
    ... )
    >>> trainer.train()
    ```
    """

    _tag_names = ["trl", "sft", "selsft"]  # noqa: RUF012 (TRL's convention)
    _name = "SelectiveSFT"
    _paper = {  # noqa: RUF012
        "title": "Forgetting: A New Mechanism Towards Better Large Language Model Fine-tuning",
        "id": "2508.04329",
        "citation": textwrap.dedent("""\
            @article{taheri2025forgetting,
                title        = {{Forgetting: A New Mechanism Towards Better Large Language Model Fine-tuning}},
                author       = {Taheri, Ali and Taban, Alireza and Wang, Qizhou and Ye, Shanshan and Mirzaei, Abdolreza and Liu, Tongliang and Han, Bo},
                year         = 2025,
                eprint       = {arXiv:2508.04329}
            }"""),
    }

    def __init__(
        self,
        model: str | PreTrainedModel | PeftModel,
        args: SelectiveSFTConfig | TrainingArguments | None = None,
        data_collator=None,
        train_dataset: Dataset | IterableDataset | None = None,
        eval_dataset=None,
        processing_class=None,
        compute_loss_func=None,
        compute_metrics=None,
        callbacks=None,
        optimizers=(None, None),
        optimizer_cls_and_kwargs=None,
        preprocess_logits_for_metrics=None,
        quantization_config=None,
        peft_config: PeftConfig | None = None,
        formatting_func=None,
        *,
        reference_model: str | PreTrainedModel | PeftModel | None = None,
    ):
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SelectiveSFTConfig(f"{name.split('/')[-1]}-SFT")
        else:
            args = SelectiveSFTConfig.from_training_arguments(args)
        self._train_is_prepared = False
        super().__init__(
            model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func,
            compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
            quantization_config, peft_config, formatting_func,
        )  # fmt: skip
        self.reference: Reference | None = None
        source = reference_model if reference_model is not None else args.reference_model
        given = token_columns(self.train_dataset)
        self._selective = source is not None or WEIGHTS in given or {BASE_LOGPS, REF_LOGPS} <= set(given)
        self._online = False
        self._step_counts: tuple[torch.Tensor, torch.Tensor] | None = None
        self._stats: list[torch.Tensor] = []
        if self._selective:
            self._set_up(source, given)

    # ------------------------------------------------------------------ setting up

    def _set_up(self, source, given: list[str]) -> None:
        """Everything that a selective run needs beyond `SFTTrainer.__init__`; runs after it, so that the policy is
        initialised from the same random numbers."""
        args = self.args
        self._refuse_unsupported(source, given)
        self._use_selective_collator()
        add_selective_head(self.model.get_base_model() if is_peft_model(self.model) else self.model)
        # Our loss is normalised over the optimizer step whatever the model's own forward accepts
        self.model_accepts_loss_kwargs = True
        self._online = source is not None and (
            not args.precompute_scores or isinstance(self.train_dataset, IterableDataset)
        )
        if source is not None:
            options = {"trust_remote_code": args.trust_remote_code, **(args.reference_model_init_kwargs or {})}
            self.reference = Reference(self.model, source, self._tokenizer, options)
            if self.reference.model is not None and not self.reference.shares_policy:
                self._place(self.reference.model)
            reference = self.reference.model if self.reference.model is not None else self.model
            add_selective_head(reference.get_base_model() if is_peft_model(reference) else reference)
        if self._online:
            self._set_up_online()
        else:
            self.train_dataset = self._scored_and_selected(self.train_dataset, given)

    def _refuse_unsupported(self, source, given: list[str]) -> None:
        args, names = self.args, get_dataset_column_names(self.train_dataset)
        parallelism = self.accelerator.parallelism_config
        sharded = parallelism is not None and (
            parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled
        )
        for refused, reason in (
            (
                source is not None and given,
                f"the train dataset has the columns {given} and a reference_model is set: both say what is negative. "
                "Drop the columns or the reference",
            ),
            (
                BASE_LOGPS in given and REF_LOGPS not in given or REF_LOGPS in given and BASE_LOGPS not in given,
                f"the train dataset has only one of the columns {BASE_LOGPS!r} and {REF_LOGPS!r}: a score needs both",
            ),
            (
                self.compute_loss_func is not None,
                "compute_loss_func and token selection exclude each other: the loss of the tokens is set by "
                "forget_objective and loss_type",
            ),
            (
                args.label_smoothing_factor > 0,
                f"label_smoothing_factor={args.label_smoothing_factor} has no meaning for negative tokens: set it to 0",
            ),
            (
                self._is_vision_dataset,
                "token selection is not available for datasets with images: their tokens are made in the collator. "
                "Train without a reference_model, or on text",
            ),
            (
                sharded,
                "token selection is not available with context, sequence or tensor parallelism (cp_size, sp_size or "
                "tp_size > 1): use data parallelism, FSDP or DeepSpeed",
            ),
            (
                "input_ids" not in names,
                "token selection needs tokenised rows; with skip_prepare_dataset bring the column 'input_ids'",
            ),
        ):
            if refused:
                raise ValueError(reason)

    def _use_selective_collator(self) -> None:
        if isinstance(self.data_collator, DataCollatorForSelectiveSFT):
            return
        if type(self.data_collator) is not DataCollatorForLanguageModeling:
            raise ValueError(
                f"data_collator is a {type(self.data_collator).__name__}, which drops the token columns: derive it from "
                "selsft.DataCollatorForSelectiveSFT, or leave it out"
            )
        self.data_collator = DataCollatorForSelectiveSFT.from_parent(self.data_collator)

    def _place(self, model) -> None:
        """Put a frozen model where the accelerator wants it, as TRL's DPO trainer does with its reference."""
        from ._compat import prepare_deepspeed, prepare_fsdp

        assert self.reference is not None
        if self.is_deepspeed_enabled:
            prepared = prepare_deepspeed(model, self.accelerator)
        elif self.is_fsdp_enabled:
            prepared = prepare_fsdp(model, self.accelerator)
        else:
            prepared = self.accelerator.prepare_model(model, evaluation_mode=True)
        self.reference.model = prepared

    def _set_up_online(self) -> None:
        args = self.args
        if args.positive_fraction is not None and (args.selection_scope == "global" or self.padding_free):
            raise ValueError(
                "positive_fraction ranks the tokens of the whole dataset, which scores of one batch cannot: use "
                "negative_threshold, or selection_scope='sequence' without padding_free, or precompute_scores=True"
            )
        # Scores compare with the model as it is now, so without an adapter to switch off a frozen copy is needed
        self._start = self.model if is_peft_model(self.model) else copy.deepcopy(self.model).requires_grad_(False)
        if self._start is not self.model:
            self._start.__dict__.pop("forward", None)  # the copy's forward is bound to the original
            self._start.__dict__.pop("_has_selective_head", None)
            add_selective_head(self._start)
        elif not starts_at_base(self.model):
            raise ValueError(
                "the model has a trained adapter, which changes while it trains: scores need precompute_scores=True, "
                "or merge the adapter first"
            )
        if self.reference is not None and hasattr(self.reference, "_restore"):
            raise ValueError(
                "a LoRA reference of a model that is trained in full cannot be kept beside it, since its base changes: "
                "use precompute_scores=True, or train with peft_config"
            )

    # ------------------------------------------------------------------ data

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Train rows with token columns or weighted messages are truncated and packed with those columns; all other
        rows go through TRL's preparation as they are."""
        is_train, self._train_is_prepared = not self._train_is_prepared, True
        weighted = is_train and has_message_weights(dataset)
        if not (weighted or (is_train and token_columns(dataset))):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        plain = copy.copy(args)
        plain.max_length, plain.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, plain, False, formatting_func, dataset_name)
        if weighted:
            dataset = add_message_weights(dataset, processing_class, self.chat_template, args)
        return truncate_and_pack(dataset, args, packing)

    def _set_signature_columns_if_needed(self):
        """Keeps the token columns that training needs."""
        super()._set_signature_columns_if_needed()
        if self._selective and WEIGHTS not in self._signature_columns:
            self._signature_columns += [WEIGHTS, *([BASE_LOGPS] if self.args.forget_objective == "npo" else [])]

    def _scored_and_selected(self, dataset: Dataset, given: list[str]) -> Dataset:
        """Add the columns `base_logps`, `ref_logps` (where scores are needed) and `token_weights` to final rows."""
        args = self.args
        if self.reference is not None or (args.forget_objective == "npo" and BASE_LOGPS not in given):
            dataset = _with_column(dataset, BASE_LOGPS, self._base_logps(dataset))
        if self.reference is not None:
            with self.reference.use(self.model) as model:
                rows = self._logps(
                    dataset, model, self.reference.fingerprint(self.model), self.reference.name, "reference"
                )
            dataset = _with_column(dataset, REF_LOGPS, rows)
            self.reference.release(self.model)
            self.reference = None
        if WEIGHTS in given:
            return self._protect(dataset)
        columns = dataset.with_format("numpy")
        trained = trained_tokens(dataset, self.padding_free)
        weights = select_token_weights(
            columns[BASE_LOGPS][:], columns[REF_LOGPS][:], trained, self._special_tokens(dataset), args
        )
        return _with_column(dataset, WEIGHTS, weights)

    def _base_logps(self, dataset: Dataset) -> list[np.ndarray]:
        at_base = is_peft_model(self.model) and starts_at_base(self.model)
        digest = model_fingerprint(self.model, adapter=None if at_base else "*")
        with use_start(self.model) as model:
            return self._logps(dataset, model, digest, get_config_model_id(self.model.config), "base")

    def _logps(self, dataset: Dataset, model, digest: str, name: str, role: str) -> list[np.ndarray]:
        def forward(inputs):
            with self.accelerator.autocast():
                return forward_logps(model, inputs)

        return cached_logps(
            dataset,
            forward,
            self.data_collator,
            self.accelerator,
            batch_size=self.args.scoring_batch_size or self.args.per_device_eval_batch_size,
            cache=LogpCache(self.args.scoring_cache_dir),
            model_hash=digest,
            model_name=name,
            description=f"Scoring train dataset ({role})",
        )

    def _special_ids(self) -> np.ndarray:
        tokenizer: PreTrainedTokenizerBase = self._tokenizer
        added = [index for index, token in tokenizer.added_tokens_decoder.items() if token.special]
        return np.unique([*tokenizer.all_special_ids, *added])

    def _special_tokens(self, dataset: Dataset) -> list[np.ndarray]:
        """Tokens of each row that must not be negative: one bool array per row."""
        special = self._special_ids() if self.args.protect_special_tokens else np.zeros(0, np.int64)
        return [np.isin(row["input_ids"], special) for row in dataset.select_columns(["input_ids"])]

    def _protect(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Given weights are kept, but a special token in a negative span is neither forgotten nor learnt."""
        if not self.args.protect_special_tokens and self.args.forget_weight != 0:
            return dataset
        special = self._special_ids() if self.args.protect_special_tokens else np.zeros(0, np.int64)
        ignore = self.args.forget_weight == 0

        def protect(row):
            weights = np.asarray(row[WEIGHTS], dtype=np.float32)
            shielded = np.isin(row["input_ids"], special) | ignore
            return {WEIGHTS: np.where(shielded, np.maximum(weights, 0), weights)}

        return (
            dataset.map(protect, desc="Protecting special tokens")
            if isinstance(dataset, Dataset)
            else dataset.map(protect)
        )

    # ------------------------------------------------------------------ the step

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts positive and negative tokens over the whole optimizer step and all processes, where TRL counts labels;
        scores the batches of the step first when there are no scores yet."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._selective or not batches:
            return batches, num_items
        if self._online:
            for batch in batches:
                self._score_batch(batch)
        counts = sum(_count(batch[WEIGHTS].to(device)) for batch in batches)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._step_counts = positives, negatives = counts[0], counts[1]
        return batches, positives + negatives if self.args.forget_normalization == "joint" else positives

    def _score_batch(self, batch: dict[str, Any]) -> None:
        device = self.accelerator.device
        inputs = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
        assert self.reference is not None
        with self.accelerator.autocast():
            with use_start(self._start) as model:
                base = forward_logps(model, inputs)
            with self.reference.use(self.model) as model:
                ref = forward_logps(model, inputs)
        trained = (inputs["labels"] != -100).cpu().numpy()
        trained[:, 0] = False
        special = self._special_ids() if self.args.protect_special_tokens else np.zeros(0, np.int64)
        shield = np.isin(inputs["input_ids"].cpu().numpy(), special)
        rows = select_token_weights(base.cpu().numpy(), ref.cpu().numpy(), trained, shield, self.args)
        batch[WEIGHTS] = torch.from_numpy(np.stack(rows))
        batch[ACTIVE_ROWS] = active_rows(batch[WEIGHTS])
        batch[BASE_LOGPS] = base

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training, `SFTTrainer.compute_loss` runs on a model whose fused head returns the selective loss, so that
        its normalisation, metrics and auxiliary loss stay TRL's. In evaluation it runs as it is: plain NLL."""
        columns = {name: inputs.pop(name) for name in (*TOKEN_COLUMNS, ACTIVE_ROWS) if name in inputs}
        if not self._selective or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args = self.args
        positives, negatives = self._step_counts if num_items_in_batch is not None else _count(columns[WEIGHTS])
        forget_weight = forget_weight_at(
            self.state.global_step, self.state.max_steps, args.forget_weight, args.forget_schedule
        )
        if args.forget_normalization == "joint":
            num_items, scale = positives + negatives, forget_weight
        else:  # both terms over the number of positives: lambda sum_neg / N- = (lambda N+ / N-) sum_neg / N+
            num_items = positives.clamp(min=1)
            scale = forget_weight * num_items / negatives.clamp(min=1)
        weights = columns[WEIGHTS].float()
        head = SelectiveHead(
            torch.where(weights < 0, weights * scale, weights),
            columns.get(ACTIVE_ROWS),
            reference_logps=columns.get(BASE_LOGPS) if args.forget_objective == "npo" else None,
            positive=args.loss_type,
            forget=args.forget_objective,
            beta=args.forget_beta,
            floor=args.forget_floor,
        )

        def with_selective_head(fused_lm_head: bool = False, **kwargs):
            if not fused_lm_head:  # the deprecated forward that rebuilds logits for `return_outputs`
                return model(**kwargs)
            outputs = model(**kwargs, selective_head=head)
            self._stats.append(outputs.stats.detach())
            outputs.log_probs = -outputs.loss.reshape(1, 1)  # TRL sums `-log_probs` and divides by the number of items
            return outputs

        self._metrics["train"]["forget_weight"].append(forget_weight)
        loss_type, args.loss_type = args.loss_type, "nll"  # the head has applied DFT's factor already
        try:
            return super().compute_loss(with_selective_head, inputs, return_outputs, num_items)
        finally:
            args.loss_type = loss_type

    def log(self, logs, start_time=None):
        """Adds the metrics of the positive and negative tokens since the last log, over all processes."""
        if self.model.training and self._stats:
            totals = self.accelerator.reduce(torch.stack(self._stats).sum(0), reduction="sum")
            self._stats.clear()
            total = dict(zip(STATS, totals.tolist(), strict=True))
            metrics = self._metrics["train"]
            if positives := total["positives"]:
                metrics["positive_loss"].append(total["positive_loss"] / positives)
            if negatives := total["negatives"]:
                metrics["forget_loss"].append(total["forget_loss"] / negatives)
                metrics["negative_prob"].append(total["negative_prob"] / negatives)
                metrics["negative_below_1e-6"].append(total["negatives_forgotten"] / negatives)
            metrics["negative_fraction"].append(negatives / max(positives + negatives, 1))
        super().log(logs, start_time)


def _count(token_weights: torch.Tensor) -> torch.Tensor:
    """`(2,)` int64: numbers of positive and negative tokens of a batch. The first column is predicted by nothing."""
    shifted = token_weights[:, 1:]
    return torch.stack([(shifted > 0).sum(), (shifted < 0).sum()])


def _with_column(dataset: Dataset, name: str, rows: list[np.ndarray]) -> Dataset:
    """`dataset` with a column of float32 lists, the rest untouched (`add_column` would flatten a shuffled data set)."""
    from datasets import Features, List, Value

    column = Dataset.from_dict({name: rows}, features=Features({name: List(Value("float32"))}))
    return concatenate_datasets([dataset, column], axis=1)
