"""Parameters as decoding holds them."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax

from maxlm.config import ModelConfig, WeightFormat
from maxlm.models import Execution, declared, parameter_dims
from maxlm.models.linear import Int8, Weight
from maxlm.shapes import Array


def held(parameters: Any, config: ModelConfig, how: Execution, weights: WeightFormat) -> Any:
    """Nested dicts of float32 arrays, on the mesh of `how` and in the format asked for."""
    layout, arrays = how.layout, declared(config)
    in_8_bits = lambda array: weights is WeightFormat.INT8 and bool(array.inputs)

    def one(x: jax.Array, array: Array) -> Weight:
        if in_8_bits(array):
            return Int8.of(x, tuple(array.dims.index(dim) for dim in array.inputs))
        return x.astype(how.dtype) if array.role.casts else x

    def place(array: Array) -> Any:
        sharding: Any = lambda dims: layout.sharding(layout.parameter(dims))
        scale_dims = [None if dim in array.inputs else dim for dim in array.dims]
        return Int8(sharding(array.dims), sharding(scale_dims)) if in_8_bits(array) else sharding(array.dims)

    hold = jax.jit(lambda values: jax.tree.map(one, values, arrays), out_shardings=jax.tree.map(place, arrays))
    return hold(jax.device_put(parameters, layout.shardings(parameter_dims(config))))


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
