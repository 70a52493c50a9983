"""What makes logits of hidden states: one object for training, evaluation and generation."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import jax
import jax.numpy as jnp

from maxlm.models.weights.kinds import Weight

_NEVER = -1e9
"""Added to a logit: the exponential is 0, and nothing times it is NaN."""


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

    def cooled(self, temperature: float) -> Unembedding:
        """What makes logits / temperature."""
        if temperature == 1:
            return self
        return replace(
            self,
            scale=(1 if self.scale is None else self.scale) / temperature,
            bias=None if self.bias is None else self.bias / temperature,
            soft_cap=None if self.soft_cap is None else self.soft_cap / temperature,
        )

    def only(self, n: int) -> Unembedding:
        """What makes logits by which no id from n on comes."""
        if n >= self.table.shape[0]:
            return self
        bias = jnp.zeros(self.table.shape[0]) if self.bias is None else self.bias
        return replace(self, bias=jnp.where(jnp.arange(len(bias)) < n, bias, _NEVER))

    def finish(self, product: jax.Array) -> jax.Array:
        """hidden @ table.T -> logits, both float32 [..., V], or the same part of V that bias is."""
        logits = product if self.scale is None else self.scale * product
        logits = logits if self.bias is None else logits + self.bias
        return logits if self.soft_cap is None else self.soft_cap * jnp.tanh(logits / self.soft_cap)
