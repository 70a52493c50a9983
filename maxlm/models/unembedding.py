"""What makes logits of hidden states: one object for training, evaluation and generation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import assert_never

import jax
import jax.numpy as jnp

from maxlm.models.linear import Int8, Weight


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Unembedding:
    """Logits are cap(scale * hidden @ table.T + bias), with cap(x) = soft_cap * tanh(x / soft_cap), as `LmHead` has it.

    `ops.logits` and `training/losses.py` make the product, each in its own way, and leave the rest to `finish`.
    """

    table: Weight
    """[V, D]; where rows are normalised, they are so here."""
    bias: jax.Array | None = None
    """float32 [V]."""
    scale: float | None = field(default=None, metadata={"static": True})
    soft_cap: float | None = field(default=None, metadata={"static": True})

    def finish(self, product: jax.Array) -> jax.Array:
        """hidden @ table.T -> logits, both float32 [..., V], or the same part of V that bias is."""
        logits = product if self.scale is None else self.scale * product
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)


def unit_rows(table: Weight) -> Weight:
    """Each row divided by its length (PyTorch's `normalize`, with its 1e-12 for rows of zeros), in float32."""
    match table:
        case Int8(values=values):  # a row's scale is its length's too
            length = jnp.linalg.norm(values.astype(jnp.float32), axis=1, keepdims=True)
            return Int8(values, 1 / jnp.maximum(length, 1))
        case jax.Array():
            wide = table.astype(jnp.float32)
            return wide * jax.lax.rsqrt(jnp.maximum(jnp.sum(wide * wide, axis=1, keepdims=True), 1e-24))
        case _:
            assert_never(table)
