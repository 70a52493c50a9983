"""Learning rate as a function of the optimizer's step count."""

from __future__ import annotations

from typing import assert_never

import jax
import jax.numpy as jnp
import optax

from maxlm.config import (
    ConstantSchedule,
    CosineSchedule,
    Decay,
    InverseSqrtSchedule,
    LinearSchedule,
    MultiStepSchedule,
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
            final, annealed = peak * config.final_fraction, min(config.anneal_steps, after - 1)
            tail = optax.cosine_decay_schedule(peak, after - annealed, alpha=config.final_fraction)
            if annealed:
                tail = optax.join_schedules([tail, optax.linear_schedule(final, 0.0, annealed)], [after - annealed])
        case LinearSchedule():
            tail = optax.linear_schedule(peak, peak * config.final_fraction, after)
        case InverseSqrtSchedule():
            start = max(1, warmup + config.constant_steps)
            # Asked for counts below 0 too, whose values go unused.
            tail = lambda count: peak * jnp.sqrt(start / (start + jnp.maximum(count - config.constant_steps, 0)))
        case WsdSchedule():
            decay_steps = min(config.decay_steps, after)
            decay = _decay(config, peak, max(1, decay_steps))
            tail = optax.join_schedules([optax.constant_schedule(peak), decay], [after - decay_steps])
        case MultiStepSchedule():
            levels = [peak, *(peak * drop.fraction for drop in config.drops)]
            tail = optax.join_schedules(
                [optax.constant_schedule(level) for level in levels],
                [round(drop.at * steps) - warmup for drop in config.drops],
            )
        case ConstantSchedule():
            tail = optax.constant_schedule(peak)
        case _:
            assert_never(config)
    if warmup == 0:
        return tail
    ramp = optax.linear_schedule(peak / warmup, peak, max(1, warmup - 1))
    return optax.join_schedules([ramp, tail], [warmup])


def _decay(config: WsdSchedule, peak: float, steps: int) -> optax.Schedule:
    """The last steps, counted from 0; as `Decay` says."""
    final = config.final_fraction

    def rate(count: jax.typing.ArrayLike) -> jax.Array:
        x = jnp.clip(count, 0, steps) / steps
        match config.decay:
            case Decay.LINEAR:
                above = 1 - x
            case Decay.SQRT:
                above = 1 - jnp.sqrt(x)
            case Decay.COSINE:
                above = (1 + jnp.cos(jnp.pi * x)) / 2
            case Decay.EXPONENTIAL:
                return peak * final**x
            case _:
                assert_never(config.decay)
        return peak * (final + (1 - final) * above)

    return rate
