"""Puts the selective loss inside `model.forward`.

The loss needs the hidden states and the LM head's weight, and must run within `forward`: DDP, FSDP and ZeRO-3 gather
parameters and arm their hooks there, accelerate's autocast wraps it, and PEFT calls down to it. So `forward` of the
base model gets one more keyword, `selective_head`, as TRL's own `add_fused_lm_head` does with `fused_lm_head`; calls
without the keyword go on to the forward that was there before. Rejected: computing the loss in `compute_loss` from
`output_hidden_states=True`, which keeps every layer's activations and reads a sharded weight outside of `forward`.
"""

from __future__ import annotations

import functools
import types
from dataclasses import dataclass

import torch
from torch import nn
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from selsft_kernels import linear_logprob, linear_selective_cross_entropy
from selsft_kernels.objectives import Objective, token_loss

from ._compat import FusedCausalLMOutput, load_balancing_loss, maybe_gather_lm_head_ctx

# log of the probability under which a negative token counts as forgotten in the metrics
_FORGOTTEN = -13.815510557964274  # log(1e-6)
STATS = ("positive_loss", "positives", "forget_loss", "negatives", "negative_prob", "negatives_forgotten")


class SelectiveHead:
    """What the head is asked to do in one forward pass. A plain class on purpose: FSDP casts the floating-point
    tensors that it finds in dicts, tuples and dataclasses to the compute dtype, and a log-probability in bf16 is wrong
    in its third digit.

    Args:
        token_weights (`torch.Tensor` of shape `(batch, seq_len)`, float32, or `None`): signed weight of each token; a
            token's column is its own, not that of the position which predicts it. `None` asks for log-probabilities
            of all labels instead of a loss.
        active_rows (`torch.Tensor` of shape `(m,)`, int64, or `None`): flat indices, in the `(batch, seq_len - 1)` grid
            of predicting positions, of the rows with a weight other than 0; made on the host so that no step waits.
        reference_logps (`torch.Tensor` of shape `(batch, seq_len)`, float32, or `None`): for `forget="npo"`.
        positive, forget, beta, floor: see `selsft_kernels.linear_selective_cross_entropy`.
    """

    def __init__(
        self,
        token_weights: torch.Tensor | None = None,
        active_rows: torch.Tensor | None = None,
        reference_logps: torch.Tensor | None = None,
        positive: str = "nll",
        forget: str = "unlikelihood",
        beta: float = 1.0,
        floor: float | None = None,
    ):
        self.token_weights = token_weights
        self.active_rows = active_rows
        self.reference_logps = reference_logps
        self.positive = positive
        self.forget = forget
        self.beta = beta
        self.floor = floor


@dataclass
class SelectiveCausalLMOutput(FusedCausalLMOutput):
    """
    Output of a model called with `selective_head`. `entropy`, `is_top1` and `label_mask` cover the positive tokens.

    Args:
        loss (`torch.Tensor`): sum over the tokens of |weight| times the objective, not normalised, float32.
        stats (`torch.Tensor` of shape `(6,)`): sums over this batch, float32, in the order of `STATS`.
    """

    stats: torch.Tensor | None = None


def shift(column: torch.Tensor, width: int) -> torch.Tensor:
    """Align a token column with the positions that predict its tokens: the one place where columns are shifted.

    Index t of a column belongs to token t, which position t - 1 predicts, so the first column falls away. Prompt
    learning (PEFT) puts virtual tokens in front, which have no column: the left is filled with zeros.

    Args:
        column: `(batch, seq_len)`.
        width: number of predicting positions, `seq_len - 1` plus the number of virtual tokens.

    Returns:
        `(batch, width)`.
    """
    return nn.functional.pad(column[:, 1:], (width - column.size(1) + 1, 0))


def add_selective_head(model: PreTrainedModel) -> None:
    """Give `model` a forward that accepts `selective_head=SelectiveHead(...)` together with `labels`.

    Args:
        model: causal language model, not wrapped by PEFT. Calling this twice has no effect.
    """
    if getattr(model, "_has_selective_head", False):
        return
    original_forward = model.forward

    # Keep the original signature: `generate` validates its keyword arguments against it
    @functools.wraps(type(model).forward)
    def forward(self, *args, selective_head: SelectiveHead | None = None, **kwargs):
        if selective_head is None:
            return original_forward(*args, **kwargs)
        return _selective_forward(self, selective_head, *args, **kwargs)

    model.forward = types.MethodType(forward, model)  # type: ignore[method-assign]
    model._has_selective_head = True  # type: ignore[assignment]


