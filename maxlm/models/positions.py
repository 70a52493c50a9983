"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.config import Llama3RopeScaling, RopeConfig


def rope_frequencies(config: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians per position of each pair of head dims: theta^(-2i / H) for i = 0 .. H/2 - 1, stretched if asked.

    Returns:
        float32 [H / 2].
    """
    frequencies = config.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if config.scaling is not None:
        frequencies = _stretch(frequencies, config.scaling)
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
