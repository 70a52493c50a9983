"""What positions do to queries, keys, scores and embeddings; in float32."""

from __future__ import annotations

import math
from typing import assert_never

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Llama3RopeScaling, Rope


def rope_frequencies(config: Rope, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of head dims: theta^(-2i / H) for i = 0 .. H/2 - 1, stretched if asked.

    Returns:
        float32 [H / 2].
    """
    frequencies = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    match config.scaling:
        case Llama3RopeScaling() as scaling:
            frequencies = _stretch(frequencies, scaling)
        case None:
            pass
        case _:
            assert_never(config.scaling)
    return frequencies.astype(np.float32)


def _stretch(frequencies: np.ndarray, scaling: Llama3RopeScaling) -> np.ndarray:
    """Llama 3.1: short wavelengths stay, long ones grow by `factor`, the band between is interpolated."""
    turns = scaling.original_max_len * frequencies / (2 * np.pi)  # rotations over the original context
    keep = np.clip((turns - scaling.low_freq_factor) / (scaling.high_freq_factor - scaling.low_freq_factor), 0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling.factor


def rotate(x: jax.Array, angles: jax.Array) -> jax.Array:
    """Rotate head dims (i, i + H/2) by angles[..., i], the pairing of Hugging Face's LLaMA weights.

    Args:
        x: [B, T, heads, H].
        angles: float32 [B, T, H / 2], position times frequency.

    Returns:
        [B, T, heads, H] in x's dtype.
    """
    cos, sin = jnp.cos(angles)[:, :, None], jnp.sin(angles)[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


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


def sinusoids(positions: jax.Array, d_model: int) -> jax.Array:
    """sin of positions at wavelengths 2 pi 10,000^(2i / D) in even dims, cos in odd ones (arXiv:1706.03762, section
    3.5): int32 [B, T] -> float32 [B, T, D]."""
    frequencies = 10_000.0 ** (-np.arange(0, d_model, 2, dtype=np.float64) / d_model)
    angles = positions[..., None].astype(jnp.float32) * frequencies.astype(np.float32)
    both = jnp.stack([jnp.sin(angles), jnp.cos(angles)], axis=-1)
    return both.reshape(*positions.shape, -1)[..., :d_model]
