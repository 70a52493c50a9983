"""Gradients of attention on NVIDIA Hopper (sm_90), as two Mosaic GPU kernels: one for dk and dv, one for dq.

The backward of FlashAttention-2 (Dao 2023, arXiv:2307.08691, algorithm 2) without its atomic additions: with s the
scores and p = exp(s - lse),

    ds = p * (d_out v^T - delta),   dv = p^T d_out,   dk = scale * ds^T q,   dq = scale * ds k.

A block of the grid keeps 64 rows a warpgroup in shared memory (keys and values in the first kernel, queries and d_out
in the second), sums its gradients in registers, and streams the other side past them: one warpgroup issues the copies,
the others compute. The first kernel streams the queries of all heads that share a key head, so that nothing is summed
afterwards. Every sum has one fixed order: the same call gives the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.gpu_tile import (
    LOG2_E,
    ROWS,
    WARPGROUPS,
    BackwardInputs,
    GpuTile,
    accumulator,
    along,
    key_blocks,
    load,
    marks_of,
    matrix,
    pad,
    probabilities,
    product,
    query_blocks,
    whole_width,
)
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.compat import gpu_interpreter, start_product, transposed
from kernels_pallas.targets import HOPPER_SHARED_BYTES

# exp2(score - this) is 0, without a test: for queries beyond the end, and for those that see no key.
_NEVER = 1e30
_PARAMS = plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup)


def backward_bytes(problem: AttentionProblem, blocks: AttentionBlocks) -> int:
    """Shared memory of the larger of the two kernels."""
    k_tiles = _key_tiles(whole_width(problem.H), whole_width(problem.Hv))
    return max(
        _bytes(problem, k_tiles, blocks.q_backward, _stages(problem, blocks, k_tiles, blocks.q_backward)),
        _bytes(problem, WARPGROUPS, blocks.k_backward, _stages(problem, blocks, WARPGROUPS, blocks.k_backward)),
    )


def _bytes(problem: AttentionProblem, tiles: int, rows: int, stages: int) -> int:
    """Shared memory of a kernel that keeps `tiles` of ROWS rows and streams `stages` blocks of `rows`."""
    row = problem.dtype.itemsize * (whole_width(problem.H) + whole_width(problem.Hv)) + 4 * (
        2 + 1 + problem.segments + problem.visible_to
    )
    # Each of about eight arrays starts at a multiple of 1024 bytes, and jax keeps 2048 for itself.
    return (tiles * ROWS + stages * rows) * row + 8 * 1024 + 2048


def _stages(problem: AttentionProblem, blocks: AttentionBlocks, tiles: int, rows: int) -> int:
    """Blocks in flight: a power of two, since the remainder by another costs registers that the sums need."""
    return next((n for n in (4, 2) if n <= blocks.stages and _bytes(problem, tiles, rows, n) <= HOPPER_SHARED_BYTES), 1)


def _key_tiles(H: int, Hv: int) -> int:
    """Tiles of keys of a grid block: one a warpgroup, or one for both where dk and dv exceed the registers of one."""
    return WARPGROUPS if H + Hv <= 256 else 1


def backward(
    problem: AttentionProblem,
    blocks: AttentionBlocks,
    operands: Operands,
    lse: jax.Array,
    delta: jax.Array,
    d_out: jax.Array,
    *,
    interpret: Any,
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    """Gradients of q, k and v.

    Args:
        problem: one that `unsupported` accepts.
        blocks: `q_backward` queries are streamed at a time in the kernel of dk and dv, `k_backward` keys in that of dq.
        operands: the arrays of the forward pass.
        lse: [B, N, T] float32, what the forward pass gave.
        delta: [B, N, T] float32, rowsum(d_out * out) less the gradient of lse.
        d_out: [B, T, N, Hv] in q's dtype.
        interpret: True for the GPU interpreter, or what `plgpu.kernel` takes; None compiles.

    Returns:
        (dq, dk, dv, None) in the shapes and dtype of q, k and v.

    Raises:
        ValueError: a block size that the hardware's instructions cannot make.
    """
    for name, size in (("q_backward", blocks.q_backward), ("k_backward", blocks.k_backward)):
        if size % 64 or not 64 <= size <= 256:
            raise ValueError(f"blocks.{name} = {size} must be a multiple of 64 up to 256, such as 64")
    H, Hv = problem.H, problem.Hv
    # To whole swizzle rows of shared memory: zeros add nothing to a product.
    problem = replace(problem, H=whole_width(H), Hv=whole_width(Hv))
    kept = ROWS * WARPGROUPS
    q_pad = -problem.T % math.lcm(kept, blocks.q_backward)
    k_pad = -problem.S % math.lcm(kept, blocks.k_backward)
    q, d_out = (pad(pad(x, 1, q_pad), 3, whole_width(x.shape[3]) - x.shape[3]) for x in (operands.q, d_out))
    k, v = (pad(pad(x, 1, k_pad), 3, whole_width(x.shape[3]) - x.shape[3]) for x in (operands.k, operands.v))
    lse = jnp.where(lse <= MASKED / 2, _NEVER, lse * LOG2_E)
    arrays = BackwardInputs(
        q,
        k,
        v,
        d_out,
        jnp.stack([pad(lse, 2, q_pad, _NEVER), pad(delta, 2, q_pad)], 2),
        marks_of(operands.q_offset[:, None] + jnp.arange(q.shape[1]), operands.q_segments, operands.visible_to),
        marks_of(jnp.broadcast_to(jnp.arange(k.shape[1]), k.shape[:2]), operands.k_segments),
        operands.q_offset,
        operands.alibi_slopes,
        None,
    )
    dk, dv = _key_gradients(problem, blocks, arrays, interpret)
    dq = _query_gradients(problem, blocks, arrays, interpret)
    return dq[:, : problem.T, :, :H], dk[:, : problem.S, :, :H], dv[:, : problem.S, :, :Hv], None


def _key_gradients(problem: AttentionProblem, blocks: AttentionBlocks, arrays: BackwardInputs, interpret: Any) -> Any:
    """dk [B, S, K, H] and dv [B, S, K, Hv]."""
    H, Hv, rows = problem.H, problem.Hv, blocks.q_backward
    tiles = _key_tiles(H, Hv)
    stages = _stages(problem, blocks, tiles, rows)
    n_blocks = arrays.k.shape[1] // (ROWS * tiles)
    arrays = arrays._replace(ranges=query_blocks(problem, arrays, ROWS * tiles, rows))

    def body(x: BackwardInputs, dk_ref: Any, dv_ref: Any, *scratch: Any) -> None:
        kept, streamed, arrived, consumed, all_done, copies = scratch
        b, head, j = (lax.axis_index(name) for name in ("batch", "heads", "keys"))
        warpgroup = lax.axis_index("warpgroup")
        start, stop = x.ranges[b, j, 0], x.ranges[b, j, 1]
        k_smem, v_smem, k_marks = kept
        q_smem, d_out_smem, statistics, q_marks = streamed
        kept_arrived, q_arrived, d_out_arrived = arrived

        def for_each_block(visit: Callable[[Any, Any, Any], None]) -> None:
            """Calls visit(step, query head, query block)."""

            @pl.loop(0, problem.group)
            def _(member: Any) -> None:
                @pl.loop(start, stop)
                def _(i: Any) -> None:
                    visit(member * (stop - start) + i - start, head * problem.group + member, i)

        @pl.when(warpgroup == WARPGROUPS)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")
            for w in range(tiles):
                keys = pl.ds((j * tiles + w) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(x.k.at[b, keys, head], k_smem.at[w], kept_arrived.at[w])
                plgpu.copy_gmem_to_smem(x.v.at[b, keys, head], v_smem.at[w], kept_arrived.at[w])
                plgpu.copy_gmem_to_smem(x.k_marks.at[b, :, keys], k_marks.at[w], kept_arrived.at[w])

            @for_each_block
            def _(step: Any, q_head: Any, i: Any) -> None:
                slot = lax.rem(step, _i32(stages))
                queries = pl.ds(i * rows, rows)

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(consumed.at[slot])

                plgpu.copy_gmem_to_smem(x.q.at[b, queries, q_head], q_smem.at[slot], q_arrived.at[slot])
                plgpu.copy_gmem_to_smem(x.statistics.at[b, q_head, :, queries], statistics.at[slot], q_arrived.at[slot])
                plgpu.copy_gmem_to_smem(x.q_marks.at[b, :, queries], q_marks.at[slot], q_arrived.at[slot])
                plgpu.copy_gmem_to_smem(x.d_out.at[b, queries, q_head], d_out_smem.at[slot], d_out_arrived.at[slot])

        def compute(own: Any, with_dk: bool, with_dv: bool) -> None:
            plgpu.set_max_registers(240, action="increase")
            k_own, v_own = k_smem.at[own], v_smem.at[own]
            copy_own = None if copies is None else copies.at[warpgroup]
            plgpu.barrier_wait(kept_arrived.at[own])

            def accumulate(dk: Any, dv: Any) -> tuple[Any, Any]:
                @for_each_block
                def _(step: Any, q_head: Any, i: Any) -> None:
                    slot = lax.rem(step, _i32(stages))
                    q_tile, d_out_tile = q_smem.at[slot], d_out_smem.at[slot]
                    tile = GpuTile(
                        1,
                        x.q_offset[b] + i * rows,
                        (j * tiles + own) * ROWS,
                        rows,
                        q_marks.at[slot],
                        k_marks.at[own],
                        x.slopes[q_head] if problem.alibi else None,
                    )
                    plgpu.barrier_wait(q_arrived.at[slot])
                    raw = product(k_own, transposed(q_tile), rows)
                    p, slope = probabilities(problem, tile, raw, load(statistics.at[slot, 0], 0))
                    plgpu.barrier_wait(d_out_arrived.at[slot])
                    if with_dv:
                        start_product(dv, p.astype(problem.dtype), d_out_tile, copy_own)
                    if with_dk:
                        dp = product(v_own, transposed(d_out_tile), rows)
                        ds = slope * (dp - along(load(statistics.at[slot, 1], 0), dp.shape, 1))
                        start_product(dk, ds.astype(problem.dtype), q_tile, copy_own)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[slot])

                return dk[...] if with_dk else None, dv[...] if with_dv else None

            dk, dv = pl.run_scoped(
                accumulate, accumulator(H) if with_dk else None, accumulator(Hv) if with_dv else None
            )
            if tiles < WARPGROUPS:  # the other one may still read what the sums are about to replace
                plgpu.barrier_arrive(all_done.at[0])
                plgpu.barrier_wait(all_done.at[0])
            keys = pl.ds((j * tiles + own) * ROWS, ROWS)
            if with_dk:
                k_own[...] = (dk * problem.scale).astype(problem.dtype)
            if with_dv:
                v_own[...] = dv.astype(problem.dtype)
            plgpu.commit_smem()
            if with_dk:
                plgpu.copy_smem_to_gmem(k_own, dk_ref.at[b, keys, head])
            if with_dv:
                plgpu.copy_smem_to_gmem(v_own, dv_ref.at[b, keys, head])
            plgpu.wait_smem_to_gmem(0)

        if tiles == WARPGROUPS:
            pl.when(warpgroup < WARPGROUPS)(lambda: compute(warpgroup, True, True))
        else:  # each computes the same p; more work, but the sums fit
            pl.when(warpgroup == 0)(lambda: compute(0, True, False))
            pl.when(warpgroup == 1)(lambda: compute(0, False, True))

    q_marks, k_marks = arrays.q_marks.shape[1], arrays.k_marks.shape[1]
    return plgpu.kernel(
        body,
        out_type=(_like(arrays.k), _like(arrays.v)),
        grid=(problem.B, problem.K, n_blocks),
        grid_names=("batch", "heads", "keys"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            (
                matrix(tiles, ROWS, H, problem.dtype),
                matrix(tiles, ROWS, Hv, problem.dtype),
                plgpu.SMEM((tiles, k_marks, ROWS), jnp.int32),
            ),
            (
                matrix(stages, rows, H, problem.dtype),
                matrix(stages, rows, Hv, problem.dtype),
                plgpu.SMEM((stages, 2, rows), jnp.float32),
                plgpu.SMEM((stages, q_marks, rows), jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=3, num_barriers=tiles),
                plgpu.Barrier(num_arrivals=3, num_barriers=stages),
                plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=1),
            plgpu.SMEM((WARPGROUPS, ROWS, rows), problem.dtype) if interpret else None,
        ),
        compiler_params=_PARAMS,
        interpret=gpu_interpreter(interpret),
        kernel_name="attention_backward_dkv",
    )(arrays)


def _query_gradients(problem: AttentionProblem, blocks: AttentionBlocks, arrays: BackwardInputs, interpret: Any) -> Any:
    """dq [B, T, N, H]."""
    H, Hv, rows = problem.H, problem.Hv, blocks.k_backward
    stages = _stages(problem, blocks, WARPGROUPS, rows)
    n_blocks = arrays.q.shape[1] // (ROWS * WARPGROUPS)
    arrays = arrays._replace(ranges=key_blocks(problem, arrays, ROWS * WARPGROUPS, rows))

    def body(
        x: BackwardInputs, dq_ref: Any, kept: Any, streamed: Any, arrived: Any, consumed: Any, copies: Any
    ) -> None:
        b, head = lax.axis_index("batch"), lax.axis_index("heads")
        # The last queries see most keys of a causal mask: started first, they do not run alone at the end.
        i = n_blocks - 1 - lax.axis_index("queries")
        warpgroup = lax.axis_index("warpgroup")
        k_head = lax.div(head, _i32(problem.group))
        start, stop = x.ranges[b, i, 0], x.ranges[b, i, 1]
        q_smem, d_out_smem, statistics, q_marks = kept
        k_smem, v_smem, k_marks = streamed
        kept_arrived, k_arrived, v_arrived = arrived

        @pl.when(warpgroup == WARPGROUPS)
        def copy() -> None:
            plgpu.set_max_registers(24, action="decrease")
            for w in range(WARPGROUPS):
                queries = pl.ds((i * WARPGROUPS + w) * ROWS, ROWS)
                plgpu.copy_gmem_to_smem(x.q.at[b, queries, head], q_smem.at[w], kept_arrived.at[w])
                plgpu.copy_gmem_to_smem(x.d_out.at[b, queries, head], d_out_smem.at[w], kept_arrived.at[w])
                plgpu.copy_gmem_to_smem(x.statistics.at[b, head, :, queries], statistics.at[w], kept_arrived.at[w])
                plgpu.copy_gmem_to_smem(x.q_marks.at[b, :, queries], q_marks.at[w], kept_arrived.at[w])

            @pl.loop(0, stop - start)
            def _(step: Any) -> None:
                slot = lax.rem(step, _i32(stages))
                keys = pl.ds((start + step) * rows, rows)

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(consumed.at[slot])

                plgpu.copy_gmem_to_smem(x.k.at[b, keys, k_head], k_smem.at[slot], k_arrived.at[slot])
                plgpu.copy_gmem_to_smem(x.k_marks.at[b, :, keys], k_marks.at[slot], k_arrived.at[slot])
                plgpu.copy_gmem_to_smem(x.v.at[b, keys, k_head], v_smem.at[slot], v_arrived.at[slot])

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            q_own, d_out_own = q_smem.at[warpgroup], d_out_smem.at[warpgroup]
            copy_own = None if copies is None else copies.at[warpgroup]
            plgpu.barrier_wait(kept_arrived.at[warpgroup])
            lse, delta = (load(statistics.at[warpgroup, which], 1) for which in range(2))

            def accumulate(dq: Any) -> Any:
                @pl.loop(0, stop - start)
                def _(step: Any) -> None:
                    slot = lax.rem(step, _i32(stages))
                    k_tile, v_tile = k_smem.at[slot], v_smem.at[slot]
                    plgpu.barrier_wait(k_arrived.at[slot])
                    tile = GpuTile(
                        0,
                        x.q_offset[b] + (i * WARPGROUPS + warpgroup) * ROWS,
                        (start + step) * rows,
                        rows,
                        q_marks.at[warpgroup],
                        k_marks.at[slot],
                        x.slopes[head] if problem.alibi else None,
                    )
                    raw = product(q_own, transposed(k_tile), rows)
                    _, slope = probabilities(problem, tile, raw, lse)
                    plgpu.barrier_wait(v_arrived.at[slot])
                    dp = product(d_out_own, transposed(v_tile), rows)
                    ds = slope * (dp - along(delta, dp.shape, 0))
                    start_product(dq, ds.astype(problem.dtype), k_tile, copy_own)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(consumed.at[slot])

                return dq[...]

            dq = pl.run_scoped(accumulate, accumulator(H))
            q_own[...] = (dq * problem.scale).astype(problem.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_own, dq_ref.at[b, pl.ds((i * WARPGROUPS + warpgroup) * ROWS, ROWS), head])
            plgpu.wait_smem_to_gmem(0)

    q_marks, k_marks = arrays.q_marks.shape[1], arrays.k_marks.shape[1]
    return plgpu.kernel(
        body,
        out_type=_like(arrays.q),
        grid=(problem.B, problem.N, n_blocks),
        grid_names=("batch", "heads", "queries"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        scratch_types=(
            (
                matrix(WARPGROUPS, ROWS, H, problem.dtype),
                matrix(WARPGROUPS, ROWS, Hv, problem.dtype),
                plgpu.SMEM((WARPGROUPS, 2, ROWS), jnp.float32),
                plgpu.SMEM((WARPGROUPS, q_marks, ROWS), jnp.int32),
            ),
            (
                matrix(stages, rows, H, problem.dtype),
                matrix(stages, rows, Hv, problem.dtype),
                plgpu.SMEM((stages, k_marks, rows), jnp.int32),
            ),
            (
                plgpu.Barrier(num_arrivals=4, num_barriers=WARPGROUPS),
                plgpu.Barrier(num_arrivals=2, num_barriers=stages),
                plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            ),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=stages),
            plgpu.SMEM((WARPGROUPS, ROWS, rows), problem.dtype) if interpret else None,
        ),
        compiler_params=_PARAMS,
        interpret=gpu_interpreter(interpret),
        kernel_name="attention_backward_dq",
    )(arrays)


def _i32(value: int) -> jax.Array:
    return jnp.array(value, jnp.int32)


def _like(x: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape, x.dtype)
