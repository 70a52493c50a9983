"""The whole model: embed, repeat the blocks, norm, unembed."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies

from maxlm.config import BlockConfig, ModelConfig, Remat
from maxlm.config.remat import SAVED_NAMES
from maxlm.models import ops
from maxlm.models.attention import Contiguous
from maxlm.models.block import Block
from maxlm.models.moe import RouterStats
from maxlm.models.norms import RMSNorm
from maxlm.models.parameters import Initializer
from maxlm.models.pipeline import pipelined
from maxlm.sharding import Layout

Cache = tuple[Contiguous, ...]
"""One for each of the first blocks, L' = 1, then one for each entry of the block pattern, of all its repeats."""


class DecoderOutput(NamedTuple):
    hidden: jax.Array
    """[B, T, D] in the compute dtype, after the final norm."""
    cache: Cache | None
    """With these tokens added."""
    router: tuple[RouterStats | None, ...]
    """For each entry of the block pattern, stacked over the pattern's repeats; None where it has no experts."""


class _Repeats(NamedTuple):
    """What the loop over the pattern's repeats takes a slice of."""

    parameters: tuple[Any, ...]  # of each block of the pattern, stacked
    number: jax.Array  # int32 [L']


class _Item(NamedTuple):
    """What goes through the layers, which change x and the cache."""

    x: jax.Array
    cache: Cache | None  # of the blocks of the loop
    positions: jax.Array
    segment_ids: jax.Array | None
    seeds: jax.Array | None


class Decoder(nnx.Module):
    """A decoder-only transformer (Vaswani et al. 2017; LLaMA, arXiv:2302.13971).

    The layers of one kind are stacked: each parameter of block entry i has a leading dim of `config.repeats`, and one
    loop runs over that dim. `blocks["0"]` holds the first entry of the pattern, and so on. `first_blocks["0"]` is the
    layer before them, if there is one, and not stacked.
    """

    def __init__(self, config: ModelConfig, layout: Layout, key: jax.Array):
        self.config, self.layout = config, layout
        D, V = config.d_model, config.vocab_size
        outer_key, *block_keys = jax.random.split(key, 1 + len(config.blocks) + len(config.first_blocks))
        init = Initializer(outer_key, config.init_std)

        def make(blocks: tuple[BlockConfig, ...], keys: list[jax.Array], repeats: int | None) -> nnx.Dict:
            inits = [Initializer(key, config.init_std, repeats) for key in keys]
            return nnx.Dict({str(i): Block(block, config, layout, inits[i]) for i, block in enumerate(blocks)})

        self.embed = init.weight((V, D), ("vocab", "embed"))
        self.blocks = make(config.blocks, block_keys[: len(config.blocks)], config.repeats)
        if config.first_blocks:
            self.first_blocks = make(config.first_blocks, block_keys[len(config.blocks) :], None)
        self.final_norm = RMSNorm(D, "vector", config.norm_eps, init)
        if not config.tie_embeddings:
            self.unembed = init.weight((V, D), ("vocab", "embed"))

    def __call__(
        self,
        inputs: jax.Array,
        positions: jax.Array,
        segment_ids: jax.Array | None = None,
        cache: Cache | None = None,
        *,
        seeds: jax.Array | None = None,
        micro_batches: int = 1,
    ) -> DecoderOutput:
        """Final hidden states; multiply by `output_table` for logits.

        Args:
            inputs: int32 [B, T] token ids. With ring attention over the seq axis, all columns are in
                `ops.ring.zigzag_order`.
            positions: int32 [B, T], where each token stands in its document.
            segment_ids: int32 [B, T], the document of each token; tokens of different documents never meet.
            cache: from `empty_cache`; then the tokens continue what it holds, at their positions.
            seeds: uint32 [B], of the noise of each row's routers; None: no noise.
            micro_batches: parts that flow through the pipeline, where there is one.
        """
        dtype = jnp.dtype(self.config.compute_dtype.value)
        with jax.named_scope("embed"):
            x = ops.embed(self.layout, self.embed[...], inputs, dtype)
            x = self.layout.constrain(x, "batch", "residual_seq", "embed")

        n_first = len(self.config.first_blocks)
        first_cache, cache = (None, None) if cache is None else (cache[:n_first], cache[n_first:])
        item = _Item(x, first_cache, positions, segment_ids, seeds)
        if n_first:
            with jax.named_scope("first_blocks"):
                item = self._run_first(item)
                first_cache = item.cache
        with jax.named_scope("blocks"):
            item, router = self._run_pattern(item._replace(cache=cache), micro_batches)
        cache = None if first_cache is None or item.cache is None else first_cache + item.cache
        return DecoderOutput(self.layout.constrain(self.final_norm(item.x), "batch", "seq", "embed"), cache, router)

    def _run_first(self, item: _Item) -> _Item:
        """The layers before the pattern, one after the other."""
        graphs, parameters = _split(self.first_blocks)
        run = _pattern(self.config, graphs, in_loop=False)
        return run(item, _Repeats(parameters, jnp.int32(0)))[0]

    def _run_pattern(self, item: _Item, micro_batches: int) -> tuple[_Item, tuple[RouterStats | None, ...]]:
        """All repeats of the pattern, in a loop or a pipeline of loops."""
        graphs, parameters = _split(self.blocks)
        repeat = _pattern(self.config, graphs, in_loop=self.config.scan_layers)

        def run(repeats: _Repeats, item: _Item) -> tuple[_Item, tuple[RouterStats | None, ...]]:
            # Unrolled is the same loop with every turn written out, so that both have one set of parameters.
            return jax.lax.scan(repeat, item, repeats, unroll=1 if self.config.scan_layers else True)

        repeats = _Repeats(parameters, jnp.arange(self.config.repeats))
        if self.layout.mesh.shape["stage"] == 1:
            return run(repeats, item)
        if item.cache is not None:
            raise ValueError("a pipeline has no cache; decode on a mesh with stage = 1")
        return pipelined(self.layout, run, repeats, item, micro_batches=micro_batches)

    @property
    def output_table(self) -> jax.Array:
        """float32 [V, D]; logits are hidden @ output_table.T."""
        return self.embed[...] if self.config.tie_embeddings else self.unembed[...]

    def empty_cache(self, batch: int, length: int) -> Cache:
        """Room for at least `length` positions of `batch` sequences, in the compute dtype."""
        dtype = jnp.dtype(self.config.compute_dtype.value)
        room = ops.cache_room(length)

        def zeros(block: BlockConfig, layers: int) -> jax.Array:
            shape = (layers, batch, room, block.attention.n_kv_heads, block.attention.head_dim)
            return self.layout.constrain(jnp.zeros(shape, dtype), None, "batch", None, "kv_heads", None)

        kinds = [(block, 1) for block in self.config.first_blocks]
        kinds += [(block, self.config.repeats) for block in self.config.blocks]
        # Two arrays for each, as one that is donated twice would be refused.
        return tuple(Contiguous(zeros(*kind), zeros(*kind)) for kind in kinds)


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


