"""Logits of a chunk of tokens, over the part of a large vocabulary that a device has; what losses are made of.

Everything but `whole`, `of_gradients` and `narrow` runs inside a `shard_map`, on one device's arrays.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import ACTIVATION_DIMS, StatePart
from maxlm.models import Unembedding
from maxlm.sharding import Layout

TOKEN_AXES = (*ACTIVATION_DIMS["batch"], *ACTIVATION_DIMS["seq"])  # the mesh axes that share out a batch's tokens


def with_arrays(unembedding: Unembedding, table: Any, bias: Any) -> Unembedding:
    """The same with other arrays, or with what is to be said of each of its arrays."""
    return dataclasses.replace(unembedding, table=table, bias=None if unembedding.bias is None else bias)


def whole(layout: Layout, unembedding: Unembedding) -> Unembedding:
    """How the loss has them: cut along the vocabulary alone."""
    return with_arrays(unembedding, layout.activation("vocab", None), layout.activation("vocab"))


def of_gradients(layout: Layout, unembedding: Unembedding) -> Unembedding:
    """How their gradients are kept."""
    spec = lambda *dims: layout.parameter(dims, StatePart.GRADIENTS)
    return with_arrays(unembedding, spec("vocab", "embed"), spec("vocab"))


def narrow(unembedding: Unembedding, dtype: jnp.dtype) -> Unembedding:
    """With its table as a plain array in the compute dtype."""
    table = unembedding.table
    return dataclasses.replace(
        unembedding, table=table.astype(dtype) if isinstance(table, jax.Array) else table.dense(dtype)
    )


def zeros(unembedding: Unembedding) -> Unembedding:
    """What gradients are added to."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), unembedding)


def local_ids(unembedding: Unembedding, targets: jax.Array) -> jax.Array:
    """Rows of this device's part of the table; others lie outside of it."""
    return targets - jax.lax.axis_index("tensor") * unembedding.table.shape[0]


def cut(chunk: int, *arrays: jax.Array) -> tuple[jax.Array, ...]:
    """Each [B, T, ...] as [chunks, tokens of a chunk, ...], zeros at the end."""
    n_tokens = arrays[0].shape[0] * arrays[0].shape[1]
    chunk = min(chunk, n_tokens)
    flat = [x.reshape(n_tokens, *x.shape[2:]) for x in arrays]
    pad = lambda x: jnp.pad(x, [(0, -n_tokens % chunk)] + [(0, 0)] * (x.ndim - 1))
    return tuple(pad(x).reshape(-1, chunk, *x.shape[1:]) for x in flat)


def uncut(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """What `cut` made of an array of this shape."""
    return x.reshape(-1, *shape[2:])[: shape[0] * shape[1]].reshape(shape)


class ChunkScores(NamedTuple):
    """Of a chunk, float32."""

    logits: jax.Array
    exp: jax.Array  # of logit - top
    total: jax.Array  # their sum over the whole vocabulary
    log_z: jax.Array  # over the whole vocabulary
    top: jax.Array  # the largest logit of it
    pull: Callable[[jax.Array, Unembedding | None], tuple[jax.Array, Unembedding | None]]
    """d_logits and d_unembedding of earlier chunks, None: not wanted -> d_x, and d_unembedding with that of this chunk
    added."""


def chunk_scores(x: jax.Array, unembedding: Unembedding) -> ChunkScores:
    table = unembedding.table
    product = jnp.einsum("td,vd->tv", x, table, preferred_element_type=jnp.float32)
    finish = lambda product, bias: with_arrays(unembedding, table, bias).finish(product)
    logits, d_finish = jax.vjp(finish, product, unembedding.bias)

    def pull(d_logits: jax.Array, before: Unembedding | None) -> tuple[jax.Array, Unembedding | None]:
        d_product, d_bias = d_finish(d_logits)
        d_product = d_product.astype(x.dtype)
        d_x = jax.lax.psum(jnp.einsum("tv,vd->td", d_product, table), "tensor")
        if before is None:
            return d_x, None
        d_table = jnp.einsum("tv,td->vd", d_product, x, preferred_element_type=jnp.float32)
        return d_x, jax.tree.map(jnp.add, before, with_arrays(unembedding, d_table, d_bias))

    top = jax.lax.pmax(logits.max(-1), "tensor")
    exp = jnp.exp(logits - top[:, None])
    total = jax.lax.psum(exp.sum(-1), "tensor")
    return ChunkScores(logits, exp, total, top + jnp.log(total), top, pull)


def at_top(exp: jax.Array, top: jax.Array, values: jax.Array) -> jax.Array:
    """Zeros of the shape of this device's logits [tokens, V'], with each token's value at its largest logit `top`;
    where others are as large, equal parts at each. As large are those within 2^-20 of it: a compiler may compute logits
    twice, and then in other bits. It is found in `exp`, which is there, as e^-x is 1 - x for so small an x."""
    here = exp >= (1 - jnp.abs(top) * 2.0**-20)[:, None]
    parts = jax.lax.psum(here.astype(jnp.float32).sum(-1), "tensor")
    return jnp.where(here, (values / parts)[:, None], 0)


def is_target_of(unembedding: Unembedding, target: jax.Array) -> jax.Array:
    """bool [tokens, this device's part of the vocabulary], from `local_ids`."""
    return jnp.arange(unembedding.table.shape[0]) == target[:, None]


def sum_over_tokens(layout: Layout, d_unembedding: Unembedding, dtype: jnp.dtype) -> Unembedding:
    """The gradient of this device's part of the vocabulary from the tokens of all devices, in float32 and in the layout
    of gradients; on the way in `dtype`, unless the config says float32."""
    cast = lambda x: x if layout.config.float32_gradients else x.astype(dtype)
    d_table, d_bias = jax.tree.map(cast, (d_unembedding.table, d_unembedding.bias))
    if layout.parameter(("vocab", "embed"), StatePart.GRADIENTS)[1] == "fsdp":
        d_table = jax.lax.psum(d_table, tuple(axis for axis in TOKEN_AXES if axis != "fsdp"))
        d_table = jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True)
    else:
        d_table = jax.lax.psum(d_table, TOKEN_AXES)
    d_bias = jax.lax.psum(d_bias, TOKEN_AXES)
    return jax.tree.map(lambda x: x.astype(jnp.float32), with_arrays(d_unembedding, d_table, d_bias))
