"""Attention over a set of keys from attention over its parts."""

from __future__ import annotations

from collections.abc import Iterable

import jax
import jax.numpy as jnp

from kernels_pallas.attention.problem import MASKED


def merge_partials(parts: Iterable[tuple[jax.Array, jax.Array]]) -> tuple[jax.Array, jax.Array]:
    """Combine attention over disjoint sets of keys into attention over all of them.

    With lse_i = log sum exp(scores_i): out = sum_i exp(lse_i - lse) out_i, where lse = log sum_i exp(lse_i)
    (Milakov & Gimelshein 2018, arXiv:1805.02867). Differentiable, as both results of `flash_attention` are.

    Args:
        parts: pairs of out [B, T, N, Hv] and lse float32 [B, N, T], as `flash_attention(..., return_lse=True)` gives.

    Returns:
        out in the parts' dtype, and lse. Queries that saw no key in any part keep 0.

    Raises:
        ValueError: no parts, or their shapes differ.
    """
    parts = list(parts)
    if not parts:
        raise ValueError("merge_partials: parts is empty; give at least one pair (out, lse)")
    for out, lse in parts:
        B, T, N = out.shape[:3] if out.ndim == 4 else (None, None, None)
        if out.shape != parts[0][0].shape or lse.shape != (B, N, T):
            raise ValueError(
                f"merge_partials: out {out.shape} and lse {lse.shape} do not fit; every out must be [B, T, N, Hv], "
                f"as the first {parts[0][0].shape}, and its lse [B, N, T]"
            )
    # Other kernels say -inf where nothing was seen, and -inf - -inf is not a number.
    each = [jnp.maximum(lse, MASKED) for _, lse in parts]
    lse = jax.nn.logsumexp(jnp.stack(each), axis=0)
    total = sum(out * _per_head(jnp.exp(part - lse)) for (out, _), part in zip(parts, each, strict=True))
    return jnp.asarray(total, parts[0][0].dtype), lse


def add_sinks(out: jax.Array, lse: jax.Array, sinks: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Let every query also see a key of score sinks[n] whose value is 0 (arXiv:2309.17453)."""
    total = jnp.logaddexp(lse, sinks.astype(jnp.float32)[:, None])
    return (out * _per_head(jnp.exp(lse - total))).astype(out.dtype), total


def _per_head(weight: jax.Array) -> jax.Array:
    """[B, N, T] to [B, T, N, 1]."""
    return weight.swapaxes(1, 2)[..., None]
