"""The arrays of a model, each declared once. To add one, add a line here and use it in the module of its name.

Modules in `maxlm/models/` are built from the functions below (`attention`, `mlp`, `norm`, ...), which list the arrays
of one module with names relative to it; `arrays` puts them together under the names that checkpoints have.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import NamedTuple, assert_never

from maxlm.config import (
    Activation,
    Alibi,
    Attention,
    BlockConfig,
    ClassHead,
    DeepNorm,
    EmbedHead,
    ExpertChoiceRouter,
    Experts,
    GatedMlp,
    GlmRope,
    GroupedQuery,
    LatentAttention,
    Learned,
    LmHead,
    Mlp,
    MlpConfig,
    ModelConfig,
    NoisyTopKRouter,
    Nonlinearity,
    Norm,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    QkNorm,
    RelativeBias,
    RelativeSinusoids,
    ResidualInit,
    Rope,
    Sandwich,
    ScalarHead,
    SigmoidRouter,
    Sinusoidal,
    Swish,
    TopKRouter,
)
from maxlm.shapes.additions import with_adapter
from maxlm.shapes.array import Array, Constant, Init, Normal, Part, Role

MTP = "mtp"
"""What modules that predict further tokens have lies under it."""


@functools.cache  # a search asks thousands of times for one model
def arrays(model: ModelConfig) -> tuple[Array, ...]:
    """Every array of the model, in the order of its tree's leaves (dicts sorted by key)."""
    found = [*embedding(model), *head(model)]
    for name, there in (("embedding_norm", model.embedding_norm), ("final_norm", model.final_norm)):
        found += _inside(name, norm(model.norm, "vector", model.d_model)) if there else ()
    for i, config in enumerate(model.blocks):
        found += _inside(f"blocks/{i}", block(config, model), repeats=model.repeats)
    for i, config in enumerate(model.first_blocks):
        found += _inside(f"first_blocks/{i}", block(config, model))
    for k in range(0 if model.mtp is None else model.mtp.depth):
        found += _inside(f"{MTP}/{k}", mtp_module(model))
    if model.mup_base_width is not None:
        slower = lambda array: array.role in (Role.PRODUCT, Role.ROUTER) and "vocab" not in array.dims
        found = [replace(array, learning_rate=1 / model.wider) if slower(array) else array for array in found]
    if model.medusa is not None:
        found = [replace(array, learning_rate=0.0) for array in found]
        for k in range(model.medusa.n_heads):
            found += _inside(f"medusa/{k}", medusa_head(model))
    if model.adapter is not None:
        found = with_adapter(model.adapter, found)
    return tuple(sorted(found, key=lambda array: array.name.split("/")))


def embedding(model: ModelConfig) -> Iterator[Array]:
    """What turns ids into vectors."""
    rows, D = Normal(model.init_std), {"embed": model.d_model}
    uses = 1.0 if model.tied else 0.0
    yield _array("embed", {"vocab": model.vocab_size} | D, rows, Role.TABLE, Part.EMBEDDING, uses, inputs=D)
    match model.embedded_position:
        case Learned(offset=offset):
            dims = {"positions": offset + model.max_seq_len} | D
            yield _array("embedded_position", dims, rows, Role.TABLE, Part.EMBEDDING, 0.0)
        case Sinusoidal() | None:
            pass
        case _:
            assert_never(model.embedded_position)


def head(model: ModelConfig) -> Iterator[Array]:
    """What turns the last hidden states into results."""
    init, D = Normal(model.init_std), {"embed": model.d_model}
    if (lm := model.lm_head) is not None:
        V = {"vocab": model.vocab_size}
        if not lm.tied:
            yield _array("unembed", V | D, init, Role.PRODUCT, Part.UNEMBEDDING, inputs=D)
        if lm.bias:
            yield _array("unembed_bias", V, Constant(0), Role.OTHER, Part.UNEMBEDDING)
    match model.head:
        case LmHead():
            pass
        case ScalarHead():
            yield _array("score", D, _to_few(model), Role.PRODUCT, Part.UNEMBEDDING)
        case ClassHead(n_classes=n_classes):
            yield _array("classes", {"classes": n_classes} | D, _to_few(model), Role.PRODUCT, Part.UNEMBEDDING)
        case EmbedHead():
            scale = Constant(math.log(1 / 0.07))
            yield _array("log_scale", {"vector": 1}, scale, Role.OTHER, Part.UNEMBEDDING, 0.0)
        case _:
            assert_never(model.head)


