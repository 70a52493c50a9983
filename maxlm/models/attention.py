"""Causal self-attention with grouped key/value heads."""

from __future__ import annotations

import functools
from typing import assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from maxlm import shapes
from maxlm.config import Alibi, GlmRope, GroupedQuery, ModelConfig, QkNorm, RelativeBias, RelativeSinusoids, Rope
from maxlm.models import ops
from maxlm.models.execution import Execution
from maxlm.models.kv_cache import KeyValueBlocks, LayerCache
from maxlm.models.norms import NormLayer
from maxlm.models.parameters import Initializer
from maxlm.models.positions import alibi_slopes, log_length_factors, relative_sinusoids, rotate_both, rotate_halves
from maxlm.models.tokens import Tokens
from maxlm.sharding import Layout


class GroupedQueryLayer(nnx.Module):
    """Queries, keys and values from x, softmax attention, and the way back to D."""

    q_proj: nnx.Param
    k_proj: nnx.Param
    v_proj: nnx.Param
    o_proj: nnx.Param
    q_bias: nnx.Param
    k_bias: nnx.Param
    v_bias: nnx.Param
    o_bias: nnx.Param
    relative_bias: nnx.Param
    content_bias: nnx.Param
    distance_bias: nnx.Param
    distance_proj: nnx.Param
    sinks: nnx.Param
    q_norm: NormLayer
    k_norm: NormLayer

    def __init__(self, config: GroupedQuery, model: ModelConfig, init: Initializer):
        self.config, self.max_seq_len = config, model.max_seq_len
        init.declare(self, shapes.attention(config, model))
        for name, dim, size in shapes.head_norms(config):
            setattr(self, name, NormLayer(model.norm, dim, size, init))

    def __call__(
        self, x: jax.Array, tokens: Tokens, how: Execution, cache: LayerCache | None, layer: jax.Array
    ) -> tuple[jax.Array, LayerCache | None]:
        """Attend within the sequence, or to a cache.

        Args:
            x: [B, T, D].
            tokens: positions, segments and reach of each token.
            how: mesh, number format and kernels.
            cache: keys and values of the positions before; None in training. With one, a row is a single token, T = 1,
                and is written where `tokens.pages` says.
            layer: int32, this layer's place in the cache.

        Returns:
            [B, T, D], and the cache with these tokens.
        """
        config, layout = self.config, how.layout
        biases = (self.q_bias[...], self.k_bias[...], self.v_bias[...]) if config.qkv_bias else (None, None, None)
        q = ops.project(layout, "btd,dnh->btnh", x, self.q_proj[...], biases[0])
        k = ops.project(layout, "btd,dkh->btkh", x, self.k_proj[...], biases[1])
        v = ops.project(layout, "btd,dkh->btkh", x, self.v_proj[...], biases[2])
        q, k = self._placed(*self._normed(q, k), tokens, layout)
        k, v = (ops.begun(w, y, tokens.positions) for w, y in ((self.k_proj[...], k), (self.v_proj[...], v)))
        q, k, v = (checkpoint_name(y, name) for y, name in ((q, "query"), (k, "key"), (v, "value")))

        if cache is None:
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
            assert isinstance(cache, KeyValueBlocks) and tokens.pages is not None
            table, positions = tokens.pages.tables[shapes.window_of(config)], tokens.positions[:, 0]
            rows = tokens.pages.slots, positions
            out, arrays = ops.attention_to_blocks(
                layout, q, (k, v), cache, layer, table, *rows, self._scores(), tree=tokens.pages.tree
            )
            cache = KeyValueBlocks(*arrays)
        out = ops.prompted(self.q_proj[...], q, out, functools.partial(self._unplaced, layout), self._scale)
        out_bias = self.o_bias[...] if config.out_bias else None
        return ops.project(layout, "btnh,nhd->btd", out, self.o_proj[...], out_bias), cache

    def _unplaced(self, layout: Layout, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of vectors that stand nowhere: [B, T, D] -> [B, T, K, H] twice."""
        biases = (self.k_bias[...], self.v_bias[...]) if self.config.qkv_bias else (None, None)
        k = ops.project(layout, "btd,dkh->btkh", x, self.k_proj[...], biases[0])
        v = ops.project(layout, "btd,dkh->btkh", x, self.v_proj[...], biases[1])
        return self._normed(k, k)[1] if self.config.qk_norm is QkNorm.HEADS else k, v

    def _normed(self, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Queries and keys, after their norms."""
        match self.config.qk_norm:
            case None:
                return q, k
            case QkNorm.HEADS:
                return self.q_norm(q), self.k_norm(k)
            case QkNorm.WHOLE:
                together = lambda norm, x: norm(x.reshape(*x.shape[:2], -1)).reshape(x.shape)
                return together(self.q_norm, q), together(self.k_norm, k)
            case _:
                assert_never(self.config.qk_norm)

    def _placed(self, q: jax.Array, k: jax.Array, tokens: Tokens, layout: Layout) -> tuple[jax.Array, jax.Array]:
        """Queries and keys that know where they stand, if their own values tell it."""
        config = self.config
        match config.position:
            case Rope() as rope:
                q, k = rotate_both(rope, config.head_dim, self.max_seq_len, tokens, q, k)
            case GlmRope() as rope:
                q, k = rotate_halves(rope, tokens, q, k)
            case RelativeSinusoids():
                biased = q + self.distance_bias[...].astype(q.dtype)
                weights = ops.dense(layout, self.distance_proj[...], q.dtype)
                weights = jnp.einsum("btnh,nhs->btns", biased, weights.astype(q.dtype))
                of_q, of_k = relative_sinusoids(weights, tokens.positions)
                of_k = jnp.broadcast_to(of_k[:, :, None], (*k.shape[:-1], of_k.shape[-1]))
                q = jnp.concatenate([q + self.content_bias[...].astype(q.dtype), of_q], axis=-1)
                k = jnp.concatenate([k, of_k], axis=-1)
            case Alibi() | RelativeBias() | None:  # in the scores
                pass
            case _:
                assert_never(config.position)
        if config.log_length is not None:
            q = (q * log_length_factors(tokens.positions, config.log_length)[..., None, None]).astype(q.dtype)
        return q, k

    @property
    def _scale(self) -> float:
        """Of the scores."""
        return self.config.scale or self.config.head_dim**-0.5

    def _scores(self) -> ops.Scores:
        """All that shapes the scores, beside queries and keys."""
        config = self.config
        slopes = bias = None
        match config.position:
            case Alibi():
                slopes = jnp.asarray(alibi_slopes(config.n_heads))
            case RelativeBias(max_distance=max_distance):
                bias = ops.DistanceBias(self.relative_bias[...], max_distance=max_distance)
            case Rope() | GlmRope() | RelativeSinusoids() | None:
                pass
            case _:
                assert_never(config.position)
        return ops.Scores(
            mask=ops.causal(config.window, config.pattern),
            scale=self._scale,
            soft_cap=config.soft_cap,
            alibi_slopes=slopes,
            relative_bias=bias,
            sinks=self.sinks[...] if config.sinks else None,
        )
