"""Ring attention (Liu et al. 2023, arXiv:2310.01889): keys and values go round the devices of the seq axis.

Each of the n devices keeps its own queries and sees every other device's keys once, while the next ones are on their
way; no device ever holds the keys of a whole sequence. Under a causal mask a cut into n consecutive parts would leave
the first device idle most of the time. So a sequence is cut into 2n chunks, and device i holds chunks i and 2n-1-i, its
low and its high one (zig-zag order; Llama 3, arXiv:2407.21783, section 3.3.2). Then of the four pairs of a query chunk
and a key chunk that meet when device i has the keys of device j

    (high, low)    is visible, always
    (low, low)     is visible if j <= i: chunk j is not after chunk i
    (high, high)   is visible if j >= i: chunk 2n-1-j is not after chunk 2n-1-i
    (low, high)    is hidden, always

so that every device attends two pairs whenever j != i: the same work everywhere, at every stop.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import flash_attention, flash_attention_gradients, merge_partials
from kernels_pallas.masks import Mask
from maxlm.config import Context, UserError
from maxlm.sharding import Layout

LOW, HIGH = 0, 1
Half = int | jax.Array
"""Which of a device's two chunks: LOW or HIGH."""

_UNSEEN = -1e30
"""Logsumexp of a query that has seen no key yet, as `flash_attention` gives it."""


def zigzag_order(seq_len: int, devices: int) -> np.ndarray:
    """int [seq_len]: the position in the sequence of each column, so that device i holds chunks i and 2 * devices-1-i.

    Raises:
        UserError: the sequence cannot be cut into 2 * devices chunks.
    """
    if seq_len % (2 * devices):
        works = max(seq_len // (2 * devices), 1) * 2 * devices
        raise UserError(
            f"train.seq_len = {seq_len} is not a multiple of {2 * devices} (2 x sharding.seq {devices}, as "
            f"sharding.context = {Context.RING.value}); use {works}"
        )
    chunks = np.arange(seq_len).reshape(2 * devices, -1)
    return np.concatenate([chunks[[i, 2 * devices - 1 - i]].reshape(-1) for i in range(devices)])


def in_ring_order(layout: Layout, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """The batch with the columns of its arrays [B, T] in zig-zag order, where attention on this mesh is a ring.

    Positions, targets and masks travel with their tokens, so that a loss summed over tokens does not change. Arrays [B]
    stay as they are.
    """
    devices = layout.mesh.shape["seq"]
    if layout.config.context is not Context.RING or devices == 1:
        return batch

    def reorder(x: jax.Array) -> jax.Array:
        if x.ndim == 1:
            return x
        whole = layout.constrain(x, "batch", None)  # 4 bytes a token
        return layout.constrain(whole[:, zigzag_order(x.shape[1], devices)], "batch", "seq")

    return {name: reorder(x) for name, x in batch.items()}


class _Keys(NamedTuple):
    """What goes round."""

    k: jax.Array  # [B, 2C, K, H]
    v: jax.Array  # [B, 2C, K, H]
    segments: jax.Array | None  # [B, 2C]


class _Pair(NamedTuple):
    """A query chunk of this device, and a key chunk of those it has at stop r."""

    r: int | jax.Array
    q: Half
    k: Half


@dataclass(frozen=True)
class Ring:
    """What is known of a ring when it is compiled, and the view that a device has of it inside shard_map."""

    mask: Mask
    devices: int
    chunk: int
    """C, the positions in a chunk: half of what a device holds."""
    first: int
    last: int
    """The stops: at stop r each device has the keys of the device r before it (after it, where r is negative)."""
    backend: str

    def go_round(self, home: _Keys, total: Any, visit: Callable[[Any, _Keys, int | jax.Array], Any]) -> Any:
        """Visit every stop with the keys that are there; the next ones travel meanwhile."""

        def stop(carry: tuple[_Keys, Any], r: jax.Array) -> tuple[tuple[_Keys, Any], None]:
            keys, total = carry
            return (self.shift(keys, 1), visit(total, keys, r)), None

        start = self.shift(home, self.first), total
        (keys, total), _ = lax.scan(stop, start, jnp.arange(self.first, self.last))
        return visit(total, keys, self.last)

    def pairs(self, r: int | jax.Array) -> tuple[_Pair, _Pair]:
        """The pairs to attend at a stop; at home there is a third, of LOW and LOW."""
        own = lax.axis_index("seq")
        same = jnp.where((own - r) % self.devices < own, LOW, HIGH)
        return _Pair(r, HIGH, LOW), _Pair(r, same, same)

    def offset(self, pair: _Pair) -> jax.Array:
        """How many positions the query chunk begins after the key chunk."""
        own = lax.axis_index("seq")
        chunk = lambda device, half: jnp.where(half == LOW, device, 2 * self.devices - 1 - device)
        return (chunk(own, pair.q) - chunk((own - pair.r) % self.devices, pair.k)) * self.chunk

    def half(self, x: jax.Array, half: Half, dim: int = 1) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, half * self.chunk, self.chunk, dim)

    def with_half(self, x: jax.Array, new: jax.Array, half: Half, dim: int = 1) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, new, half * self.chunk, dim)

    def segments(self, own: jax.Array | None, keys: _Keys, pair: _Pair) -> tuple[jax.Array | None, jax.Array | None]:
        """Of the query chunk and of the key chunk."""
        if own is None or keys.segments is None:
            return None, None
        return self.half(own, pair.q), self.half(keys.segments, pair.k)

    def shift(self, tree: Any, stops: int) -> Any:
        """Every device's arrays, at the device `stops` after it."""
        if stops % self.devices == 0:
            return tree
        perm = [(device, (device + stops) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, "seq", perm), tree)


