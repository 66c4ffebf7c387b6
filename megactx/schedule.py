"""What changes with the step number: the learning rate, and the weight of multi-token prediction."""

from __future__ import annotations

import math


def learning_rate_at(step: int, *, peak: float, floor: float, warmup_steps: int, decay_steps: int) -> float:
    """Linear warm-up to `peak` over `warmup_steps`, then a half cosine down to `floor` at step `decay_steps`."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    if step >= decay_steps:
        return floor
    progress = (step - warmup_steps) / max(1, decay_steps - warmup_steps)
    return floor + 0.5 * (1.0 + math.cos(math.pi * progress)) * (peak - floor)


def mtp_weight_at(step: int, *, weight: float, rampup_steps: int, decay_start: int, decay_end: int) -> float:
    """The weight of the mean loss of the targets 2..K at `step`, in [0, weight].

    `weight * min(step / rampup_steps, (decay_end - step) / (decay_end - decay_start))`, both ratios clamped to [0, 1]:
    from 0 at step 0 up to `weight` at `rampup_steps`, level until `decay_start`, down to 0 at `decay_end` and after. An
    interval of no steps is a jump.

    It begins at 0 because the far targets are noise to a model that cannot predict the next one yet. It has to end at 0
    because all K targets are read from the same logits: the optimum of that loss is the mixture
    `(p_1 + w * mean p_k) / (1 + w)`, not the next-token distribution p_1, and what that costs, KL(p_1 || mixture), is
    up to ln(1 + w) nats: 0.095 at w = 0.1.
    """
    ramp = 1.0 if step >= rampup_steps else max(step, 0) / rampup_steps
    if step >= decay_end:
        decay = 0.0
    elif step <= decay_start:
        decay = 1.0
    else:
        decay = (decay_end - step) / (decay_end - decay_start)
    return weight * min(ramp, decay)
