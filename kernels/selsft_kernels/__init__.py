"""Fused losses for selective fine-tuning: likelihood for some tokens, bounded forgetting for others.

Imports torch and, when a kernel is first launched, triton; nothing of the trainer. Derivations: `kernels/README.md`.
"""

from .linear_logprob import LogprobOutput, linear_logprob
from .linear_loss import SelectiveLossOutput, linear_selective_cross_entropy
from .logits_loss import selective_cross_entropy
from .objectives import FORGET_OBJECTIVES, POSITIVE_OBJECTIVES

__all__ = [
    "FORGET_OBJECTIVES",
    "POSITIVE_OBJECTIVES",
    "LogprobOutput",
    "SelectiveLossOutput",
    "linear_logprob",
    "linear_selective_cross_entropy",
    "selective_cross_entropy",
]
