"""The whole model: embed, repeat the blocks, norm, and the head."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, assert_never

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_policies

from maxlm import shapes
from maxlm.config import BaseFormat, BlockConfig, Learned, LmHead, ModelConfig, Remat, Sinusoidal
from maxlm.config.remat import SAVED_NAMES
from maxlm.models import ops
from maxlm.models.adapters import adapted, base_of, begin, composed, held
from maxlm.models.block import Block
from maxlm.models.execution import Execution
from maxlm.models.kv_cache import Cache, LayerCache
from maxlm.models.medusa import MedusaHead
from maxlm.models.moe import RouterStats
from maxlm.models.mtp import MtpModule
from maxlm.models.norms import NormLayer
from maxlm.models.parameters import Initializer, declared
from maxlm.models.pipeline import pipelined
from maxlm.models.positions import sinusoids
from maxlm.models.tokens import Tokens
from maxlm.models.unembedding import Unembedding
from maxlm.models.weights.by_layer import slices
from maxlm.models.weights.holding import shardings
from maxlm.models.weights.kinds import Weight
from maxlm.models.weights.low_rank import with_keys
from maxlm.sharding import Layout


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
    tokens: Tokens


class Decoder(nnx.Module):
    """A decoder-only transformer (Vaswani et al. 2017; LLaMA, arXiv:2302.13971).

    The layers of one kind are stacked: each parameter of block entry i has a leading dim of `config.repeats`, and one
    loop runs over that dim. `blocks["0"]` holds the first entry of the pattern, and so on. `first_blocks["0"]` is the
    layer before them, if there is one, and not stacked.
    """

    embed: nnx.Param
    embedded_position: nnx.Param
    unembed: nnx.Param
    unembed_bias: nnx.Param
    score: nnx.Param
    classes: nnx.Param
    log_scale: nnx.Param

    def __init__(self, config: ModelConfig, key: jax.Array):
        self.config = config
        depth = 0 if config.mtp is None else config.mtp.depth
        outer_key, *block_keys = jax.random.split(key, 1 + len(config.blocks) + len(config.first_blocks) + depth)
        init = Initializer(outer_key)

        def make(blocks: tuple[BlockConfig, ...], inits: list[Initializer]) -> nnx.Dict:
            return nnx.Dict({str(i): Block(block, config, inits[i]) for i, block in enumerate(blocks)})

        init.declare(self, shapes.embedding(config))
        if config.embedding_norm:
            self.embedding_norm = NormLayer(config.norm, "vector", config.d_model, init)
        first, entries = len(config.first_blocks), len(config.blocks)
        places = [range(first + i + 1, config.n_layers + 1, entries) for i in range(entries)]
        stacks = zip(block_keys[:entries], places, strict=True)
        self.blocks = make(config.blocks, [Initializer(key, layers, stacked=True) for key, layers in stacks])
        if config.first_blocks:
            singles = enumerate(block_keys[entries : entries + first], start=1)
            self.first_blocks = make(config.first_blocks, [Initializer(key, (place,)) for place, key in singles])
        if config.final_norm:
            self.final_norm = NormLayer(config.norm, "vector", config.d_model, init)
        init.declare(self, shapes.head(config))
        if config.medusa is not None:
            self.medusa = nnx.Dict({str(k): MedusaHead(config, init) for k in range(config.medusa.n_heads)})
        if depth:
            further = enumerate(block_keys[entries + first :], start=1)
            modules = [MtpModule(config, Initializer(key, (config.n_layers + k,))) for k, key in further]
            self.mtp = nnx.Dict({str(k): module for k, module in enumerate(modules)})

    def embeddings(self, ids: jax.Array, tokens: Tokens, how: Execution) -> jax.Array:
        """What the layers begin with: int32 [B, T] token ids -> [B, T, D] in the compute dtype."""
        with jax.named_scope("embed"):
            x = ops.embed(how.layout, ops.bare(self.embed[...]), ids, how.dtype)
            x = ops.begun(self.embed[...], x, tokens.positions)
            if self.config.embedding_scale is not None:
                x *= jnp.asarray(self.config.embedding_scale, x.dtype)
            match self.config.embedded_position:
                case Learned(offset=offset):
                    places = tokens.positions + offset if offset else tokens.positions
                    x += self.embedded_position[...][places].astype(x.dtype)
                case Sinusoidal():
                    x += sinusoids(tokens.positions, self.config.d_model).astype(x.dtype)
                case None:
                    pass
                case _:
                    assert_never(self.config.embedded_position)
            x = self.embedding_norm(x) if self.config.embedding_norm else x
            return how.layout.constrain(x, "batch", "residual_seq", "embed")

    def __call__(self, x: jax.Array, tokens: Tokens, how: Execution, cache: Cache | None = None) -> DecoderOutput:
        """Final hidden states; `unembedding` makes logits of them.

        Args:
            x: [B, T, D], from `embeddings`, or made of other inputs. With ring attention over the seq axis, all columns
                are in `ops.ring.zigzag_order`, as those of `tokens`.
            tokens: what the model knows of them.
            how: mesh, number format, rematerialisation, kernels.
            cache: from `empty_cache`; then every row is one token, T = 1, which continues the text in its slot.
        """
        n_first = len(self.config.first_blocks)
        first_cache, cache = (None, None) if cache is None else (cache[:n_first], cache[n_first:])
        item = _Item(x, first_cache, tokens)
        if n_first:
            with jax.named_scope("first_blocks"):
                item = self._run_first(item._replace(tokens=_of_first(tokens)), how)
                first_cache = item.cache
        with jax.named_scope("blocks"):
            item, router = self._run_pattern(item._replace(cache=cache, tokens=tokens), how)
        cache = None if first_cache is None or item.cache is None else first_cache + item.cache
        x = self.final_norm(item.x) if self.config.final_norm else item.x
        return DecoderOutput(how.layout.constrain(x, "batch", "seq", "embed"), cache, router)

    def _run_first(self, item: _Item, how: Execution) -> _Item:
        """The layers before the pattern, one after the other."""
        graphs, parameters = _split(self.first_blocks)
        return _pattern(how, graphs, in_loop=False)(item, _Repeats(parameters, jnp.int32(0)))[0]

    def _run_pattern(self, item: _Item, how: Execution) -> tuple[_Item, tuple[RouterStats | None, ...]]:
        """All repeats of the pattern, in a loop or a pipeline of loops."""
        graphs, parameters = _split(self.blocks)
        scan = how.config.scan_layers
        repeat = _pattern(how, graphs, in_loop=scan)

        def run(repeats: _Repeats, item: _Item) -> tuple[_Item, tuple[RouterStats | None, ...]]:
            sliced, of_layer = slices(repeats.parameters)
            turn = lambda item, one: repeat(item, one._replace(parameters=of_layer(one.parameters)))
            # Unrolled is the same loop with every turn written out, so that both have one set of parameters.
            return jax.lax.scan(turn, item, repeats._replace(parameters=sliced), unroll=1 if scan else True)

        repeats = _Repeats(parameters, jnp.arange(self.config.repeats))
        if how.layout.mesh.shape["stage"] == 1:
            return run(repeats, item)
        if item.cache is not None:
            raise ValueError("a pipeline has no cache; decode on a mesh with stage = 1")
        return pipelined(how.layout, run, repeats, item, micro_batches=how.micro_batches)

    def look(self, x: jax.Array, tokens: Tokens, how: Execution, of: Callable[[jax.Array], Any]) -> dict[str, Any]:
        """What `of` makes of each activation [B, T, D] of a forward pass: of `embeddings` and `hidden`, the first and
        the last, and stacked over the layers [L, ...], in their order, of the outputs of `attention` and `mlp` and of
        the residual stream after each `block`. For looking at a model, not for training it: nothing is rematerialised.

        Arguments as of a call.
        """

        def turn(graphs: tuple[Any, ...], tokens: Tokens, x: jax.Array, repeat: _Repeats) -> tuple[jax.Array, Any]:
            layers = []
            for i, (graph, parameters) in enumerate(zip(graphs, repeat.parameters, strict=True)):
                found: dict[str, Any] = {}
                keys = _keys(tokens, repeat.number * len(graphs) + i)
                layer = nnx.merge(graph, with_keys(parameters, keys))
                see = lambda name, x, found=found: found.update({name: of(x)})
                x = layer(x, tokens, how, None, repeat.number, keys, see)[0]
                layers.append(found | {"block": of(x)})
            return x, _stacked(layers)

        seen = {"embeddings": of(x)}
        graphs, parameters = _split(self.blocks)
        run = functools.partial(turn, graphs, tokens)
        first = []
        if self.config.first_blocks:
            of_first, singles = _split(self.first_blocks)
            x, layers = turn(of_first, _of_first(tokens), x, _Repeats(singles, jnp.int32(0)))
            first.append(layers)
        x, layers = jax.lax.scan(run, x, _Repeats(parameters, jnp.arange(self.config.repeats)))
        in_order = jax.tree.map(lambda stack: stack.reshape(-1, *stack.shape[2:]), layers)
        seen |= jax.tree.map(lambda *stacks: jnp.concatenate(stacks), *first, in_order)
        return seen | {"hidden": of(self.final_norm(x) if self.config.final_norm else x)}

    @property
    def unembedding(self) -> Unembedding:
        """What makes logits of hidden states. With an LmHead, or one beside another head."""
        head = self.config.lm_head
        if head is None:
            raise ValueError(f"a model with {self.config.head} has no logits")
        table: Weight = ops.bare(self.embed[...]) if head.tied else self.unembed[...]
        table = ops.unit_rows(table) if head.normalized else table
        bias = self.unembed_bias[...] if head.bias else None
        scale = head.scale if self.config.wider == 1 else (head.scale or 1.0) / self.config.wider
        return Unembedding(table, bias, scale, head.soft_cap)

    def later(self, hidden: jax.Array, how: Execution) -> list[tuple[jax.Array, Unembedding]]:
        """Of each Medusa head k = 1, 2, ... what makes logits of the token k places after the next one.

        Args:
            hidden: [B, T, D], of `DecoderOutput`.
            how: mesh and number format.
        """
        assert self.config.medusa is not None and isinstance(self.config.head, LmHead)
        one = lambda k: self.medusa[str(k)](hidden, self.unembedding, how, normalized=self.config.head.normalized)
        return [one(k) for k in range(self.config.medusa.n_heads)]

    def further(
        self, hidden: jax.Array, following: Sequence[tuple[jax.Array, jax.Array]], tokens: Tokens, how: Execution
    ) -> list[tuple[jax.Array, RouterStats | None]]:
        """Of each module of `mtp`, k = 1, 2, ..., states [B, T, D] of which `unembedding` makes logits of the token k
        places after the next one, and what its router did if it has one.

        Args:
            hidden: [B, T, D], of `DecoderOutput`.
            following: for each module the ids k places on, int32 [B, T], and whether they are of the same document,
                bool [B, T].
            tokens: as of the call.
            how: as of the call.
        """
        found: list[tuple[jax.Array, RouterStats | None]] = []
        for k, (graph, parameters, (ids, same)) in enumerate(zip(*_split(self.mtp), following, strict=True), start=1):
            with jax.named_scope("mtp"):
                there = tokens._replace(positions=tokens.positions + k)
                embedded = self.embeddings(ids, there, how)
                keys = _keys(tokens, jnp.int32(self.config.n_layers + k))
                module = functools.partial(_module, graph, how)
                run = _remat(how.config.remat, module, barrier=True)
                found.append(run(parameters, hidden, embedded, same, tokens, keys))
                hidden = found[-1][0]
        return found

    def scalars(self, hidden: jax.Array) -> jax.Array:
        """One number for each position: [B, T, D] -> float32 [B, T]. With a ScalarHead."""
        score = self.score[...].astype(hidden.dtype)
        return jnp.einsum("btd,d->bt", hidden, score, preferred_element_type=jnp.float32)

    def class_logits(self, hidden: jax.Array) -> jax.Array:
        """A number for each class: [B, T, D] -> float32 [B, T, C]. With a ClassHead."""
        classes = self.classes[...].astype(hidden.dtype)
        return jnp.einsum("btd,cd->btc", hidden, classes, preferred_element_type=jnp.float32)


@functools.cache
def _structure(config: ModelConfig) -> Any:
    """The decoder without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, jax.random.key(0))))[0]


