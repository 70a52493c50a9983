"""The backward pass of flash attention for TPU in Mosaic: one kernel for dk and dv, one for dq.

Both recompute the weights from the logsumexp and form dS = P * (dP - delta) (Dao 2023, arXiv:2307.08691). Each sums its
results in VMEM in the grid's order and writes them once, so the gradients are deterministic. The heads that share a key
head are steps of the first kernel's grid: dk and dv never exist for each query head.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.attention.tpu_tile import (
    LOG2E,
    At,
    Scalars,
    Tile,
    Walk,
    column,
    dot,
    fit,
    inputs,
    row,
    scalars,
    scratch,
    wide,
)

_Read = dict[str, tuple[jax.Array, pl.BlockSpec]]


def backward(
    problem: AttentionProblem,
    blocks: AttentionBlocks,
    operands: Operands,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array | None]:
    """Gradients (dq, dk, dv, d_bias_table or None), each in its argument's shape and dtype.

    Args:
        lse: [B, N, T] float32, of `forward`.
        delta: [B, N, T] float32, rowsum(d_out * out) minus the gradient of lse.
        d_out: [B, T, N, Hv] in q's dtype.
        interpret: as in `forward`.

    Raises:
        ValueError: block sizes that the chip cannot have.
    """
    q = fit("q_backward", blocks.q_backward, problem.T, interpret)
    k = fit("k_backward", blocks.k_backward, problem.S, interpret)
    rows = lse, delta, d_out
    dk, dv = _dk_dv(Walk(problem, q, k, outer_is_q=False), operands, *rows, interpret)
    dq, d_table = _dq(Walk(problem, q, k, outer_is_q=True), operands, *rows, interpret)
    return dq, dk, dv, d_table


def _inputs(
    walk: Walk, operands: Operands, lse: jax.Array, delta: jax.Array, d_out: jax.Array, q_at: At, k_at: At
) -> _Read:
    return inputs(walk, operands, q_at, k_at) | {
        "d_out": (d_out.swapaxes(1, 2), wide(q_at, walk.q, walk.problem.Hv)),
        "lse": (lse[:, :, None], row(q_at, walk.q)),
        "delta": (delta[:, :, None], row(q_at, walk.q)),
    }


def _gradient_of_scores(
    tile: Tile, product: jax.Array, dp: jax.Array, lse: jax.Array, delta: jax.Array, masked: bool
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Of a tile: the weights, the gradient of its scores, and the same through the soft cap, all float32."""
    scores, slope = tile.scores(product)
    weights = jnp.exp2(scores - lse * LOG2E)
    ds = weights * (dp - delta)
    if masked:
        seen = tile.seen()
        weights, ds = jnp.where(seen, weights, 0.0), jnp.where(seen, ds, 0.0)
    return weights, ds, ds if slope is None else ds * slope


