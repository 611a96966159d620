"""`score="excess"`: the tokens of an optimizer step, ranked by how far the current model is behind the reference.

Rho-1 (arXiv 2404.07965, eq. 3 and 5) keeps the share of a batch with the largest `L_theta - L_RM`, where theta is the
model in training. In log-probabilities that is `ref_logps - current_logps`, high = still to be learnt, the sign of
every other score here. With two passes, the step is scored in evaluation mode before it trains, all micro-batches and
processes form one ranking, and the share is exact. With one pass, the log-probabilities of the training forward itself
are compared with a boundary known in advance: a fixed threshold, or a moving average of the boundaries of the steps so
far. Rejected: ranking each micro-batch alone, which makes the selection depend on how a batch is split to fit memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from ..config import SelectiveSFTConfig
from ..data.columns import ACTIVE_ROWS, BASE_LOGPS, READ_COLUMNS, REF_LOGPS, WEIGHTS, active_rows, shift
from ..data.words import Words
from .quantile import Reduce, boundary_of_fraction
from .rules import check_finite
from .weights import ScoredTokens, pooled_scores, pools, raw_scores, shared_boundary, token_classes

Batch = dict[str, Any]


def weigh_batches(
    batches: Sequence[Batch],
    compared: Sequence[torch.Tensor],
    args: SelectiveSFTConfig,
    special_ids: np.ndarray,
    reduce: Reduce | None = None,
    words: Words | None = None,
) -> float | None:
    """Add `token_weights` and `active_rows` to collated batches, in place.

    Args:
        batches: with the columns of the score. Under `selection_scope="batch"` all of them are one ranking, else each
            is its own.
        compared: log-probabilities that take the place of each batch's `base_logps`, `(batch, seq_len)` each, nats.
        reduce: see `boundary_of_fraction`.
        words: of the tokenizer, for `score_pooling` by word or span.

    Returns:
        the boundary that all batches share, if they do.
    """
    masks = [supervised_tokens(batch).cpu().numpy() for batch in batches]
    scored = []
    for batch, logps, mask in zip(batches, compared, masks, strict=True):
        names = {*READ_COLUMNS[args.score], REF_LOGPS} & set(batch)
        columns = {name: batch[name].cpu().numpy() for name in names} | {BASE_LOGPS: logps.cpu().numpy()}
        scores = raw_scores(columns, args)
        if pools(args):
            flat = pooled_scores(
                scores.ravel(), batch["input_ids"].cpu().numpy().ravel(), _lengths(batch), mask.ravel(), args, words
            )
            scores = flat.reshape(scores.shape)
        scored.append((scores, columns.get(REF_LOGPS)))
    boundary = None
    if args.selection_scope == "batch":
        chosen = [scores[mask] for (scores, _), mask in zip(scored, masks, strict=True)]
        boundary = shared_boundary(lambda: chosen, args, reduce)
    for batch, (scores, reference), mask in zip(batches, scored, masks, strict=True):
        ids, documents = batch["input_ids"].cpu().numpy(), _documents(batch)
        rows = np.indices(ids.shape)[0]
        tokens = ScoredTokens(
            scores[mask], rows[mask], (rows if documents is None else documents)[mask],
            np.isin(ids, special_ids)[mask], None if reference is None else reference[mask],
        )  # fmt: skip
        check_finite(tokens.scores)
        own = shared_boundary(functools.partial(list, [tokens.scores]), args) if boundary is None else boundary
        weights = np.zeros(ids.shape, np.float32)
        weights[mask] = token_classes(tokens, own, args)
        batch[WEIGHTS] = torch.from_numpy(weights)
        batch[ACTIVE_ROWS] = active_rows(batch[WEIGHTS])
    return boundary


def supervised_tokens(batch: Batch) -> torch.Tensor:
    """Which tokens of a collated batch have a label and a past to be predicted from: `(batch, seq_len)` bool."""
    supervised = batch["labels"] != -100
    supervised[:, 0] = False
    return supervised


def _documents(batch: Batch) -> np.ndarray | None:
    """Number of each token's document where rows are concatenated: its positions start at 0 again."""
    if "position_ids" not in batch or "attention_mask" in batch:
        return None
    return np.cumsum(batch["position_ids"].cpu().numpy() == 0, axis=1)


def _lengths(batch: Batch) -> np.ndarray:
    """Lengths of the documents of a batch, with their padding, in the order of its tokens."""
    documents = _documents(batch)
    if documents is None:
        return np.full(len(batch["input_ids"]), batch["input_ids"].shape[1], np.int64)
    return np.concatenate([np.unique(row, return_counts=True)[1] for row in documents])


