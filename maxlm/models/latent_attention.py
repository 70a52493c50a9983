"""Causal self-attention to keys and values that are made from latents."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm import shapes
from maxlm.config import LatentAttention, ModelConfig
from maxlm.models import ops
from maxlm.models.execution import Execution
from maxlm.models.kv_cache import LatentBlocks, LayerCache
from maxlm.models.norms import NormLayer
from maxlm.models.parameters import Initializer
from maxlm.models.positions import rotate_both
from maxlm.models.tokens import Tokens


class LatentAttentionLayer(nnx.Module):
    """DeepSeek-V2's attention (arXiv:2405.04434, equations 9 to 19, and its appendix C with the order of products that
    decoding takes)."""

    q_down_proj: nnx.Param
    q_proj: nnx.Param
    kv_down_proj: nnx.Param
    k_rope_proj: nnx.Param
    k_proj: nnx.Param
    v_proj: nnx.Param
    o_proj: nnx.Param
    q_norm: NormLayer
    kv_norm: NormLayer

    def __init__(self, config: LatentAttention, model: ModelConfig, init: Initializer):
        self.config, self.max_seq_len = config, model.max_seq_len
        init.declare(self, shapes.attention(config, model))
        for name, dim, size in shapes.head_norms(config):
            setattr(self, name, NormLayer(model.norm, dim, size, init))

    def __call__(
        self, x: jax.Array, tokens: Tokens, how: Execution, cache: LayerCache | None, layer: jax.Array
    ) -> tuple[jax.Array, LayerCache | None]:
        """As of `GroupedQueryLayer`."""
        layout = how.layout
        q, latents, k_rope = self._queries(x, how), self._latents(x, how), self._rotated_keys(x, how)
        content, rotated = jnp.split(q, [self.config.content_head_dim], axis=-1)
        rotated, k_rope = rotate_both(
            self.config.position, self.config.rope_head_dim, self.max_seq_len, tokens, rotated, k_rope
        )
        q = jnp.concatenate([content, rotated], axis=-1)
        if cache is None:
            k, v = self._keys_and_values(latents, k_rope, how)
            q, k, v = (checkpoint_name(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))
            out = ops.attention(
                layout,
                q,
                k,
                v,
                self._scores(),
                segment_ids=tokens.segment_ids,
                visible_to=tokens.visible_to,
                backend=how.kernels.attention,
            )
        else:
            assert isinstance(cache, LatentBlocks)
            kept = jnp.concatenate([latents, k_rope[:, :, 0]], axis=-1)
            out, cache = self._to_latents(q, kept, cache, layer, tokens, how)
        return ops.project(layout, "btnh,nhd->btd", out, self.o_proj[...]), cache

    def _queries(self, x: jax.Array, how: Execution) -> jax.Array:
        """[B, T, N, content_head_dim + rope_head_dim], not rotated yet."""
        if self.config.query_rank is not None:
            x = self.q_norm(ops.project(how.layout, "btd,dr->btr", x, self.q_down_proj[...]))
        return ops.project(how.layout, "btd,dnh->btnh", x, self.q_proj[...])

    def _latents(self, x: jax.Array, how: Execution) -> jax.Array:
        """[B, T, kv_rank], normalised."""
        return self.kv_norm(ops.project(how.layout, "btd,dr->btr", x, self.kv_down_proj[...]))

    def _rotated_keys(self, x: jax.Array, how: Execution) -> jax.Array:
        """[B, T, 1, rope_head_dim], not rotated yet."""
        return ops.project(how.layout, "btd,dh->bth", x, self.k_rope_proj[...])[:, :, None]

    def _keys_and_values(self, latents: jax.Array, k_rope: jax.Array, how: Execution) -> tuple[jax.Array, jax.Array]:
        """[B, S, N, head_dim] and [B, S, N, value_head_dim] of all heads, from latents and the rotated keys."""
        content = ops.project(how.layout, "btr,rnh->btnh", latents, self.k_proj[...])
        rotated = jnp.broadcast_to(k_rope, (*content.shape[:3], k_rope.shape[-1]))
        v = ops.project(how.layout, "btr,rnh->btnh", latents, self.v_proj[...])
        return jnp.concatenate([content, rotated], axis=-1), v

    def _to_latents(
        self, q: jax.Array, kept: jax.Array, cache: LatentBlocks, layer: jax.Array, tokens: Tokens, how: Execution
    ) -> tuple[jax.Array, LatentBlocks]:
        """(W_k l) . q = l . (W_k^T q), so that queries see the latents themselves as the keys, and a part of them as
        the values, of one head for all."""
        assert tokens.pages is not None
        config, layout = self.config, how.layout
        content, rotated = jnp.split(q, [config.content_head_dim], axis=-1)
        plain = lambda w: ops.dense(layout, w, q.dtype).astype(q.dtype)
        product = lambda subscripts: lambda w, x: jnp.einsum(subscripts, x, plain(w))
        content = ops.in_layer(product("btnh,rnh->btnr"), self.k_proj[...], content)
        out, [latents] = ops.attention_to_blocks(
            layout,
            jnp.concatenate([content, rotated], axis=-1),
            [kept[:, :, None]],
            cache,
            layer,
            tokens.pages.tables[shapes.window_of(config)],
            tokens.pages.slots,
            tokens.positions[:, 0],
            self._scores(),
            tree=tokens.pages.tree,
            one_head_for_all=True,
        )
        out = ops.in_layer(product("btnr,rnh->btnh"), self.v_proj[...], out[..., : config.kv_rank])
        return out, LatentBlocks(latents)

    def _scores(self) -> ops.Scores:
        config = self.config
        return ops.Scores(mask=ops.causal(), scale=config.scale or config.key_head_dim**-0.5)