def logit_transform(model: PreTrainedModel) -> tuple[float, float | None]:
    """`(logit_scale, softcap)` that the architecture applies to its logits, scale first."""
    config = model.config.get_text_config()
    scale = getattr(config, "logit_scale", None)  # Cohere
    for name in ("output_multiplier", "lm_head_multiplier"):  # Muse Glimmer; Falcon-H1
        scale = getattr(config, name, None) if scale is None else scale
    if scale is None and getattr(config, "logits_scaling", None) is not None:
        # Granite and MiniCPM3 divide the logits by this, HyperCLOVA X multiplies
        scale = config.logits_scaling if config.model_type == "hyperclovax" else 1 / config.logits_scaling
    return (1.0 if scale is None else float(scale)), getattr(config, "final_logit_softcapping", None)


def _selective_forward(
    model: PreTrainedModel, head: SelectiveHead, *args, labels: torch.Tensor, **kwargs
) -> SelectiveCausalLMOutput:
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    # `base_model` and the output embedding are looked up at every call: FSDP and PEFT replace them after patching
    backbone = model.base_model(*args, **kwargs)
    lm_head = model.get_output_embeddings()
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None)
    # With `device_map` the backbone can end on another device than the head
    hidden = backbone.last_hidden_state[:, :-1].to(weight.device)
    targets = labels[:, 1:].to(weight.device)
    if isinstance(weight, DTensor):  # FSDP2 shards parameters, the hidden states are ordinary tensors
        weight = weight.full_tensor()
        bias = bias.full_tensor() if bias is not None else None
    if hidden.dtype != weight.dtype and not torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(weight.dtype)
    scale, softcap = logit_transform(model)
    common = {"linear_bias": bias, "softcap": softcap, "logit_scale": scale}
    with maybe_gather_lm_head_ctx(weight, bias):
        if head.token_weights is None:
            scored = linear_logprob(hidden, weight, targets, **common)
            return SelectiveCausalLMOutput(log_probs=scored.logprob, label_mask=targets != -100)
        output = _selective_loss(head, hidden, weight, targets, common)
    if kwargs.get("output_router_logits"):
        output.aux_loss = load_balancing_loss()(
            backbone.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
        )
    return output


def _selective_loss(head: SelectiveHead, hidden, weight, targets, common) -> SelectiveCausalLMOutput:
    width = targets.size(1)
    assert head.token_weights is not None
    weights = shift(head.token_weights, width).to(targets.device, torch.float32)
    reference = None if head.reference_logps is None else shift(head.reference_logps, width).to(targets.device)
    rows = head.active_rows
    if rows is not None and (virtual := width - head.token_weights.size(1) + 1):
        own = width - virtual  # predicting positions of a row without its virtual tokens
        rows = rows // own * width + rows % own + virtual
    out = linear_selective_cross_entropy(
        hidden,
        weight,
        targets,
        weights,
        reference_logprob=reference,
        positive=head.positive,
        forget=head.forget,
        beta=head.beta,
        floor=head.floor,
        active_rows=None if rows is None else rows.to(targets.device),
        outputs=("logprob", "entropy", "is_top1"),
        **common,
    )
    # Labels and weights agree by construction (the collator zeroes the weight of a masked label)
    positive, negative = weights > 0, weights < 0
    # The mean objective per token, without weights, for the logs. log p near 0 is exact to fp32's relative precision,
    # so the log-odds come back from it without loss
    log_odds = out.logprob - torch.log(-torch.expm1(out.logprob))
    objective = Objective(head.positive, head.forget, head.beta, head.floor)
    value, _ = token_loss(log_odds, weights.sign(), reference, objective)
    stats = torch.stack(
        [
            (value * positive).sum(),
            positive.sum().float(),
            (value * negative).sum(),
            negative.sum().float(),
            (out.logprob.exp() * negative).sum(),
            ((out.logprob < _FORGOTTEN) & negative).sum().float(),
        ]
    )
    return SelectiveCausalLMOutput(
        loss=out.loss,
        entropy=out.entropy * positive,
        is_top1=out.is_top1 & positive,
        label_mask=positive,
        stats=stats,
    )
