"""DeepSpeed-Ulysses (Jacobs et al. 2023, arXiv:2309.14509): for attention, heads are cut instead of the sequence."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas import Scores, flash_attention
from maxlm.config import Context, UserError


def ulysses_attention(
    devices: int,
    backend: str,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    visible_to: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    """Attention of one device's queries to all keys; call it on every device of the seq axis, inside shard_map.

    Every device sends each other one its part of the sequence for some of the heads, attends within these heads over
    the whole sequence, and sends the results back.

    Args:
        devices: size of the seq axis, n.
        backend: of `flash_attention`.
        q: [B, T/n, N, H]; N is a multiple of n.
        k, v: [B, T/n, K, H]; K is a multiple of n, or divides it: then every key head goes to n/K devices.
        segments, visible_to: int32 [B, T/n], or None; keys are counted in the whole sequence.
        scores: of this device's N heads, with a mask over positions of the whole sequence.

    Returns:
        [B, T/n, N, H] in q's dtype.

    Raises:
        UserError: the heads cannot be shared out over the axis.
    """
    N, K = q.shape[2], k.shape[2]
    fits = lambda n: N % n == 0 and (K % n == 0 or n % K == 0)
    if not fits(devices):
        works = [n for n in range(1, devices + 1) if fits(n)]
        raise UserError(
            f"sharding.seq = {devices} must divide the {N} query heads that each device of the tensor axis has, and "
            f"divide or be a multiple of its {K} key heads, as sharding.context = {Context.ULYSSES.value}; "
            f"use sharding.seq = {' or '.join(map(str, works))}"
        )
    if devices % K == 0:
        k, v = (jnp.repeat(x, devices // K, axis=2) for x in (k, v))
    q, k, v = (lax.all_to_all(x, "seq", split_axis=2, concat_axis=1, tiled=True) for x in (q, k, v))
    segments, visible_to = jax.tree.map(lambda x: lax.all_gather(x, "seq", axis=1, tiled=True), (segments, visible_to))
    heads = N // devices
    scores = jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, lax.axis_index("seq") * heads, heads), scores)
    out = flash_attention(q, k, v, segment_ids=segments, visible_to=visible_to, backend=backend, **vars(scores))
    return lax.all_to_all(out, "seq", split_axis=1, concat_axis=2, tiled=True)