def bind(config: ModelConfig, parameters: Any) -> Decoder:
    """The decoder with these parameters: nested dicts, as of `init_parameters`."""
    if config.adapter is None:
        return nnx.merge(_structure(config), parameters)
    return nnx.merge(_structure(composed(config)), adapted(config, parameters))


@functools.cache
def _block_structure(config: ModelConfig, block: BlockConfig) -> Any:
    """A layer without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Block(block, config, Initializer(jax.random.key(0)))))[0]


def run_block(
    config: ModelConfig, block: BlockConfig, parameters: Any, x: jax.Array, tokens: Tokens, how: Execution
) -> jax.Array:
    """One layer by itself, without a cache: [B, T, D] -> [B, T, D].

    Args:
        config: the model that it is of.
        block: one of `config.layers`.
        parameters: nested dicts of its arrays, not stacked.
        x: what goes in.
        tokens: what is known of them.
        how: it runs.
    """
    layer = nnx.merge(_block_structure(config, block), parameters)
    return layer(x, tokens, how, None, jnp.int32(0), None)[0]


def init_parameters(config: ModelConfig, key: jax.Array) -> dict[str, Any]:
    """Initial parameters as nested dicts of float32 arrays, and of `Weight`s where `model.adapter.base` says so; the
    same for a key on every mesh."""
    base: dict[str, Any] = nnx.to_pure_dict(nnx.split(Decoder(base_of(config), key))[1])
    return base if config.adapter is None else begin(config, base, jax.random.fold_in(key, 1))


def parameter_dims(config: ModelConfig) -> dict[str, Any]:
    """The names of every parameter's dims, in nested dicts like those of `init_parameters`."""
    return jax.tree.map(lambda array: array.dims, declared(config))


