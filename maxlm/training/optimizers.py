"""From an optimizer's config to an optax transformation."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax

from maxlm.config import Adafactor, AdamW, OptimizerConfig


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, declared: Any, *, layers: int
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer; weight decay as each array's role says, times the learning rate.
    The learning rate is that of the config times the array's own factor.

    Stacked layers are optimised as if each had its arrays to itself. In an Adafactor parameter with more than two dims
    the two largest are factored, for each index of the others (the layer, the head): q_proj [L, D, N, H] keeps
    L * N * (D + H) numbers where H > N.

    Args:
        config: the choice and its numbers.
        learning_rate: step count -> learning rate.
        declared: the `shapes.Array` of every parameter, in the parameters' tree.
        layers: the length of a "layers" dim.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    dims = jax.tree.map(lambda array: array.dims, declared)
    decays = jax.tree.map(lambda array: array.role.decays, declared)
    match config:
        case AdamW():
            update = optax.adamw(
                learning_rate,
                b1=config.b1,
                b2=config.b2,
                eps=config.eps,
                mu_dtype=config.moment_dtype.value,
                weight_decay=config.weight_decay,
                mask=decays,
            )
        case Adafactor():
            update = _adafactor(config, learning_rate, dims, decays, layers)
        case _:
            assert_never(config)
    factors = jax.tree.map(lambda array: array.learning_rate, declared)
    if set(jax.tree.leaves(factors)) - {1.0}:
        slower = optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors))
        return optax.chain(clip, update, slower)
    return optax.chain(clip, update)


def _adafactor(
    config: Adafactor, learning_rate: optax.Schedule, dims: Any, decays: Any, layers: int
) -> optax.GradientTransformation:
    return optax.chain(
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate, min_dim_size_to_factor=config.smallest_factored(layers)
        ),
        optax.identity() if config.update_clip is None else _clip_by_rms(config.update_clip, dims),
        _scale_by_parameter_rms(dims) if config.scale_by_parameter else optax.identity(),
        optax.add_decayed_weights(config.weight_decay, decays),
        optax.scale_by_learning_rate(learning_rate),
    )


def _clip_by_rms(limit: float, dims: Any) -> optax.GradientTransformation:
    """Adafactor's update clipping (section 6), for each layer of a stack: optax's takes one RMS for all of them."""
    clip = lambda update, names: update / jnp.maximum(1.0, _rms(update, names) / limit)
    return optax.stateless(lambda updates, _: jax.tree.map(clip, updates, dims))


def _scale_by_parameter_rms(dims: Any) -> optax.GradientTransformation:
    """Adafactor's relative step size (section 8): times max(1e-3, RMS of the parameter), for each layer of a stack."""
    scale = lambda update, parameter, names: update * jnp.maximum(1e-3, _rms(parameter, names))
    return optax.stateless(lambda updates, parameters: jax.tree.map(scale, updates, parameters, dims))


def _rms(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    """Root mean square over all dims but "layers", ready to broadcast."""
    own = tuple(i for i, name in enumerate(names) if name != "layers")
    return jnp.sqrt(jnp.mean(x * x, axis=own, keepdims=True))
