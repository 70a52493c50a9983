"""The decoder against an independent float64 forward pass, and properties that hold for any weights."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import operator
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FLOAT32,
    initial_parameters,
    latent_model,
    loss_function,
    one_device,
    packed_batch,
    plainly,
    run_decoder,
    small_model,
    small_run,
    with_attention,
)

from maxlm.config import (
    PARAMETER_DIMS,
    Activation,
    Alibi,
    BlockConfig,
    DeepNorm,
    Dtype,
    DynamicNtkScaling,
    Experts,
    FixedPattern,
    GatedMlp,
    GlmRope,
    GroupedQuery,
    LatentAttention,
    LayerNorm,
    Learned,
    LinearScaling,
    Llama3RopeScaling,
    LmHead,
    LongRopeScaling,
    Mlp,
    NtkScaling,
    OutputNorm,
    Parallel,
    PostNorm,
    PreNorm,
    QkNorm,
    RelativeBias,
    RelativeSinusoids,
    ResidualInit,
    RmsNorm,
    Rope,
    Sandwich,
    Sinusoidal,
    StridedPattern,
    Swish,
    TopKRouter,
    UserError,
    YarnScaling,
)
from maxlm.models import Decoder, Execution, Tokens, bind, init_parameters, ops, parameter_dims
from maxlm.models.positions import rope_angles, rotate, rotation

# ---- the model, from the papers ----


def norm(config, p, x):
    match config:
        case RmsNorm():
            scale = 1 + p["scale"] if config.one_plus else p["scale"]
            return x / np.sqrt((x**2).mean(-1, keepdims=True) + config.eps) * scale
        case LayerNorm():
            y = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + config.eps)
            y = y * p["scale"] if config.scale else y
            return y + p["bias"] if config.bias else y


def silu(x):
    return x / (1 + np.exp(-x))


def gelu(x):
    return 0.5 * x * (1 + np.vectorize(math.erf)(x / math.sqrt(2)))


def llama31_frequency(f, scaling):
    """Meta's released code for one frequency."""
    wavelength = 2 * math.pi / f
    low = scaling.original_max_len / scaling.low_freq_factor
    high = scaling.original_max_len / scaling.high_freq_factor
    if wavelength < high:
        return f
    if wavelength > low:
        return f / scaling.factor
    smooth = (scaling.original_max_len / wavelength - scaling.low_freq_factor) / (
        scaling.high_freq_factor - scaling.low_freq_factor
    )
    return (1 - smooth) * f / scaling.factor + smooth * f


