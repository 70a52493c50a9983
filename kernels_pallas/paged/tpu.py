"""Paged attention as a Mosaic TPU kernel.

One step of the grid for each row. Tables, slots and positions are prefetched as scalars; the blocks that a row may see
are copied one by one from where they lie into a tile of VMEM, the next tile while this one is computed, and with a
row's last tile the first of the next row. From HBM come the visible blocks of each row, once, and nothing else. Of int8
codes and scales are copied, and numbers made in VMEM.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import MASKED
from kernels_pallas.attention.tpu_tile import LOG2E
from kernels_pallas.paged.problem import PagedBlocks, PagedOperands, PagedProblem, TokenTree
from kernels_pallas.targets import Family, Target

_LANES = 128
_SCALAR_BYTES = 2**19
"""Half of a chip's scalar memory, for tables."""
_SPARE_BYTES = 2**18


def unsupported(problem: PagedProblem, target: Target) -> str | None:
    """Why this body cannot do it on that chip, or None."""
    p = problem
    if target.family is not Family.TPU:
        return f"target {target.name} is no TPU; the Mosaic TPU kernel needs one"
    if p.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {p.dtype} is rejected by Mosaic TPU; use bfloat16 or float32"
    if wrong := [width for width in (p.H, p.Hv) if width % _LANES]:
        return (
            f"a cache of width {wrong[0]} is stored otherwise than Mosaic TPU has it, and all of it would be copied; "
            f"give q, k and v zeros up to {_lanes(wrong[0])}"
        )
    if p.scaled and (p.C % _LANES or (p.K not in (2, 4) and p.K % 8)):
        return (
            f"int8 in blocks of {p.C} positions and {p.K} key heads a device: its scales are stored otherwise than "
            f"Mosaic TPU has them, and all would be copied; use multiples of {_LANES} positions and 2, 4 or 8n heads"
        )
    if p.C % _sublanes(p):
        return f"blocks of {p.C} positions do not fill the chip's rows of {_sublanes(p)}; use a multiple"
    if (needed := 4 * (p.S * p.M + (9 if p.tree else 6) * p.T)) > _SCALAR_BYTES:
        return f"tables of {p.S} x {p.M} blocks need {needed:,} bytes of scalar memory; {_SCALAR_BYTES:,} are for them"
    return None


