"""The raw logit of each target in fp32: the hidden row times the target's row of the head.

`N * H` multiplications, nothing against the `N * V * H` of the logits. The alternative, reading it from the chunk of
logits, takes a value that was rounded to bf16, and that rounding is most of the error of the log-probability.
"""

import torch
from torch import Tensor


def target_logits(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [n] int64
    bias: Tensor | None,  # [V]
    lora_hidden: Tensor | None,  # [n, r] fp32: x A^T
    lora_b: Tensor | None,  # [V, r]
    lora_scale: float,
) -> Tensor:
    """`x W[y] + bias[y] + lora_scale (x A^T) B[y]` of each row; [n] fp32, NaN for a target outside the vocabulary."""
    inside = (target >= 0) & (target < weight.shape[0])
    target = target.where(inside, 0)
    out = (x.float() * weight[target].float()).sum(-1)
    if lora_hidden is not None and lora_b is not None:
        out.add_((lora_hidden * lora_b[target].float()).sum(-1), alpha=lora_scale)
    if bias is not None:
        out.add_(bias[target])
    return out.where(inside, torch.nan)
