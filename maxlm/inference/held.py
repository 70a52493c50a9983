"""The parameters as decoding holds them."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from maxlm.config import ModelConfig, WeightFormat
from maxlm.models import Execution, declared
from maxlm.models.weights.by_layer import ByLayer
from maxlm.models.weights.by_row import ByRow
from maxlm.models.weights.holding import quantised, shardings
from maxlm.models.weights.kinds import Weight
from maxlm.shapes import Array


def held(parameters: Any, config: ModelConfig, how: Execution, weights: WeightFormat) -> Any:
    """The parameters on the mesh of `how`: products in the format `weights`, tables and products that are in none in
    the compute dtype, everything else, and what is quantised already, as it is.

    Args:
        parameters: nested dicts like those of `maxlm.models.init_parameters`, of arrays or of `Weight`s.
        config: the model.
        how: where and in which dtype it runs.
        weights: the format.
    """

    hold = _holding(config, how, weights)
    wanted = shardings(how.layout, config, jax.eval_shape(hold, parameters))
    placed = jax.device_put(parameters, shardings(how.layout, config, parameters))
    return jax.jit(hold, out_shardings=wanted)(placed)


@functools.lru_cache(maxsize=8)  # jax compiles once for the same function, and parameters come again and again
def _holding(config: ModelConfig, how: Execution, weights: WeightFormat) -> Callable[[Any], Any]:
    def one(array: Array, weight: Weight) -> Weight:
        if not isinstance(weight, jax.Array):
            return weight
        made = quantised(weight, array, weights)
        return made.astype(how.dtype) if isinstance(made, jax.Array) and array.role.casts else made

    return lambda parameters: jax.tree.map(one, declared(config), parameters)


def by_layer(config: ModelConfig, parameters: Any) -> Any:
    """The same parameters, in which no two layers share an array that a product reads: see `ByLayer`, for CPUs."""

    def one(array: Array, weight: Weight) -> Weight:
        if isinstance(weight, ByRow):  # what adapters add to a layer is small, and no loss as a slice
            return dataclasses.replace(weight, base=one(array, weight.base))
        if not array.inputs or array.dims[0] != "layers" or config.repeats == 1:
            return weight
        return ByLayer(tuple(_at(weight, i) for i in range(config.repeats)), jnp.arange(config.repeats))

    return jax.tree.map(one, declared(config), parameters)


@jax.jit
def _at(weights: Weight, i: int) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), weights)