def abstract_parameters(config: ModelConfig, layout: Layout) -> dict[str, Any]:
    """Shape, format and sharding of every parameter, as `jax.ShapeDtypeStruct` in nested dicts, and in `Weight`s where
    `model.adapter.base` says so."""
    shape = lambda array: jax.ShapeDtypeStruct(array.shape, jnp.float32)
    plain = jax.tree.map(shape, declared(config))
    wanted = BaseFormat.FLOAT32 if config.adapter is None else config.adapter.base
    hold = lambda array, w: jax.eval_shape(lambda w: held(array, w, wanted), w)
    kept = jax.tree.map(hold, declared(config), plain)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, kept, shardings(layout, config, kept))


def _of_first(tokens: Tokens) -> Tokens:
    """For the layers before the pattern, so that none draws what another does."""
    return tokens if tokens.seeds is None else tokens._replace(seeds=~tokens.seeds)


def _module(
    graph: Any,
    how: Execution,
    parameters: Any,
    hidden: jax.Array,
    embedded: jax.Array,
    same: jax.Array,
    tokens: Tokens,
    keys: jax.Array | None,
) -> tuple[jax.Array, RouterStats | None]:
    """One module of `mtp`, as a function of its parameters."""
    return nnx.merge(graph, parameters)(hidden, embedded, same, tokens, how, keys)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _split(blocks: nnx.Dict) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """The structure of each block, and its parameters."""
    graphs, parameters = zip(*(nnx.split(blocks[str(i)]) for i in range(len(blocks))), strict=True)
    return graphs, parameters