def medusa_head(model: ModelConfig) -> Iterator[Array]:
    """Of one head that guesses at a later token."""
    D, V = {"embed": model.d_model}, {"vocab": model.vocab_size}
    yield _array("proj", D | {"vector": model.d_model}, Constant(0), Role.PRODUCT, Part.MEDUSA, inputs=D)
    yield _array("unembed", V | D, Normal(model.init_std), Role.PRODUCT, Part.MEDUSA, inputs=D)


def mtp_module(model: ModelConfig) -> Iterator[Array]:
    """Of one module that predicts a further token. M is two matrices, of the state and of the embedding."""
    D = {"embed": model.d_model}
    for name in mtp_norms(model):
        yield from _inside(name, norm(model.norm, "vector", model.d_model))
    for name in ("hidden_proj", "embedding_proj"):
        yield _array(name, D | {"vector": model.d_model}, _hidden(model), Role.PRODUCT, Part.MLP, inputs=D)
    yield from _inside("block", block(model.blocks[-1], model))


def mtp_norms(model: ModelConfig) -> tuple[str, ...]:
    """Names of a module's norms beside those of its layer."""
    return ("hidden_norm", "embedding_norm", *(("final_norm",) if model.final_norm else ()))


def norm(config: Norm, dim: str, size: int, part: Part = Part.NORMS) -> Iterator[Array]:
    """Of one norm over a dim of this name and size."""
    vector = lambda name, value: _array(name, {dim: size}, Constant(value), Role.OTHER, part)
    if config.initial_scale is not None:
        yield vector("scale", config.initial_scale)
    if config.bias:
        yield vector("bias", 0)


@functools.cache  # as above
def block(config: BlockConfig, model: ModelConfig) -> tuple[Array, ...]:
    """Of one layer."""
    norms = [_inside(name, norm(model.norm, "vector", model.d_model)) for name in block_norms(config)]
    own = (_inside("attention", attention(config.attention, model)), _inside("mlp", mlp(config.mlp, model)))
    return tuple(itertools.chain(*norms, *own))


def block_norms(config: BlockConfig) -> tuple[str, ...]:
    """Names of a layer's norms of the residual stream."""
    match config.residual:
        case PreNorm() | PostNorm() | DeepNorm() | Parallel(two_norms=True):
            return ("attention_norm", "mlp_norm")
        case OutputNorm():
            return ("attention_out_norm", "mlp_out_norm")
        case Sandwich():
            return ("attention_norm", "attention_out_norm", "mlp_norm", "mlp_out_norm")
        case Parallel():
            return ("attention_norm",)
        case _:
            assert_never(config.residual)


def attention(config: Attention, model: ModelConfig) -> Iterator[Array]:
    """Of one layer's attention."""
    match config:
        case GroupedQuery():
            H = {"head_dim": config.head_dim}
            heads, kv_heads = {"heads": config.n_heads} | H, {"kv_heads": config.n_kv_heads} | H
            D, part = {"embed": model.d_model}, Part.ATTENTION
            plain = _hidden(model)
            for name, cut, init in (("q", heads, plain), ("k", kv_heads, plain), ("v", kv_heads, _deep(model))):
                yield _array(f"{name}_proj", D | cut, init, Role.PRODUCT, part, inputs=D)
            yield _array("o_proj", heads | D, _to_residual(model), Role.PRODUCT, part, inputs=heads)
            if config.qkv_bias:
                for name, cut in (("q", heads), ("k", kv_heads), ("v", kv_heads)):
                    yield _array(f"{name}_bias", cut, Constant(0), Role.OTHER, part)
            if config.out_bias:
                yield _array("o_bias", {"vector": model.d_model}, Constant(0), Role.OTHER, part)
            for name, dim, size in head_norms(config):
                yield from _inside(name, norm(model.norm, dim, size, part))
            if config.sinks:
                yield _array("sinks", {"heads": config.n_heads}, Normal(model.init_std), Role.OTHER, part)
            match config.position:
                case RelativeBias(buckets=buckets):
                    dims = {"heads": config.n_heads, "buckets": buckets}
                    yield _array("relative_bias", dims, Normal(model.init_std), Role.OTHER, part)
                case RelativeSinusoids(dims=sinusoids):
                    for name in ("content_bias", "distance_bias"):
                        yield _array(name, heads, Normal(model.init_std), Role.OTHER, part)
                    yield _array("distance_proj", heads | {"sinusoids": sinusoids}, plain, Role.PRODUCT, part)
                case Rope() | GlmRope() | Alibi() | None:
                    pass
                case _:
                    assert_never(config.position)
        case LatentAttention():
            yield from _latent_attention(config, model)
            for name, dim, size in head_norms(config):
                yield from _inside(name, norm(model.norm, dim, size, Part.ATTENTION))
        case _:
            assert_never(config)


