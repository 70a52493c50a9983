"""Cross-entropy over a large vocabulary without the logits of the whole batch in memory.

The loss is linear in each token's own loss, so its gradient with respect to the hidden states and the output table can
be formed while a chunk's logits are there: logits are computed once, used, and dropped. Plain differentiation would
either keep all of them ([B, T, V] float32) or compute them twice.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from maxlm.config import ACTIVATION_DIMS, StatePart
from maxlm.sharding import Layout

_TOKEN_AXES = (*ACTIVATION_DIMS["batch"], *ACTIVATION_DIMS["seq"])  # the mesh axes that share out a batch's tokens


class LossSums(NamedTuple):
    """Sums over the tokens of a batch, float32 scalars."""

    objective: jax.Array
    """What is minimised: cross_entropy + z_loss * log_z_squared. The only differentiable one."""
    cross_entropy: jax.Array
    """Nats."""
    log_z_squared: jax.Array


class _Options(NamedTuple):
    layout: Layout
    z_loss: float
    chunk: int


def cross_entropy_sums(
    layout: Layout,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    z_loss: float = 0.0,
    chunk: int = 1024,
) -> LossSums:
    """Sum over tokens of mask * (logsumexp(logits) - logits[target]), with logits = hidden @ table.T in float32.

    The z-loss term, mask * logsumexp(logits)^2, is that of PaLM (arXiv:2204.02311, section 5).

    Args:
        layout: the mesh; the vocabulary may be cut over the tensor axis.
        hidden: [B, T, D] in the compute dtype.
        table: float32 [V, D].
        targets: int32 [B, T].
        mask: float [B, T], weight of each token.
        z_loss: weight of the z-loss in the objective.
        chunk: tokens on each device whose logits exist at one time.
    """
    return _sums(_Options(layout, z_loss, chunk), hidden, table, targets, mask.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _sums(options: _Options, hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array) -> LossSums:
    return _on_mesh(options, hidden, table, targets, mask, with_gradient=False)[0]


def _sums_fwd(
    options: _Options, hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[LossSums, tuple[jax.Array, jax.Array]]:
    sums, d_hidden, d_table = _on_mesh(options, hidden, table, targets, mask, with_gradient=True)
    return sums, (d_hidden, d_table)


def _sums_bwd(options: _Options, gradients: tuple[jax.Array, jax.Array], d_sums: LossSums) -> tuple:
    d_hidden, d_table = gradients
    scale = d_sums.objective
    return d_hidden * scale.astype(d_hidden.dtype), d_table * scale, None, None


_sums.defvjp(_sums_fwd, _sums_bwd)


def _on_mesh(
    options: _Options,
    hidden: jax.Array,
    table: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    *,
    with_gradient: bool,
) -> tuple:
    """LossSums, d_hidden in hidden's dtype and d_table in float32; the latter two None without gradient."""
    layout = options.layout
    tokens = layout.activation("batch", "seq")
    d_table_spec = layout.parameter(("vocab", "embed"), StatePart.GRADIENTS)
    scatter_over_fsdp = d_table_spec[1] == "fsdp"

    @functools.partial(
        layout.shard_map,
        in_specs=(layout.activation("batch", "seq", None), layout.activation("vocab", None), tokens, tokens),
        out_specs=(
            layout.activation(),
            layout.activation("batch", "seq", None) if with_gradient else None,
            d_table_spec if with_gradient else None,
        ),
        check_vma=False,
    )
    def local(hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array) -> tuple:
        sums, d_hidden, d_table = _in_chunks(options, hidden, table, targets, mask, with_gradient)
        sums = LossSums(*jax.lax.psum(tuple(sums), _TOKEN_AXES))
        if with_gradient:
            wide = layout.config.float32_gradients
            d_table = d_table if wide else d_table.astype(hidden.dtype)
            if scatter_over_fsdp:
                d_table = jax.lax.psum(d_table, tuple(axis for axis in _TOKEN_AXES if axis != "fsdp"))
                d_table = jax.lax.psum_scatter(d_table, "fsdp", scatter_dimension=1, tiled=True)
            else:
                d_table = jax.lax.psum(d_table, _TOKEN_AXES)
            d_table = d_table.astype(jnp.float32)
        return sums, d_hidden, d_table

    return local(hidden, table.astype(hidden.dtype), targets, mask)


def _in_chunks(
    options: _Options, hidden: jax.Array, table: jax.Array, targets: jax.Array, mask: jax.Array, with_gradient: bool
) -> tuple:
    """One device's share: all its tokens, and its part of the vocabulary."""
    D, n_tokens = hidden.shape[-1], targets.size
    chunk = min(options.chunk, n_tokens)
    missing = -n_tokens % chunk
    first_id = jax.lax.axis_index("tensor") * table.shape[0]
    flat = hidden.reshape(n_tokens, D), targets.reshape(n_tokens) - first_id, mask.reshape(n_tokens)
    chunks = [jnp.pad(x, [(0, missing)] + [(0, 0)] * (x.ndim - 1)).reshape(-1, chunk, *x.shape[1:]) for x in flat]

    def one_chunk(carry: tuple, tokens: tuple) -> tuple:
        objective, cross_entropy, log_z_squared, d_table = carry
        x, target, weight = tokens
        logits = jnp.einsum("td,vd->tv", x, table, preferred_element_type=jnp.float32)
        is_target = jnp.arange(table.shape[0]) == target[:, None]
        top = jax.lax.pmax(logits.max(-1), "tensor")
        exp = jnp.exp(logits - top[:, None])
        total = jax.lax.psum(exp.sum(-1), "tensor")
        log_z = top + jnp.log(total)
        target_logit = jax.lax.psum(jnp.where(is_target, logits, 0).sum(-1), "tensor")
        nll = weight @ (log_z - target_logit)
        z_squared = weight @ (log_z * log_z)
        d_x = None
        if with_gradient:
            # d(objective)/d(logits) = weight * (softmax * (1 + 2 * z_loss * log_z) - onehot)
            d_softmax = weight * (1 + 2 * options.z_loss * log_z) / total
            d_logits = exp * d_softmax[:, None] - jnp.where(is_target, weight[:, None], 0)
            d_logits = d_logits.astype(x.dtype)
            d_x = jax.lax.psum(jnp.einsum("tv,vd->td", d_logits, table), "tensor")
            d_table += jnp.einsum("td,tv->dv", x, d_logits, preferred_element_type=jnp.float32)
        objective += nll + options.z_loss * z_squared
        return (objective, cross_entropy + nll, log_z_squared + z_squared, d_table), d_x

    zero = jnp.float32(0)
    start = zero, zero, zero, jnp.zeros(table.shape[::-1], jnp.float32) if with_gradient else None
    scanned: tuple = jax.lax.scan(one_chunk, start, tuple(chunks))
    (*sums, d_table), d_hidden = scanned
    if with_gradient:
        d_hidden = d_hidden.reshape(-1, D)[:n_tokens].reshape(hidden.shape)
        d_table = d_table.T
    return LossSums(*sums), d_hidden, d_table