class ExcessSelector(TrainerCallback, ExportableState):
    """Selects the tokens of each optimizer step.

    The moving average of `excess_passes=1` is saved in `trainer_state.json`, so that a resumed run continues it. Its
    first value is the exact boundary of the first step, which therefore runs in two passes.

    Args:
        current_logps: log-probabilities of a batch under the current model, without gradients, `(batch, seq_len)`.
        special_ids: `(k,)` int64, ids of tokens that are never negative.

    Attributes:
        boundary: score below which a token of the current step is negative, nats; `None` before the first step.
        one_pass: whether the current step selects in its training forward.
    """

    def __init__(
        self,
        args: SelectiveSFTConfig,
        accelerator: Accelerator,
        special_ids: np.ndarray,
        current_logps: Callable[[Batch], torch.Tensor],
    ):
        self.args, self.accelerator, self.special_ids = args, accelerator, special_ids
        self.current_logps = current_logps
        self.boundary = None if args.effective_threshold is None else -args.effective_threshold
        self.one_pass = False
        self._seen: list[torch.Tensor] = []  # scores of the micro-batches of this step, NaN where not supervised

    def begin_step(self, batches: Sequence[Batch]) -> int:
        """Give the batches of a step their `token_weights`: the token classes, or, where the training forward selects,
        1 for every token that it selects from. Returns the number of supervised tokens of this process."""
        # A step without tokens, or with too few for the share, has no boundary to start an average from
        self.one_pass = self.args.excess_passes == 1 and self.boundary is not None and math.isfinite(self.boundary)
        if self.one_pass:
            for batch in batches:
                batch[WEIGHTS] = supervised_tokens(batch).float()
                batch[ACTIVE_ROWS] = active_rows(batch[WEIGHTS])
        else:
            current = [self.current_logps(batch) for batch in batches]
            self.boundary = weigh_batches(batches, current, self.args, self.special_ids, self._reduce)
        return int(sum(supervised_tokens(batch).sum() for batch in batches))

    def num_items(self, candidates: torch.Tensor) -> torch.Tensor:
        """What the loss of a one-pass step is divided by, from the number of its candidate tokens. Every candidate is
        positive or negative; where negatives are dropped, the share k of them counts, as in eq. 5 of Rho-1."""
        fraction = self.args.positive_fraction
        return candidates * fraction if self.args.forget_weight == 0 and fraction is not None else candidates

    def chooser(
        self,
        input_ids: torch.Tensor,
        ref_logps: torch.Tensor,
        candidates: torch.Tensor,
        forget_scale: float | torch.Tensor,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """What the head calls with the log-probabilities of the training forward, `(batch, width)`, to get the signed
        weights of the predicted tokens, of that shape.

        Args:
            input_ids, ref_logps, candidates: `(batch, seq_len)`; candidates are 1 for the tokens to choose from.
            forget_scale: weight of a negative token.
        """
        assert self.boundary is not None
        boundary, gate = self.boundary, self.args.gate_reference_prob
        protected = torch.isin(input_ids, torch.as_tensor(self.special_ids, device=input_ids.device))

        def choose(logps: torch.Tensor) -> torch.Tensor:
            width, device = logps.size(1), logps.device
            reference, supervised, safe = (
                shift(column.to(device), width) for column in (ref_logps, candidates > 0, protected)
            )
            scores = reference - logps
            if self.args.positive_fraction is not None:
                self._seen.append(scores.masked_fill(~supervised, math.nan))
            if gate is not None:
                safe = safe | (reference >= math.log(gate))
            negative = (scores < boundary) & ~safe
            return torch.where(negative, -forget_scale, 1.0) * supervised

        return choose

    def on_step_end(self, args, state, control, **kwargs):
        """Update the moving average with the step's own boundary, over all processes."""
        if not self.one_pass or self.args.positive_fraction is None:
            return
        scores = [part[~part.isnan()].float().cpu().numpy() for part in self._seen]
        self._seen.clear()
        boundary = boundary_of_fraction(lambda: scores, self.args.positive_fraction, self._reduce)
        if math.isfinite(boundary):
            assert self.boundary is not None
            self.boundary += (1 - self.args.excess_decay) * (boundary - self.boundary)

    def on_train_begin(self, args, state, control, **kwargs):
        saved = state.stateful_callbacks.get(type(self).__name__)
        if isinstance(saved, dict) and self.args.excess_passes == 1 and self.args.positive_fraction is not None:
            self.boundary = saved["attributes"]["boundary"]

    def state(self) -> dict:
        kept = self.boundary is not None and self.args.excess_passes == 1 and math.isfinite(self.boundary)
        return {"args": {}, "attributes": {"boundary": self.boundary if kept else None}}

    def _reduce(self, counts: np.ndarray) -> np.ndarray:
        if self.accelerator.num_processes == 1:
            return counts
        # fp32 collectives of some back ends round above 2^24; int64 does not
        total = self.accelerator.reduce(torch.from_numpy(counts).to(self.accelerator.device), reduction="sum")
        return total.cpu().numpy()
