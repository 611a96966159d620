"""The raw logit of each target in fp32: the hidden row times the target's row of the head.

`N * H` multiplications, nothing against the `N * V * H` of the logits. Rejected: reading it from the chunk of logits,
a value that was rounded to bf16, and that rounding is most of the error of the log-probability.

On the way, the target leaves the chunk of logits, so that the row functions need no comparison of columns.
"""

import torch
from torch import Tensor


def target_logits(
    x: Tensor,  # [n, H]
    weight: Tensor,  # [V, H]
    target: Tensor,  # [n] int64
    bias: Tensor | None,  # [V] fp32
    lora_hidden: Tensor | None,  # [n, r] fp32: x A^T
    lora_b: Tensor | None,  # [V, r]
    lora_scale: float,
    raw: Tensor | None = None,  # [n, V], last stride 1
    flip: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`(logit, own)` of each target; [n] fp32.

    logit: `x W[y] + bias[y] + lora_scale (x A^T) B[y]`, NaN for a target outside the vocabulary.
    own: the target's rounded logit, bias included, out of the raw logits `raw`, which get -inf in its place (with
        `flip`, for a negative scale, +inf). None without `raw`.
    """
    given, target = target, target.clamp(0, weight.shape[0] - 1)
    out = (x.float() * weight[target].float()).sum(-1)
    if lora_hidden is not None and lora_b is not None:
        out.add_((lora_hidden * lora_b[target].float()).sum(-1), alpha=lora_scale)
    if bias is not None:
        out.add_(bias[target])
    own = None
    if raw is not None:
        place = target.unsqueeze(1)
        value = raw.gather(1, place)
        raw.scatter_(1, place, torch.inf if flip else -torch.inf)
        own = value.squeeze(1).float()
        own = own if bias is None else own + bias[target]
    return out.masked_fill_(given != target, torch.nan), own