def yarn(config, scaling, R):
    """arXiv:2309.00071 as its authors wrote it down: the frequency of each pair, and the factor of its dims."""
    place = lambda turns: R * math.log(scaling.original_max_len / (turns * 2 * math.pi)) / (2 * math.log(config.theta))
    low, high = place(scaling.beta_fast), place(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, R - 1)
    frequencies = []
    for i in range(R // 2):
        ramp = min(1, max(0, (i - low) / (high - low)))
        frequencies.append(config.theta ** (-2 * i / R) * ((1 - ramp) + ramp / scaling.factor))
    return frequencies, scaling.attention_factor or 0.1 * math.log(scaling.factor) + 1


def pairs(config, R, length, max_seq_len):
    """Frequency of each pair in a document of this length, and the factor of its dims."""
    plain = [config.theta ** (-2 * i / R) for i in range(R // 2)]
    with_theta = lambda theta: [theta ** (-2 * i / R) for i in range(R // 2)]
    match config.scaling:
        case None:
            return plain, 1
        case Llama3RopeScaling() as scaling:
            return [llama31_frequency(f, scaling) for f in plain], 1
        case LinearScaling(factor=factor):
            return [f / factor for f in plain], 1
        case NtkScaling(factor=factor):
            return with_theta(config.theta * factor ** (R / (R - 2))), 1
        case DynamicNtkScaling(factor=factor, original_max_len=known):
            grown = factor * max(length, known) / known - (factor - 1)
            return with_theta(config.theta * grown ** (R / (R - 2))), 1
        case YarnScaling() as scaling:
            return yarn(config, scaling, R)
        case LongRopeScaling() as scaling:
            longer = max_seq_len / scaling.original_max_len
            slower = scaling.long_factors if longer > 1 else scaling.short_factors
            factor = math.sqrt(1 + math.log(longer) / math.log(scaling.original_max_len)) if longer > 1 else 1
            return [f / slow for f, slow in zip(plain, slower, strict=True)], scaling.attention_factor or factor


def rope(x, positions, segments, config, max_seq_len):
    """Each pair is a complex number that turns by position * frequency. x: [T, heads, H]."""
    R, y = config.dims or x.shape[-1], x.copy()
    for t, (position, segment) in enumerate(zip(positions, segments, strict=True)):
        length = 1 + max(p for p, other in zip(positions, segments, strict=True) if other == segment)
        frequencies, factor = pairs(config, R, length, max_seq_len)
        for i, frequency in enumerate(frequencies):
            one, two = (2 * i, 2 * i + 1) if config.interleaved else (i, i + R // 2)
            turned = (x[t, :, one] + 1j * x[t, :, two]) * factor * np.exp(1j * position * frequency)
            y[t, :, one], y[t, :, two] = turned.real, turned.imag
    return y


def t5_bucket(distance, n, furthest):
    """Of a key `distance` places back: exact up to n / 2, then by logarithm (arXiv:1910.10683, section 2.1)."""
    exact = n // 2
    if distance < exact:
        return distance
    return min(n - 1, exact + int(math.log(distance / exact) / math.log(furthest / exact) * (n - exact)))


def sinusoid(position, D):
    """arXiv:1706.03762, section 3.5."""
    angles = [position / 10_000 ** (2 * i / D) for i in range(D // 2)]
    return np.array([f(angle) for angle in angles for f in (math.sin, math.cos)])


def halves_of_sinusoid(distance, R):
    """Sines and then cosines, as arXiv:1901.02860 has the R of its equations."""
    angles = [distance / 10_000 ** (2 * i / R) for i in range(R // 2)]
    return np.array([*map(math.sin, angles), *map(math.cos, angles)])


PATTERNS = {  # arXiv:1904.10509, section 4.2: A(1) or A(2)
    type(None): lambda _, t, s: True,
    StridedPattern: lambda p, t, s: t - s < p.stride or (t - s) % p.stride == 0,
    FixedPattern: lambda p, t, s: t // p.chunk == s // p.chunk or s % p.chunk in range(p.chunk - p.summary, p.chunk),
}


def attend_to_latents(model, config, p, x, positions, segments):
    """arXiv:2405.04434, equations 9 to 19, with norms of the compressed vectors (section 3.1.2)."""
    rotated = lambda y: rope(y, positions, segments, config.position, model.max_seq_len)
    latents = norm(model.norm, p["kv_norm"], x @ p["kv_down_proj"])
    compressed = x if config.query_rank is None else norm(model.norm, p["q_norm"], x @ p["q_down_proj"])
    q, k, v = np.tensordot(compressed, p["q_proj"], 1), *(np.tensordot(latents, p[f"{y}_proj"], 1) for y in "kv")
    q_content, q_rope = np.split(q, [config.content_head_dim], -1)
    q_rope, k_rope = rotated(q_rope), rotated((x @ p["k_rope_proj"])[:, None])[:, 0]
    out = np.zeros_like(v)
    for t in range(len(x)):
        seen = [s for s in range(t + 1) if segments[s] == segments[t]]
        for n in range(config.n_heads):
            products = k[seen, n] @ q_content[t, n] + k_rope[seen] @ q_rope[t, n]
            scores = products * (config.scale or 1 / math.sqrt(config.content_head_dim + config.rope_head_dim))
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / weights.sum() @ v[seen, n]
    return np.tensordot(out, p["o_proj"], 2)


def attend(model, config, p, x, positions, segments):
    """One sequence, x: [T, D]."""
    if isinstance(config, LatentAttention):
        return attend_to_latents(model, config, p, x, positions, segments)
    project = lambda w: np.tensordot(x, w, 1)
    q, k, v = project(p["q_proj"]), project(p["k_proj"]), project(p["v_proj"])
    if config.qkv_bias:
        q, k, v = q + p["q_bias"], k + p["k_bias"], v + p["v_bias"]
    if config.qk_norm is QkNorm.HEADS:
        q, k = norm(model.norm, p["q_norm"], q), norm(model.norm, p["k_norm"], k)
    if config.qk_norm is QkNorm.WHOLE:
        q, k = (
            norm(model.norm, p[name], y.reshape(len(x), -1)).reshape(y.shape)
            for name, y in (("q_norm", q), ("k_norm", k))
        )
    if isinstance(config.position, Rope):
        q, k = (rope(y, positions, segments, config.position, model.max_seq_len) for y in (q, k))
    if isinstance(config.position, GlmRope):  # of a document that is one block after an empty context
        turn = Rope(theta=config.position.theta)
        halves = lambda y: np.split(y, 2, axis=-1)
        q, k = (
            np.concatenate([first, rope(second, [t + 1 for t in positions], segments, turn, 0)], axis=-1)
            for first, second in (halves(q), halves(k))
        )
    if config.log_length is not None:
        q = q * np.array([max(1, math.log(t + 1, config.log_length)) for t in positions])[:, None, None]
    out = np.zeros_like(q)
    for t in range(len(x)):
        first = 0 if config.window is None else max(0, t - config.window + 1)
        sees = PATTERNS[type(config.pattern)]
        seen = [s for s in range(first, t + 1) if segments[s] == segments[t] and sees(config.pattern, t, s)]
        for n in range(config.n_heads):
            group = n * config.n_kv_heads // config.n_heads
            products = k[seen, group] * q[t, n]
            if isinstance(config.position, Rope) and config.position.decay is not None:
                # Written for each dim of every product, where the model scales queries and keys.
                H = config.head_dim
                dims = np.arange(H) // 2 if config.position.interleaved else np.arange(H) % (H // 2)
                products = products * ((2 * dims / H + 0.4) / 1.4) ** (
                    (t - np.array(seen))[:, None] / config.position.decay
                )
            distances = t - np.array(seen)
            if isinstance(config.position, RelativeSinusoids):
                products = k[seen, group] * (q[t, n] + p["content_bias"][n])
                of_distance = (q[t, n] + p["distance_bias"][n]) @ p["distance_proj"][n]
                vectors = [halves_of_sinusoid(d, config.position.dims) for d in distances]
                products = np.column_stack([products, np.array(vectors) * of_distance])
            scores = products.sum(-1) * (config.scale or 1 / math.sqrt(config.head_dim))
            if config.soft_cap is not None:
                scores = config.soft_cap * np.tanh(scores / config.soft_cap)
            if isinstance(config.position, Alibi):  # a power of two heads: 2^(-8/N), 2^(-16/N), ...
                scores = scores - 2.0 ** (-8 * (n + 1) / config.n_heads) * distances
            if isinstance(config.position, RelativeBias):
                rule = config.position.buckets, config.position.max_distance
                scores = scores + p["relative_bias"][n, [t5_bucket(d, *rule) for d in distances]]
            sink = np.exp(p["sinks"][n] - scores.max()) if config.sinks else 0
            weights = np.exp(scores - scores.max())
            out[t, n] = weights / (weights.sum() + sink) @ v[seen, group]
    y = np.tensordot(out, p["o_proj"], 2)
    return y + p["o_bias"] if config.out_bias else y


def mlp(config, p, x):
    functions = {
        Activation.SILU: silu,
        Activation.GELU: gelu,
        Activation.RELU: lambda x: np.maximum(x, 0),
        Activation.RELU2: lambda x: np.maximum(x, 0) ** 2,
    }
    act = functions.get(config.activation)
    if isinstance(config.activation, Swish):
        beta = p["swish_beta"] if config.activation.beta is None else config.activation.beta
        act = lambda x: x / (1 + np.exp(-beta * x))
    if isinstance(config, Mlp):
        h = act(x @ p["up_proj"] + (p["up_bias"] if config.bias else 0))
        return h @ p["down_proj"] + (p["down_bias"] if config.bias else 0)
    gate, up = x @ p["gate_proj"], x @ p["up_proj"]
    if config.bias:
        gate, up = gate + p["gate_bias"], up + p["up_bias"]
    h = act(gate) * up
    return h @ p["down_proj"] + (p["down_bias"] if config.bias else 0)


def forward(model, parameters, inputs, positions, segments):
    """Logits [B, T, V] in float64."""
    parameters = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters)
    logits = []
    for ids, where, document in zip(inputs, positions, segments, strict=True):
        x = parameters["embed"][ids] * (model.embedding_scale or 1)
        match model.embedded_position:
            case Learned(offset=offset):
                x = x + parameters["embedded_position"][offset + where]
            case Sinusoidal():
                x = x + np.stack([sinusoid(position, model.d_model) for position in where])
        if model.embedding_norm:
            x = norm(model.norm, parameters["embedding_norm"], x)
        for layer in range(model.n_layers):
            repeat, entry = divmod(layer, len(model.blocks))
            block, p = model.blocks[entry], jax.tree.map(operator.itemgetter(repeat), parameters["blocks"][str(entry)])
            normed = lambda name, x, p=p: norm(model.norm, p.get(name), x)
            attention = lambda x, p=p, block=block, where=where, document=document: attend(
                model, block.attention, p["attention"], x, where, document
            )
            feed = lambda x, p=p, block=block: mlp(block.mlp, p["mlp"], x)
            match block.residual:
                case PreNorm():
                    x = x + attention(normed("attention_norm", x))
                    x = x + feed(normed("mlp_norm", x))
                case PostNorm():
                    x = normed("attention_norm", x + attention(x))
                    x = normed("mlp_norm", x + feed(x))
                case OutputNorm():
                    x = x + normed("attention_out_norm", attention(x))
                    x = x + normed("mlp_out_norm", feed(x))
                case DeepNorm(alpha=alpha):
                    alpha = (2 * model.n_layers) ** (1 / 4) if alpha is None else alpha
                    x = normed("attention_norm", alpha * x + attention(x))
                    x = normed("mlp_norm", alpha * x + feed(x))
                case Sandwich():
                    x = x + normed("attention_out_norm", attention(normed("attention_norm", x)))
                    x = x + normed("mlp_out_norm", feed(normed("mlp_norm", x)))
                case Parallel(two_norms=two):
                    first = normed("attention_norm", x)
                    x = x + attention(first) + feed(normed("mlp_norm", x) if two else first)
        if model.final_norm:
            x = norm(model.norm, parameters.get("final_norm"), x)
        logits.append(unembed(model.head, parameters, x))
    return np.stack(logits)


def unembed(head, parameters, x):
    table = parameters["embed" if head.tied else "unembed"]
    if head.normalized:
        table = table / np.sqrt((table**2).sum(1, keepdims=True))
    logits = x @ table.T * (head.scale or 1)
    logits = logits + parameters["unembed_bias"] if head.bias else logits
    return head.soft_cap * np.tanh(logits / head.soft_cap) if head.soft_cap else logits


# ---- ours ----


@functools.cache
def random_parameters(model, seed=0):
    """Initial values, moved so that norm scales and biases are not 1 and 0."""
    parameters = jax.jit(lambda: init_parameters(model, jax.random.key(seed)))()
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda p: p + jnp.asarray(0.1 * rng.normal(size=p.shape), p.dtype), parameters)


@functools.cache
def logits_function(model, execution=FLOAT32):
    how = Execution(one_device(), execution)

    @jax.jit
    def logits(parameters, inputs, positions, segments):
        hidden = run_decoder(model, parameters, how, inputs, Tokens(positions, segments)).hidden
        return ops.logits(hidden, bind(model, parameters).unembedding)

    return logits


def documents(model, B=2, T=24, seed=0):
    batch = packed_batch(small_run(model, batch_size=B, seq_len=T), seed)
    assert batch["segment_ids"].max() > 1
    return batch["inputs"], batch["positions"], batch["segment_ids"]


def with_block(model, **changes):
    return dataclasses.replace(model, blocks=tuple(dataclasses.replace(block, **changes) for block in model.blocks))


def pattern_of_two():
    """Local layers of narrow heads with everything on, then global ones without position embedding."""
    local = BlockConfig(
        attention=GroupedQuery(
            n_heads=6, n_kv_heads=3, head_dim=4, window=5, qkv_bias=True, out_bias=True, qk_norm=QkNorm.HEADS
        ),
        mlp=GatedMlp(d_ff=20, activation=Activation.GELU, bias=True),
    )
    everywhere = BlockConfig(
        attention=GroupedQuery(n_heads=4, n_kv_heads=1, head_dim=8, position=None), mlp=GatedMlp(d_ff=48)
    )
    return small_model(n_layers=4, blocks=(local, everywhere))


MODELS = {
    "llama": small_model(),
    "multi_head_tied": with_attention(small_model(head=LmHead(tied=True)), n_kv_heads=4),
    "multi_query_unrolled": with_attention(small_model(n_layers=3), n_kv_heads=1),
    "qwen": with_attention(
        small_model(norm=RmsNorm(eps=1e-2)), qkv_bias=True, qk_norm=QkNorm.HEADS, position=Rope(theta=1e6)
    ),
    "llama31": with_attention(
        small_model(), position=Rope(theta=100.0, scaling=Llama3RopeScaling(factor=4.0, original_max_len=60))
    ),
    "pattern_of_two": pattern_of_two(),
    "gpt2": with_block(
        with_attention(small_model(norm=LayerNorm(), embedded_position=Learned()), position=None, qkv_bias=True),
        mlp=Mlp(d_ff=40, bias=True),
    ),
    "transformer": with_block(
        with_attention(small_model(embedded_position=Sinusoidal(), final_norm=False), position=None),
        mlp=Mlp(d_ff=40, activation=Activation.RELU),
        residual=PostNorm(),
    ),
    "strided": with_attention(small_model(), pattern=StridedPattern(stride=3)),
    "fixed": with_attention(small_model(), pattern=FixedPattern(chunk=4, summary=2), n_kv_heads=4),
    "glm_130b": with_block(
        with_attention(small_model(norm=LayerNorm(), embedding_norm=True, final_norm=False), position=GlmRope()),
        mlp=GatedMlp(d_ff=40, activation=Activation.GELU, bias=True),
        residual=DeepNorm(alpha=2.0),
    ),
    "transformer_xl": with_attention(small_model(init_std=0.4), position=RelativeSinusoids(dims=6)),
    "gemma2": with_block(with_attention(small_model(), soft_cap=2.0, window=6), residual=Sandwich()),
    "alibi_parallel": with_block(
        with_attention(small_model(norm=LayerNorm(bias=False)), position=Alibi(), qk_norm=QkNorm.HEADS),
        residual=Parallel(),
    ),
    "gpt_j": with_block(
        with_attention(small_model(norm=LayerNorm()), position=Rope(dims=4, interleaved=True)), residual=Parallel()
    ),
    "interleaved": with_attention(small_model(), position=Rope(theta=50.0, interleaved=True)),
    "xpos": with_attention(small_model(), position=Rope(theta=100.0, decay=4.0)),
    "xpos_interleaved": with_attention(small_model(), position=Rope(theta=100.0, decay=4.0, interleaved=True)),
    "linear": with_attention(small_model(), position=Rope(theta=100.0, scaling=LinearScaling(factor=3.0))),
    "ntk": with_attention(small_model(), position=Rope(theta=100.0, dims=6, scaling=NtkScaling(factor=5.0))),
    "dynamic_ntk": with_attention(
        small_model(), position=Rope(theta=100.0, scaling=DynamicNtkScaling(factor=3.0, original_max_len=5))
    ),
    "yarn": with_attention(
        small_model(), position=Rope(theta=100.0, scaling=YarnScaling(factor=4.0, original_max_len=300, beta_fast=16.0))
    ),
    "yarn_exact_ends": with_attention(
        small_model(),
        position=Rope(
            theta=100.0,
            interleaved=True,
            scaling=YarnScaling(factor=4.0, original_max_len=300, truncate=False, attention_factor=0.8),
        ),
    ),
    "long_rope": with_attention(
        small_model(),
        position=Rope(
            theta=100.0,
            dims=4,
            scaling=LongRopeScaling(short_factors=(1.0, 1.5), long_factors=(2.0, 7.0), original_max_len=16),
        ),
    ),
    "long_rope_short": with_attention(
        small_model(),
        position=Rope(
            dims=4,
            scaling=LongRopeScaling(
                short_factors=(1.5, 4.0), long_factors=(2.0, 7.0), original_max_len=64, attention_factor=1.3
            ),
        ),
    ),
    "scaled_scores": with_attention(small_model(), scale=0.9, soft_cap=2.0),
    "gpt_oss": with_attention(small_model(), sinks=True, window=6, qkv_bias=True, out_bias=True),
    "olmo2": with_block(with_attention(small_model(), qk_norm=QkNorm.WHOLE, n_kv_heads=4), residual=OutputNorm()),
    "grouped_whole_norm": with_attention(small_model(norm=LayerNorm()), qk_norm=QkNorm.WHOLE),
    "opt": with_attention(small_model(norm=LayerNorm(), embedded_position=Learned(offset=2)), position=None),
    "qwen_1": with_attention(small_model(), log_length=4, qkv_bias=True),
    "t5_bias_parallel_two_norms": with_block(
        with_attention(small_model(init_std=0.4), position=RelativeBias(buckets=8, max_distance=16)),
        residual=Parallel(two_norms=True),
    ),
    "gemma": with_block(
        small_model(
            norm=RmsNorm(one_plus=True), embedding_scale=32**0.5, head=LmHead(tied=True, soft_cap=3.0), init_std=0.3
        ),
        residual=Sandwich(),
    ),
    "olmo1": small_model(norm=LayerNorm(scale=False, bias=False), head=LmHead(scale=0.5)),
    "phi_nemotron": with_block(
        small_model(norm=LayerNorm(), head=LmHead(bias=True, soft_cap=4.0)),
        mlp=Mlp(d_ff=40, activation=Activation.RELU2, bias=True),
        residual=Parallel(),
    ),
    "deep_norm": with_block(
        with_attention(
            small_model(norm=LayerNorm(scale=False), embedding_norm=True, embedded_position=Learned()), position=None
        ),
        mlp=GatedMlp(d_ff=40, activation=Swish(beta=1.702)),
        residual=DeepNorm(),
    ),
    "deep_norm_given_norm_head": with_block(
        small_model(n_layers=3, head=LmHead(normalized=True, scale=3.0, bias=True)), residual=DeepNorm(alpha=3.0)
    ),
    "learned_swish": small_model(
        n_layers=4,
        blocks=(
            dataclasses.replace(small_model().blocks[0], mlp=Mlp(d_ff=40, activation=Swish(), bias=True)),
            dataclasses.replace(small_model().blocks[0], mlp=GatedMlp(d_ff=40, activation=Swish(), bias=True)),
        ),
    ),
    "latents": latent_model(),
    "latents_of_queries_too": latent_model(
        small_model(norm=LayerNorm()),
        query_rank=8,
        scale=0.5,
        position=Rope(theta=100.0, interleaved=True, scaling=YarnScaling(factor=4.0, original_max_len=300)),
    ),
    "norm_head_tied": small_model(head=LmHead(tied=True, normalized=True), embedding_scale=0.3, embedding_norm=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_the_papers(name):
    model = MODELS[name]
    parameters, batch = random_parameters(model), documents(model)
    got, want = logits_function(model)(parameters, *batch), forward(model, parameters, *batch)
    assert want.std() > 0.5
    np.testing.assert_allclose(got, want, atol=2e-5 * np.abs(want).max())


def test_the_gradient_of_a_learned_swish_is_that_of_finite_differences():
    model = MODELS["learned_swish"]
    parameters, batch = random_parameters(model), documents(model, B=1, T=12)
    logits, weights = logits_function(model), np.random.default_rng(3).normal(size=(1, 12, model.vocab_size))
    found = jax.grad(lambda p: (logits(p, *batch) * weights).sum())(parameters)
    exact = jax.tree.map(lambda p: np.asarray(p, np.float64), parameters)
    for block, repeat in itertools.product(("0", "1"), range(2)):
        beta, sums = exact["blocks"][block]["mlp"]["swish_beta"], []
        for step in (1e-5, -2e-5):
            beta[repeat] += step
            sums.append((forward(model, exact, *batch) * weights).sum())
        beta[repeat] += 1e-5
        got = found["blocks"][block]["mlp"]["swish_beta"][repeat, 0]
        assert got == pytest.approx((sums[0] - sums[1]) / 2e-5, rel=1e-3) and abs(got) > 0.01


def test_rope_frequencies():
    plain = rotation(Rope(theta=10_000.0), 8, 64)
    np.testing.assert_allclose(plain.frequencies, [1, 0.1, 0.01, 0.001], rtol=1e-6)
    assert plain.factor == 1

    scaling = Llama3RopeScaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=8192)
    got = rotation(Rope(theta=500_000.0, scaling=scaling), 128, 131_072).frequencies
    before = [500_000.0 ** (-2 * i / 128) for i in range(64)]
    want = [llama31_frequency(f, scaling) for f in before]
    np.testing.assert_allclose(got, want, rtol=1e-6)
    # All three cases occur: kept, in between, divided by 8.
    ratio = np.array(before) / got
    assert (ratio < 1.001).sum() > 20 and (ratio > 7.999).sum() > 20 and ((ratio > 1.01) & (ratio < 7.9)).any()


def long_rope(**changes):
    return LongRopeScaling(
        short_factors=(1.0, 1.1, 1.2, 1.5), long_factors=(1.5, 2.0, 8.0, 30.0), original_max_len=4096, **changes
    )


@pytest.mark.parametrize(
    ("position", "head_dim", "max_seq_len", "frequencies", "factor"),
    [
        (Rope(scaling=LinearScaling(factor=4.0)), 8, 4096, [0.25, 0.025, 0.0025, 0.00025], 1),
        (Rope(dims=8, scaling=LinearScaling(factor=4.0)), 16, 4096, [0.25, 0.025, 0.0025, 0.00025], 1),
        (
            Rope(scaling=YarnScaling(factor=4.0, original_max_len=4096)), 16, 16_384,
            [1.0, 0.3162278, 0.1, 0.02569351, 0.00625, 0.001383497, 0.00025, 7.905695e-05], 1.138629436111989,
        ),
        (
            Rope(scaling=YarnScaling(factor=4.0, original_max_len=4096, truncate=False)), 16, 16_384,
            [1.0, 0.3162278, 0.1, 0.02861361, 0.006556971, 0.001285632, 0.00025, 7.905695e-05], 1.138629436111989,
        ),
        (  # DeepSeek-V3's
            Rope(scaling=YarnScaling(factor=40.0, original_max_len=4096, mscale=1.0, mscale_all_dim=1.0)), 64, 163_840,
            [
                1.0, 0.7498942, 0.5623413, 0.4216965, 0.3162278, 0.2371374, 0.1778279, 0.1333521, 0.1, 0.07498942,
                0.05623413, 0.03900693, 0.02687936, 0.01837814, 0.01244796, 0.008334509, 0.0055, 0.003561997,
                0.002249365, 0.001370513, 0.0007905694, 0.0004149904, 0.0001778279, 3.333803e-05, 2.5e-05,
                1.874735e-05, 1.405853e-05, 1.054241e-05, 7.905694e-06, 5.928434e-06, 4.445698e-06, 3.333804e-06,
            ],
            1,
        ),
        (
            Rope(
                theta=1000.0,
                scaling=YarnScaling(
                    factor=8.0, original_max_len=1024, mscale=0.707, mscale_all_dim=0.5, beta_fast=16.0, beta_slow=2.0
                ),
            ),
            16, 8192, [1.0, 0.4216965, 0.1778279, 0.05858548, 0.01778781, 0.00458398, 0.0007029267, 0.0002964217],
            1.0389905150739585,
        ),
        (  # gpt-oss's stretching
            Rope(
                theta=150_000.0,
                scaling=YarnScaling(factor=32.0, original_max_len=4096, truncate=False, attention_factor=1.25),
            ),
            16, 16_384,
            [1.0, 0.225418, 0.05081327, 0.006794959, 0.0004564839, 1.818834e-05, 4.099978e-06, 9.24209e-07], 1.25,
        ),
        (Rope(scaling=long_rope()), 8, 131_072, [0.6666667, 0.05, 0.00125, 3.333333e-05], 1.1902380714238083),
        (Rope(scaling=long_rope()), 8, 4096, [1.0, 0.09090909, 0.008333333, 0.0006666667], 1),
        (Rope(scaling=long_rope(attention_factor=1.1)), 8, 131_072, [0.6666667, 0.05, 0.00125, 3.333333e-05], 1.1),
    ],
)  # fmt: skip
def test_stretched_frequencies_are_those_of_transformers(position, head_dim, max_seq_len, frequencies, factor):
    """As ROPE_INIT_FUNCTIONS of transformers 5.24 gave them, in float32."""
    got = rotation(position, head_dim, max_seq_len)
    np.testing.assert_allclose(got.frequencies, frequencies, rtol=1e-6)
    assert got.factor == pytest.approx(factor, rel=1e-12)


def test_dynamic_frequencies_are_those_of_transformers():
    """As its `dynamic` gives them for 64 positions and for 100, of two documents in one row."""
    config = Rope(scaling=DynamicNtkScaling(factor=2.0, original_max_len=64))
    tokens = Tokens(
        np.concatenate([np.arange(100), np.arange(64)])[None].astype(np.int32), np.repeat([[1, 2]], [100, 64], axis=1)
    )
    angles = np.asarray(rope_angles(config, rotation(config, 8, 128).frequencies, tokens))[0]
    np.testing.assert_allclose(angles[1], [1.0, 0.07778222, 0.006050074, 0.0004705882], rtol=2e-6)
    np.testing.assert_allclose(angles[99], 99 * angles[1], rtol=2e-6)
    np.testing.assert_allclose(angles[101], [1.0, 0.1, 0.01, 0.001], rtol=2e-6)
    alone = rope_angles(config, rotation(config, 8, 128).frequencies, Tokens(tokens.positions[:, :100]))
    np.testing.assert_array_equal(alone[0], angles[:100])


def test_rotation_depends_on_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))
    frequencies = rotation(Rope(), 8, 64).frequencies
    at = lambda x, position: np.asarray(rotate(x, jnp.full((1, 1, 1), position, jnp.float32) * frequencies)).ravel()
    near, far = at(q, 7) @ at(k, 3), at(q, 107) @ at(k, 103)
    np.testing.assert_allclose(near, far, rtol=1e-4)
    assert abs(near - at(q, 7) @ at(k, 4)) > 1e-2
    np.testing.assert_allclose(np.linalg.norm(at(q, 50)), np.linalg.norm(q), rtol=1e-6)
    np.testing.assert_array_equal(at(q, 0), np.ravel(q))


REFUSED = {
    "attention.position.dims = 3 is odd": lambda: Rope(dims=3),
    "theta = 1.0 must be more than 1, as Yarn": lambda: Rope(
        theta=1.0, scaling=YarnScaling(factor=2.0, original_max_len=8)
    ),
    "beta_fast = 1.0 must be more than beta_slow = 1.0": lambda: YarnScaling(
        factor=2.0, original_max_len=8, beta_fast=1.0
    ),
    "long_factors has 1 numbers, short_factors 2": lambda: LongRopeScaling(
        short_factors=(1.0, 2.0), long_factors=(1.0,), original_max_len=8
    ),
    "attention.position.dims = 10 is more than head_dim = 8": lambda: with_attention(
        small_model(), position=Rope(dims=10)
    ),
    "attention.head_dim = 7 is odd, but RoPE rotates pairs; use 8": lambda: with_attention(small_model(), head_dim=7),
    "scaling = NtkScaling stretches the slower of several pairs, but 2 dims": lambda: with_attention(
        small_model(), position=Rope(dims=2, scaling=NtkScaling(factor=2.0))
    ),
    "short_factors has 4 numbers, but the 6 rotated dims are 3 pairs": lambda: with_attention(
        small_model(), position=Rope(dims=6, scaling=long_rope())
    ),
    "position.decay = 0.5 is too fast for model.max_seq_len = 64": lambda: with_attention(
        small_model(), position=Rope(decay=0.5)
    ),
}


@pytest.mark.parametrize("words", REFUSED)
def test_rotations_that_cannot_be_are_refused(words):
    with pytest.raises(UserError, match=re.escape(words)):
        REFUSED[words]()
    assert with_attention(small_model(), head_dim=7, position=Rope(dims=6))


# ---- what may reach what ----


def test_a_document_is_not_moved_by_its_neighbours():
    model = small_model()
    parameters, logits = random_parameters(model), logits_function(model)
    positions = np.concatenate([np.arange(9), np.arange(12), np.arange(11)])[None].astype(np.int32)
    segments = np.repeat([1, 2, 3], [9, 12, 11])[None].astype(np.int32)
    inputs = np.random.default_rng(0).integers(0, 64, (1, 32)).astype(np.int32)
    want = logits(parameters, inputs, positions, segments)
    for changed, where in ((slice(0, 9), slice(9, 32)), (slice(21, 32), slice(0, 21))):
        other = inputs.copy()
        other[:, changed] = (other[:, changed] + 7) % 64
        got = logits(parameters, other, positions, segments)
        np.testing.assert_array_equal(got[:, where], want[:, where])
        assert (got[:, changed] != want[:, changed]).any()
    # Alone it gives the same as packed: its positions start again.
    alone = logits(parameters, inputs[:, 9:21], positions[:, 9:21], segments[:, 9:21])
    np.testing.assert_allclose(alone, want[:, 9:21], atol=2e-5)
    # And without packing at all, the documents would see each other.
    merged = logits(parameters, inputs, positions, np.ones_like(segments))
    assert np.abs(merged - want)[:, 9:].max() > 0.1 and np.array_equal(merged[:, :9], want[:, :9])


@pytest.mark.parametrize(("window", "reach"), [(None, 1000), (4, 2 * 3)])
def test_gradients_flow_from_the_past_of_the_document_only(window, reach):
    """d(hidden[t]) / d(embedding of token s), not zero exactly for the pairs that two layers connect."""
    model = with_attention(small_model(), window=window)
    parameters = random_parameters(model)
    T, segments = 20, np.repeat([[1, 2]], [12, 8], axis=1).astype(np.int32)
    positions = np.concatenate([np.arange(12), np.arange(8)])[None].astype(np.int32)
    inputs = np.arange(T, dtype=np.int32)[None]  # each token once, so that a table row is a position
    direction = jnp.asarray(np.random.default_rng(0).normal(size=model.d_model), jnp.float32)

    def scalars(table):
        hidden = run_decoder(
            model, {**parameters, "embed": table}, plainly(), inputs, Tokens(positions, segments)
        ).hidden
        return hidden[0] @ direction

    jacobian = np.abs(jax.jit(jax.jacrev(scalars))(parameters["embed"])).sum(-1)[:, :T]
    t, s = np.arange(T)[:, None], np.arange(T)[None]
    connected = (s <= t) & (t - s <= reach) & (segments[0][:, None] == segments[0][None])
    np.testing.assert_array_equal(jacobian != 0, connected)


def test_shifting_all_positions_changes_nothing():
    model = small_model()
    parameters, logits = random_parameters(model), logits_function(model)
    inputs, positions, segments = documents(model)
    want = logits(parameters, inputs, positions, segments)
    np.testing.assert_allclose(logits(parameters, inputs, positions + 50, segments), want, atol=1e-4)
    assert np.abs(logits(parameters, inputs, 2 * positions, segments) - want).max() > 0.1  # they do matter


def test_no_segments_are_one_document():
    model = small_model()
    parameters, logits = random_parameters(model), logits_function(model)
    inputs = documents(model)[0]
    positions = np.broadcast_to(np.arange(inputs.shape[1], dtype=np.int32), inputs.shape)
    np.testing.assert_array_equal(
        logits(parameters, inputs, positions, None), logits(parameters, inputs, positions, np.ones_like(inputs))
    )


def test_a_prefix_sees_itself_whole_and_nothing_after_it():
    """Prefix LM (arXiv:1910.10683, section 3.2.1): its first tokens know its last ones."""
    model, prefix, T = small_model(), 6, 12
    parameters, how = random_parameters(model), plainly()
    positions = jnp.arange(T)[None]
    tokens = Tokens(positions, visible_to=jnp.maximum(positions + 1, prefix))
    run = jax.jit(lambda p, ids: run_decoder(model, p, how, ids, tokens).hidden)
    ids = np.random.default_rng(0).integers(0, 64, (1, T)).astype(np.int32)
    before = run(parameters, ids)
    for changed, moved in ((prefix - 1, 0), (prefix, prefix), (T - 1, T - 1)):
        other = ids.copy()
        other[0, changed] = (other[0, changed] + 7) % 64
        after = run(parameters, other)
        np.testing.assert_array_equal(after[:, :moved], before[:, :moved])
        assert (after[:, moved] != before[:, moved]).any()


# ---- formats and layers ----


def test_scanned_and_unrolled_layers_agree():
    model = MODELS["pattern_of_two"]
    parameters, batch = random_parameters(model), documents(model)
    unrolled = logits_function(model, dataclasses.replace(FLOAT32, scan_layers=False))(parameters, *batch)
    np.testing.assert_allclose(unrolled, logits_function(model)(parameters, *batch), atol=2e-5)


def test_bfloat16_is_close_to_float32():
    model = MODELS["qwen"]
    parameters, batch = random_parameters(model), documents(model)
    want = np.asarray(logits_function(model)(parameters, *batch))
    narrow = dataclasses.replace(FLOAT32, dtype=Dtype.BFLOAT16)
    got = np.asarray(logits_function(model, narrow)(parameters, *batch))
    error = np.linalg.norm(got - want) / np.linalg.norm(want)
    assert 1e-4 < error < 0.03  # not float32 in disguise either: bfloat16 rounds to 2^-8 a dozen times on the way


def test_bfloat16_gradients_are_close_to_float32():
    run = small_run(small_model())
    narrow = dataclasses.replace(run, execution=dataclasses.replace(FLOAT32, dtype=Dtype.BFLOAT16))
    parameters, batch = random_parameters(run.model), packed_batch(run)
    grad = lambda run: jax.jit(jax.grad(lambda p: loss_function(run, one_device())(p, batch).objective))(parameters)
    for (path, got), want in zip(
        jax.tree_util.tree_leaves_with_path(grad(narrow)), jax.tree.leaves(grad(run)), strict=True
    ):
        assert got.dtype == jnp.float32
        error = np.linalg.norm(got - want) / np.linalg.norm(want)
        assert error < 0.06, (jax.tree_util.keystr(path), error)


# ---- parameters ----


def test_every_parameter_names_its_dims():
    model = MODELS["pattern_of_two"]
    shapes = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0)))
    dims = parameter_dims(model)
    sizes = {"layers": 2, "vocab": 64, "embed": 32, "vector": 32}  # the others differ between the blocks

    def check(path, array, names):
        where = jax.tree_util.keystr(path)
        assert array.dtype == jnp.float32 and len(names) == array.ndim and set(names) <= set(PARAMETER_DIMS), where
        assert ("layers" in names) == ("blocks" in where) and names.index(
            "layers" if "blocks" in where else names[0]
        ) == 0
        assert all(size == sizes.get(name, size) for name, size in zip(names, array.shape, strict=True)), where

    jax.tree_util.tree_map_with_path(check, shapes, dims)
    attention = lambda entry: {
        name: a.shape for name, a in shapes["blocks"][entry]["attention"].items() if "_proj" in name
    }
    assert attention("0") == {
        "q_proj": (2, 32, 6, 4), "k_proj": (2, 32, 3, 4), "v_proj": (2, 32, 3, 4), "o_proj": (2, 6, 4, 32)
    }  # fmt: skip
    assert attention("1") == {
        "q_proj": (2, 32, 4, 8), "k_proj": (2, 32, 1, 8), "v_proj": (2, 32, 1, 8), "o_proj": (2, 4, 8, 32)
    }  # fmt: skip
    tied = jax.eval_shape(lambda: init_parameters(small_model(head=LmHead(tied=True)), jax.random.key(0)))
    assert "unembed" in shapes and "unembed" not in tied


def test_initial_values():
    model = dataclasses.replace(MODELS["pattern_of_two"], d_model=96, vocab_size=300, init_std=0.02)
    parameters = jax.jit(lambda: init_parameters(model, jax.random.key(0)))()
    seen = []
    for path, value in jax.tree_util.tree_leaves_with_path(parameters):
        name, value = path[-1].key, np.asarray(value)
        if name == "scale":
            assert (value == 1).all()
        elif name.endswith("bias"):
            assert (value == 0).all()
        else:
            std = 0.02 / math.sqrt(2 * model.n_layers) if name in ("o_proj", "down_proj") else 0.02
            count = value.size
            assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * count), (name, value.std())
            assert abs(value.mean()) < 5 * std / math.sqrt(count), name
            stacked = path[0].key == "blocks"
            seen += [array.ravel()[:100] / std for array in (value if stacked else [value])]
    # No two matrices, layers or block entries start from the same numbers.
    correlation = np.corrcoef([array[:100] for array in seen]) - np.eye(len(seen))
    assert np.abs(correlation).max() < 0.6


def test_initial_values_of_deep_norm():
    """beta of the standard deviation where the paper has it, and no 1 / sqrt(2L)."""
    experts = Experts(n_experts=4, d_ff=96, router=TopKRouter(top_k=2))
    blocks = tuple(
        BlockConfig(attention=GroupedQuery(n_heads=4, n_kv_heads=4, head_dim=16), mlp=mlp, residual=DeepNorm())
        for mlp in (GatedMlp(d_ff=96), Mlp(d_ff=96), experts)
    )
    model = small_model(d_model=64, n_layers=6, blocks=blocks, init_std=0.02)
    given = with_block(model, residual=DeepNorm(beta=0.3))
    for one, beta in ((model, 48**-0.25), (given, 0.3)):
        parameters = initial_parameters(one)
        for path, value in jax.tree_util.tree_leaves_with_path(parameters):
            name, value = path[-1].key, np.asarray(value)
            if value.ndim > (2 if path[0].key == "blocks" else 1):
                plain = name in ("q_proj", "k_proj", "embed", "unembed", "router")
                std = 0.02 * (1 if plain else beta)
                assert abs(value.std() / std - 1) < 5 / math.sqrt(2 * value.size), (name, value.std())


@pytest.mark.parametrize("rule", ResidualInit)
def test_initial_values_by_depth(rule):
    """Of a pattern of two after a first layer: entry 1 of the second repeat is layer 5."""
    model = MODELS["pattern_of_two"]
    model = dataclasses.replace(model, d_model=96, n_layers=5, first_blocks=model.blocks[:1], residual_init=rule)
    parameters = initial_parameters(model)
    layers = {1: jax.tree.map(np.asarray, parameters["first_blocks"]["0"])}
    for entry, repeat in ((0, 0), (1, 0), (0, 1), (1, 1)):
        layers[2 + entry + 2 * repeat] = jax.tree.map(
            lambda x, repeat=repeat: np.asarray(x[repeat]), parameters["blocks"][str(entry)]
        )
    for place, layer in layers.items():
        divisor = {
            ResidualInit.ALL_LAYERS: math.sqrt(10), ResidualInit.LAYERS_SO_FAR: math.sqrt(2 * place),
            ResidualInit.NONE: 1,
        }[rule]  # fmt: skip
        for part, name in (("attention", "o_proj"), ("mlp", "down_proj")):
            value = layer[part][name]
            assert abs(value.std() * divisor / 0.2 - 1) < 4 / math.sqrt(2 * value.size), (place, name)
        for part, name in (("attention", "v_proj"), ("mlp", "up_proj")):
            assert abs(layer[part][name].std() / 0.2 - 1) < 4 / math.sqrt(2 * layer[part][name].size), (place, name)


def test_deep_norm_is_for_a_whole_model():
    model = small_model(n_layers=4, blocks=small_model().blocks * 2)
    mixed = (model.blocks[0], dataclasses.replace(model.blocks[1], residual=DeepNorm()))
    with pytest.raises(UserError, match=r"DeepNorm beside another residual; .* use one DeepNorm for all"):
        dataclasses.replace(model, blocks=mixed)
    with pytest.raises(UserError, match="use one DeepNorm for all"):
        dataclasses.replace(with_block(model, residual=DeepNorm()), first_blocks=model.blocks)
    with pytest.raises(UserError, match=r"residual_init = .* no meaning with DeepNorm"):
        dataclasses.replace(with_block(model, residual=DeepNorm()), residual_init=ResidualInit.NONE)


def test_new_norms_begin_as_plain_ones():
    parameters = init_parameters(small_model(norm=RmsNorm(one_plus=True)), jax.random.key(0))
    assert (parameters["final_norm"]["scale"] == 0).all() and (
        parameters["blocks"]["0"]["mlp_norm"]["scale"] == 0
    ).all()
    bare = init_parameters(small_model(norm=LayerNorm(scale=False, bias=False)), jax.random.key(0))
    assert "final_norm" not in bare and "mlp_norm" not in bare["blocks"]["0"]


def test_the_embeddings_factor_is_rounded_as_gemma_rounds_it():
    """sqrt(3072) is 55.4256..., and 55.5 in bfloat16; the product is rounded once more."""
    model = small_model(embedding_scale=3072**0.5)
    parameters = initial_parameters(model)
    ids = np.arange(8, dtype=np.int32)[None]
    how = Execution(one_device(), dataclasses.replace(FLOAT32, dtype=Dtype.BFLOAT16))
    got = jax.jit(lambda p: bind(model, p).embeddings(ids, Tokens(ids), how))(parameters)
    rows = np.asarray(parameters["embed"][:8].astype(jnp.bfloat16), np.float64)
    np.testing.assert_array_equal(got[0], jnp.asarray(55.5 * rows, jnp.float32).astype(jnp.bfloat16))


def test_initial_values_follow_the_key():
    model = small_model()
    draw = jax.jit(lambda key: Decoder(model, key).embed[...])
    np.testing.assert_array_equal(draw(jax.random.key(3)), draw(jax.random.key(3)))
    assert (draw(jax.random.key(3)) != draw(jax.random.key(4))).any()
