"""Learning rate as a function of the optimizer's step count."""

from __future__ import annotations

from typing import assert_never

import jax.numpy as jnp
import optax

from maxlm.config import (
    ConstantSchedule,
    CosineSchedule,
    InverseSqrtSchedule,
    LinearSchedule,
    Schedule,
    WsdSchedule,
)


def learning_rate_schedule(config: Schedule, peak: float, steps: int) -> optax.Schedule:
    """Learning rate at step 0 .. steps - 1.

    Step i of the warm-up has peak * (i + 1) / warmup_steps, so that the first step already learns and step
    warmup_steps - 1 has the peak. What falls reaches its final fraction at step `steps`, one past the last, so that a
    final fraction of 0 wastes no step. A decay longer than what the warm-up leaves is shortened to that.
    """
    warmup = config.warmup_steps
    after = max(1, steps - warmup)  # steps that the falling part has
    match config:
        case CosineSchedule():
            tail = optax.cosine_decay_schedule(peak, after, alpha=config.final_fraction)
        case LinearSchedule():
            tail = optax.linear_schedule(peak, peak * config.final_fraction, after)
        case InverseSqrtSchedule():
            start = max(1, warmup)
            # Asked for counts below 0 too, whose values go unused.
            tail = lambda count: peak * jnp.sqrt(start / (start + jnp.maximum(count, 0)))
        case WsdSchedule():
            decay_steps = min(config.decay_steps, after)
            decay = optax.linear_schedule(peak, peak * config.final_fraction, max(1, decay_steps))
            tail = optax.join_schedules([optax.constant_schedule(peak), decay], [after - decay_steps])
        case ConstantSchedule():
            tail = optax.constant_schedule(peak)
        case _:
            assert_never(config)
    if warmup == 0:
        return tail
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, tail], [warmup])
