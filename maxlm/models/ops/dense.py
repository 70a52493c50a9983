"""Products of activations and weights, the gated unit, and the embedding."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable
from typing import Literal, assert_never

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kernels_pallas import fused_glu, mixed_einsum, plan_glu
from kernels_pallas.glu import activations
from maxlm.config import Activation, GluSave, KernelConfig, Nonlinearity, Swish
from maxlm.models.ops.backends import blaming
from maxlm.models.ops.ring import in_ring_order
from maxlm.models.unembedding import Unembedding
from maxlm.models.weights.around import Begun, MlpAfter, Prompted, Rescaled, SmallMlp
from maxlm.models.weights.by_channel import ByChannel, Float8, Int8, Int8Activations, Int8Outliers
from maxlm.models.weights.by_group import ByGroup
from maxlm.models.weights.by_layer import ByLayer, in_layer
from maxlm.models.weights.by_row import ByRow
from maxlm.models.weights.kinds import Weight
from maxlm.models.weights.low_rank import LowRank
from maxlm.models.weights.narrow import Narrow, narrow_einsum
from maxlm.models.weights.normal_float import NormalFloat4
from maxlm.models.weights.watched import Watched, watch
from maxlm.sharding import Layout


def project(layout: Layout, subscripts: str, x: jax.Array, w: Weight, bias: jax.Array | None = None) -> jax.Array:
    """einsum of activations [B, T, ...] with a weight over the dims that both have, which come first in the weight, and
    a bias added, computed in x's dtype.

    The gradient of a float32 w is summed over devices in x's dtype, or in float32 with `sharding.float32_gradients`.
    """
    match w:
        case Int8() | Float8():
            y = _scaled(layout, subscripts, x, w)
        case Int8Activations():
            y = _integers(layout, subscripts, x, w).astype(x.dtype)
        case Int8Outliers(threshold=threshold):
            outliers = jnp.where(jnp.abs(x) > threshold, x, 0)
            y = _integers(layout, subscripts, x - outliers, w).astype(x.dtype)
            y += _scaled(layout, subscripts, outliers, w)
        case Watched(values=values, seen=seen):
            y = _product(layout, subscripts, watch(x, seen), dense(layout, values, x.dtype))
        case Narrow(values=values, products=products, scales=scales):
            y = narrow_einsum(products, subscripts, x, dense(layout, values, x.dtype), scales)
        case ByLayer():
            y = in_layer(lambda w, x: project(layout, subscripts, x, w), w, x)
        case LowRank():
            y = _with_low_rank(layout, subscripts, x, w)
        case Rescaled(base=base, inputs=inputs, outputs=outputs):
            y = project(layout, subscripts, x if inputs is None else (x * inputs).astype(x.dtype), base, bias)
            return y if outputs is None else (y * outputs).astype(y.dtype)
        case MlpAfter(base=base, mlp=mlp):
            y = project(layout, subscripts, x, base, bias)
            return y + small_mlp(layout, y, mlp)
        case ByRow():
            return _with_rows_own(layout, subscripts, x, w, bias)
        case Begun(base=base) | Prompted(base=base):
            y = project(layout, subscripts, x, base)
        case ByGroup() | NormalFloat4() | jax.Array():
            y = _product(layout, subscripts, x, dense(layout, w, x.dtype))
        case _:
            assert_never(w)
    return y if bias is None else y + bias.astype(y.dtype)


def _scaled(layout: Layout, subscripts: str, x: jax.Array, w: ByChannel) -> jax.Array:
    """The scales come after the product, which reads 8 bits."""
    y = _product(layout, subscripts, x, w.values.astype(x.dtype)) * w.scales.reshape(w.shape[x.ndim - 2 :])
    return y.astype(x.dtype)


def _with_low_rank(layout: Layout, subscripts: str, x: jax.Array, w: LowRank) -> jax.Array:
    """Both products by themselves, so that what is not trained has no gradient, and A B is never made."""
    of_x, _, of_y = re.split(",|->", subscripts)
    rows, inputs = of_x[:2], of_x[2:]
    y = project(layout, subscripts, x, w.base)
    if w.keys is not None and w.dropout:
        x = _dropped(layout, x, w.keys, w.dropout)
    inside = project(layout, f"{of_x},{inputs}z->{rows}z", x, w.a)
    if w.keys is not None and w.nested:
        rank = inside.shape[-1]
        first = jax.vmap(lambda key: jax.random.randint(key, (), 1, rank + 1))(w.keys)[:, None, None]
        inside = jnp.where(jnp.arange(rank) < first, inside * (rank / first), 0).astype(inside.dtype)
    y += w.scale * project(layout, f"{rows}z,z{of_y[2:]}->{of_y}", inside, w.b)
    factors = w.factors()
    return y if factors is None else (y * factors).astype(y.dtype)


def _dropped(layout: Layout, x: jax.Array, keys: jax.Array, chance: float) -> jax.Array:
    """x [B, T, ...] with numbers that are 0 by chance, and others larger. What a token loses depends on its row's key
    and its place alone, on every mesh."""
    kept = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - chance, x.shape[1:]))(keys)
    kept = layout.constrain(in_ring_order(layout, {"kept": kept})["kept"], "batch", "seq")
    return jnp.where(kept, x / (1 - chance), 0).astype(x.dtype)


def small_mlp(layout: Layout, x: jax.Array, w: SmallMlp) -> jax.Array:
    """[B, T, D] -> [B, T, D]: what an adapter makes of it."""
    inside = activate(project(layout, "btd,dz->btz", x, w.down, w.down_bias), w.activation)
    y = project(layout, "btz,zd->btd", inside, w.up, w.up_bias)
    return (w.scale * y).astype(y.dtype)


def _with_rows_own(layout: Layout, subscripts: str, x: jax.Array, w: ByRow, bias: jax.Array | None) -> jax.Array:
    """The same, where each row has what is its adapter's."""
    of_x, _, of_y = re.split(",|->", subscripts)
    rows, inputs = of_x[:2], of_x[2:]
    y = project(layout, subscripts, w.times(x, w.inputs), w.base)
    inside = jnp.where(w.mask(), project(layout, f"{of_x},{inputs}z->{rows}z", x, w.a), 0)
    y += w.times(project(layout, f"{rows}z,z{of_y[2:]}->{of_y}", inside, w.b), w.scales)
    y = w.times(y, w.outputs)
    return w.times(y if bias is None else y + bias.astype(y.dtype), w.after)


