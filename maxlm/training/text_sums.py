"""Texts that lie in the rows of a batch: sums over each, and what the model says at the end of each.

Text s of a row, s = 0, 1, ..., is its segment s + 1 (`segment_ids`). Sums hold in any order of the columns, so that
rings and pipelines change nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp


def text_sums(values: jax.Array, segment_ids: jax.Array, texts: int) -> jax.Array:
    """The sum of each text's values, in float32: [B, T] or [B, T, D] -> float32 [B, S] or [B, S, D].

    Args:
        values: of each token.
        segment_ids: int32 [B, T]; what is in none of segments 1 to S counts nowhere.
        texts: S.
    """
    member = segment_ids[:, :, None] == jnp.arange(1, texts + 1)
    if values.ndim == 2:
        # No product: one bad number of another text would be 0 * inf, and products may be rounded.
        return jnp.where(member, values[:, :, None].astype(jnp.float32), 0).sum(1)
    return jnp.einsum("bts,btd->bsd", member.astype(jnp.float32), values.astype(jnp.float32), precision="highest")
