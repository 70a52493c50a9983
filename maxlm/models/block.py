"""One layer of the decoder."""

from __future__ import annotations

import jax
from flax import nnx

from maxlm.config import BlockConfig, ModelConfig
from maxlm.models.attention import Attention, LayerCache
from maxlm.models.mlp import GluMlp
from maxlm.models.norms import RMSNorm
from maxlm.models.parameters import Initializer
from maxlm.sharding import Layout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x))."""

    def __init__(self, config: BlockConfig, model: ModelConfig, layout: Layout, init: Initializer):
        self.layout = layout
        self.attention_norm = RMSNorm(model.d_model, "vector", model.norm_eps, init)
        self.attention = Attention(config.attention, model, layout, init)
        self.mlp_norm = RMSNorm(model.d_model, "vector", model.norm_eps, init)
        self.mlp = GluMlp(config.ffn, model, layout, init)

    def __call__(
        self, x: jax.Array, positions: jax.Array, segment_ids: jax.Array | None, cache: LayerCache | None
    ) -> tuple[jax.Array, LayerCache | None]:
        """[B, T, D] -> [B, T, D] and the layer's cache; arguments as in Attention."""
        # Sequence parallelism: the sum lies sharded over the sequence, what enters a product is whole again.
        with jax.named_scope("attention"):
            normed = self.layout.constrain(self.attention_norm(x), "batch", "seq", "embed")
            update, cache = self.attention(normed, positions, segment_ids, cache)
            x += self.layout.constrain(update, "batch", "residual_seq", "embed")
        with jax.named_scope("mlp"):
            normed = self.layout.constrain(self.mlp_norm(x), "batch", "seq", "embed")
            x += self.layout.constrain(self.mlp(normed), "batch", "residual_seq", "embed")
        return x, cache