def abstract_parameters(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Shape, format and sharding of every parameter, as `jax.ShapeDtypeStruct` in nested dicts."""
    shapes = jax.eval_shape(lambda: init_parameters(config, layout, jax.random.key(0)))
    shardings = layout.shardings(parameter_dims(abstract_decoder(config, layout)))
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, shapes, shardings)


def _split(blocks: nnx.Dict) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The structure of each block, and its parameters."""
    graphs, parameters = zip(*(nnx.split(blocks[str(i)]) for i in range(len(blocks))), strict=True)
    return graphs, parameters


def _pattern(
    config: ModelConfig, graphs: tuple[Any, ...], *, in_loop: bool
) -> Callable[[_Item, _Repeats], tuple[_Item, tuple[RouterStats | None, ...]]]:
    """The blocks of a pattern, one after the other. Each is rematerialised by itself: while the backward pass works on
    one, nothing of the others waits but their inputs and what the policy saves."""

    # What ties a block's second forward pass to the gradient that needs it. In a loop over single blocks the loop does.
    barrier = len(graphs) > 1 or not in_loop

    def block(graph: Any, item: _Item, cache: Contiguous | None, parameters: Any, number: jax.Array, i: int) -> tuple:
        keys = None if item.seeds is None else _row_keys(item.seeds, number * len(graphs) + i)
        return nnx.merge(graph, parameters)(item.x, item.positions, item.segment_ids, cache, number, keys)

    blocks = [_remat(config, functools.partial(block, graph, i=i), barrier) for i, graph in enumerate(graphs)]

    def run(item: _Item, repeat: _Repeats) -> tuple[_Item, tuple[RouterStats | None, ...]]:
        caches, stats = [], []
        for i, (block, parameters) in enumerate(zip(blocks, repeat.parameters, strict=True)):
            cache = None if item.cache is None else item.cache[i]
            x, cache, of_router = block(item._replace(cache=None), cache, parameters, repeat.number)
            item = item._replace(x=x)
            caches.append(cache)
            stats.append(of_router)
        return item._replace(cache=None if item.cache is None else tuple(caches)), tuple(stats)

    return run


def _row_keys(seeds: jax.Array, layer: jax.Array) -> jax.Array:
    """A random key [B] for each row in this layer, the same on every mesh and however the batch is cut."""
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), layer))(seeds)


def _remat(config: ModelConfig, body: Any, barrier: bool) -> Any:
    """The body with the config's rule for what the backward pass finds saved."""
    checkpoint = functools.partial(jax.checkpoint, body, prevent_cse=barrier)
    match config.remat:
        case Remat.NONE:
            return body
        case Remat.DOTS:
            dots = checkpoint_policies.dots_with_no_batch_dims_saveable  # not the experts' products, hence their name
            named = checkpoint_policies.save_only_these_names(*SAVED_NAMES[config.remat])
            return checkpoint(policy=checkpoint_policies.save_from_both_policies(dots, named))
        case Remat.FULL | Remat.QKV | Remat.NAMES | Remat.GLU:
            return checkpoint(policy=checkpoint_policies.save_only_these_names(*SAVED_NAMES[config.remat]))
        case Remat.OFFLOAD:
            return checkpoint(
                policy=checkpoint_policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(SAVED_NAMES[config.remat]),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
            )
        case _:
            assert_never(config.remat)
