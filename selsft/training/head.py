"""Puts the selective loss inside `model.forward`.

The loss needs the hidden states and the LM head's weight, and must run within `forward`: DDP, FSDP and ZeRO-3 gather
parameters and arm their hooks there, accelerate's autocast wraps it, and PEFT calls down to it. So `forward` of the
base model gets one more keyword, `selective_head`, as TRL's own `add_fused_lm_head` does with `fused_lm_head`; calls
without the keyword reach the forward that was there before. Rejected: computing the loss in `compute_loss` from
`output_hidden_states=True`, which keeps every layer's activations and reads a sharded weight outside of `forward`.
"""

from __future__ import annotations

import functools
import math
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from peft.tuners.lora import Linear as LoraLinear
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn
from torch.distributed.tensor import DTensor, Partial
from transformers import PreTrainedModel

from selsft_kernels import linear_logprob, linear_selective_cross_entropy
from selsft_kernels.objectives import FORGET, Objective, token_loss

from .._compat import FusedCausalLMOutput, load_balancing_loss, maybe_gather_lm_head_ctx
from ..data.columns import shift

# log of the probability under which a negative token counts as forgotten in the metrics
_FORGOTTEN = -13.815510557964274  # log(1e-6)
# probability under which a gradient proportional to p is all but gone; most human errors lie below it
UNLIKELY = 0.01
STATS = (
    "positive_loss", "positives", "forget_loss", "negatives", "negative_prob", "negatives_unlikely",
    "negatives_forgotten",
)  # fmt: skip


def spares_the_unlikely(forget: str, beta: float) -> bool:
    """Whether a forget objective leaves a token of probability `UNLIKELY` as good as alone: dL/dm is below a twentieth
    there, while the model is where it was at the start of training."""
    logp = torch.tensor([math.log(UNLIKELY)])
    _, slope = FORGET[forget].loss(logp - torch.log1p(-logp.exp()), logp, beta)
    return abs(slope.item()) < 0.05


class SelectiveHead:
    """What the head computes in one forward pass. A plain class on purpose: FSDP casts the floating-point
    tensors that it finds in dicts, tuples and dataclasses to the compute dtype, and a log-probability in bf16 is wrong
    in its third digit.

    Args:
        token_weights (`torch.Tensor` of shape `(batch, seq_len)`, float32, or `None`): signed weight of each token; a
            token's column is its own, not that of the position which predicts it. `None` asks for log-probabilities
            of all labels instead of a loss.
        metrics (`bool`): whether log-probabilities come with entropy and top-1 hits (a loss always does).
        active_rows (`torch.Tensor` of shape `(m,)`, int64, or `None`): flat indices, in the grid of
            `(batch, seq_len - 1)` predicting positions, of the tokens with a weight; made on the host, so that no step
            waits for the device.
        reference_logps (`torch.Tensor` of shape `(batch, seq_len)`, float32, or `None`): for `forget="npo"`
            and `anchor`.
        choose (`Callable[[torch.Tensor], torch.Tensor]`, *optional*): selects in this forward pass: takes the
            log-probabilities of the labels, `(batch, width)` float32 without gradient, 0 where `active_rows` has no
            position, and returns the signed weights, of that shape. `token_weights` then says which tokens it chooses
            from (`active_rows` must list them all).
        positive, forget, beta, floor, entropy_gate, anchor, z_loss: see
            `selsft_kernels.linear_selective_cross_entropy`.
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
        entropy_gate: float | None = None,
        anchor: float | None = None,
        z_loss: float | None = None,
        metrics: bool = False,
        choose: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ):
        self.token_weights = token_weights
        self.active_rows = active_rows
        self.reference_logps = reference_logps
        self.positive = positive
        self.forget = forget
        self.beta = beta
        self.floor = floor
        self.entropy_gate = entropy_gate
        self.anchor = anchor
        self.z_loss = z_loss
        self.metrics = metrics
        self.choose = choose


@dataclass
class SelectiveCausalLMOutput(FusedCausalLMOutput):
    """
    Output of a model called with `selective_head`. `entropy`, `is_top1` and `label_mask` cover the positive tokens.

    Args:
        loss (`torch.Tensor`): sum over the tokens of |weight| times the objective, not normalised, float32.
        stats (`torch.Tensor` of shape `(7,)`): sums over this batch, float32, in the order of `STATS`.
        broken_rows (`torch.Tensor` of shape `(batch,)`): whether a token's log-probability in the row is not finite.
    """

    stats: torch.Tensor | None = None
    broken_rows: torch.Tensor | None = None


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

    model.forward = types.MethodType(forward, model)
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


class LMHead(NamedTuple):
    """The tensors of a language-modelling head, full-sized and on one device."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    lora_a: torch.Tensor | None  # (r, H)
    lora_b: torch.Tensor | None  # (V, r)
    lora_scale: float

    @property
    def tensors(self) -> tuple[torch.Tensor | None, ...]:
        return self.weight, self.bias, self.lora_a, self.lora_b

    def keywords(self, model: PreTrainedModel) -> dict[str, Any]:
        """Keyword arguments of the functions of `selsft_kernels`."""
        scale, softcap = logit_transform(model)
        lora = {"lora_a": self.lora_a, "lora_b": self.lora_b, "lora_scale": self.lora_scale}
        return {"linear_bias": self.bias, "softcap": softcap, "logit_scale": scale, **lora}