def _integers(layout: Layout, subscripts: str, x: jax.Array, w: ByChannel) -> jax.Array:
    """float32: products of integers, summed in int32, times the scales of tokens and outputs."""
    rounded = Int8.of(x, tuple(range(2, x.ndim)))
    of_tokens = rounded.scales.reshape(*x.shape[:2], *[1] * (len(w.shape) - x.ndim + 2))
    if layout.mesh.size == 1:  # an integer product has one dim on each side, or it is a loop, on a CPU
        rows, out = x.shape[:2], w.shape[x.ndim - 2 :]
        left, right = rounded.values.reshape(math.prod(rows), -1), w.values.reshape(-1, math.prod(out))
        y = jnp.einsum("ri,io->ro", left, right, preferred_element_type=jnp.int32).reshape(*rows, *out)
    else:
        y = jnp.einsum(subscripts, rounded.values, w.values, preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * of_tokens * w.scales.reshape(w.shape[x.ndim - 2 :])


def _product(layout: Layout, subscripts: str, x: jax.Array, w: jax.Array) -> jax.Array:
    if not _takes_matrices(layout, x.dtype):
        return mixed_einsum(subscripts, x, w)
    rows, out = x.shape[:2], w.shape[x.ndim - 2 :]
    y = mixed_einsum("ri,io->ro", x.reshape(math.prod(rows), -1), w.reshape(-1, math.prod(out)))
    return y.reshape(*rows, *out)


def activate(x: jax.Array, activation: Nonlinearity, swish_beta: jax.Array | None = None) -> jax.Array:
    """activation(x) in x's dtype, computed in float32; `swish_beta` [1] is that of a Swish that learns it."""
    act, beta = formula(activation, swish_beta)
    return activations.activate(act, x.astype(jnp.float32), beta).astype(x.dtype)


def formula(activation: Nonlinearity, swish_beta: jax.Array | None) -> tuple[str, float | jax.Array]:
    """What kernels_pallas calls it, and its number."""
    match activation:
        case Activation():
            return activation.value, 1.0
        case Swish(beta=None):
            assert swish_beta is not None
            return "swish", swish_beta
        case Swish():
            assert activation.beta is not None
            return "swish", activation.beta
        case _:
            assert_never(activation)


def glu(
    layout: Layout,
    kernels: KernelConfig,
    x: jax.Array,
    w_gate: Weight,
    w_up: Weight,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    *,
    activation: Nonlinearity,
    swish_beta: jax.Array | None = None,
) -> jax.Array:
    """activation(x w_gate + b_gate) * (x w_up + b_up): x [B, T, D], weights [D, F], biases [F] -> [B, T, F].

    With a learned `swish_beta` [1] it is plain products whatever `kernels.glu` says: kernels know fixed numbers alone;
    and with weights that are not plain arrays.
    """
    if isinstance(w_gate, ByLayer):
        unit = functools.partial(glu, activation=activation, swish_beta=swish_beta)
        return in_layer(lambda w, x: unit(layout, kernels, x, w[0], w[1], b_gate, b_up), (w_gate, w_up), x)
    act, beta = formula(activation, swish_beta)
    if isinstance(beta, jax.Array) or not (isinstance(w_gate, jax.Array) and isinstance(w_up, jax.Array)):
        gate, up = (project(layout, "btd,df->btf", x, w, b) for w, b in ((w_gate, b_gate), (w_up, b_up)))
        gate, up = checkpoint_name(gate, "glu_gate"), checkpoint_name(up, "glu_up")
        return checkpoint_name(_gated(act, gate, up, beta), "glu_out")
    w_gate, w_up = dense(layout, w_gate, x.dtype), dense(layout, w_up, x.dtype)
    save: Literal["ag", "none"] = "ag" if kernels.glu_save is GluSave.AG else "none"

    def run(
        x: jax.Array, w_gate: jax.Array, w_up: jax.Array, b_gate: jax.Array | None, b_up: jax.Array | None
    ) -> jax.Array:
        with blaming("glu", kernels.glu):
            return fused_glu(
                x,
                w_gate,
                w_up,
                b_gate=b_gate,
                b_up=b_up,
                act=act,
                beta=beta,
                save=save,
                backend=kernels.glu.value,
            )

    rows, cut, bias = layout.activation("batch", "seq", None), layout.activation(None, "mlp"), layout.activation("mlp")
    on_mesh = layout.shard_map(
        run,
        in_specs=(rows, cut, cut, bias, bias),
        out_specs=layout.activation("batch", "seq", "mlp"),
        check_vma=False,  # kernels have no replication rule
    )
    here = lambda array, spec: jax.ShapeDtypeStruct(layout.local_shape(array.shape, spec), array.dtype)
    with blaming("glu", kernels.glu):
        plan = plan_glu(
            here(x, rows), here(w_gate, cut), here(w_up, cut),
            b_gate=None if b_gate is None else here(b_gate, bias), b_up=None if b_up is None else here(b_up, bias),
            act=act, beta=beta, save=save, backend=kernels.glu.value, device=layout.mesh.devices.flat[0],
        )  # fmt: skip
    # The compiler splits plain products over devices better than we do by hand; a kernel it cannot split.
    if plan.backend != "xla":
        return on_mesh(x, w_gate, w_up, b_gate, b_up)
    if _takes_matrices(layout, x.dtype):
        return run(x.reshape(-1, x.shape[-1]), w_gate, w_up, b_gate, b_up).reshape(*x.shape[:2], -1)
    return run(x, w_gate, w_up, b_gate, b_up)


def _gated(act: str, gate: jax.Array, up: jax.Array, beta: float | jax.Array) -> jax.Array:
    """The unit alone; the backward pass makes it again of the two products, as that of the kernels does."""

    @jax.checkpoint
    def unit(gate: jax.Array, up: jax.Array) -> jax.Array:
        wide = activations.activate(act, gate.astype(jnp.float32), beta) * up.astype(jnp.float32)
        return wide.astype(gate.dtype)

    return unit(gate, up)


def _takes_matrices(layout: Layout, dtype: jnp.dtype) -> bool:
    """Whether a product is best written with two dims on each side: on a CPU, which copies what it sums over more than
    one dim of. Not on a mesh, where the compiler cuts each dim in its own way, nor in bfloat16, of which a CPU's
    product takes no transposed matrix.
    """
    return layout.mesh.size == 1 and layout.on_cpu and dtype == jnp.float32


def begun(w: Weight, x: jax.Array, positions: jax.Array) -> jax.Array:
    """What a weight has made, [B, T, ...], with what is learned in place of it at the first positions, int32 [B, T]."""
    if not isinstance(w, Begun):
        return x
    n = w.rows.shape[0]
    inside = (positions < n).reshape(*positions.shape, *[1] * (x.ndim - 2))
    return jnp.where(inside, w.rows[positions.clip(0, n - 1)].astype(x.dtype), x)


def prompted(
    w: Weight, q: jax.Array, out: jax.Array, made: Callable[[jax.Array], tuple[jax.Array, jax.Array]], scale: float
) -> jax.Array:
    """What attention has made, [B, T, N, H], with what the queries find in the vectors of a `Prompted` weight.

    Args:
        w: of the queries.
        q: [B, T, N, H], as they attend.
        out: [B, T, N, H].
        made: [1, P, D] -> the layer's keys and values of vectors, [1, P, K, H] each.
        scale: of the scores.
    """
    if not isinstance(w, Prompted):
        return out
    keys, values = (x[0].astype(jnp.float32) for x in made(w.rows[None].astype(q.dtype)))
    groups = q.astype(jnp.float32).reshape(*q.shape[:2], keys.shape[1], -1, q.shape[-1])
    found = jnp.einsum("btkgp,pkh->btkgh", jax.nn.softmax(scale * jnp.einsum("btkgh,pkh->btkgp", groups, keys)), values)
    return out + (w.gate[:, None] * found.reshape(out.shape)).astype(out.dtype)


def bare(w: Weight) -> Weight:
    """The weight without what is learned for the first positions."""
    return w.base if isinstance(w, Begun) else w


def embed(layout: Layout, table: Weight, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """Rows of the table: [V, D] and int32 [B, T] -> [B, T, D] in `dtype`.

    Each device looks up the ids of its own part of the vocabulary, and the parts are added: a plain gather from a table
    that is cut along the vocabulary would have the compiler copy the whole table to every device. A float32 table stays
    so here, because its gradient adds one row for each token, and a frequent token's sum would stall in bfloat16.
    """

    @functools.partial(
        layout.shard_map,
        in_specs=(layout.activation("vocab", None), layout.activation("batch", "seq")),
        out_specs=layout.activation("batch", "seq", None),
    )
    def local(table: Weight, ids: jax.Array) -> jax.Array:
        own = ids - jax.lax.axis_index("tensor") * table.shape[0]
        inside = (own >= 0) & (own < table.shape[0])
        rows = table[jnp.where(inside, own, 0)]
        rows = rows.astype(dtype) if isinstance(rows, jax.Array) else rows.dense(dtype)
        return jax.lax.psum(jnp.where(inside[..., None], rows, 0), "tensor")

    return local(table, ids)


def logits(hidden: jax.Array, unembedding: Unembedding) -> jax.Array:
    """[..., D] in the compute dtype -> float32 [..., V]. Not for training."""
    product = functools.partial(jnp.einsum, "...d,vd->...v", hidden, preferred_element_type=jnp.float32)
    match unembedding.table:
        case Int8(values=values, scales=scales) | Float8(values=values, scales=scales):
            return unembedding.finish(product(values.astype(hidden.dtype)) * scales[:, 0])
        case jax.Array() as table:
            return unembedding.finish(product(table.astype(hidden.dtype)))
        case table:
            return unembedding.finish(product(table.dense(hidden.dtype)))


def unit_rows(table: Weight) -> Weight:
    """Each row divided by its length (PyTorch's `normalize`, with its 1e-12 for rows of zeros), in float32."""
    match table:
        case Int8(values=values) | Float8(values=values):  # a row's scale is its length's too
            length = jnp.linalg.norm(values.astype(jnp.float32), axis=1, keepdims=True)
            return type(table)(values, 1 / jnp.maximum(length, 1))
        case jax.Array():
            wide = table.astype(jnp.float32)
            return wide * jax.lax.rsqrt(jnp.maximum(jnp.sum(wide * wide, axis=1, keepdims=True), 1e-24))
        case _:
            return unit_rows(table.dense(jnp.float32))


def dense(layout: Layout, w: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as one array, for products that run as kernels; the gradient of a float32 one is summed over devices in
    the same dtype. What is quantised is unpacked."""
    match w:
        case jax.Array():
            return w if layout.config.float32_gradients else w.astype(dtype)
        case _:
            return w.dense(dtype)


def of_experts(layout: Layout, w: Weight, dtype: jnp.dtype) -> jax.Array | Narrow:
    """The same, for grouped products; what is multiplied in 8 bits stays a float, and says so."""
    if isinstance(w, Narrow):
        return dataclasses.replace(w, values=dense(layout, w.values, dtype))
    return dense(layout, w, dtype)