def _dk_dv(
    walk: Walk, operands: Operands, lse: jax.Array, delta: jax.Array, d_out: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Grid (row, key head, key block, query head of the group, step)."""
    p = walk.problem

    def q_at(b: Any, kv_head: Any, i: Any, member: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, kv_head * p.group + member, walk.visit(scalars, b, i, step)[0]

    def k_at(b: Any, kv_head: Any, i: Any, member: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, kv_head, i

    arrays = _inputs(walk, operands, lse, delta, d_out, q_at, k_at)
    elements = p.B * p.N * walk.area
    dk, dv = pl.pallas_call(
        functools.partial(_dk_dv_kernel, walk),
        out_shape=(
            jax.ShapeDtypeStruct((p.B, p.K, p.S, p.H), p.dtype),
            jax.ShapeDtypeStruct((p.B, p.K, p.S, p.Hv), p.dtype),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.K, walk.n_outer, p.group, walk.steps),
            in_specs=[{name: spec for name, (_, spec) in arrays.items()}],
            out_specs=(wide(k_at, walk.k, p.H), wide(k_at, walk.k, p.Hv)),
            scratch_shapes=[
                {
                    "dk": pltpu.VMEM((walk.k, p.H), jnp.float32),
                    "dv": pltpu.VMEM((walk.k, p.Hv), jnp.float32),
                    **scratch(walk),
                }
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "parallel", "arbitrary", "arbitrary")
        ),
        cost_estimate=pl.CostEstimate(
            flops=4 * elements * (p.H + p.Hv),
            transcendentals=elements * (1 if p.soft_cap is None else 2),
            bytes_accessed=(2 * p.B * p.K * p.S + elements // walk.k) * (p.H + p.Hv) * p.dtype.itemsize,
        ),
        interpret=interpret or False,
        name="attention_backward_dk_dv",
    )(scalars(walk, operands), {name: array for name, (array, _) in arrays.items()})
    return dk.swapaxes(1, 2), dv.swapaxes(1, 2)


def _dk_dv_kernel(
    walk: Walk, scalars: Scalars, inputs: dict[str, Any], dk_out: Any, dv_out: Any, scratch: dict[str, Any]
) -> None:
    p = walk.problem
    b, kv_head, i, member, step = (pl.program_id(dim) for dim in range(5))
    j, needed = walk.visit(scalars, b, i, step)
    tile = Tile(walk, scalars, b, kv_head * p.group + member, i, j, inputs | scratch)
    dk, dv = scratch["dk"], scratch["dv"]

    @pl.when((member == 0) & (step == 0))
    def _start() -> None:
        dk[...] = jnp.zeros(dk.shape)
        dv[...] = jnp.zeros(dv.shape)
        tile.start()

    def add(masked: bool) -> None:
        q, d_out = inputs["q"][...], inputs["d_out"][...]
        if masked:
            q, d_out = tile.inner_rows(q), tile.inner_rows(d_out)
        product, dp = dot(inputs["k"][...], q, (1, 1)), dot(inputs["v"][...], d_out, (1, 1))
        weights, _, ds = _gradient_of_scores(tile, product, dp, inputs["lse"][...], inputs["delta"][...], masked)
        dv[...] += dot(weights.astype(d_out.dtype), d_out, (1, 0))
        dk[...] += dot(ds.astype(q.dtype), q, (1, 0))

    tile.when_needed(needed, add)

    @pl.when((member == p.group - 1) & (step == walk.steps - 1))
    def _finish() -> None:
        dk_out[...] = (dk[...] * p.scale).astype(dk_out.dtype)
        dv_out[...] = dv[...].astype(dv_out.dtype)


def _dq(
    walk: Walk, operands: Operands, lse: jax.Array, delta: jax.Array, d_out: jax.Array, interpret: Any
) -> tuple[jax.Array, jax.Array | None]:
    """Grid (row, head, query block, step). With a bias table each query block sums its part of the table's gradient."""
    p = walk.problem
    steps = () if p.buckets is None else p.buckets.steps()

    def q_at(b: Any, head: Any, i: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, head, i

    def k_at(b: Any, head: Any, i: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, head // p.group, walk.visit(scalars, b, i, step)[0]

    def table_at(b: Any, head: Any, i: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, head, i, 0, 0

    arrays = _inputs(walk, operands, lse, delta, d_out, q_at, k_at)
    elements = p.B * p.N * walk.area
    out_shape = {"dq": jax.ShapeDtypeStruct((p.B, p.N, p.T, p.H), p.dtype)}
    out_specs = {"dq": wide(q_at, walk.q, p.H)}
    if steps:
        out_shape["d_steps"] = jax.ShapeDtypeStruct((p.B, p.N, walk.n_outer, 1, len(steps)), jnp.float32)
        out_specs["d_steps"] = pl.BlockSpec((None, None, None, 1, len(steps)), table_at)
    out = pl.pallas_call(
        functools.partial(_dq_kernel, walk),
        out_shape=out_shape,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.N, walk.n_outer, walk.steps),
            in_specs=[{name: spec for name, (_, spec) in arrays.items()}],
            out_specs=out_specs,
            scratch_shapes=[
                {
                    "dq": pltpu.VMEM((walk.q, p.H), jnp.float32),
                    "lse": pltpu.VMEM((walk.q, 1), jnp.float32),
                    "delta": pltpu.VMEM((walk.q, 1), jnp.float32),
                    **scratch(walk),
                }
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * elements * (2 * p.H + p.Hv),
            transcendentals=elements * (1 if p.soft_cap is None else 2),
            bytes_accessed=(p.B * p.N * p.T * (2 * p.H + p.Hv) + elements // walk.q * (p.H + p.Hv)) * p.dtype.itemsize,
        ),
        interpret=interpret or False,
        name="attention_backward_dq",
    )(scalars(walk, operands), {name: array for name, (array, _) in arrays.items()})
    d_table = None
    if p.buckets is not None and operands.bias_table is not None:
        buckets = jnp.array([bucket for _, bucket in steps])
        d_table = jnp.zeros_like(operands.bias_table).at[:, buckets].add(out["d_steps"].sum((0, 2, 3)))
    return out["dq"].swapaxes(1, 2), d_table


def _dq_kernel(
    walk: Walk, scalars: Scalars, inputs: dict[str, Any], outputs: dict[str, Any], scratch: dict[str, Any]
) -> None:
    p = walk.problem
    b, head, i, step = (pl.program_id(dim) for dim in range(4))
    j, needed = walk.visit(scalars, b, i, step)
    tile = Tile(walk, scalars, b, head, i, j, inputs | scratch)
    dq = scratch["dq"]

    @pl.when(step == 0)
    def _start() -> None:
        dq[...] = jnp.zeros(dq.shape)
        scratch["lse"][...] = column(inputs["lse"][...])
        scratch["delta"][...] = column(inputs["delta"][...])
        tile.start()
        if p.buckets is not None:
            outputs["d_steps"][...] = jnp.zeros(outputs["d_steps"].shape)

    def add(masked: bool) -> None:
        k = inputs["k"][...]
        if masked:
            k = tile.inner_rows(k)
        product, dp = dot(inputs["q"][...], k, (1, 1)), dot(inputs["d_out"][...], inputs["v"][...], (1, 1))
        _, d_bias, ds = _gradient_of_scores(tile, product, dp, scratch["lse"][...], scratch["delta"][...], masked)
        if p.buckets is not None:
            tile.add_bias_gradient(d_bias, outputs["d_steps"])
        dq[...] += dot(ds.astype(k.dtype), k, (1, 0))

    tile.when_needed(needed, add)

    @pl.when(step == walk.steps - 1)
    def _finish() -> None:
        outputs["dq"][...] = (dq[...] * p.scale).astype(outputs["dq"].dtype)