def _latent_attention(config: LatentAttention, model: ModelConfig) -> Iterator[Array]:
    heads, D, part = {"heads": config.n_heads}, {"embed": model.d_model}, Part.ATTENTION
    content, rope, value = (
        {"head_dim": size} for size in (config.content_head_dim, config.rope_head_dim, config.value_head_dim)
    )
    latent, plain = {"from_latent": config.kv_rank}, _hidden(model)

    def product(name: str, inputs: dict[str, int], outputs: dict[str, int], init: Normal = plain) -> Array:
        return _array(f"{name}_proj", inputs | outputs, init, Role.PRODUCT, part, inputs=inputs)

    of_queries = D
    if config.query_rank is not None:
        yield product("q_down", D, {"latent": config.query_rank})
        of_queries = {"from_latent": config.query_rank}
    yield product("q", of_queries, heads | {"head_dim": config.key_head_dim})
    yield product("kv_down", D, {"latent": config.kv_rank})
    yield product("k_rope", D, rope)
    yield product("k", latent, heads | content)
    yield product("v", latent, heads | value, _deep(model))
    yield product("o", heads | value, D, _to_residual(model))


def head_norms(config: Attention) -> tuple[tuple[str, str, int], ...]:
    """Name, dim and size of the norms of queries and of keys, or of what they are made from."""
    match config:
        case LatentAttention(kv_rank=kv_rank, query_rank=query_rank):
            of_queries = () if query_rank is None else (("q_norm", "vector", query_rank),)
            return (*of_queries, ("kv_norm", "vector", kv_rank))
        case GroupedQuery(qk_norm=None):
            return ()
        case GroupedQuery(qk_norm=QkNorm.HEADS):
            return ("q_norm", "head_dim", config.head_dim), ("k_norm", "head_dim", config.head_dim)
        case GroupedQuery():  # over all heads, which lie one after another, so that a device has the dims of its own
            query, key = config.n_heads * config.head_dim, config.n_kv_heads * config.head_dim
            return ("q_norm", "heads", query), ("k_norm", "kv_heads", key)
        case _:
            assert_never(config)


class Kept(NamedTuple):
    """An array that decoding keeps of the tokens before: so many numbers for each of some heads."""

    heads: int
    width: int
    dim: str | None
    """By which dim of `ACTIVATION_DIMS` devices share the heads; None: all have them."""

    @property
    def size(self) -> int:
        """Numbers of a token."""
        return self.heads * self.width


def kept(config: Attention) -> tuple[Kept, ...]:
    """Of one layer."""
    match config:
        case GroupedQuery():
            return tuple(
                Kept(config.n_kv_heads, width, "kv_heads") for width in (config.key_head_dim, config.value_head_dim)
            )
        case LatentAttention():
            return (Kept(1, config.kv_rank + config.rope_head_dim, None),)
        case _:
            assert_never(config)