def default_blocks(problem: PagedProblem, target: Target) -> PagedBlocks:
    """Tiles of 128 keys or more, as many as make a copy worth its wait, that fit the VMEM that a kernel has."""
    sizes = (512, 256, _LANES)
    needed = lambda keys: on_chip_bytes(problem, PagedBlocks(keys=keys))
    return PagedBlocks(keys=next(keys for keys in sizes if keys == _LANES or needed(keys) <= target.kernel_bytes // 2))


def on_chip_bytes(problem: PagedProblem, blocks: PagedBlocks) -> int:
    """VMEM: two tiles of keys and values, the sums of a row, and what is computed of a tile."""
    p, W, G = problem, blocks.count(problem.C) * problem.C, _rows_of_a_head(problem)
    H, Hv = _lanes(p.H), _lanes(p.Hv)
    tiles = 2 * p.K * W * (H if p.one_cache else H + Hv) * (1 if p.scaled else p.dtype.itemsize)
    scales = 2 * 2 * 4 * pl.cdiv(p.K, 8) * 8 * W * p.scaled
    sums = 4 * p.K * G * (Hv + 2 * _LANES)
    row = 2 * p.K * G * (H + Hv) * p.dtype.itemsize
    per_head = 2 * 4 * p.K * G * _LANES * (p.alibi + (p.buckets is not None))
    scores = 4 * p.K * G * _lanes(W) * 4 + 4 * p.K * W * Hv
    return tiles + scales + sums + row + per_head + scores + _SPARE_BYTES


def forward(problem: PagedProblem, blocks: PagedBlocks, operands: PagedOperands, *, interpret: Any = None) -> jax.Array:
    """[T, N, Hv] in q's dtype.

    Args:
        interpret: None or False compiles for the TPU; True or pltpu.InterpretParams runs in jax's interpreters.
    """
    p, n_blocks, rows = problem, blocks.count(problem.C), _rows_of_a_head(problem)
    W = n_blocks * p.C
    per_head = lambda x: _padded(x.reshape(p.K, p.group, -1), rows)
    whole = lambda *shape: pl.BlockSpec(shape, lambda t, scalars: (0,) * len(shape))
    of_row = lambda width: pl.BlockSpec((None, p.K, rows, width), lambda t, scalars: (t, 0, 0, 0))
    q = _padded(operands.q.reshape(p.T, p.K, p.group, p.H), rows)
    inputs: dict[str, tuple[jax.Array, pl.BlockSpec]] = {"q": (q, of_row(p.H))}
    inputs["k"] = operands.k, pl.BlockSpec(memory_space=pl.ANY)
    if not p.one_cache:
        inputs["v"] = operands.v, pl.BlockSpec(memory_space=pl.ANY)
    for name, x in (
        ("slopes", operands.alibi_slopes),
        ("table", operands.bias_table),
        ("sinks", operands.sinks),
    ):
        if x is not None:
            inputs[name] = per_head(x * LOG2E), whole(p.K, rows, x.size // p.N)
    scratch = {
        "k": pltpu.VMEM((2, p.K, W, p.H), operands.k.dtype),
        "top": pltpu.VMEM((p.K, rows, 1), jnp.float32),
        "total": pltpu.VMEM((p.K, rows, 1), jnp.float32),
        "out": pltpu.VMEM((p.K, rows, p.Hv), jnp.float32),
        "arrived": pltpu.SemaphoreType.DMA((2,)),
    }
    if not p.one_cache:
        scratch["v"] = pltpu.VMEM((2, p.K, W, p.Hv), operands.v.dtype)
    for name, x in () if operands.scales is None else operands.scales._asdict().items():
        if name in scratch:
            inputs[f"{name}_scales"] = x, pl.BlockSpec(memory_space=pl.ANY)
            scratch[f"{name}_scales"] = pltpu.VMEM((2, p.K, W), x.dtype)
    elements = p.T * p.N * p.most_keys
    out = pl.pallas_call(
        functools.partial(_kernel, p, n_blocks),
        out_shape=jax.ShapeDtypeStruct((p.T, p.K, rows, p.Hv), p.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.T,),
            in_specs=[{name: spec for name, (_, spec) in inputs.items()}],
            out_specs=of_row(p.Hv),
            scratch_shapes=[scratch],
        ),
        # One after the other, since a row starts the copies of the next.
        compiler_params=pltpu.CompilerParams(dimension_semantics=("arbitrary",)),
        cost_estimate=pl.CostEstimate(
            flops=2 * elements * (p.H + p.Hv),
            transcendentals=elements * (1 if p.soft_cap is None else 2),
            bytes_accessed=p.T * p.most_keys * p.K * p.bytes_of_key,
        ),
        interpret=interpret or False,
        name="paged_attention",
    )(_scalars(p, n_blocks, operands), {name: array for name, (array, _) in inputs.items()})
    return out[:, :, : p.group].reshape(p.T, p.N, p.Hv)


def _scalars(problem: PagedProblem, n_blocks: int, operands: PagedOperands) -> dict[str, jax.Array]:
    """What the kernel knows before it starts. Of each row, beside its own: entries [first, last) of its table, the
    tiles of all rows before it, and the next row that has tiles, or T."""
    T = problem.T
    first, last = problem.blocks_of(operands.positions, operands.tree)
    tiles = -(-(last - first) // n_blocks)
    with_tiles = jnp.where(tiles > 0, jnp.arange(T, dtype=jnp.int32), T)
    return {
        "layer": operands.layer[None],
        "tables": operands.tables.reshape(-1),
        "slots": operands.slots,
        "positions": operands.positions,
        "entry": first,
        "last": last,
        "before": jnp.cumsum(tiles, dtype=jnp.int32) - tiles,
        "following": jnp.append(lax.cummin(with_tiles, reverse=True)[1:], jnp.int32(T)),
        **({} if operands.tree is None else operands.tree._asdict()),
    }


def _kernel(
    p: PagedProblem,
    n_blocks: int,
    scalars: dict[str, Any],
    inputs: dict[str, Any],
    out: Any,
    scratch: dict[str, Any],
) -> None:
    t = pl.program_id(0)
    top, total, acc = scratch["top"], scratch["total"], scratch["out"]
    position, first = scalars["positions"][t], scalars["entry"][t]
    tree = TokenTree(*(scalars[name][t] for name in TokenTree._fields)) if p.tree else None
    n_tiles, before = pl.cdiv(scalars["last"][t] - first, n_blocks), scalars["before"][t]
    copies = functools.partial(_copies, p, n_blocks, scalars, inputs, scratch)

    @pl.when((before == 0) & (n_tiles > 0))
    def _first_of_all() -> None:
        copies(t, 0, 0, lambda copy: copy.start())

    if p.sinks:  # one more key, whose value is 0
        top[...], total[...] = inputs["sinks"][...], jnp.ones(total.shape, jnp.float32)
    else:
        top[...], total[...] = jnp.full(top.shape, MASKED), jnp.zeros(total.shape, jnp.float32)
    acc[...] = jnp.zeros(acc.shape, jnp.float32)

    @pl.loop(0, n_tiles)
    def _add_tile(j: jax.Array) -> None:
        place = (before + j) % 2
        here = j + 1 < n_tiles
        row, tile = jnp.where(here, t, scalars["following"][t]), jnp.where(here, j + 1, 0)

        @pl.when(row < p.T)
        def _next() -> None:
            copies(row, tile, 1 - place, lambda copy: copy.start())

        copies(t, j, place, lambda copy: copy.wait())
        k = scratch["k"][place].astype(p.dtype)  # as it is, if it is no code
        v = k if p.one_cache else scratch["v"][place].astype(p.dtype)
        W = n_blocks * p.C
        begin = (first + j * n_blocks) * p.C
        keys = begin + lax.broadcasted_iota(jnp.int32, (1, W), 1)
        seen = p.seen(jnp.full((1, W), position), keys, tree)
        seen = jnp.broadcast_to(seen, (p.K * top.shape[1], W)).reshape(p.K, -1, W)
        products = _product(inputs["q"][...], k, 2)
        if p.scaled:  # of what a sum is over, all numbers have one scale: it comes after
            products *= scratch["k_scales"][place].astype(jnp.float32)[:, None]
        scores = jnp.where(seen, _scores(p, products, keys - position, inputs), MASKED)
        new_top = jnp.maximum(top[...], scores.max(2, keepdims=True))
        # Before the first visible key top = MASKED, where exp2(score - top) would be 1 for hidden keys.
        weights = jnp.where(seen, jnp.exp2(scores - new_top), 0.0)
        shrink = jnp.exp2(top[...] - new_top)
        top[...] = new_top
        total[...] = total[...] * shrink + weights.sum(2, keepdims=True)
        # Places that were not written, or by another text, need not hold numbers.
        start, _ = p.mask.key_range(position, position)
        rows = begin + lax.broadcasted_iota(jnp.int32, (W, 1), 0)
        inside = (rows >= start) & (rows <= position) if tree is None else p.seen(position, rows, tree)
        v = jnp.where(inside[None], v.astype(jnp.float32), 0.0).astype(v.dtype)
        if p.scaled:
            v_scales = scratch["k_scales" if p.one_cache else "v_scales"][place].astype(jnp.float32)
            weights = jnp.where(seen, weights * v_scales[:, None], 0.0)
        acc[...] = acc[...] * shrink + _product(weights.astype(v.dtype), v, 1)

    divisor = jnp.where(total[...] == 0, 1.0, total[...])
    out[...] = (acc[...] / divisor).astype(out.dtype)


def _copies(
    p: PagedProblem,
    n_blocks: int,
    scalars: dict[str, Any],
    inputs: dict[str, Any],
    scratch: dict[str, Any],
    row: Any,
    tile: Any,
    place: Any,
    act: Callable[[Any], None],
) -> None:
    """Start, or wait for, the copies of those blocks of a row's tile that it may see."""
    begin = scalars["entry"][row] + tile * n_blocks

    @pl.loop(0, jnp.minimum(scalars["last"][row] - begin, n_blocks))
    def _one(i: jax.Array) -> None:
        block = scalars["tables"][scalars["slots"][row] * p.M + begin + i]
        for name in ("k", "v", "k_scales", "v_scales"):
            if name in inputs:
                source = inputs[name].at[scalars["layer"][0], block]
                target = scratch[name].at[place, :, pl.ds(pl.multiple_of(i * p.C, p.C), p.C)]
                act(pltpu.make_async_copy(source, target, scratch["arrived"].at[place]))


def _scores(p: PagedProblem, products: jax.Array, distance: jax.Array, inputs: dict[str, Any]) -> jax.Array:
    """In base 2, unmasked: [K, G, W] for distances [1, W]."""
    if p.soft_cap is None:
        scores = products * (p.scale * LOG2E)
    else:
        scores = jnp.tanh(products * (p.scale / p.soft_cap)) * (p.soft_cap * LOG2E)
    if p.alibi:
        scores -= inputs["slopes"][...] * jnp.abs(distance).astype(jnp.float32)[None]
    if p.buckets is not None:
        table = inputs["table"][...]
        (_, lowest), *steps = p.buckets.steps()
        bias = jnp.broadcast_to(table[..., lowest : lowest + 1], scores.shape)
        for start, bucket in steps:
            if start <= 0:  # no key is after the query
                bias = jnp.where(distance[None] >= start, table[..., bucket : bucket + 1], bias)
        scores += bias
    return scores


def _product(x: jax.Array, y: jax.Array, axis: int) -> jax.Array:
    """Of each head: x [K, G, .] times y [K, W, H], summed over y's axis."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((2,), (axis,)), ((0,), (0,)))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _padded(x: jax.Array, rows: int) -> jax.Array:
    """[..., G, width] with rows of zeros, to whole sublanes."""
    return jnp.pad(x, [(0, 0)] * (x.ndim - 2) + [(0, rows - x.shape[-2]), (0, 0)])


def _rows_of_a_head(problem: PagedProblem) -> int:
    """Query heads of a key head, in whole rows of float32: the scores of fewer would be copied to be joined."""
    return pl.cdiv(problem.group, 8) * 8


def _sublanes(problem: PagedProblem) -> int:
    return 32 // problem.dtype.itemsize


def _lanes(width: int) -> int:
    return pl.cdiv(width, _LANES) * _LANES
