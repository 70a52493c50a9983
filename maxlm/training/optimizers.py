"""From an optimizer's config to an optax transformation."""

from __future__ import annotations

import difflib
import operator
import re
from collections.abc import Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
import optax

from maxlm.config import (
    Adafactor,
    AdamW,
    EightBitMoments,
    HasDim,
    Lion,
    Muon,
    NameMatches,
    OptimizerConfig,
    ParameterGroup,
    Sgd,
    UserError,
)
from maxlm.config.fields import shown
from maxlm.shapes import Array, matrix_dims, seen_by_optimizer
from maxlm.training.eight_bit import scale_by_eight_bit_adam
from maxlm.training.ema import exponential_average
from maxlm.training.muon import orthogonalised


def make_optimizer(
    config: OptimizerConfig, learning_rate: optax.Schedule, declared: Any, *, layers: int
) -> optax.GradientTransformation:
    """Clipping by global norm, then the optimizer; weight decay as each array's role and group say, times the learning
    rate. The learning rate is that of the config times the factors of the array and its group. Last comes the average.

    Stacked layers are optimised as if each had its arrays to itself. In an Adafactor parameter with more than two dims
    the two largest are factored, for each index of the others (the layer, the head): q_proj [L, D, N, H] keeps
    L * N * (D + H) numbers where H > N. What it keeps, the config's `state` tells.

    Args:
        config: the choice and its numbers.
        learning_rate: step count -> learning rate.
        declared: the `shapes.Array` of every parameter, in the parameters' tree.
        layers: the length of a "layers" dim.

    Raises:
        UserError: no parameter is in one of the groups.
    """
    _refuse_empty(config.groups, jax.tree.leaves(declared))

    def factor(array: Array) -> float:
        group, own = _group_of(config.groups, array), array.learning_rate
        if isinstance(config, Muon) and matrix_dims(array) is None:
            own *= config.adam_learning_rate / config.learning_rate
        return own if group is None else own * group.learning_rate

    def decay(array: Array) -> float:
        group = _group_of(config.groups, array)
        if group is None or group.weight_decay is None:
            return config.weight_decay * array.role.decays
        return group.weight_decay

    factors, decays = jax.tree.map(factor, declared), jax.tree.map(decay, declared)
    decayed = lambda update, parameter, decay: update + decay * parameter if decay else update
    return optax.chain(
        optax.identity() if config.clip_norm is None else optax.clip_by_global_norm(config.clip_norm),
        optax.chain(
            *_directions(config, declared, layers),
            optax.stateless(lambda updates, parameters: jax.tree.map(decayed, updates, parameters, decays)),
            optax.scale_by_learning_rate(learning_rate),
        ),
        optax.identity()
        if set(jax.tree.leaves(factors)) == {1.0}
        else optax.stateless(lambda updates, _: jax.tree.map(jnp.multiply, updates, factors)),
        optax.identity() if config.average is None else exponential_average(config.average),
    )


def _directions(config: OptimizerConfig, declared: Any, layers: int) -> list[optax.GradientTransformation]:
    """What makes a step of a gradient, before decay and learning rate. A checkpoint names a state by its place here."""
    match config:
        case AdamW(eight_bit=EightBitMoments() as eight_bit):
            large = jax.tree.map(lambda array: eight_bit.takes(seen_by_optimizer(array)), declared)
            small = jax.tree.map(operator.not_, large)
            of_large = scale_by_eight_bit_adam(config, eight_bit.block)
            return [optax.masked(_adam(config), small), optax.masked(of_large, large)]
        case AdamW():
            return [_adam(config)]
        case Adafactor():
            return _adafactor(config, jax.tree.map(lambda array: array.dims, declared), layers)
        case Lion():
            return [optax.scale_by_lion(config.b1, config.b2, mu_dtype=config.moment_dtype.value)]
        case Muon():
            dims = jax.tree.map(lambda array: matrix_dims(array) or optax.MaskedNode(), declared)
            matrices = jax.tree.map(lambda array: seen_by_optimizer(array).matrix, declared)
            others = jax.tree.map(operator.not_, matrices)
            trace = optax.trace(config.momentum, config.nesterov, config.moment_dtype.value)
            muon = optax.chain(trace, orthogonalised(config, dims))
            return [optax.masked(muon, matrices), optax.masked(_adam(config), others)]
        case Sgd(momentum=0.0):
            return []
        case Sgd():
            return [optax.trace(config.momentum, config.nesterov, config.moment_dtype.value)]
        case _:
            assert_never(config)


def _adam(config: AdamW | Muon) -> optax.GradientTransformation:
    return optax.scale_by_adam(config.b1, config.b2, config.eps, mu_dtype=config.moment_dtype.value)


def _group_of(groups: Sequence[ParameterGroup], array: Array) -> ParameterGroup | None:
    """The first that fits; None: none does."""
    return next((group for group in groups if _fits(group, array)), None)


def _fits(group: ParameterGroup, array: Array) -> bool:
    match group.match:
        case NameMatches(pattern=pattern):
            return re.search(pattern, array.name) is not None
        case HasDim(dim=dim):
            return dim in array.dims
        case _:
            assert_never(group.match)


def _refuse_empty(groups: Sequence[ParameterGroup], arrays: Sequence[Array]) -> None:
    """
    Raises:
        UserError: a group fits none of these parameters.
    """
    for i, group in enumerate(groups):
        if any(_fits(group, array) for array in arrays):
            continue
        key, names = f"optimizer.groups.{i}.match", [array.name for array in arrays]
        match group.match:
            case NameMatches(pattern=pattern):
                near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
                raise UserError(f"{key}.pattern = {shown(pattern)} fits no parameter; the nearest: {', '.join(near)}")
            case HasDim(dim=dim):
                dims = dict.fromkeys(dim for array in arrays for dim in array.dims)
                raise UserError(f"{key}.dim = {dim} is no dim of a parameter; there are {', '.join(dims)}")
            case _:
                assert_never(group.match)


def _adafactor(config: Adafactor, dims: Any, layers: int) -> list[optax.GradientTransformation]:
    scaled = _scale_by_parameter_rms(dims) if config.scale_by_parameter else optax.identity()
    if config.b1:
        mean = optax.ema(config.b1, debias=False, accumulator_dtype=config.moment_dtype.value)
        scaled = optax.chain(scaled, mean)
    return [
        optax.scale_by_factored_rms(
            decay_rate=config.decay_rate, min_dim_size_to_factor=config.smallest_factored(layers)
        ),
        optax.identity() if config.update_clip is None else _clip_by_rms(config.update_clip, dims),
        scaled,
    ]


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
