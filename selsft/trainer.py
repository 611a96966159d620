"""`SelectiveSFTTrainer`: TRL's `SFTTrainer` that learns the positive tokens and forgets the negative ones.

A subclass of overrides only, each of which says what it changes; without a reference and without weights none of them
does anything, and training is `SFTTrainer`'s bit for bit. Two alternatives were rejected: a callback or
`compute_loss_func`, which see neither the hidden states nor the whole optimizer step, and a trainer of our own, which
would have to follow every feature of TRL's.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.metadata
import logging
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import cast

import torch
from datasets import Dataset, IterableDataset
from peft import PeftConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from transformers import TrainingArguments
from trl import SFTTrainer

from ._compat import (
    DataCollatorForLanguageModeling,
    adapter_on_lm_head,
    get_config_model_id,
)
from .config import SelectiveSFTConfig
from .data.columns import (
    ACTIVE_ROWS,
    BASE_LOGPS,
    READ_COLUMNS,
    REF_LOGPS,
    SCORE_COLUMNS,
    TOKEN_COLUMNS,
    WEIGHTS,
    token_columns,
)
from .data.preparation import add_marked_weights, brings_weights, truncate_and_pack
from .data.spans import check_marks, has_marks, join_parts, refuse_late_marks
from .scoring.weighing import TokenWeigher
from .selection.excess import ExcessSelector
from .training import card
from .training.collator import DataCollatorForSelectiveSFT
from .training.head import (
    STATS,
    UNLIKELY,
    SelectiveCausalLMOutput,
    SelectiveHead,
    spares_the_unlikely,
    toy_forward,
)
from .training.model import Model
from .training.schedules import forget_weight_at
from .training.validation import validate_arguments, validate_effects, validate_prepared, validate_selection

logger = logging.getLogger(__name__)

# Micro-batches whose sums stay on the device one by one; a run that never logs must not fill it
_KEPT = 1000
_NO_HEAD = (
    f"SFTTrainer.compute_loss of the installed TRL {importlib.metadata.version('trl')} does not go through the fused "
    "head as selsft expects, so token weights would have no effect: install the versions of constraints.txt"
)


class SelectiveSFTTrainer(SFTTrainer):
    """
    Trainer for supervised fine-tuning that takes [`~trl.SFTTrainer`]'s place.

    A token is *positive* or *negative* by its score under a reference model, or by a `token_weights` column or a
    `weight` of its message. Positive tokens are trained with likelihood, negative ones with a bounded forgetting term
    (arXiv 2508.04329), in one fused loss that never builds the logits of the batch. `eval_loss` stays the plain
    negative log-likelihood of all labels, comparable with `SFTTrainer`'s.

    Args:
        model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`]):
            As in [`~trl.SFTTrainer`], like all other arguments up to `formatting_func`.
        args ([`SelectiveSFTConfig`], *optional*):
            A [`~trl.SFTConfig`] or [`~transformers.TrainingArguments`] is taken too, with the selective defaults.
        reference_model (`str`, `Path`, [`~transformers.PreTrainedModel`] or [`~peft.PeftModel`], *optional*):
            Keyword only. The reference, which may be loaded already; replaces `args.reference_model`.

    Train data may bring, besides everything that `SFTTrainer` accepts:
        - `token_weights` (`list[float]`), with `input_ids`: a signed weight for each token;
        - `spans` (`[[start, end, weight], ...]`, characters) of a text, a completion or a message, `corrected` texts,
          and `weight` or `train` of a message, content part or row (docs/spans.md);
        - `base_logps` and `ref_logps`, `probe_scores` or `noisy_logps` (`list[float]`), with `input_ids`: what a score
          is read from, computed before (`selsft score`);
        - `negative_mask` (`list[bool]`) or `token_scores` (`list[float]`), with `input_ids`, for `score="oracle"` and
          `score="given"`.

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

    args: SelectiveSFTConfig
    model: Model

    _tag_names = ["trl", "sft", "selsft"]  # noqa: RUF012 (TRL's convention)
    _name = "SelectiveSFT"
    _paper = {  # noqa: RUF012
        "title": "Forgetting: A New Mechanism Towards Better Large Language Model Fine-tuning",
        "id": "2508.04329",
        "citation": textwrap.dedent("""\
            @article{taheri2025forgetting,
                title        = {{Forgetting: A New Mechanism Towards Better Large Language Model Fine-tuning}},
                author       = {Ali Taheri and Alireza Taban and Qizhou Wang and Shanshan Ye and Abdolreza Mirzaei
                                and Tongliang Liu and Bo Han},
                year         = 2025,
                eprint       = {arXiv:2508.04329}
            }"""),
    }

    def __init__(
        self,
        model: str | Path | Model,
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
        reference_model: str | Path | Model | None = None,
    ):
        validate_arguments(model, args, train_dataset, eval_dataset, formatting_func is not None)
        model = str(model) if isinstance(model, Path) else model
        reference_model = str(reference_model) if isinstance(reference_model, Path) else reference_model
        if args is None:
            name = model if isinstance(model, str) else get_config_model_id(model.config)
            args = SelectiveSFTConfig(f"{name.split('/')[-1]}-SFT")
        else:
            args = SelectiveSFTConfig.from_training_arguments(args)
        source = reference_model if reference_model is not None else args.reference_model
        self._train_is_prepared = False
        if train_dataset is not None:
            check_marks(
                train_dataset,
                args.dataset_text_field,
                formatting=formatting_func is not None,
                reference=source is not None,
            )
        may_select = (
            source is not None
            or args.score != "influence"
            or (train_dataset is not None and brings_weights(train_dataset, args.score, args.dataset_text_field))
        )
        with adapter_on_lm_head() if may_select else contextlib.nullcontext():
            super().__init__(
                model, args, data_collator, train_dataset, eval_dataset, processing_class, compute_loss_func,
                compute_metrics, callbacks, optimizers, optimizer_cls_and_kwargs, preprocess_logits_for_metrics,
                quantization_config, peft_config, formatting_func,
            )  # fmt: skip
        validate_prepared(self)
        given = token_columns(self.train_dataset, args.score)
        self._selective = source is not None or bool(given) or args.score != "influence"
        scored = source is not None or (
            args.score in ("surprisal", "probe") and not set(READ_COLUMNS[args.score]) <= set(given)
        )
        self._online = scored and (not args.precompute_scores or isinstance(self.train_dataset, IterableDataset))
        self._excess: ExcessSelector | None = None
        self._candidates = 0  # supervised tokens of this process since the last log, where a step selects among them
        self._step_counts: torch.Tensor | None = None
        self._outputs: list[SelectiveCausalLMOutput] = []  # of the micro-batches since the last log, detached
        self._totals: torch.Tensor | None = None  # of those before, when many steps go by without a log
        self._looked_for_inertia = False
        validate_effects(self, source, given)
        self._described: dict[str, str] = {}  # the selection, for the model card
        if self._selective:
            reference = source if source is None or isinstance(source, str) else get_config_model_id(source.config)
            known = card.public_name(reference) or ("that of the scored rows" if REF_LOGPS in given else "")
            self._described = card.describe(args, known, WEIGHTS if WEIGHTS in given else "")
            self._select_tokens(source, given)

    def _select_tokens(self, source: str | Model | None, given: list[str]) -> None:
        """All that a selective run needs beyond `SFTTrainer.__init__`. Called after it, so that the policy is
        initialised from the same random numbers."""
        validate_selection(self, source, given)
        if not isinstance(self.data_collator, DataCollatorForSelectiveSFT):
            parent = cast(DataCollatorForLanguageModeling, self.data_collator)
            self.data_collator = DataCollatorForSelectiveSFT.from_parent(parent)
        # The loss is normalised over the optimizer step, whatever the model's own forward accepts
        self.model_accepts_loss_kwargs = True
        self._prove_weights_count()
        self._weigher = TokenWeigher(
            self.model, source, self.args, self.accelerator, self.data_collator, self._tokenizer, self.chat_template,
            given, self._online,
        )  # fmt: skip
        if isinstance(self.train_dataset, Dataset) and not self._online:
            self.train_dataset = self._weigher.weigh(self.train_dataset)
        elif WEIGHTS in given:
            self.train_dataset = self._weigher.mask_special_tokens(self.train_dataset)
        elif self.args.score in SCORE_COLUMNS:
            self.train_dataset = self._weigher.weigh_stream(cast(IterableDataset, self.train_dataset))
        if self.args.score == "excess":
            self._excess = ExcessSelector(
                self.args, self.accelerator, self._weigher.special_ids, self._weigher.current_logps
            )
            self.add_callback(self._excess)

    def _prepare_dataset(self, dataset, processing_class, args, packing, formatting_func, dataset_name):
        """Train rows with token columns or marks of their text are truncated and packed with those columns; all other
        rows go through TRL's preparation as they are."""
        is_train, self._train_is_prepared = not self._train_is_prepared, True
        weighted = is_train and has_marks(dataset, args.dataset_text_field)
        dataset = join_parts(dataset) if weighted or not is_train else refuse_late_marks(dataset)
        if not (weighted or (is_train and token_columns(dataset, args.score))):
            return super()._prepare_dataset(dataset, processing_class, args, packing, formatting_func, dataset_name)
        plain = copy.copy(args)
        plain.max_length, plain.shuffle_dataset = None, False
        dataset = super()._prepare_dataset(dataset, processing_class, plain, False, formatting_func, dataset_name)
        if weighted:
            dataset = add_marked_weights(dataset, processing_class, self.chat_template, args)
        return truncate_and_pack(dataset, args, packing, args.score)

    def _set_signature_columns_if_needed(self):
        """Keeps the token columns that training needs."""
        super()._set_signature_columns_if_needed()
        names = cast(list[str], self._signature_columns)
        if self._selective and WEIGHTS not in names:
            names += [WEIGHTS]
            names += [BASE_LOGPS] if self.args.needs_start_logps else []
            names += [REF_LOGPS] if self.args.score == "excess" else []

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        """Counts positive and negative tokens over the optimizer step and all processes, where TRL counts labels, and
        scores the batches of the step first when they have no scores yet."""
        batches, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if not self._selective or not batches:
            return batches, num_items
        if self._online:
            score = self._weigher.weigh_batch if self._excess is None else self._weigher.score_batch
            for batch in batches:
                score(batch)
        if self._excess is not None:
            self._candidates += self._excess.begin_step(batches)
            if self._excess.boundary is not None:
                self._metrics["train"]["score_boundary"].append(self._excess.boundary)
        if any(WEIGHTS not in batch for batch in batches):
            raise ValueError(
                f"a batch has no {WEIGHTS!r}, which other rows of the train dataset have: give it to every row"
            )
        counts = torch.stack([_count(batch[WEIGHTS].to(device)) for batch in batches]).sum(0)
        if self.args.average_tokens_across_devices and self.args.world_size > 1:
            counts = self.accelerator.reduce(counts, reduction="sum")
        self._step_counts = counts
        return batches, counts.sum()

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """In training, `SFTTrainer.compute_loss` runs on a model whose fused head returns the selective loss, so that
        its normalisation, metrics and auxiliary loss stay TRL's. In evaluation it runs as it is: plain NLL."""
        columns = {name: inputs.pop(name) for name in (*TOKEN_COLUMNS, ACTIVE_ROWS) if name in inputs}
        if not self._selective or not self.model.training:
            if isinstance(self.model.get_output_embeddings(), BaseTunerLayer):  # TRL's head would drop the adapter
                model = _with_head(model, SelectiveHead(metrics=True))
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        args = self.args
        counts = self._step_counts if num_items_in_batch is not None else _count(columns[WEIGHTS])
        assert counts is not None
        positives, negatives = counts
        forget_weight = forget_weight_at(
            self.state.global_step, self.state.max_steps, args.forget_weight, args.forget_schedule
        )
        # A row of weight 0 is skipped and missing from the metrics: where lambda starts at 0, a weight too small to
        # change any sum stands for it
        scale: float | torch.Tensor = max(forget_weight, 1e-30)
        if args.forget_normalization == "joint":
            num_items = positives + negatives
        else:  # both terms over the number of positives: lambda sum_neg / N- = (lambda N+ / N-) sum_neg / N+
            num_items = positives.clamp(min=1)
            scale = scale * num_items / negatives.clamp(min=1)
        weights = columns[WEIGHTS].float()
        choose = None
        if self._excess is not None and self._excess.one_pass:
            num_items = self._excess.num_items(positives)
            scale = scale if args.forget_weight else 0.0
            choose = self._excess.chooser(inputs["input_ids"], columns[REF_LOGPS], weights, scale)
        head = SelectiveHead(
            torch.where(weights < 0, weights * scale, weights),
            columns.get(ACTIVE_ROWS),
            reference_logps=columns.get(BASE_LOGPS) if args.needs_start_logps else None,
            positive=args.loss_type,
            forget=args.forget_objective,
            beta=args.forget_beta,
            floor=args.forget_floor,
            entropy_gate=args.entropy_gate,
            anchor=args.anchor_weight,
            z_loss=args.z_loss_weight,
            choose=choose,
        )

        if len(self._outputs) >= _KEPT:
            self._totals = self._take_stats()
        self._metrics["train"]["forget_weight"].append(forget_weight)
        kept = len(self._outputs)
        loss = self._sft_loss(_with_head(model, head, self._outputs), inputs, return_outputs, num_items)
        if len(self._outputs) != kept + 1:
            raise RuntimeError(_NO_HEAD)
        return loss

    def _sft_loss(self, forward: Callable, inputs: dict, return_outputs: bool, num_items: torch.Tensor):
        """`SFTTrainer.compute_loss` on `forward`, without DFT's factor, which the head has applied already."""
        loss_type, self.args.loss_type = self.args.loss_type, "nll"
        try:
            return super().compute_loss(forward, inputs, return_outputs, num_items)
        finally:
            self.args.loss_type = loss_type

    def _prove_weights_count(self) -> None:
        """Send two toy batches, which differ in a weight alone, through `SFTTrainer.compute_loss`: the installed TRL
        must call the fused head, and return its loss. Metrics and counts are restored."""
        before = copy.deepcopy(self._metrics), self._total_train_tokens, self.aux_loss_enabled
        self.aux_loss_enabled = False  # of experts, which TRL divides by a number that only a step knows
        device = self.accelerator.device
        ids = torch.arange(3, device=device)[None]
        try:
            for weight in (1.0, -0.5):
                kept: list[SelectiveCausalLMOutput] = []
                head = SelectiveHead(torch.full((1, 3), weight, device=device))
                inputs = {"input_ids": ids, "labels": ids, "attention_mask": torch.ones_like(ids)}
                forward = _with_head(toy_forward, head, kept)
                loss = cast(torch.Tensor, self._sft_loss(forward, inputs, False, torch.tensor(2, device=device)))
                wanted = cast(torch.Tensor, toy_forward(**inputs, selective_head=head).loss) / 2
                if self.args.average_tokens_across_devices:
                    wanted = wanted * (self.accelerator.num_processes // self.get_tp_size())
                if len(kept) != 1 or not torch.allclose(loss.detach().float(), wanted.detach(), rtol=1e-4):
                    raise RuntimeError(_NO_HEAD)
        finally:
            self._metrics, self._total_train_tokens, self.aux_loss_enabled = before

    def log(self, logs, start_time=None):
        """Adds the metrics of the positive and negative tokens since the last log, over all processes."""
        if self.model.training and self._outputs:
            totals = self.accelerator.reduce(self._take_stats(), reduction="sum")
            self._totals = None
            total = dict(zip(STATS, totals.tolist(), strict=True))
            metrics = self._metrics["train"]
            if positives := total["positives"]:
                metrics["positive_loss"].append(total["positive_loss"] / positives)
            if negatives := total["negatives"]:
                metrics["forget_loss"].append(total["forget_loss"] / negatives)
                metrics["negative_prob"].append(total["negative_prob"] / negatives)
                metrics["negative_below_1e-2"].append(total["negatives_unlikely"] / negatives)
                self._warn_if_inert(total["negatives_unlikely"] / negatives)
                metrics["negative_below_1e-6"].append(total["negatives_forgotten"] / negatives)
            metrics["negative_fraction"].append(negatives / max(positives + negatives, 1))
            if self._excess is not None:
                candidates = self.accelerator.reduce(totals.new_tensor(float(self._candidates)), reduction="sum")
                metrics["selected_fraction"].append(positives / max(float(candidates), 1))
                self._candidates = 0
        super().log(logs, start_time)

    def _warn_if_inert(self, unlikely: float) -> None:
        """Say once, at the first log after the warm-up, that the objective has hardly a gradient on these negatives.
        Later they may be unlikely because they are forgotten.

        Args:
            unlikely: share of the negatives whose probability is below `UNLIKELY`.
        """
        args, state = self.args, self.state
        if self._looked_for_inertia or state.global_step < args.get_warmup_steps(state.max_steps):
            return
        self._looked_for_inertia = True
        if unlikely > 0.9 and args.forget_weight > 0 and spares_the_unlikely(args.forget_objective, args.forget_beta):
            logger.warning(
                f"{unlikely:.0%} of the negative tokens have p < {UNLIKELY}, where forget_objective="
                f"{args.forget_objective!r} has next to no gradient: they are ignored rather than forgotten. "
                "forget_objective='npo' forgets them, too"
            )

    def create_model_card(  # type: ignore[override]  # TRL narrows it likewise
        self, model_name: str | None = None, dataset_name: str | None = None, tags: str | list[str] | None = None
    ) -> None:
        """TRL's card with the selection, the data and the results; a run that selects nothing credits no paper."""
        if not self._selective:
            self._name, self._paper = SFTTrainer._name, {}
        super().create_model_card(model_name, dataset_name, tags)
        if self.is_world_process_zero():
            path = Path(str(self.args.output_dir), "README.md")
            rows = f"{len(self.train_dataset):,}" if isinstance(self.train_dataset, Dataset) else "streamed"
            data = " of ".join(filter(None, (f"{rows} rows", card.public_name(dataset_name))))
            lines = {"Data": data, **self._described, **card.results(self.state.log_history)}
            base = card.public_name(get_config_model_id(self.model.config)) or "a model without a name"
            card.complete(path, base, model_name or path.parent.name, lines)

    def _take_stats(self) -> torch.Tensor:
        """The sums since the last log, `(7,)`. Names the rows whose loss was not finite: here, and not in every step,
        since looking waits for the device."""
        stats = torch.stack([cast(torch.Tensor, output.stats) for output in self._outputs]).sum(0)
        stats = stats if self._totals is None else self._totals + stats
        for index, output in enumerate(self._outputs):
            if rows := cast(torch.Tensor, output.broken_rows).nonzero().flatten().tolist():
                logger.warning(
                    f"the loss is not finite: batch {index + 1} of the {len(self._outputs)} up to step "
                    f"{self.state.global_step} has log-probabilities that are not finite in its rows {rows} "
                    f"(process {self.accelerator.process_index}). The model overflows or its weights are broken"
                )
        self._outputs.clear()
        return stats


def _with_head(model: Callable, head: SelectiveHead, kept: list | None = None) -> Callable:
    """What `SFTTrainer.compute_loss` calls in place of the model: its fused head becomes the selective one.

    Args:
        kept: receives what the metrics need of each output, when the head returns a loss.
    """
    before = None if kept is None else len(kept)

    def forward(fused_lm_head: bool = False, **inputs):
        if not fused_lm_head:  # the deprecated forward that rebuilds the logits for `return_outputs`, after the loss
            if kept is not None and len(kept) == before:
                raise RuntimeError(_NO_HEAD)
            return model(**inputs)
        outputs = model(**inputs, selective_head=head)
        if kept is not None:
            kept.append(SelectiveCausalLMOutput(stats=outputs.stats.detach(), broken_rows=outputs.broken_rows))
            outputs.log_probs = -outputs.loss.reshape(1, 1)  # TRL sums `-log_probs` and divides by the number of items
        return outputs

    return forward


def _count(token_weights: torch.Tensor) -> torch.Tensor:
    """`(2,)` int64: numbers of positive and negative tokens of a batch. The first column is predicted by nothing."""
    shifted = token_weights[:, 1:]
    return torch.stack([(shifted > 0).sum(), (shifted < 0).sum()])
