"""A quantised model's weights, read one array at a time for the tensors that they lie in."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.checkpoint.store import Deferred
from maxlm.hub.names import Tensor
from maxlm.hub.tensor_files import Spec


class WrittenTensor(NamedTuple):
    """A tensor to be written."""

    name: str
    spec: Spec
    make: Callable[[], npt.NDArray[Any]]


class HeldWeights:
    """Of a tree of parameters with `Quantised` weights among them, whose arrays may be `Deferred`."""

    def __init__(self, parameters: Any) -> None:
        self._parameters = parameters
        self._kept: dict[str, Any] = {}

    def weight(self, name: str) -> Any:
        """By an array's name; nothing is read."""
        return functools.reduce(lambda place, key: place[key], name.split("/"), self._parameters)

    def read(self, name: str) -> Any:
        """The same, read."""
        if name not in self._kept:
            read = lambda leaf: jnp.asarray(leaf.read(None) if isinstance(leaf, Deferred) else leaf)
            self._kept[name] = jax.tree.map(read, self.weight(name))
        return self._kept[name]

    def joined(self, tensor: Tensor, arrays: Callable[[Any], jax.Array]) -> npt.NDArray[Any]:
        """The tensor [outputs, ...] of what `arrays` has of each of its weights. Arrays of other tensors are let go:
        the layers of one array are to come one after the other."""
        for name in self._kept.keys() - {part.array.name for part in tensor.parts}:
            del self._kept[name]
        return tensor.join([np.asarray(arrays(self.read(part.array.name)[part.at])) for part in tensor.parts])
