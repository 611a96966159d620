"""How the weight of the forgetting term grows over training: lambda(t) of arXiv 2508.04329, eq. (8).

lambda is a function of the *global* step, so that it restarts neither with an epoch nor with a resumed run (the
official code computes it from the micro-step of the epoch). A callback that changes a config field was rejected: a
pure function of the step has no state to save.
"""

from __future__ import annotations

import math

from ..config import FORGET_SCHEDULES


def forget_weight_at(step: int, max_steps: int, forget_weight: float, schedule: str) -> float:
    """Weight of the forgetting term at optimizer step `step`.

    Args:
        step: finished optimizer steps, 0 at the start of training.
        max_steps: optimizer steps of the whole training.
        forget_weight: final weight (the only weight with `"constant"`).
        schedule: `"linear"` from 0 (the paper), `"constant"`, or `"cosine"` (half a cosine wave from 0).
    """
    progress = min(step / max_steps, 1.0) if max_steps > 0 else 1.0
    if schedule == "constant":
        return forget_weight
    if schedule == "linear":
        return forget_weight * progress
    if schedule == "cosine":
        return forget_weight * 0.5 * (1.0 - math.cos(math.pi * progress))
    raise ValueError(f"forget_schedule={schedule!r} is unknown: use one of {', '.join(FORGET_SCHEDULES)}")