def read_lm_head(module: nn.Module) -> LMHead:
    """Weight, bias and LoRA factors of an output embedding.

    Raises:
        `ValueError` for an adapter on the head that is more than plain LoRA: the loss reads the weights directly and
        would silently drop it.
    """
    if not isinstance(module, BaseTunerLayer):
        return LMHead(_whole(module.weight), _whole(getattr(module, "bias", None)), None, None, 1.0)
    base = cast(nn.Linear, module.get_base_layer())
    weight, bias = _whole(base.weight), _whole(base.bias)
    if not isinstance(module, LoraLayer):
        raise ValueError(
            f"lm_head has an adapter that the fused loss cannot follow ({type(module).__name__}): only LoRA is "
            "supported there. Remove 'lm_head' from target_modules"
        )
    active = [] if module.disable_adapters else [name for name in module.active_adapters if name in module.lora_A]
    if not active or module.merged:
        return LMHead(weight, bias, None, None, 1.0)
    name, *more = active
    # `isinstance`: FSDP2 gives a sharded module a class of its own
    linear = isinstance(module, LoraLinear) and not module.lora_variant
    if more or not linear or not isinstance(module.lora_dropout[name], nn.Identity):
        raise ValueError(
            f"lm_head has an adapter that the fused loss cannot follow ({type(module).__name__}, adapters {active}): "
            "only one plain LoRA adapter with lora_dropout=0 is supported there. Remove 'lm_head' from "
            "target_modules, or set lora_dropout=0 and use_dora=False"
        )
    lora_a, lora_b = _whole(module.lora_A[name].weight), _whole(module.lora_B[name].weight)
    return LMHead(weight, bias, lora_a, lora_b, float(module.scaling[name]))


def _whole(parameter):
    """FSDP2 shards parameters as DTensors, while the hidden states are ordinary tensors.

    A parameter that arrives here sharded has a shard group of its own (adapters have), whose hooks a direct read does
    not run. So its gradient is averaged over the processes here, as FSDP does: without `grad_placements` each process
    would keep the gradient of its own rows alone.
    """
    if not isinstance(parameter, DTensor):
        return parameter
    return parameter.full_tensor(grad_placements=[Partial("avg")] * parameter.device_mesh.ndim)


def _selective_forward(
    model: PreTrainedModel, head: SelectiveHead, *args, labels: torch.Tensor, **kwargs
) -> SelectiveCausalLMOutput:
    kwargs["use_cache"] = False
    config = model.config.get_text_config()
    if getattr(config, "output_router_logits", False):
        kwargs.setdefault("output_router_logits", True)
    # `base_model` and the output embedding are looked up at every call: FSDP and PEFT replace them after patching
    backbone = model.base_model(*args, **kwargs)
    lm_head = read_lm_head(model.get_output_embeddings())
    # With `device_map` the backbone can end on another device than the head
    device = lm_head.weight.device
    hidden, targets = backbone.last_hidden_state[:, :-1].to(device), labels[:, 1:].to(device)
    if hidden.dtype != lm_head.weight.dtype and not torch.is_autocast_enabled(device.type):
        hidden = hidden.to(lm_head.weight.dtype)
    with maybe_gather_lm_head_ctx(*lm_head.tensors):  # type: ignore[arg-type]
        if head.token_weights is None:
            output = _label_logps(head, hidden, lm_head, targets, lm_head.keywords(model))
        else:
            output = _selective_loss(head, hidden, lm_head, targets, lm_head.keywords(model))
    if kwargs.get("output_router_logits"):
        output.aux_loss = load_balancing_loss()(
            backbone.router_logits, config.num_experts, config.num_experts_per_tok, kwargs.get("attention_mask")
        )
    return output


