"""A weight, and what an adapter does to what goes into its product or comes out of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Self

import jax
import jax.numpy as jnp

from maxlm.config import Activation


@dataclass(frozen=True)
class Around:
    """A weight of the same shape inside."""

    base: Any
    """Any other weight."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        found: tuple[int, ...] = self.base.shape
        return found

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rescaled(Around):
    """W with inputs or outputs times learned numbers. See `config.Ia3`."""

    inputs: jax.Array | None
    """float32 [*inputs]; None: they are as they are."""
    outputs: jax.Array | None
    """float32 [*outputs], for what the bias has been added to."""

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """As a plain array; whatever bias there is, is multiplied elsewhere."""
        w = plain(self.base)
        if self.inputs is not None:
            w *= self.inputs.reshape(*self.inputs.shape, *[1] * (w.ndim - self.inputs.ndim))
        if self.outputs is not None:
            w *= self.outputs
        return w.astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SmallMlp:
    """scale * (f(x down + down_bias) up + up_bias). See `config.Bottleneck`."""

    down: jax.Array
    """float32 [D, size]."""
    down_bias: jax.Array
    """float32 [size]."""
    up: jax.Array
    """float32 [size, D]."""
    up_bias: jax.Array
    """float32 [D]."""
    activation: Activation = field(metadata={"static": True})
    scale: float = field(metadata={"static": True})

    def __getitem__(self, index: Any) -> Self:
        """[...]: all of it."""
        return self


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class MlpAfter(Around):
    """A weight whose product, with its bias, is followed by y + mlp(y)."""

    mlp: SmallMlp

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """There is none."""
        raise NotImplementedError("what follows this weight is no matrix")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Begun(Around):
    """A weight whose results for the first positions of a text are learned ones. See `config.PromptTuning`."""

    rows: jax.Array
    """float32 [P, *outputs]: of positions 0 .. P - 1."""

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The weight, as it is for all other positions."""
        return plain(self.base).astype(dtype)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompted(Around):
    """A weight of queries, which attend to learned vectors too. See `config.LlamaAdapter`."""

    rows: jax.Array
    """float32 [P, D]."""
    gate: jax.Array
    """float32 [N]: of each head; [1]: of all."""

    def dense(self, dtype: jnp.dtype) -> jax.Array:
        """The weight."""
        return plain(self.base).astype(dtype)


def plain(weight: Any) -> jax.Array:
    """Any weight as a float32 array."""
    return weight.astype(jnp.float32) if isinstance(weight, jax.Array) else weight.dense(jnp.dtype(jnp.float32))
