"""The average of parameters over steps, as the last part of an optimizer."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from maxlm.config import Ema


class EmaState(NamedTuple):
    """What `exponential_average` keeps."""

    updates: jax.Array
    """int32: how many there were."""
    average: Any
    """A tree like the parameters', float32."""


def exponential_average(config: Ema) -> optax.GradientTransformation:
    """Changes no update; averages what the parameters are after it, before anything settles (routers' biases, ranks of
    AdaLoRA). It begins with the first parameters."""

    def init(parameters: Any) -> EmaState:
        return EmaState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.copy, parameters))  # donated apart from them

    def update(updates: Any, state: EmaState, parameters: Any = None) -> tuple[Any, EmaState]:
        t = state.updates.astype(jnp.float32)
        decay = jnp.minimum(config.decay, (1 + t) / (10 + t)) if config.warm_up else config.decay
        moved = lambda average, old, update: average + (1 - decay) * (old + update - average)
        average = jax.tree.map(moved, state.average, parameters, updates)
        return updates, EmaState(optax.safe_increment(state.updates), average)

    return optax.GradientTransformation(init, update)


def averaged(state: Any) -> Any:
    """The average in an optimizer's state; None: it keeps none."""
    is_ema = lambda part: isinstance(part, EmaState)
    return next((part.average for part in jax.tree.leaves(state, is_leaf=is_ema) if is_ema(part)), None)
