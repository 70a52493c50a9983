"""The parameters as decoding holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from maxlm.config import ModelConfig, WeightFormat
from maxlm.models import Execution, declared
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

    def one(array: Array, weight: Weight) -> Weight:
        if not isinstance(weight, jax.Array):
            return weight
        made = quantised(weight, array, weights)
        return made.astype(how.dtype) if isinstance(made, jax.Array) and array.role.casts else made

    def hold(parameters: Any) -> Any:
        return jax.tree.map(one, declared(config), parameters)

    wanted = shardings(how.layout, config, jax.eval_shape(hold, parameters))
    placed = jax.device_put(parameters, shardings(how.layout, config, parameters))
    return jax.jit(hold, out_shardings=wanted)(placed)


def layers_apart(config: ModelConfig, parameters: Any) -> tuple[ModelConfig, Any]:
    """The same model with all layers in one pattern that occurs once, so that no two share an array.

    A CPU copies a layer's weights out of a stack before it multiplies by them, and does so for each token: three times
    the traffic of memory, which is all the time that decoding takes. On a TPU or GPU the product reads the stack.
    """
    entries = len(config.blocks)

    def apart(parameters: Any) -> Any:
        layer = lambda i: jax.tree.map(
            lambda x: jax.lax.slice_in_dim(x, i // entries, i // entries + 1), parameters["blocks"][str(i % entries)]
        )
        return {**parameters, "blocks": {str(i): layer(i) for i in range(entries * config.repeats)}}

    return dataclasses.replace(config, blocks=config.blocks * config.repeats), jax.jit(apart)(parameters)
