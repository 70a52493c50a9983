"""From an optimizer's config to an optax transformation."""

from __future__ import annotations

from typing import Any, assert_never

import jax
import optax

from maxlm.config import Adafactor, AdamW, OptimizerConfig


def make_optimizer(config: OptimizerConfig, learning_rate: optax.Schedule, dims: Any) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer; weight decay on matrices only.

    Args:
        config: the choice and its numbers.
        learning_rate: step count -> learning rate.
        dims: names of every parameter's dims, in the parameters' tree.
    """
    clip = optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm)
    mask = decay_mask(dims)
    match config:
        case AdamW():
            update = optax.adamw(
                learning_rate, b1=config.b1, b2=config.b2, eps=config.eps, weight_decay=config.weight_decay, mask=mask
            )
        case Adafactor():
            update = optax.chain(
                optax.scale_by_factored_rms(
                    decay_rate=config.decay_rate, min_dim_size_to_factor=config.min_factored_dim
                ),
                optax.identity() if config.update_clip is None else optax.clip_by_block_rms(config.update_clip),
                optax.scale_by_param_block_rms() if config.scale_by_parameter else optax.identity(),
                optax.add_decayed_weights(config.weight_decay, mask),
                optax.scale_by_learning_rate(learning_rate),
            )
        case _:
            assert_never(config)
    return optax.chain(clip, update)


def decay_mask(dims: Any) -> Any:
    """True for the parameters that weight decay shrinks: matrices, which all have an "embed" dim.

    The number of dims does not tell: a stacked norm scale has two, the bias of a query projection three.
    """
    return jax.tree.map(lambda names: "embed" in names, dims, is_leaf=lambda leaf: isinstance(leaf, tuple))
