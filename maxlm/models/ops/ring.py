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

That holds for causal masks. Where the mask, or `visible_to`, lets queries see what comes after them, any of the four
pairs may be visible: each is looked at, and skipped where nothing of it is.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import Scores, flash_attention, flash_attention_gradients, merge_partials
from kernels_pallas.attention.merge import add_sinks
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


class _Own(NamedTuple):
    """Of this device's queries."""

    segments: jax.Array | None  # [B, 2C]
    visible_to: jax.Array | None  # [B, 2C], counted in the whole sequence


class _Pair(NamedTuple):
    """A query chunk of this device, and a key chunk of those it has at stop r."""

    r: int | jax.Array
    q: Half
    k: Half


@dataclass(frozen=True)
class Ring:
    """What is known of a ring when it is compiled, and the view that a device has of it inside shard_map."""

    devices: int
    chunk: int
    """C, the positions in a chunk: half of what a device holds."""
    first: int
    last: int
    """The stops: at stop r each device has the keys of the device r before it (after it, where r is negative)."""
    causal: bool
    """No query sees what comes after it."""
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
        """The pairs that a causal mask leaves at a stop; at home there is a third, of LOW and LOW."""
        own = lax.axis_index("seq")
        same = jnp.where((own - r) % self.devices < own, LOW, HIGH)
        return _Pair(r, HIGH, LOW), _Pair(r, same, same)

    def begins(self, pair: _Pair) -> tuple[jax.Array, jax.Array]:
        """The first position of the query chunk and of the key chunk."""
        own = lax.axis_index("seq")
        chunk = lambda device, half: jnp.where(half == LOW, device, 2 * self.devices - 1 - device)
        return chunk(own, pair.q) * self.chunk, chunk((own - pair.r) % self.devices, pair.k) * self.chunk

    def half(self, x: jax.Array, half: Half, dim: int = 1) -> jax.Array:
        return lax.dynamic_slice_in_dim(x, half * self.chunk, self.chunk, dim)

    def with_half(self, x: jax.Array, new: jax.Array, half: Half, dim: int = 1) -> jax.Array:
        return lax.dynamic_update_slice_in_dim(x, new, half * self.chunk, dim)

    def options(self, scores: Scores, own: _Own, keys: _Keys, pair: _Pair) -> dict[str, Any]:
        """Of attention of the query chunk to the key chunk, whose positions begin at 0; without sinks."""
        q_begin, k_begin = self.begins(pair)
        halves = lambda x, half: None if x is None else self.half(x, half)
        ends = halves(own.visible_to, pair.q)
        return {name: value for name, value in vars(scores).items() if name != "sinks"} | {
            "segment_ids": halves(own.segments, pair.q),
            "kv_segment_ids": halves(keys.segments, pair.k),
            "visible_to": None if ends is None else ends - k_begin,
            "q_offset": q_begin - k_begin,
            "backend": self.backend,
        }

    def attend(self, mask: Mask, own: _Own, r: int | jax.Array, add: Callable[[_Pair, Any], Any], total: Any) -> Any:
        """The total with add(pair, total) of the pairs at a stop of which a query may see a key."""
        if self.causal:
            return functools.reduce(lambda total, pair: add(pair, total), self.pairs(r), total)
        if own.visible_to is not None:
            mask = mask.opened()

        def look_at(n: jax.Array, total: Any) -> Any:
            pair = _Pair(r, n // 2, n % 2)
            (q_begin, k_begin), last = self.begins(pair), self.chunk - 1
            seen = mask.touches(q_begin, q_begin + last, k_begin, k_begin + last)
            if own.visible_to is not None:
                seen &= jnp.max(self.half(own.visible_to, pair.q)) > k_begin
            return lax.cond(seen, functools.partial(add, pair), lambda total: total, total)

        return lax.fori_loop(0, 4, look_at, total)

    def shift(self, tree: Any, stops: int) -> Any:
        """Every device's arrays, at the device `stops` after it."""
        if stops % self.devices == 0:
            return tree
        perm = [(device, (device + stops) % self.devices) for device in range(self.devices)]
        return jax.tree.map(lambda x: lax.ppermute(x, "seq", perm), tree)


def make_ring(mask: Mask, devices: int, length: int, backend: str, visible_to: bool = False) -> Ring:
    """The ring for sequences of which each device holds `length` positions; a causal window shortens it.

    Where windows reach m chunks back, a device needs the keys of the m devices before it, for its low chunk, and of the
    m after it, for its high one.

    Args:
        visible_to: queries say themselves where the keys that they see end.

    Raises:
        UserError: the mask depends on more than the distance of query and key, and chunks do not know where they are.
    """
    window = (mask.opened() if visible_to else mask).as_window()
    if window is None:
        raise UserError(
            f"the mask {mask} is no window, and with sharding.context = {Context.RING.value} only windows can be cut; "
            f"use {Context.ALL_GATHER.value} or {Context.ULYSSES.value}"
        )
    left, right = window
    chunk = length // 2
    reach = devices if left is None or right != 0 else -(-left // chunk)
    first, last = (-reach, reach) if 2 * reach + 1 < devices else (0, devices - 1)
    return Ring(devices, chunk, first, last, right == 0, backend)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def ring_attention(
    ring: Ring,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    visible_to: jax.Array | None,
    scores: Scores,
) -> jax.Array:
    """Attention of one device's queries to all keys; call it on every device of the seq axis, inside shard_map.

    The backward pass sends the keys round again, and their gradients after them: neither pass keeps what has passed.
    Gradients of the bias table and the sinks are those of this device's queries, summed over its stops; the transpose
    of shard_map sums them over devices.

    Args:
        ring: from `make_ring`.
        q: [B, 2C, N, H], this device's low chunk and then its high one.
        k, v: [B, 2C, K, H], the same of keys and values.
        segments, visible_to: int32 [B, 2C], or None; the ends of what queries see are counted in the whole sequence.
        scores: of this device's N heads, with the mask of `make_ring`.

    Returns:
        [B, 2C, N, H] in q's dtype.
    """
    return _forward(ring, q, k, v, segments, visible_to, scores)[0]


def _forward(
    ring: Ring,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    segments: jax.Array | None,
    visible_to: jax.Array | None,
    scores: Scores,
) -> tuple[jax.Array, jax.Array]:
    """Output in q's dtype, and the logsumexp, float32 [B, N, 2C]."""
    own = _Own(segments, visible_to)

    def add(keys: _Keys, pair: _Pair, total: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        part = flash_attention(
            ring.half(q, pair.q),
            ring.half(keys.k, pair.k),
            ring.half(keys.v, pair.k),
            return_lse=True,
            **ring.options(scores, own, keys, pair),
        )
        out, lse = total
        new_out, new_lse = merge_partials([(ring.half(out, pair.q), ring.half(lse, pair.q, 2)), part])
        return ring.with_half(out, new_out, pair.q), ring.with_half(lse, new_lse, pair.q, 2)

    def visit(total: Any, keys: _Keys, r: int | jax.Array) -> Any:
        return ring.attend(scores.mask, own, r, functools.partial(add, keys), total)

    B, T, N, _ = q.shape
    nothing = jnp.zeros((B, T, N, v.shape[3]), jnp.float32), jnp.full((B, N, T), _UNSEEN, jnp.float32)
    home = _Keys(k, v, segments)
    out, lse = ring.go_round(home, add(home, _Pair(0, LOW, LOW), nothing) if ring.causal else nothing, visit)
    if scores.sinks is not None:
        out, lse = add_sinks(out, lse, scores.sinks)
    return out.astype(q.dtype), lse


def _fwd(ring: Ring, *arguments: Any) -> tuple[jax.Array, tuple]:
    out, lse = _forward(ring, *arguments)
    # The names of flash_attention's results: a remat policy that saves them does not go round again.
    out, lse = checkpoint_name(out, "attention_out"), checkpoint_name(lse, "attention_lse")
    return out, (*arguments, out, lse)


def _bwd(ring: Ring, residuals: tuple, d_out: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, None, None, Scores]:
    q, k, v, segments, visible_to, scores, out, lse = residuals
    own = _Own(segments, visible_to)
    delta = jnp.sum(out.astype(jnp.float32) * d_out.astype(jnp.float32), -1).swapaxes(1, 2)

    def add(keys: _Keys, pair: _Pair, total: _Gradients) -> _Gradients:
        part = flash_attention_gradients(
            ring.half(q, pair.q),
            ring.half(keys.k, pair.k),
            ring.half(keys.v, pair.k),
            ring.half(lse, pair.q, 2),
            ring.half(delta, pair.q, 2),
            ring.half(d_out, pair.q),
            **ring.options(scores, own, keys, pair),
        )
        plus = lambda x, new, half: ring.with_half(x, ring.half(x, half) + new, half)
        return _Gradients(
            plus(total.dq, part.q, pair.q),
            plus(total.dk, part.k, pair.k),
            plus(total.dv, part.v, pair.k),
            None if part.bias_table is None else total.table + part.bias_table,
        )

    def visit(total: _Gradients, keys: _Keys, r: int | jax.Array) -> _Gradients:
        # The sums for keys follow them one stop behind: so they too travel during the work, on the next part.
        dk, dv = ring.shift((total.dk, total.dv), 1)
        total = total._replace(dk=dk, dv=dv)
        return ring.attend(scores.mask, own, r, functools.partial(add, keys), total)

    home, bias = _Keys(k, v, segments), scores.relative_bias
    zeros = lambda x: jnp.zeros(x.shape, jnp.float32)
    nothing = _Gradients(zeros(q), zeros(k), zeros(v), None if bias is None else zeros(bias.table))
    total = ring.go_round(home, nothing, visit)
    dk, dv = ring.shift((total.dk, total.dv), -ring.last)
    total = total._replace(dk=dk, dv=dv)
    dq, dk, dv, d_table = add(home, _Pair(0, LOW, LOW), total) if ring.causal else total
    d_scores = jax.tree.map(jnp.zeros_like, scores)
    if bias is not None:
        d_bias = dataclasses.replace(bias, table=d_table.astype(bias.table.dtype))
        d_scores = dataclasses.replace(d_scores, relative_bias=d_bias)
    if scores.sinks is not None:
        # A sink's value is 0, and so is the gradient of its weight.
        d_sinks = -jnp.sum(jnp.exp(scores.sinks.astype(jnp.float32)[:, None] - lse) * delta, (0, 2))
        d_scores = dataclasses.replace(d_scores, sinks=d_sinks.astype(scores.sinks.dtype))
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None, None, d_scores


class _Gradients(NamedTuple):
    """Sums so far, float32."""

    dq: jax.Array  # [B, 2C, N, H]
    dk: jax.Array  # [B, 2C, K, H]: for the keys that are here now
    dv: jax.Array  # [B, 2C, K, H]
    table: Any  # [N, buckets], or None


ring_attention.defvjp(_fwd, _bwd)
