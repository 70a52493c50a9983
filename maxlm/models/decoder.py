"""The whole model: embed, repeat the blocks, norm, unembed."""

from __future__ import annotations

import functools
from typing import Any, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies

from maxlm.config import ModelConfig, Remat
from maxlm.models import ops
from maxlm.models.attention import LayerCache
from maxlm.models.block import Block
from maxlm.models.norms import RMSNorm
from maxlm.models.parameters import Initializer
from maxlm.sharding import Layout

Cache = tuple[LayerCache, ...]
"""One LayerCache for each entry of the block pattern, stacked over the pattern's repeats: k and v [L', B, S, K, H]."""


class Decoder(nnx.Module):
    """A decoder-only transformer (Vaswani et al. 2017; LLaMA, arXiv:2302.13971).

    The layers of one kind are stacked: each parameter of block entry i has a leading dim of n_layers / len(blocks), and
    one loop runs over that dim. `blocks["0"]` holds the first entry of the pattern, and so on.
    """

    def __init__(self, config: ModelConfig, layout: Layout, key: jax.Array):
        self.config, self.layout = config, layout
        D, V, repeats = config.d_model, config.vocab_size, config.n_layers // len(config.blocks)
        outer_key, *block_keys = jax.random.split(key, 1 + len(config.blocks))
        init = Initializer(outer_key, config.init_std)
        self.embed = init.weight((V, D), ("vocab", "embed"))
        self.blocks = nnx.Dict(
            {
                str(i): Block(block, config, layout, Initializer(block_key, config.init_std, repeats))
                for i, (block, block_key) in enumerate(zip(config.blocks, block_keys, strict=True))
            }
        )
        self.final_norm = RMSNorm(D, "vector", config.norm_eps, init)
        if not config.tie_embeddings:
            self.unembed = init.weight((V, D), ("vocab", "embed"))

    def __call__(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None]:
        """Final hidden states; multiply by `output_table` for logits.

        Args:
            inputs: int32 [B, T] token ids.
            positions: int32 [B, T], where each token stands in its document.
            segment_ids: int32 [B, T], the document of each token; tokens of different documents never meet.
            cache: from `empty_cache`; then the tokens continue what it holds, at their positions.

        Returns:
            [B, T, D] in the compute dtype, after the final norm, and the cache with these tokens added.
        """
        dtype = jnp.dtype(self.config.compute_dtype.value)
        with jax.named_scope("embed"):
            x = ops.embed(self.layout, self.embed[...], inputs, dtype)
            x = self.layout.constrain(x, "batch", "residual_seq", "embed")

        graphs, parameters = zip(*(nnx.split(self.blocks[str(i)]) for i in range(len(self.config.blocks))), strict=True)

        def one_repeat(x: jax.Array, layer: tuple[Any, Cache | None]) -> tuple[jax.Array, Cache | None]:
            layer_parameters, layer_caches = layer
            new_caches = []
            for i, (graph, values) in enumerate(zip(graphs, layer_parameters, strict=True)):
                block_cache = None if layer_caches is None else layer_caches[i]
                x, new_cache = nnx.merge(graph, values)(x, positions, segment_ids, block_cache)
                new_caches.append(new_cache)
            return x, None if layer_caches is None else tuple(new_caches)

        body = _remat(one_repeat, self.config) if cache is None else one_repeat
        # Unrolled is the same loop with every turn written out, so that both have one set of parameters.
        with jax.named_scope("blocks"):
            x, cache = jax.lax.scan(body, x, (parameters, cache), unroll=1 if self.config.scan_layers else True)
        return self.layout.constrain(self.final_norm(x), "batch", "seq", "embed"), cache

    @property
    def output_table(self) -> jax.Array:
        """float32 [V, D]; logits are hidden @ output_table.T."""
        return self.embed[...] if self.config.tie_embeddings else self.unembed[...]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for `length` positions of `batch` sequences, in the compute dtype."""
        dtype, repeats = jnp.dtype(self.config.compute_dtype.value), self.config.n_layers // len(self.config.blocks)
        caches = []
        for block in self.config.blocks:
            shape = (repeats, batch, length, block.attention.n_kv_heads, block.attention.head_dim)
            room = self.layout.constrain(jnp.zeros(shape, dtype), None, "batch", None, "kv_heads", None)
            caches.append(LayerCache(room, room))
        return tuple(caches)


def abstract_decoder(config: ModelConfig, layout: Layout) -> Decoder:
    """The decoder with shapes in place of arrays; takes no memory."""
    return nnx.eval_shape(lambda: Decoder(config, layout, jax.random.key(0)))


def init_parameters(config: ModelConfig, layout: Layout, key: jax.Array) -> dict[str, Any]:
    """Initial parameters as nested dicts of float32 arrays; the same for a key on every mesh."""
    return nnx.to_pure_dict(nnx.split(Decoder(config, layout, key))[1])


def parameter_dims(decoder: Decoder) -> dict[str, Any]:
    """The names of every parameter's dims, in nested dicts like those of `init_parameters`."""
    state = nnx.split(decoder)[1]
    is_variable = lambda leaf: isinstance(leaf, nnx.Variable)
    return nnx.to_pure_dict(jax.tree.map(lambda variable: variable.dims, state, is_leaf=is_variable))


def _remat(body: Any, config: ModelConfig) -> Any:
    """The loop body with the config's rule for what the backward pass finds saved."""
    checkpoint = functools.partial(jax.checkpoint, body, prevent_cse=not config.scan_layers)
    names = ("query", "key", "value", "attention_out", "attention_lse")
    match config.remat:
        case Remat.NONE:
            return body
        case Remat.DOTS:
            dots = checkpoint_policies.dots_with_no_batch_dims_saveable
            return checkpoint(
                policy=checkpoint_policies.save_from_both_policies(
                    dots, checkpoint_policies.save_only_these_names(*names)
                )
            )
        case Remat.NAMES:
            return checkpoint(policy=checkpoint_policies.save_only_these_names(*names))
        case Remat.FULL:
            return checkpoint(policy=checkpoint_policies.nothing_saveable)
        case Remat.OFFLOAD:
            return checkpoint(
                policy=checkpoint_policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(names),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
            )
        case _:
            assert_never(config.remat)