def _label_logps(
    head: SelectiveHead, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keywords: dict[str, Any]
) -> SelectiveCausalLMOutput:
    scored = linear_logprob(
        hidden,
        lm_head.weight,
        targets,
        outputs=("logprob", "entropy", "is_top1") if head.metrics else ("logprob",),
        **keywords,
    )
    return SelectiveCausalLMOutput(
        log_probs=scored.logprob, entropy=scored.entropy, is_top1=scored.is_top1, label_mask=targets != -100
    )


def _selective_loss(
    head: SelectiveHead, hidden: torch.Tensor, lm_head: LMHead, targets: torch.Tensor, keywords: dict[str, Any]
) -> SelectiveCausalLMOutput:
    width = targets.size(1)
    assert head.token_weights is not None
    weights = shift(head.token_weights, width).to(targets.device, torch.float32)
    reference = None if head.reference_logps is None else shift(head.reference_logps, width).to(targets.device)
    rows = head.active_rows
    if rows is not None and (virtual := width - head.token_weights.size(1) + 1):
        own = width - virtual  # predicting positions of a row without its virtual tokens
        rows = rows // own * width + rows % own + virtual
    rows = None if rows is None else rows.to(targets.device)
    if head.choose is not None:
        with torch.no_grad():
            logps = linear_logprob(hidden.detach(), lm_head.weight, targets, active_rows=rows, **keywords).logprob
        assert logps is not None
        weights = head.choose(logps)
    out = linear_selective_cross_entropy(
        hidden,
        lm_head.weight,
        targets,
        weights,
        reference_logprob=reference,
        positive=head.positive,
        forget=head.forget,
        beta=head.beta,
        floor=head.floor,
        entropy_gate=head.entropy_gate,
        anchor=head.anchor,
        z_loss=head.z_loss,
        active_rows=rows,
        outputs=("logprob", "entropy", "is_top1"),
        **keywords,
    )
    assert out.logprob is not None and out.entropy is not None and out.is_top1 is not None
    # Labels and weights agree by construction (the collator zeroes the weight of a masked label)
    positive, negative = weights > 0, weights < 0
    # The mean objective per token, without weights, for the logs. log p near 0 is exact to fp32's relative precision,
    # so the log-odds come back from it without loss, up to the 103 where log p itself becomes 0
    log_odds = (out.logprob - torch.log(-torch.expm1(out.logprob))).clamp(max=103.0)
    objective = Objective(head.positive, head.forget, head.beta, head.floor)
    value, _ = token_loss(log_odds, weights.sign(), reference, objective)
    stats = torch.stack(
        [
            (value * positive).sum(),
            positive.sum().float(),
            (value * negative).sum(),
            negative.sum().float(),
            (out.logprob.exp() * negative).sum(),
            ((out.logprob < math.log(UNLIKELY)) & negative).sum().float(),
            ((out.logprob < _FORGOTTEN) & negative).sum().float(),
        ]
    )
    return SelectiveCausalLMOutput(
        loss=out.loss,
        entropy=out.entropy * positive,
        is_top1=out.is_top1 & positive,
        label_mask=positive,
        stats=stats,
        broken_rows=(~out.logprob.isfinite()).any(1),
    )


def toy_forward(*, labels: torch.Tensor, selective_head: SelectiveHead, **_: Any) -> SelectiveCausalLMOutput:
    """What a causal language model of three tokens with fixed states returns when it is called with a selective head:
    enough to see whether a caller uses the head. `labels` is `(batch, seq_len)`."""
    hidden = torch.linspace(-1.0, 1.0, 4, device=labels.device).expand(*labels[:, 1:].shape, 4)
    lm_head = LMHead(torch.arange(12.0, device=labels.device).view(3, 4) / 12, None, None, None, 1.0)
    output = _selective_loss(selective_head, hidden, lm_head, labels[:, 1:], {})
    output.aux_loss = hidden.new_zeros(())
    return output
