"""From frozen models to token weights, for the trainer: a data set at once or a batch at a time.

`weigh` adds the columns to a whole data set before training (cached on disk), `weigh_batch` to one batch within a step
(streamed data, or `precompute_scores=False`). Both run the same forward pass and the same selection. Rejected: doing
this in the trainer, whose overrides would drown in it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import send_to_device
from datasets import Dataset, IterableDataset
from transformers import PreTrainedTokenizerBase

from .._compat import get_config_model_id
from ..config import SelectiveSFTConfig
from ..data.chunks import TOKENS_PER_CHUNK, data_fingerprint, with_column
from ..data.columns import BASE_LOGPS, PROBE_SCORES, REF_LOGPS, WEIGHTS
from ..data.tokenizers import special_ids, tokenizer_sha256
from ..selection.chosen import warn_unverified
from ..selection.excess import weigh_batches
from ..selection.weights import add_token_weights, row_weights, vocabulary
from ..training.collator import DataCollatorForSelectiveSFT
from ..training.model import Model, frozen
from .cache import cached_column
from .frozen import FrozenModels
from .probe import load_probe


class TokenWeigher:
    """Adds `token_weights`, and the columns that they are read from: `base_logps`, `ref_logps`, `probe_scores`.

    Args:
        model: the policy; it must still be as it is at the start of training.
        source: see `SelectiveSFTConfig.reference_model`; `None` when the rows bring their own scores or weights.
        collator: the collator that training uses.
        tokenizer: of the policy.
        chat_template: what the trainer renders with instead of the tokenizer's own.
        given: token columns that the rows have already.
        online: whether batches are scored one by one; then the reference stays in memory.

    Raises:
        `ValueError` for a reference or a launcher's setting that scoring cannot work with, and for a rule that one
        batch cannot follow.
    """

    def __init__(
        self,
        model: Model,
        source: str | Model | None,
        args: SelectiveSFTConfig,
        accelerator: Accelerator,
        collator: DataCollatorForSelectiveSFT,
        tokenizer: PreTrainedTokenizerBase,
        chat_template: str | None,
        given: list[str],
        online: bool = False,
    ):
        self.model, self.args, self.accelerator, self.collator = model, args, accelerator, collator
        self.special_ids, self.words = vocabulary(tokenizer, args)
        self._given = given
        if WEIGHTS not in given:
            warn_unverified(args)
        ranked = args.effective_fraction is not None and args.score in ("influence", "surprisal", "probe")
        if online and ranked and (args.selection_scope == "global" or collator.padding_free):
            default = f", the default of score={args.score!r}," if args.rule_is_default else ""
            raise ValueError(
                f"positive_fraction={args.effective_fraction}{default} ranks the tokens of the whole dataset, which "
                "one batch cannot show: use negative_threshold, or selection_scope='sequence' without padding_free, "
                "or precompute_scores=True on data that is not streamed"
            )
        compares = (source is not None and args.score == "influence") or args.needs_start_logps
        compares |= args.score == "surprisal"
        self._probe = args.score == "probe" and PROBE_SCORES not in given
        self.models = FrozenModels(
            model, source, tokenizer, args, accelerator, collator,
            base=(compares and BASE_LOGPS not in given) or self._probe, online=online,
        )  # fmt: skip
        if self._probe:
            assert args.probe is not None
            probe = load_probe(args.probe, self.models.policy_sha256, tokenizer_sha256(tokenizer, chat_template))
            self.models.state_columns = probe.state_columns(special_ids(tokenizer))
            self._probe_sha256 = probe.sha256

    def weigh(self, dataset: Dataset) -> Dataset:
        """`dataset` with the columns that a run needs.

        Args:
            dataset: final rows, with `input_ids`, `labels` and, when packed, `seq_lengths`.
        """
        models = self.models
        if models.columns:
            rows = {"data_sha256": data_fingerprint(dataset), "shard_tokens": TOKENS_PER_CHUNK}
            rows["documents"] = self.collator.padding_free
            scored = {}
            passes = {name: (name, rows) for name in models.columns}  # column -> the pass that gives it, its identity
            if self._probe:
                passes[PROBE_SCORES] = (BASE_LOGPS, rows | {"probe_sha256": self._probe_sha256})
                if not self.args.needs_start_logps:
                    del passes[BASE_LOGPS]
            digests = {
                name: models.sha256(source) for name, (source, _) in passes.items()
            }  # before an adapter is put in
            with models.ready():
                for name, (source, key) in passes.items():
                    scored[name] = cached_column(
                        dataset,
                        name,
                        functools.partial(models.score, columns=[source], joint=True),
                        self.accelerator,
                        folder=self.args.scoring_cache_dir,
                        identity={"model_sha256": digests[name], **models.precision(source), **key},
                        name=models.name if name == REF_LOGPS else get_config_model_id(self.model.config),
                        documents=self.collator.padding_free,
                    )
            models.release()
            for name, column in scored.items():
                dataset = with_column(dataset, name, column)
        if WEIGHTS in self._given:
            return self.mask_special_tokens(dataset)
        if self.args.score == "excess":  # its weights are made in every step
            return dataset
        return add_token_weights(dataset, self.args, self.special_ids, self.collator.padding_free, self.words)

    def weigh_batch(self, batch: dict[str, Any]) -> None:
        """Add `token_weights`, `active_rows` and `base_logps` to a collated batch, in place."""
        self.score_batch(batch)
        weigh_batches([batch], [batch[BASE_LOGPS]], self.args, self.special_ids, words=self.words)

    def score_batch(self, batch: dict[str, Any]) -> None:
        """Add the scores of a streamed batch, in place: `ref_logps` where there is a reference, and `base_logps` and
        the probe's column where the start of training matters."""
        inputs = send_to_device(batch, self.accelerator.device)
        if BASE_LOGPS in self.models.columns:
            with self.models.start() as model:
                batch.update(self.models.policy_columns(model, inputs))
        if REF_LOGPS in self.models.columns:
            with self.models.reference() as model:
                batch[REF_LOGPS] = self.models.logps(model, inputs)

    def current_logps(self, batch: dict[str, Any]) -> torch.Tensor:
        """Log-probabilities of a batch under the model as it is now, in evaluation mode (no dropout, so that a score
        is a property of model and token and not of a draw); `(batch, seq_len)` as `forward_logps` gives them."""
        with frozen(self.model):
            return self.models.logps(self.model, send_to_device(batch, self.accelerator.device))

    def weigh_stream(self, dataset: IterableDataset) -> IterableDataset:
        """Streamed rows with the weights that follow from their own columns, under a rule that needs no other row."""
        return dataset.map(
            lambda row: {
                WEIGHTS: row_weights(row, self.args, self.special_ids, self.collator.padding_free, self.words)
            }
        )

    def mask_special_tokens(self, dataset: Dataset | IterableDataset) -> Dataset | IterableDataset:
        """Keep given weights, but give special tokens of a negative span weight 0; with `forget_weight=0`
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