def mlp(config: MlpConfig, model: ModelConfig) -> Iterator[Array]:
    """Of one layer's MLP, or of its router and experts."""
    match config:
        case Mlp() | GatedMlp():
            yield from _projections(isinstance(config, GatedMlp), config.d_ff, model, Part.MLP)
            if config.bias:
                yield from _biases(isinstance(config, GatedMlp), config.d_ff, model, Part.MLP)
            yield from _swish_beta(config.activation, config.d_ff)
        case Experts():
            E = config.n_experts
            scores = {"embed": model.d_model, "router": E}
            yield _array("router", scores, _to_few(model), Role.ROUTER, Part.MLP)
            biases = _biases(True, config.d_ff, model, Part.EXPERTS) if config.bias else ()
            for one in (*_projections(True, config.d_ff, model, Part.EXPERTS), *biases):
                dims = {"experts": E} | dict(zip(one.dims, one.shape, strict=True))
                uses = config.experts_per_token / E
                yield _array(one.name, dims, one.init, one.role, one.part, uses, inputs=one.inputs)
            yield from _swish_beta(config.activation, config.d_ff * config.experts_per_token)
            match config.router:
                case NoisyTopKRouter():
                    yield _array("router_noise", scores, _to_few(model), Role.ROUTER, Part.MLP)
                case SigmoidRouter():
                    yield _array("router_bias", {"router": E}, Constant(0), Role.OTHER, Part.MLP)
                case TopKRouter(bias=True):
                    yield _array("score_bias", {"router": E}, Constant(0), Role.OTHER, Part.MLP)
                case TopKRouter() | ExpertChoiceRouter():
                    pass
                case _:
                    assert_never(config.router)
            if shared := shared_experts(config):
                yield from _inside("shared_experts", mlp(shared, model))
        case _:
            assert_never(config)


def shared_experts(config: Experts) -> GatedMlp | None:
    """The experts that every token uses, as the one MLP that they are."""
    if not config.n_shared_experts:
        return None
    return GatedMlp(d_ff=config.n_shared_experts * config.d_ff, activation=config.activation, bias=config.bias)


def _projections(gated: bool, d_ff: int, model: ModelConfig, part: Part) -> Iterator[Array]:
    D, F = {"embed": model.d_model}, {"mlp": d_ff}
    for name in ("gate_proj", "up_proj") if gated else ("up_proj",):
        yield _array(name, D | F, _deep(model), Role.PRODUCT, part, inputs=D)
    yield _array("down_proj", F | D, _to_residual(model), Role.PRODUCT, part, inputs=F)


def _biases(gated: bool, d_ff: int, model: ModelConfig, part: Part) -> Iterator[Array]:
    for name in ("gate_bias", "up_bias") if gated else ("up_bias",):
        yield _array(name, {"mlp": d_ff}, Constant(0), Role.OTHER, part)
    yield _array("down_bias", {"vector": model.d_model}, Constant(0), Role.OTHER, part)


def _swish_beta(activation: Nonlinearity, width: float) -> Iterator[Array]:
    """The one number of a layer, which multiplies so many values of a token."""
    match activation:
        case Swish(beta=None):
            yield _array("swish_beta", {"vector": 1}, Constant(1), Role.OTHER, Part.MLP, width)
        case Swish() | Activation():
            pass
        case _:
            assert_never(activation)


def _hidden(model: ModelConfig) -> Normal:
    """Of a matrix between vectors that are as wide as the model."""
    return Normal(model.init_std * model.wider**-0.5)


def _to_few(model: ModelConfig) -> Normal:
    """Of what sums a hidden vector up in a few numbers, however wide the model is."""
    return Normal(model.init_std / model.wider)


def _deep(model: ModelConfig) -> Normal:
    """Of a value projection, or a matrix into an MLP: what DeepNorm makes smaller."""
    deep = model.deep_norm
    return Normal(_hidden(model).std * (1.0 if deep is None else deep.beta_of(model.n_layers)))


def _to_residual(model: ModelConfig) -> Normal:
    """Of what writes to the residual stream."""
    if model.deep_norm is not None:
        return _deep(model)
    match model.residual_init:
        case ResidualInit.ALL_LAYERS:
            return Normal(_hidden(model).std * (2 * model.n_layers) ** -0.5)
        case ResidualInit.LAYERS_SO_FAR:
            return Normal(_hidden(model).std, by_layer=True)
        case ResidualInit.NONE:
            return _hidden(model)
        case _:
            assert_never(model.residual_init)


def _array(
    name: str,
    dims: dict[str, int],
    init: Init,
    role: Role,
    part: Part,
    uses: float = 1.0,
    inputs: Iterable[str] = (),
) -> Array:
    return Array(name, tuple(dims.values()), tuple(dims), init, role, part, uses, tuple(inputs))


def _inside(prefix: str, found: Iterable[Array], repeats: int | None = None) -> Iterator[Array]:
    """The arrays of a module under its name; with `repeats`, stacks of as many."""
    for array in found:
        array = replace(array, name=f"{prefix}/{array.name}")
        if repeats is not None:
            array = replace(array, shape=(repeats, *array.shape), dims=("layers", *array.dims))
        yield array
