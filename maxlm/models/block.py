"""One layer of the decoder."""

from __future__ import annotations

from typing import assert_never

import jax
from flax import nnx

from maxlm.config import BlockConfig, GluConfig, ModelConfig, MoeConfig
from maxlm.models.attention import Attention, Contiguous
from maxlm.models.mlp import GluMlp
from maxlm.models.moe import MoE, RouterStats
from maxlm.models.norms import RMSNorm
from maxlm.models.parameters import Initializer
from maxlm.sharding import Layout


class Block(nnx.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), where the MLP may be a mixture of experts."""

    def __init__(self, config: BlockConfig, model: ModelConfig, layout: Layout, init: Initializer):
        self.layout = layout
        self.attention_norm = RMSNorm(model.d_model, "vector", model.norm_eps, init)
        self.attention = Attention(config.attention, model, layout, init)
        self.mlp_norm = RMSNorm(model.d_model, "vector", model.norm_eps, init)
        match config.ffn:
            case GluConfig():
                self.mlp: GluMlp | MoE = GluMlp(config.ffn, model, layout, init)
            case MoeConfig():
                self.mlp = MoE(config.ffn, model, layout, init)
            case _:
                assert_never(config.ffn)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: Contiguous | None,
        layer: jax.Array,
        keys: jax.Array | None,
    ) -> tuple[jax.Array, Contiguous | None, RouterStats | None]:
        """[B, T, D] -> [B, T, D], the cache with this layer's keys, and what its router did if it has one.

        Arguments as in Attention, and keys: a random key [B] for each row, for noise in training; None: no noise.
        """
        # Sequence parallelism: the sum lies sharded over the sequence, what enters a product is whole again.
        with jax.named_scope("attention"):
            normed = self.layout.constrain(self.attention_norm(x), "batch", "seq", "embed")
            update, cache = self.attention(normed, positions, segment_ids, cache, layer)
            x += self.layout.constrain(update, "batch", "residual_seq", "embed")
        with jax.named_scope("mlp"):
            normed = self.layout.constrain(self.mlp_norm(x), "batch", "seq", "embed")
            stats = None
            match self.mlp:
                case MoE():
                    update, stats = self.mlp(normed, keys, decoding=cache is not None)
                case GluMlp():
                    update = self.mlp(normed)
                case _:
                    assert_never(self.mlp)
            x += self.layout.constrain(update, "batch", "residual_seq", "embed")
        return x, cache, stats