def make_ring(mask: Mask, window: int | None, devices: int, length: int, backend: str) -> Ring:
    """The ring for sequences of which each device holds `length` positions; a window shortens it.

    Where windows reach m chunks back, a device needs the keys of the m devices before it, for its low chunk, and of the
    m after it, for its high one.
    """
    chunk = length // 2
    reach = devices if window is None else -(-(window - 1) // chunk)
    first, last = (-reach, reach) if 2 * reach + 1 < devices else (0, devices - 1)
    return Ring(mask, devices, chunk, first, last, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> jax.Array:
    """Attention of one device's queries to all keys; call it on every device of the seq axis, inside shard_map.

    The backward pass sends the keys round again, and their gradients after them: neither pass keeps what has passed.

    Args:
        ring: from `make_ring`.
        q: [B, 2C, N, H], this device's low chunk and then its high one.
        k, v: [B, 2C, K, H], the same of keys and values.
        segments: int32 [B, 2C], or None.

    Returns:
        [B, 2C, N, H] in q's dtype.
    """
    return _forward(ring, q, k, v, segments)[0]


def _forward(
    ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype, and the logsumexp, float32 [B, N, 2C]."""

    def add(total: tuple[jax.Array, jax.Array], keys: _Keys, pair: _Pair) -> tuple[jax.Array, jax.Array]:
        q_segments, k_segments = ring.segments(segments, keys, pair)
        part = flash_attention(
            ring.half(q, pair.q),
            ring.half(keys.k, pair.k),
            ring.half(keys.v, pair.k),
            mask=ring.mask,
            segment_ids=q_segments,
            kv_segment_ids=k_segments,
            q_offset=ring.offset(pair),
            return_lse=True,
            backend=ring.backend,
        )
        out, lse = total
        new_out, new_lse = merge_partials([(ring.half(out, pair.q), ring.half(lse, pair.q, 2)), part])
        return ring.with_half(out, new_out, pair.q), ring.with_half(lse, new_lse, pair.q, 2)

    def visit(total: tuple[jax.Array, jax.Array], keys: _Keys, r: int | jax.Array) -> tuple[jax.Array, jax.Array]:
        for pair in ring.pairs(r):
            total = add(total, keys, pair)
        return total

    B, T, N, _ = q.shape
    nothing = jnp.zeros((B, T, N, v.shape[3]), jnp.float32), jnp.full((B, N, T), _UNSEEN, jnp.float32)
    home = _Keys(k, v, segments)
    out, lse = ring.go_round(home, add(nothing, home, _Pair(0, LOW, LOW)), visit)
    return out.astype(q.dtype), lse


def _fwd(ring: Ring, q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None) -> tuple[jax.Array, tuple]:
    out, lse = _forward(ring, q, k, v, segments)
    # The names of flash_attention's results: a remat policy that saves them does not go round again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (q, k, v, segments, out, lse)


def _bwd(ring: Ring, residuals: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, segments, out, lse = residuals
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2)

    def add(total: _Gradients, keys: _Keys, pair: _Pair) -> _Gradients:
        q_segments, k_segments = ring.segments(segments, keys, pair)
        parts = flash_attention_gradients(
            ring.half(q, pair.q),
            ring.half(keys.k, pair.k),
            ring.half(keys.v, pair.k),
            ring.half(lse, pair.q, 2),
            ring.half(delta, pair.q, 2),
            ring.half(d_out, pair.q),
            mask=ring.mask,
            segment_ids=q_segments,
            kv_segment_ids=k_segments,
            q_offset=ring.offset(pair),
            backend=ring.backend,
        )
        halves = pair.q, pair.k, pair.k
        new = (ring.half(x, half) + part for x, part, half in zip(total, parts, halves, strict=True))
        return _Gradients(*map(ring.with_half, total, new, halves))

    def visit(total: _Gradients, keys: _Keys, r: int | jax.Array) -> _Gradients:
        # The sums for keys follow them one stop behind: so they too travel during the work, on the next part.
        dq, dk, dv = total
        total = _Gradients(dq, *ring.shift((dk, dv), 1))
        for pair in ring.pairs(r):
            total = add(total, keys, pair)
        return total

    home = _Keys(k, v, segments)
    zeros = _Gradients(*(jnp.zeros(x.shape, jnp.float32) for x in (q, k, v)))
    dq, dk, dv = ring.go_round(home, zeros, visit)
    dq, dk, dv = add(_Gradients(dq, *ring.shift((dk, dv), -ring.last)), home, _Pair(0, LOW, LOW))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


class _Gradients(NamedTuple):
    """Sums so far, float32."""

    dq: jax.Array  # [B, 2C, N, H]
    dk: jax.Array  # [B, 2C, K, H]: for the keys that are here now
    dv: jax.Array  # [B, 2C, K, H]


ring_attention.defvjp(_fwd, _bwd)
