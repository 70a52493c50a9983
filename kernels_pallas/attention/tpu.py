"""Flash attention for TPU in Mosaic: what it can do, its block sizes, and the forward kernel.

Grid (row, head, query block, step): running maximum, sum and accumulator of a query block stay in VMEM, in float32,
while the steps walk over the key blocks that the mask lets it see (Dao 2023, arXiv:2307.08691). Hidden blocks cost
neither arithmetic nor traffic, and the last dimension of the grid is as long as the longest walk, not as all keys.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.attention.tpu_backward import backward
from kernels_pallas.attention.tpu_tile import Scalars, Tile, Walk, dot, fit, inputs, row, scalars, scratch, wide
from kernels_pallas.targets import Family, Target

__all__ = ["backward", "default_blocks", "forward", "on_chip_bytes", "unsupported"]

_LANES = 128
_SIZES = (1024, 512, 256, _LANES)


def unsupported(problem: AttentionProblem, target: Target) -> str | None:
    """Why this body cannot do it on that chip, or None."""
    if target.family is not Family.TPU:
        return f"target {target.name} is no TPU; the Mosaic TPU kernels need one"
    if problem.dtype not in (jnp.float32, jnp.bfloat16):
        return f"dtype {problem.dtype} is rejected by Mosaic TPU; use bfloat16 or float32"
    if problem.dtype == jnp.bfloat16 and min(problem.T, problem.S) == 1:
        return (
            f"a product over one position (T {problem.T}, S {problem.S}) is rejected by Mosaic TPU; use two, or float32"
        )
    return None


def default_blocks(problem: AttentionProblem, target: Target) -> AttentionBlocks:
    """The largest square tiles of scores whose kernels fit the VMEM that a kernel gets by default."""
    limit = target.kernel_bytes
    largest = lambda needed: next(size for size in _SIZES if size == _LANES or needed(problem, size, size) <= limit)
    forward, back = largest(_forward_bytes), largest(_backward_bytes)
    return AttentionBlocks(
        q=_balanced(forward, problem.T),
        k=_balanced(forward, problem.S),
        q_backward=_balanced(back, problem.T),
        k_backward=_balanced(back, problem.S),
    )


def _balanced(size: int, length: int) -> int:
    """The smallest block that makes as many: 1100 queries are two blocks of 640, not of 1024 and 76."""
    parts = pl.cdiv(length, size)
    return length if parts == 1 else _lanes(pl.cdiv(length, parts))


def on_chip_bytes(problem: AttentionProblem, blocks: AttentionBlocks) -> int:
    """VMEM of the largest of the three kernels."""
    return max(
        _forward_bytes(problem, blocks.q, blocks.k), _backward_bytes(problem, blocks.q_backward, blocks.k_backward)
    )


def _forward_bytes(problem: AttentionProblem, q: int, k: int) -> int:
    p, q, k = problem, min(q, problem.T), min(k, problem.S)
    H, Hv = _lanes(p.H), _lanes(p.Hv)
    blocks = (q * (H + Hv) + k * (H + Hv)) * p.dtype.itemsize
    accumulators = 4 * q * (Hv + 2 * _LANES)
    return 2 * blocks + accumulators + _tile_bytes(p, q, k, 3)


def _backward_bytes(problem: AttentionProblem, q: int, k: int) -> int:
    p, q, k = problem, min(q, problem.T), min(k, problem.S)
    H, Hv = _lanes(p.H), _lanes(p.Hv)
    dk_dv = 2 * (q + 2 * k) * (H + Hv) * p.dtype.itemsize + 4 * k * (H + Hv)
    dq = 2 * (q * (2 * H + Hv) + k * (H + Hv)) * p.dtype.itemsize + 4 * q * (H + 2 * _LANES)
    return max(dk_dv, dq) + _tile_bytes(p, q, k, 4)


def _tile_bytes(problem: AttentionProblem, q: int, k: int, copies: int) -> int:
    """Of a float32 tile of scores and what is live beside it: no less than the compilers ask for, not derived."""
    p = problem
    extras = (p.soft_cap is not None) + p.alibi + (p.buckets is not None) + len(p.mask.intervals) - 1
    tiles = 4 * q * _lanes(k) * (copies + extras)
    # Products of float32 operands are made of products of their bfloat16 parts.
    parts = 6 * (q + k) * (_lanes(p.H) + _lanes(p.Hv)) if p.dtype == jnp.float32 else 0
    return tiles + parts


def _lanes(width: int) -> int:
    return pl.cdiv(width, _LANES) * _LANES


def forward(
    problem: AttentionProblem, blocks: AttentionBlocks, operands: Operands, *, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """Output [B, T, N, Hv] in q's dtype and the logsumexp of the scores, float32 [B, N, T].

    Args:
        interpret: None or False compiles for the TPU; True or pltpu.InterpretParams runs in jax's interpreters.

    Raises:
        ValueError: block sizes that the chip cannot have.
    """
    p = problem
    walk = Walk(p, fit("q", blocks.q, p.T, interpret), fit("k", blocks.k, p.S, interpret), outer_is_q=True)

    def q_at(b: Any, head: Any, i: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, head, i

    def k_at(b: Any, head: Any, i: Any, step: Any, scalars: Scalars) -> tuple[Any, ...]:
        return b, head // p.group, walk.visit(scalars, b, i, step)[0]

    arrays = inputs(walk, operands, q_at, k_at)
    elements = p.B * p.N * walk.area
    out, lse = pl.pallas_call(
        functools.partial(_kernel, walk),
        out_shape=(
            jax.ShapeDtypeStruct((p.B, p.N, p.T, p.Hv), p.dtype),
            jax.ShapeDtypeStruct((p.B, p.N, 1, p.T), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(p.B, p.N, walk.n_outer, walk.steps),
            in_specs=[{name: spec for name, (_, spec) in arrays.items()}],
            out_specs=(wide(q_at, walk.q, p.Hv), row(q_at, walk.q)),
            scratch_shapes=[
                {
                    "top": pltpu.VMEM((walk.q, 1), jnp.float32),
                    "total": pltpu.VMEM((walk.q, 1), jnp.float32),
                    "out": pltpu.VMEM((walk.q, p.Hv), jnp.float32),
                    **scratch(walk),
                }
            ],
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * elements * (p.H + p.Hv),
            transcendentals=elements * (1 if p.soft_cap is None else 2),
            bytes_accessed=(p.B * p.N * p.T + elements // walk.q) * (p.H + p.Hv) * p.dtype.itemsize,
        ),
        interpret=interpret or False,
        name="attention_forward",
    )(scalars(walk, operands), {name: array for name, (array, _) in arrays.items()})
    return out.swapaxes(1, 2), lse[:, :, 0]


def _kernel(
    walk: Walk,
    scalars: Scalars,
    inputs: dict[str, Any],
    out: Any,
    lse: Any,
    scratch: dict[str, Any],
) -> None:
    b, head, i, step = (pl.program_id(dim) for dim in range(4))
    j, needed = walk.visit(scalars, b, i, step)
    tile = Tile(walk, scalars, b, head, i, j, inputs | scratch)
    top, total, acc = scratch["top"], scratch["total"], scratch["out"]

    @pl.when(step == 0)
    def _start() -> None:
        top[...] = jnp.full(top.shape, MASKED)
        total[...] = jnp.zeros(total.shape)
        acc[...] = jnp.zeros(acc.shape)
        tile.start()

    def add(masked: bool) -> None:
        v = inputs["v"][...]
        scores, _ = tile.scores(dot(inputs["q"][...], inputs["k"][...], (1, 1)))
        if masked:
            v = tile.inner_rows(v)
            seen = tile.seen()
            scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top[...], scores.max(1, keepdims=True))
        weights = jnp.exp2(scores - new_top)
        if masked:
            # A row that has seen nothing yet has top = MASKED, where exp2(score - top) would be 1 for hidden keys.
            weights = jnp.where(seen, weights, 0.0)
        shrink = jnp.exp2(top[...] - new_top)
        top[...] = new_top
        total[...] = total[...] * shrink + weights.sum(1, keepdims=True)
        acc[...] = acc[...] * shrink + dot(weights.astype(v.dtype), v, (1, 0))

    tile.when_needed(needed, add)

    @pl.when(step == walk.steps - 1)
    def _finish() -> None:
        nothing = total[...] == 0
        divisor = jnp.where(nothing, 1.0, total[...])
        out[...] = (acc[...] / divisor).astype(out.dtype)
        lse[...] = jnp.where(nothing, MASKED, top[...] * math.log(2) + jnp.log(divisor)).swapaxes(0, 1)
