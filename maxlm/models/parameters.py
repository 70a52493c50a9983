"""Parameters of modules, made from their declarations in `maxlm/shapes/`."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Sequence
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx

from maxlm import shapes
from maxlm.config import ModelConfig
from maxlm.shapes import Array, Constant, Normal


class Initializer:
    """Makes the parameters of a module and of those inside it, each random one from a key of its own.

    With `stacked`, every parameter is a stack over `layers`, with a leading "layers" dim; a loop hands each layer its
    slice. The values are the same for a key on every mesh.
    """

    def __init__(self, key: jax.Array, layers: Sequence[int] = (1,), *, stacked: bool = False):
        """`layers`: the places in the model, counted from 1, of the layer or the stack."""
        self._key, self._count, self._layers, self._stacked = key, 0, layers, stacked

    def declare(self, module: nnx.Module, arrays: Iterable[Array]) -> None:
        """Give `module` its own arrays; those of a module inside it have a path for a name, and are its to ask for."""
        for array in arrays:
            if "/" not in array.name:
                setattr(module, array.name, self._parameter(array))

    def _parameter(self, array: Array) -> nnx.Param:
        shape, dims = array.shape, array.dims
        if self._stacked:
            shape, dims = (len(self._layers), *shape), ("layers", *dims)
        match array.init:
            case Normal(std, by_layer=by_layer):
                self._count += 1
                value = std * jax.random.normal(jax.random.fold_in(self._key, self._count), shape, jnp.float32)
                if by_layer:
                    factors = (2 * jnp.array(self._layers, jnp.float32)) ** -0.5
                    value *= factors.reshape(-1, *[1] * (len(shape) - 1))
            case Constant(number):
                value = jnp.full(shape, number, jnp.float32)
            case _:
                assert_never(array.init)
        return nnx.Param(value, dims=dims)


def initial(array: Array, key: jax.Array) -> jax.Array:
    """One array by itself, as its declaration says."""
    match array.init:
        case Normal(std):
            return std * jax.random.normal(key, array.shape, jnp.float32)
        case Constant(number):
            return jnp.full(array.shape, number, jnp.float32)
        case _:
            assert_never(array.init)


def declared(config: ModelConfig) -> dict[str, Any]:
    """What `maxlm.shapes` says of every parameter, in nested dicts like those of `init_parameters`."""
    tree: dict[str, Any] = {}
    for array in shapes.arrays(config):
        *path, name = array.name.split("/")
        functools.reduce(lambda place, key: place.setdefault(key, {}), path, tree)[name] = array
    return tree
