"""The weights of all layers as arrays of their own, for a loop over the layers on a CPU.

Of a stack [L, ...] a CPU copies a layer's weight out before it multiplies by it, and does so for each token: three
times the traffic of memory, which is all the time that decoding takes. Written out, without a loop, L layers take L
times as long to compile. Here the loop stays, and only what reads a weight is there L times.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, Self, TypeVar

import jax
import jax.numpy as jnp

T = TypeVar("T")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class ByLayer:
    """One weight of each layer, and which layer it is of."""

    layers: tuple[Any, ...]
    """Weights of one kind and shape."""
    number: jax.Array
    """int32: the layer; [L] before the loop: 0, 1, ..."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of a layer's."""
        found: tuple[int, ...] = self.layers[0].shape
        return found

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array: a copy. What multiplies by it is better called `in_layer`."""
        one = lambda w: w.astype(dtype) if isinstance(w, jax.Array) else w.dense(dtype)
        return in_layer(one, self)


def in_layer(run: Callable[..., T], weights: Any, *arguments: Any) -> T:
    """run(weights, *arguments), with the layer's own in place of each `ByLayer` in the weights, a pytree of them."""
    leaves, tree = _leaves(weights)
    numbers = [leaf.number for leaf in leaves if _is_by_layer(leaf)]
    if not numbers:
        return run(weights, *arguments)

    def of_layer(i: int) -> Callable[..., T]:
        own = tree.unflatten([leaf.layers[i] if _is_by_layer(leaf) else leaf for leaf in leaves])
        return lambda *arguments: run(own, *arguments)

    n = next(len(leaf.layers) for leaf in leaves if _is_by_layer(leaf))
    found: T = jax.lax.switch(numbers[0], [of_layer(i) for i in range(n)], *arguments)
    return found


def slices(parameters: Any) -> tuple[Any, Callable[[Any], Any]]:
    """What a loop over layers takes slices of, and what makes such a slice the parameters of its layer."""
    leaves, tree = _leaves(parameters)

    def of_layer(sliced: Any) -> Any:
        pairs = zip(leaves, sliced, strict=True)
        return tree.unflatten([ByLayer(all.layers, one) if _is_by_layer(all) else one for all, one in pairs])

    return [leaf.number if _is_by_layer(leaf) else leaf for leaf in leaves], of_layer


def _leaves(weights: Any) -> tuple[list[Any], Any]:
    return jax.tree.flatten(weights, is_leaf=_is_by_layer)


def _is_by_layer(x: Any) -> bool:
    return isinstance(x, ByLayer)