def _pattern(
    how: Execution, graphs: tuple[Any, ...], *, in_loop: bool
) -> Callable[[_Item, _Repeats], tuple[_Item, tuple[RouterStats | None, ...]]]:
    """The blocks of a pattern, one after the other. Each is rematerialised by itself: while the backward pass works on
    one, nothing of the others waits but their inputs and what the policy saves."""

    # What ties a block's second forward pass to the gradient that needs it. In a loop over single blocks the loop does.
    barrier = len(graphs) > 1 or not in_loop

    def block(
        graph: Any,
        i: int,
        parameters: Any,
        x: jax.Array,
        tokens: Tokens,
        cache: LayerCache | None,
        number: jax.Array,
    ) -> tuple[jax.Array, LayerCache | None, RouterStats | None]:
        keys = _keys(tokens, number * len(graphs) + i)
        return nnx.merge(graph, with_keys(parameters, keys))(x, tokens, how, cache, number, keys)

    blocks = [_remat(how.config.remat, functools.partial(block, graph, i), barrier) for i, graph in enumerate(graphs)]

    def run(item: _Item, repeat: _Repeats) -> tuple[_Item, tuple[RouterStats | None, ...]]:
        x, caches, stats = item.x, [], []
        for i, (block, parameters) in enumerate(zip(blocks, repeat.parameters, strict=True)):
            cache = None if item.cache is None else item.cache[i]
            x, cache, of_router = block(parameters, x, item.tokens, cache, repeat.number)
            caches.append(cache)
            stats.append(of_router)
        return _Item(x, None if item.cache is None else tuple(caches), item.tokens), tuple(stats)

    return run


def _keys(tokens: Tokens, layer: jax.Array) -> jax.Array | None:
    """A random key [B] for each row in this layer, the same on every mesh and however the batch is cut; None: nothing
    is drawn."""
    if (seeds := tokens.seeds) is None:
        return None
    return jax.vmap(lambda seed: jax.random.fold_in(jax.random.key(seed), layer))(seeds)


def _remat(remat: Remat, body: Any, barrier: bool) -> Any:
    """The body with a rule for what the backward pass finds saved."""
    checkpoint = functools.partial(jax.checkpoint, body, prevent_cse=barrier)
    match remat:
        case Remat.NONE:
            return body
        case Remat.DOTS:
            dots = checkpoint_policies.dots_with_no_batch_dims_saveable  # not the experts' products, hence their name
            named = checkpoint_policies.save_only_these_names(*SAVED_NAMES[remat])
            return checkpoint(policy=checkpoint_policies.save_from_both_policies(dots, named))
        case Remat.FULL | Remat.QKV | Remat.NAMES | Remat.GLU:
            return checkpoint(policy=checkpoint_policies.save_only_these_names(*SAVED_NAMES[remat]))
        case Remat.OFFLOAD:
            return checkpoint(
                policy=checkpoint_policies.save_and_offload_only_these_names(
                    names_which_can_be_saved=[],
                    names_which_can_be_offloaded=list(SAVED_NAMES[remat]),
                    offload_src="device",
                    offload_dst="pinned_host",
                )
            )
        case _:
            assert_never(remat)
