"""What positions do to queries, keys, scores and embeddings; in float32."""

from __future__ import annotations

import math
from typing import NamedTuple, TypeVar, assert_never

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import (
    DynamicNtkScaling,
    GlmRope,
    LinearScaling,
    Llama3RopeScaling,
    LongRopeScaling,
    NtkScaling,
    Rope,
    YarnScaling,
)
from maxlm.models.tokens import Tokens

Numbers = TypeVar("Numbers", np.ndarray, jax.Array)


class Rotation(NamedTuple):
    """What RoPE does to the first R dims of a head."""

    frequencies: np.ndarray
    """float32 [R / 2]: radians per position of each pair."""
    factor: float = 1.0
    """What these dims are multiplied by, of queries and of keys."""


def rotate_both(
    config: Rope, head_dim: int, max_seq_len: int, tokens: Tokens, q: jax.Array, k: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Queries [B, T, N, H] and keys [B, T, K, H], rotated by the positions of their tokens."""
    frequencies, factor = rotation(config, head_dim, max_seq_len)
    angles = rope_angles(config, frequencies, tokens)
    decay = decay_factors(config, len(frequencies), tokens.positions, max_seq_len)
    of_q, of_k = (factor, factor) if decay is None else (factor * decay, factor / decay)
    return rotate(q, angles, of_q, interleaved=config.interleaved), rotate(
        k, angles, of_k, interleaved=config.interleaved
    )


def rotate_halves(config: GlmRope, tokens: Tokens, q: jax.Array, k: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries [B, T, N, H] and keys [B, T, K, H], each half of a head's dims rotated by one of the two places."""
    half = q.shape[-1] // 2
    frequencies = rotation(Rope(theta=config.theta), half, 0).frequencies
    zeros = jnp.zeros_like(tokens.positions)
    context, block = (zeros, tokens.positions + 1) if tokens.places is None else jnp.unstack(tokens.places, axis=-1)
    angles = [place[..., None].astype(jnp.float32) * frequencies for place in (context, block)]

    def both(x: jax.Array) -> jax.Array:
        first, second = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([rotate(first, angles[0]), rotate(second, angles[1])], axis=-1)

    return both(q), both(k)


def rotation(config: Rope, head_dim: int, max_seq_len: int) -> Rotation:
    """theta^(-2i / R) for pairs i = 0 .. R/2 - 1, stretched if asked, for a model with this max_seq_len; with
    DynamicNtkScaling before a document's length stretches it."""
    R = head_dim if config.dims is None else config.dims
    frequencies, factor = config.theta ** (-np.arange(0, R, 2, dtype=np.float64) / R), 1.0
    match config.scaling:
        case LinearScaling(factor=slower):
            frequencies = frequencies / slower
        case NtkScaling(factor=slower):
            frequencies = frequencies * _ntk(np.array([slower]), R)
        case YarnScaling() as scaling:
            frequencies, factor = _yarn(frequencies, scaling, config.theta)
        case LongRopeScaling() as scaling:
            frequencies, factor = _long_rope(frequencies, scaling, max_seq_len)
        case Llama3RopeScaling() as scaling:
            frequencies = _stretch(frequencies, scaling)
        case DynamicNtkScaling() | None:
            pass
        case _:
            assert_never(config.scaling)
    return Rotation(frequencies.astype(np.float32), factor)


def rope_angles(config: Rope, frequencies: np.ndarray, tokens: Tokens) -> jax.Array:
    """Position times frequency, float32 [B, T, R / 2], of a whole row; `frequencies` are those of `rotation`."""
    angles = tokens.positions[..., None].astype(jnp.float32) * frequencies
    match config.scaling:
        case DynamicNtkScaling(factor=factor) as scaling:
            beyond = _times_longer(_document_lengths(tokens), scaling) - 1
            return angles * _ntk((1 + factor * beyond)[..., None], 2 * len(frequencies))
        case _:
            return angles


def decay_factors(config: Rope, pairs: int, positions: jax.Array, max_seq_len: int) -> jax.Array | None:
    """What the pairs of a query are multiplied by, and those of a key divided by, of xPos (arXiv:2212.10554, section
    3): float32 [B, T, pairs]; None: nothing."""
    if config.decay is None:
        return None
    logarithms = np.log((np.arange(pairs) / pairs + 0.4) / 1.4) / config.decay
    # Counted from the middle, which changes no product, as both ends are then far from the largest number.
    return jnp.exp((positions - max_seq_len / 2)[..., None].astype(jnp.float32) * logarithms.astype(np.float32))


def _document_lengths(tokens: Tokens) -> jax.Array:
    """Of each token's document, in any order of the columns: int32 [B, T], or [B, 1] where a row is one document."""
    if tokens.segment_ids is None:
        return 1 + tokens.positions.max(1, keepdims=True)
    same = tokens.segment_ids[:, :, None] == tokens.segment_ids[:, None]
    return 1 + jnp.where(same, tokens.positions[:, None], 0).max(2)


def _times_longer(lengths: jax.Array, scaling: DynamicNtkScaling) -> jax.Array:
    """How many times original_max_len a document counts as, at least 1: float32, of the shape of the lengths."""
    known = scaling.original_max_len
    if not scaling.doubling:
        return jnp.maximum(lengths / known, 1)
    # Counted in integers: log2 of a power of two may come out above it.
    limits = np.array([known << n for n in range(31) if known << n < 2**31], np.int32)
    return jnp.left_shift(1, (lengths[..., None] > limits).sum(-1)).astype(jnp.float32)


def _ntk(stretch: Numbers, R: int) -> Numbers:
    """What frequencies [..., R / 2] are multiplied by where theta grows by stretch^(R / (R - 2)): stretch is [..., 1].

    (theta s^(R / (R - 2)))^(-2i / R) = theta^(-2i / R) s^(-2i / (R - 2)).
    """
    return stretch ** (-np.arange(0, R, 2) / (R - 2))


def _yarn(frequencies: np.ndarray, scaling: YarnScaling, theta: float) -> tuple[np.ndarray, float]:
    """Frequencies and factor of arXiv:2309.00071, sections 3.2 and 3.4."""
    pairs = len(frequencies)

    def pair(turns: float) -> float:
        """The pair, a fraction of one too, that turns so often over the original context."""
        return pairs * math.log(scaling.original_max_len / (2 * math.pi * turns)) / math.log(theta)

    begin, end = pair(scaling.beta_fast), pair(scaling.beta_slow)
    if scaling.truncate:
        begin, end = math.floor(begin), math.ceil(end)
    begin, end = max(begin, 0), min(end, 2 * pairs - 1)
    slow = np.clip((np.arange(pairs) - begin) / (end - begin or 0.001), 0, 1)  # a step where there is no ramp
    factor = scaling.attention_factor
    if factor is None:
        log = max(0.0, math.log(scaling.factor))
        factor = (0.1 * scaling.mscale * log + 1) / (0.1 * scaling.mscale_all_dim * log + 1)
    return frequencies * (1 - slow + slow / scaling.factor), factor


def _long_rope(frequencies: np.ndarray, scaling: LongRopeScaling, max_seq_len: int) -> tuple[np.ndarray, float]:
    """Frequencies and factor of arXiv:2402.13753, for a model with this max_seq_len."""
    longer = max_seq_len / scaling.original_max_len
    slower = scaling.long_factors if longer > 1 else scaling.short_factors
    factor = scaling.attention_factor
    if factor is None:
        factor = math.sqrt(1 + math.log(max(1.0, longer)) / math.log(scaling.original_max_len))
    return frequencies / np.array(slower), factor


def _stretch(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    """Llama 3.1: short wavelengths stay, long ones grow by `factor`, the band between is interpolated."""
    turns = scaling.original_max_len * frequencies / (2 * np.pi)  # rotations over the original context
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: jax.Array, angles: jax.Array, factor: float | jax.Array = 1.0, *, interleaved: bool = False) -> jax.Array:
    """Rotate pair i of the first R dims of a head by angles[..., i], and multiply it by the factor.

    Args:
        x: [B, T, heads, H].
        angles: float32 [B, T, R / 2], position times frequency.
        factor: of all pairs; or of each, float32 [B, T, R / 2].
        interleaved: pair i is dims (2i, 2i + 1); else (i, i + R/2), the pairing of Hugging Face's LLaMA weights.

    Returns:
        [B, T, heads, H] in x's dtype; dims from R on are as they were.
    """
    R = 2 * angles.shape[-1]
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    if isinstance(factor, jax.Array):
        factor = factor[:, :, None]
    if not isinstance(factor, float) or factor != 1:
        cos, sin = cos * factor, sin * factor
    rotated = x[..., :R].astype(jnp.float32)
    if interleaved:
        first, second = rotated[..., ::2], rotated[..., 1::2]
    else:
        first, second = jnp.split(rotated, 2, axis=-1)
    turned = first * cos - second * sin, second * cos + first * sin
    if interleaved:
        y = jnp.stack(turned, axis=-1).reshape(rotated.shape).astype(x.dtype)
    else:
        y = jnp.concatenate(turned, axis=-1).astype(x.dtype)
    return y if x.shape[-1] == R else jnp.concatenate([y, x[..., R:]], axis=-1)


def log_length_factors(positions: jax.Array, log_length: int) -> jax.Array:
    """max(1, log(position + 1) / log(log_length)), by which queries beyond it are longer, so that attention is as sharp
    among more keys (Qwen, arXiv:2309.16609, section 2.3): int32 [B, T] -> float32 [B, T]."""
    return jnp.maximum(1.0, jnp.log1p(positions.astype(jnp.float32)) / math.log(log_length))


def alibi_slopes(n_heads: int) -> np.ndarray:
    """2^(-8 i / N) for heads i = 1 .. N where N is a power of two (Press et al. 2022, arXiv:2108.12409, section 3).

    Else those of the largest power of two n below N, and then every other one of those of 2n: 2^(-4 (2 i - 1) / n) for
    the N - n heads that remain, as the authors' code has it.

    Returns:
        float32 [N].
    """
    n = 2 ** int(math.log2(n_heads))
    slopes = 2.0 ** (-8 * np.arange(1, n + 1) / n)
    between = 2.0 ** (-4 * (2 * np.arange(1, n_heads - n + 1) - 1) / n)
    return np.concatenate([slopes, between]).astype(np.float32)


def relative_sinusoids(weights: jax.Array, positions: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What queries and keys are longer by, so that their products gain weights . r(n) for a key n positions back.

    r(n) is sin(n f) and then cos(n f), for frequencies f from 1 down to 1 / 10,000 (arXiv:1901.02860, section 3.3).
    With n = i - j these are sums of products of sines and cosines of i and of j: a sum over r that depends on the
    distance alone becomes a product of what the query at i knows and what the key at j knows.

    Args:
        weights: [B, T, N, R], of each query: W^T (q + v).
        positions: int32 [B, T].

    Returns:
        [B, T, N, R] for the queries, [B, T, R] for the keys of all heads; in the dtype of weights.
    """
    R = weights.shape[-1]
    frequencies = 10_000.0 ** (-np.arange(0, R, 2, dtype=np.float64) / R)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    of_sin, of_cos = jnp.split(weights.astype(jnp.float32), 2, axis=-1)
    to_cos = of_sin * sin[:, :, None] + of_cos * cos[:, :, None]
    to_sin = of_cos * sin[:, :, None] - of_sin * cos[:, :, None]
    both = jnp.concatenate([to_cos, to_sin], axis=-1), jnp.concatenate([cos, sin], axis=-1)
    return both[0].astype(weights.dtype), both[1].astype(weights.dtype)


def sinusoids(positions: jax.Array, d_model: int) -> jax.Array:
    """sin of positions at wavelengths 2 pi 10,000^(2i / D) in even dims, cos in odd ones (arXiv:1706.03762, section
    3.5): int32 [B, T] -> float32 [B, T, D]."""
    frequencies = 10_000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*positions.shape, -1)[..., :d_model]
