"""Causal self-attention with grouped key/value heads."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm.config import AttentionConfig, ModelConfig
from maxlm.models import ops
from maxlm.models.norms import RMSNorm
from maxlm.models.parameters import Initializer
from maxlm.models.positions import rope_frequencies, rotate
from maxlm.sharding import Layout


class Contiguous(NamedTuple):
    """Keys and values of L' equal layers, slot s for position s. Layers change it in place: it is never taken apart."""

    k: jax.Array  # [L', B, S, K, H]
    v: jax.Array  # [L', B, S, K, H]

    def add(self, layer: jax.Array, k: jax.Array, v: jax.Array, first: jax.Array) -> Contiguous:
        """With keys and values [B, T, K, H] of one layer, row b from slot first[b] on."""
        return Contiguous(_write(self.k, layer, k, first), _write(self.v, layer, v, first))


class Attention(nnx.Module):
    """Queries, keys and values from x, softmax attention, and the way back to D."""

    def __init__(self, config: AttentionConfig, model: ModelConfig, layout: Layout, init: Initializer):
        self.config, self.kernels, self.layout = config, model.kernels, layout
        D, N, K, H = model.d_model, config.n_heads, config.n_kv_heads, config.head_dim
        self.q_proj = init.weight((D, N, H), ("embed", "heads", "head_dim"))
        self.k_proj = init.weight((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.v_proj = init.weight((D, K, H), ("embed", "kv_heads", "head_dim"))
        self.o_proj = init.weight((N, H, D), ("heads", "head_dim", "embed"), scale=(2 * model.n_layers) ** -0.5)
        if config.qkv_bias:
            self.q_bias = init.zeros((N, H), ("heads", "head_dim"))
            self.k_bias = init.zeros((K, H), ("kv_heads", "head_dim"))
            self.v_bias = init.zeros((K, H), ("kv_heads", "head_dim"))
        if config.out_bias:
            self.o_bias = init.zeros((D,), ("vector",))
        if config.qk_norm:
            self.q_norm = RMSNorm(H, "head_dim", model.norm_eps, init)
            self.k_norm = RMSNorm(H, "head_dim", model.norm_eps, init)

    def __call__(
        self,
        x: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None,
        cache: Contiguous | None,
        layer: jax.Array,
    ) -> tuple[jax.Array, Contiguous | None]:
        """Attend within the sequence, or to a cache.

        Args:
            x: [B, T, D].
            positions: int32 [B, T], where each token stands in its document.
            segment_ids: int32 [B, T], the document of each token; None: one document.
            cache: keys and values of positions before these; None in training. The T tokens are written into it at
                their positions, which must be consecutive.
            layer: int32, this layer's place in the cache.

        Returns:
            [B, T, D], and the cache with these tokens.
        """
        config, layout = self.config, self.layout
        q = ops.project(layout, "btd,dnh->btnh", x, self.q_proj[...])
        k = ops.project(layout, "btd,dkh->btkh", x, self.k_proj[...])
        v = ops.project(layout, "btd,dkh->btkh", x, self.v_proj[...])
        if config.qkv_bias:
            q, k, v = (
                y + bias[...].astype(y.dtype) for y, bias in ((q, self.q_bias), (k, self.k_bias), (v, self.v_bias))
            )
        if config.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        if config.rope is not None:
            angles = positions[..., None].astype(jnp.float32) * rope_frequencies(config.rope, config.head_dim)
            q, k = rotate(q, angles), rotate(k, angles)
        q, k, v = (checkpoint_name(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))

        if cache is None:
            out = ops.attention(
                layout, q, k, v, window=config.window, segment_ids=segment_ids, backend=self.kernels.attention
            )
        else:
            cache = cache.add(layer, k, v, positions[:, 0])
            out = ops.attention_to_cache(layout, q, cache.k, cache.v, layer, positions[:, 0], window=config.window)
        y = ops.project(layout, "btnh,nhd->btd", out, self.o_proj[...])
        if config.out_bias:
            y += self.o_bias[...].astype(y.dtype)
        return y, cache


def _write(cache: jax.Array, layer: jax.Array, new: jax.Array, first: jax.Array) -> jax.Array:
    """Put new [B, T, K, H] into one layer of a cache [L', B, S, K, H], row b from slot first[b] on."""
    # Rows are a batching dim, so that devices that each have some of the rows write their own.
    dims = jax.lax.ScatterDimensionNumbers(
        update_window_dims=(1, 2, 3),
        inserted_window_dims=(0,),
        scatter_dims_to_operand_dims=(0, 2),
        operand_batching_dims=(1,),
        scatter_indices_batching_dims=(0,),
    )
    places = jnp.stack([jnp.broadcast_to(layer, first.shape), first], -1)
    return jax.lax.scatter(
        cache, places, new.astype(cache.dtype), dims, unique_indices=True, mode=jax.lax.GatherScatterMode.CLIP
    )
