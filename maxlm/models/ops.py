"""The model's heavy operations. This is the only importer of `kernels_pallas`, and where kernels meet the mesh.

The compiler cannot split a kernel over devices by itself, so attention runs inside `shard_map`: each device has its own
rows, heads and queries, and all keys of its rows.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator

import jax
import jax.numpy as jnp

from kernels_pallas import explain, flash_attention, fused_glu, masks, mixed_einsum
from maxlm.config import Activation, Backend, GluSave, KernelConfig, UserError
from maxlm.sharding import Layout


def project(layout: Layout, subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    """einsum of activations with a float32 weight, computed in x's dtype.

    The gradient of w is summed over devices in x's dtype, or in float32 with `sharding.float32_gradients`.
    """
    return mixed_einsum(subscripts, x, _weight(layout, w, x.dtype))


def glu(
    layout: Layout,
    kernels: KernelConfig,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    *,
    activation: Activation,
) -> jax.Array:
    """activation(x w_gate + b_gate) * (x w_up + b_up): x [B, T, D], weights [D, F], biases [F] -> [B, T, F]."""
    w_gate, w_up = _weight(layout, w_gate, x.dtype), _weight(layout, w_up, x.dtype)

    def run(
        x: jax.Array, w_gate: jax.Array, w_up: jax.Array, b_gate: jax.Array | None, b_up: jax.Array | None
    ) -> jax.Array:
        with _blaming("glu", kernels.glu):
            return fused_glu(
                x,
                w_gate,
                w_up,
                b_gate=b_gate,
                b_up=b_up,
                act=activation.value,
                save="ag" if kernels.glu_save is GluSave.AG else "none",
                backend=kernels.glu.value,
            )

    weight, bias = layout.activation(None, "mlp"), layout.activation("mlp")
    on_mesh = jax.shard_map(
        run,
        mesh=layout.mesh,
        in_specs=(layout.activation("batch", "seq", None), weight, weight, bias, bias),
        out_specs=layout.activation("batch", "seq", "mlp"),
        check_vma=False,  # kernels have no replication rule
    )
    # The compiler splits plain products over devices better than we do by hand; a kernel it cannot split.
    if explain(on_mesh, x, w_gate, w_up, b_gate, b_up).backend == "xla":
        return run(x, w_gate, w_up, b_gate, b_up)
    return on_mesh(x, w_gate, w_up, b_gate, b_up)


def attention(
    layout: Layout,
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    *,
    window: int | None,
    segment_ids: jax.Array | None = None,
    first_position: jax.Array | None = None,
    backend: Backend = Backend.AUTO,
) -> jax.Array:
    """Causal attention on the mesh.

    Args:
        q: [B, T, N, H]; sharded over rows, queries and heads.
        k, v: [B, S, K, H]; gathered over the seq axis, as every query may need every earlier key.
        window: keys a query sees, itself included; None: all earlier ones.
        segment_ids: [B, T] int32, when S = T; queries see only their own segment.
        first_position: [B] int32 position of the first query; key s has position s. None: 0.
        backend: what it runs as.

    Returns:
        [B, T, N, H].
    """
    mask = masks.causal if window is None else masks.local(window - 1, 0)
    one_device_seq = layout.mesh.shape["seq"] == 1

    @functools.partial(
        jax.shard_map,
        mesh=layout.mesh,
        in_specs=(
            layout.activation("batch", "seq", "heads", None),
            layout.activation("batch", None, "kv_heads", None),
            layout.activation("batch", None, "kv_heads", None),
            None if segment_ids is None else layout.activation("batch", None),
            None if first_position is None else layout.activation("batch"),
        ),
        out_specs=layout.activation("batch", "seq", "heads", None),
        check_vma=False,  # neither kernels nor loops with data-dependent bounds have a replication rule
    )
    def local(
        q: jax.Array, k: jax.Array, v: jax.Array, segments: jax.Array | None, first: jax.Array | None
    ) -> jax.Array:
        T = q.shape[1]
        start = 0 if one_device_seq else jax.lax.axis_index("seq") * T
        own = None if segments is None else jax.lax.dynamic_slice_in_dim(segments, start, T, 1)
        offset = start if first is None else start + first
        with _blaming("attention", backend):
            return flash_attention(
                q, k, v, mask=mask, segment_ids=own, kv_segment_ids=segments, q_offset=offset, backend=backend.value
            )

    return local(q, k, v, segment_ids, first_position)


def embed(layout: Layout, table: jax.Array, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table: float32 [V, D] and int32 [B, T] -> [B, T, D] in `dtype`.

    Each device looks up the ids of its own part of the vocabulary, and the parts are added: a plain gather from a table
    that is cut along the vocabulary would have the compiler copy the whole table to every device. The table stays
    float32 here, because its gradient adds one row for each token, and a frequent token's sum would stall in bfloat16.
    """

    @functools.partial(
        jax.shard_map,
        mesh=layout.mesh,
        in_specs=(layout.activation("vocab", None), layout.activation("batch", "seq")),
        out_specs=layout.activation("batch", "seq", None),
    )
    def local(table: jax.Array, ids: jax.Array) -> jax.Array:
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        inside = (own >= 0) & (own < table.shape[0])
        rows = jnp.where(inside[..., None], table[jnp.where(inside, own, 0)], 0)
        return jax.lax.psum(rows.astype(dtype), "tensor")

    return local(table, ids)


@contextlib.contextmanager
def _blaming(key: str, backend: Backend) -> Iterator[None]:
    """Say which key of the config named a backend that cannot do this."""
    try:
        yield
    except ValueError as error:
        if backend is Backend.AUTO:
            raise
        raise UserError(f"model.kernels.{key} = {backend.value}, but {error}") from error


def _weight(layout: Layout, w: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return w if layout.config.float32_gradients else w.astype(dtype)
