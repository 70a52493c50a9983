"""Attention for NVIDIA Hopper (sm_90), forward, as one Pallas Mosaic GPU kernel.

The algorithm is FlashAttention-2's (Dao 2023, arXiv:2307.08691), the division of labour FlashAttention-3's (Shah et al.
2024, arXiv:2407.08608): of a thread block's three warpgroups two compute, 64 queries each, and the third only fetches
keys and values into a ring of `stages` slots of shared memory. The two take turns, so that the softmax of one runs
while the other has the tensor cores.

Checked in the GPU interpreter, and by compiling for H100 and H200 without spilled registers; not yet run on a GPU.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.attention.gpu_backward import backward, backward_bytes
from kernels_pallas.attention.gpu_tile import (
    LOG2_E,
    ROWS,
    WARPGROUPS,
    along,
    blocks_reached,
    blocks_sharing_ids,
    both,
)
from kernels_pallas.attention.problem import MASKED, AttentionBlocks, AttentionProblem, Operands
from kernels_pallas.compat import add_product, gpu_interpreter, transposed
from kernels_pallas.targets import HOPPER_SHARED_BYTES, Target

__all__ = ["backward", "default_blocks", "forward", "on_chip_bytes", "unsupported"]

_QUERIES = ROWS * WARPGROUPS
# Of the 512 registers that a thread of each of the three can have together: two that compute, one that fetches.
_COMPUTE_REGISTERS, _FETCH_REGISTERS = 240, 24


def unsupported(problem: AttentionProblem, target: Target) -> str | None:
    """Why the Hopper kernels, forward and backward, cannot do this; or None."""
    if not target.hopper:
        return f"the kernels are written for sm_90 (H100, H200), and the target is {target.name}"
    if problem.dtype.name not in ("bfloat16", "float16"):
        return f"{problem.dtype.name}: the tensor cores take bfloat16 and float16"
    if problem.buckets is not None:
        return "relative_bias: only the xla and tpu bodies look biases up"
    # The compiler that comes with jax 0.10 has the wider backward kernels spill hundreds of bytes a thread.
    widest = 256 if jax.__version_info__ >= (0, 11) else 192
    for name, width in (("H", problem.H), ("Hv", problem.Hv)):
        if width % 16 or not 16 <= width <= widest:
            nearest = min(widest, -(-width // 16) * 16)
            return f"{name} {width}: with jax {jax.__version__} it takes multiples of 16 up to {widest}, as {nearest}"
    return None


def default_blocks(problem: AttentionProblem, target: Target) -> AttentionBlocks:
    """The largest key blocks that spill no register, and as many slots for them as fit, up to 4.

    One combination does spill a little: head dim 256 with soft cap, segments, ALiBi and a union of masks at once.
    """
    extras = sum(
        (
            problem.soft_cap is not None,
            problem.segments,
            problem.visible_to,
            problem.alibi,
            len(problem.mask.intervals) > 1,
        )
    )
    widest = 128 if problem.Hv <= 128 and extras < 3 and problem.S > 64 else 64
    candidates = (
        AttentionBlocks(q=_QUERIES, k=k, q_backward=64, k_backward=64, stages=stages)
        for k in (widest, 64)
        for stages in (4, 3, 2)
    )
    return next(blocks for blocks in candidates if _forward_bytes(problem, blocks) <= HOPPER_SHARED_BYTES)


def on_chip_bytes(problem: AttentionProblem, blocks: AttentionBlocks) -> int:
    """Shared memory of the largest of the three kernels."""
    return max(_forward_bytes(problem, blocks), backward_bytes(problem, blocks))


def _forward_bytes(problem: AttentionProblem, blocks: AttentionBlocks) -> int:
    size = problem.dtype.itemsize
    arrays = [
        size * blocks.q * max(problem.H, problem.Hv),
        size * blocks.stages * blocks.k * problem.H,
        size * blocks.stages * blocks.k * problem.Hv,
        4 * blocks.q,
        *([4 * blocks.q, 4 * blocks.stages * blocks.k] if problem.segments else []),
        *([4 * blocks.q] if problem.visible_to else []),
    ]
    barriers = WARPGROUPS + 4 * blocks.stages + 1
    # Each array starts at a multiple of 1024 bytes; jax keeps 2048 for reductions.
    return sum(-(-n // 1024) * 1024 for n in arrays) + 8 * barriers + 2048


class _Inputs(NamedTuple):
    q: Any  # [B, T, N, H]
    k: Any  # [B, S, K, H]
    v: Any  # [B, S, K, Hv]
    q_offset: Any  # [B] int32
    q_ids: Any  # [B, T padded to whole blocks] int32, or None, and so the next one
    k_ids: Any  # [B, S padded to whole blocks] int32
    q_ends: Any  # [B, T padded to whole blocks] int32, where the keys end that a query sees; or None
    key_blocks: Any  # [B, query blocks, 2] int32: the key blocks [start, stop) that ids and ends leave; or None
    slopes: Any  # [N] float32, or None


class _Shared(NamedTuple):
    """What the three warpgroups share; slots are of the ring of key blocks."""

    q_or_out: Any  # [warpgroups, 64, H] and [warpgroups, 64, Hv] in the same place
    k: Any  # [slots, key block, H]
    v: Any  # [slots, key block, Hv]
    lse: Any  # [warpgroups, 64]
    q_ids: Any  # [warpgroups, 64], or None
    k_ids: Any  # [slots, key block], or None
    q_ends: Any  # [warpgroups, 64], or None
    p: Any  # [warpgroups, 64, key block] for the interpreter only
    q_ready: Any  # barriers: a warpgroup's queries have arrived
    k_ready: Any  # a slot's keys have arrived
    v_ready: Any
    k_free: Any  # both warpgroups are done with a slot's keys
    v_free: Any
    turn: Any  # both warpgroups are here


class _Work(NamedTuple):
    """What a thread block does: a block of queries of one head, and the key blocks that these need."""

    batch: jax.Array
    head: jax.Array
    offset: jax.Array  # position of the row's first query
    first_query: jax.Array
    first_block: jax.Array
    n_blocks: jax.Array


def forward(
    problem: AttentionProblem, blocks: AttentionBlocks, operands: Operands, *, interpret: Any = None
) -> tuple[jax.Array, jax.Array]:
    """Attention of a problem that is not `unsupported`.

    Args:
        problem: what is known at compile time.
        blocks: `q` is 128, `k` a multiple of 64 up to 256, `stages` the number of key blocks in shared memory.
        operands: the arrays.
        interpret: True, or an object of the GPU interpreter's parameters, to run without a GPU. A warpgroup that waits
            there holds a thread of XLA's CPU pool, which has one a core or a CPU device: with fewer than four it may
            wait for ever (XLA_FLAGS=--xla_force_host_platform_device_count=8 makes room).

    Returns:
        Output [B, T, N, Hv] in q's dtype, and the logsumexp of the scores, float32 [B, N, T].

    Raises:
        ValueError: blocks of other sizes.
    """
    if blocks.q != _QUERIES:
        raise ValueError(f"blocks.q = {blocks.q} must be {_QUERIES}")
    if blocks.k % 64 or not 64 <= blocks.k <= 256:
        raise ValueError(f"blocks.k = {blocks.k} must be 64, 128, 192 or 256")
    if blocks.stages < 1:
        raise ValueError(f"blocks.stages = {blocks.stages} must be positive; 2 is usual")
    B, T, N, H, Hv, dtype = problem.B, problem.T, problem.N, problem.H, problem.Hv, problem.dtype
    n_blocks = pl.cdiv(T, blocks.q)
    q, k, v = (_in_eights(x) for x in operands[:3])
    q_ids, k_ids, q_ends, key_blocks = _limits(problem, blocks, operands)
    has_ids, has_ends = q_ids is not None, q_ends is not None
    ring = functools.partial(plgpu.Barrier, num_barriers=blocks.stages)
    shared = _Shared(
        q_or_out=plgpu.RefUnion(plgpu.SMEM((WARPGROUPS, ROWS, H), dtype), plgpu.SMEM((WARPGROUPS, ROWS, Hv), dtype)),
        k=plgpu.SMEM((blocks.stages, blocks.k, H), dtype),
        v=plgpu.SMEM((blocks.stages, blocks.k, Hv), dtype),
        lse=plgpu.SMEM((WARPGROUPS, ROWS), jnp.float32),
        q_ids=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32) if has_ids else None,
        k_ids=plgpu.SMEM((blocks.stages, blocks.k), jnp.int32) if has_ids else None,
        q_ends=plgpu.SMEM((WARPGROUPS, ROWS), jnp.int32) if has_ends else None,
        p=plgpu.SMEM((WARPGROUPS, ROWS, blocks.k), dtype) if interpret else None,
        q_ready=plgpu.Barrier(num_barriers=WARPGROUPS, num_arrivals=1 + has_ids + has_ends),
        k_ready=ring(num_arrivals=1 + has_ids),
        v_ready=ring(),
        k_free=ring(num_arrivals=WARPGROUPS),
        v_free=ring(num_arrivals=WARPGROUPS),
        turn=plgpu.Barrier(num_barriers=1, num_arrivals=WARPGROUPS),
    )

    def body(x: _Inputs, out: Any, lse: Any, shared: _Shared) -> None:
        work = _work(problem, blocks, x, n_blocks)
        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == WARPGROUPS)
        def fetch() -> None:
            plgpu.set_max_registers(_FETCH_REGISTERS, action="decrease")
            _fetch(problem, blocks, work, x, shared)

        @pl.when(warpgroup < WARPGROUPS)
        def compute() -> None:
            plgpu.set_max_registers(_COMPUTE_REGISTERS, action="increase")
            _compute(problem, blocks, work, warpgroup, x.slopes, out, lse, shared)

    # A row of lse is copied as whole blocks, so it gets room for them.
    out, lse = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((B, q.shape[1], N, Hv), dtype),
            jax.ShapeDtypeStruct((B, N, n_blocks * blocks.q), jnp.float32),
        ),
        scratch_types=[shared],
        grid=(B, n_blocks, N),  # heads innermost: those that share a key head run together, and find it in L2
        grid_names=("batch", "block", "head"),
        num_threads=WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="attention_forward",
        interpret=gpu_interpreter(interpret),
    )(_Inputs(q, k, v, operands.q_offset, q_ids, k_ids, q_ends, key_blocks, operands.alibi_slopes))
    return out[:, :T], lse[:, :, :T]


def _in_eights(x: jax.Array) -> jax.Array:
    """[B, length, ...] with zeros up to a multiple of 8: rows are copied to shared memory 8 at a time."""
    missing = -x.shape[1] % 8
    return jnp.pad(x, [(0, missing if dim == 1 else 0) for dim in range(x.ndim)]) if missing else x


def _limits(problem: AttentionProblem, blocks: AttentionBlocks, operands: Operands) -> tuple[jax.Array | None, ...]:
    """Segment ids of queries and of keys, the queries' ends, as whole blocks; and the key blocks that they leave."""
    whole = lambda x, block: None if x is None else jnp.pad(x, ((0, 0), (0, -x.shape[1] % block)), "edge")
    q_ids, k_ids = whole(operands.q_segments, blocks.q), whole(operands.k_segments, blocks.k)
    q_ends = whole(operands.visible_to, blocks.q)
    key_blocks = None
    if q_ids is not None and k_ids is not None:
        key_blocks = blocks_sharing_ids(q_ids, blocks.q, k_ids, blocks.k)
    if q_ends is not None:
        seen = blocks_reached(q_ends, blocks.q, problem.S, blocks.k)
        key_blocks = seen if key_blocks is None else both(key_blocks, seen)
    return q_ids, k_ids, q_ends, key_blocks


def _work(problem: AttentionProblem, blocks: AttentionBlocks, x: _Inputs, n_blocks: int) -> _Work:
    batch = lax.axis_index("batch")
    # The last queries first: under a causal mask they have the most to do, and should not be what the others wait for.
    block = n_blocks - 1 - lax.axis_index("block")
    first_query = block * blocks.q
    offset = x.q_offset[batch]
    start, stop = problem.mask.key_range(offset + first_query, offset + first_query + (blocks.q - 1))
    first = jnp.clip(start, 0, problem.S) // blocks.k
    last = pl.cdiv(jnp.clip(stop, 0, problem.S), blocks.k)
    if x.key_blocks is not None:
        first = jnp.maximum(first, x.key_blocks[batch, block, 0])
        last = jnp.minimum(last, x.key_blocks[batch, block, 1])
    return _Work(batch, lax.axis_index("head"), offset, first_query, first, jnp.maximum(last - first, 0))


def _fetch(problem: AttentionProblem, blocks: AttentionBlocks, work: _Work, x: _Inputs, shared: _Shared) -> None:
    """Copy queries, keys, values and ids to shared memory. What lies beyond the end of an array arrives as zeros."""
    for i in range(WARPGROUPS):
        rows = pl.ds(work.first_query + i * ROWS, ROWS)
        plgpu.copy_gmem_to_smem(x.q.at[work.batch, rows, work.head], shared.q_or_out[0].at[i], shared.q_ready.at[i])
        if x.q_ids is not None:
            plgpu.copy_gmem_to_smem(x.q_ids.at[work.batch, rows], shared.q_ids.at[i], shared.q_ready.at[i])
        if x.q_ends is not None:
            plgpu.copy_gmem_to_smem(x.q_ends.at[work.batch, rows], shared.q_ends.at[i], shared.q_ready.at[i])
    key_head = lax.div(work.head, jnp.int32(problem.group))

    def fetch(step: jax.Array, _: None) -> None:
        slot = lax.rem(step, jnp.int32(blocks.stages))
        keys = pl.ds((work.first_block + step) * blocks.k, blocks.k)

        def copy(source: Any, target: Any, ready: Any) -> None:
            plgpu.copy_gmem_to_smem(source, target.at[slot], ready.at[slot])

        @pl.when(step >= blocks.stages)
        def wait_for_slot() -> None:
            plgpu.barrier_wait(shared.k_free.at[slot])
            if x.k_ids is not None:
                plgpu.commit_smem()  # ids were read by ordinary loads, which copies do not wait for of themselves

        copy(x.k.at[work.batch, keys, key_head], shared.k, shared.k_ready)
        if x.k_ids is not None:
            copy(x.k_ids.at[work.batch, keys], shared.k_ids, shared.k_ready)
        pl.when(step >= blocks.stages)(lambda: plgpu.barrier_wait(shared.v_free.at[slot]))
        copy(x.v.at[work.batch, keys, key_head], shared.v, shared.v_ready)

    lax.fori_loop(0, work.n_blocks, fetch, None)


def _compute(
    problem: AttentionProblem,
    blocks: AttentionBlocks,
    work: _Work,
    warpgroup: jax.Array,
    slopes: Any,
    out: Any,
    lse: Any,
    shared: _Shared,
) -> None:
    """Attention of this warpgroup's 64 queries, by online softmax in base 2."""
    q_tiles, out_tiles = shared.q_or_out
    turn = shared.turn.at[0]
    first_query = work.first_query + warpgroup * ROWS
    unit = _unit(problem)
    copy = None if shared.p is None else shared.p.at[warpgroup]

    def change_turns() -> None:
        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(turn)

    plgpu.barrier_wait(shared.q_ready.at[warpgroup])
    pl.when(warpgroup == 1)(change_turns)  # from here on half a step behind the other

    def attend(step: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        slot = lax.rem(step, jnp.int32(blocks.stages))

        def multiply(scores: Any) -> jax.Array:
            plgpu.wgmma(scores, q_tiles.at[warpgroup], transposed(shared.k.at[slot]))
            change_turns()
            return scores[...]

        plgpu.barrier_wait(shared.k_ready.at[slot])
        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, blocks.k), jnp.float32))
        first_key = (work.first_block + step) * blocks.k
        scores = _bend(problem, scores, work, first_query, first_key, slopes)
        scores = _hide(problem, scores, work, first_query, first_key)
        if shared.q_ids is not None:
            ids = shared.q_ids[warpgroup], shared.k_ids[slot]
            same = along(ids[0], scores.shape, 0) == along(ids[1], scores.shape, 1)
            scores = jnp.where(same, scores, MASKED)
        if shared.q_ends is not None:
            ends = along(shared.q_ends[warpgroup], scores.shape, 0)
            scores = jnp.where(_counts(scores.shape)[1] < ends - first_key, scores, MASKED)
        plgpu.barrier_arrive(shared.k_free.at[slot])

        new_top = jnp.maximum(top, scores.max(1))
        shrink = jnp.exp2((top - new_top) * unit)
        p = jnp.exp2(scores * unit - along(new_top * unit, scores.shape, 0))
        total = total * shrink + p.sum(1)
        acc = acc * along(shrink, acc.shape, 0)
        p = p.astype(problem.dtype)

        plgpu.barrier_arrive(turn)
        plgpu.barrier_wait(shared.v_ready.at[slot])
        plgpu.barrier_wait(turn)
        acc = add_product(acc, p, shared.v.at[slot], copy)
        plgpu.barrier_arrive(shared.v_free.at[slot])
        return acc, new_top, total

    acc, top, total = lax.fori_loop(
        0,
        work.n_blocks,
        attend,
        (
            jnp.zeros((ROWS, problem.Hv), jnp.float32),
            # Above the score of a hidden key, which so weighs 0 even where no other has been seen.
            jnp.full((ROWS,), MASKED / 2, jnp.float32),
            jnp.zeros((ROWS,), jnp.float32),
        ),
    )
    # The last turn of each warpgroup comes after the other's last use of its queries, where outputs may now be written.
    pl.when(warpgroup == 0)(change_turns)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)  # with nothing seen the sums are 0, and stay so
    shared.lse[warpgroup] = jnp.where(seen, top * (unit / LOG2_E) + jnp.log(total), MASKED)
    out_tiles[warpgroup] = (acc * along(1 / total, acc.shape, 0)).astype(problem.dtype)
    plgpu.commit_smem()
    rows = pl.ds(first_query, ROWS)
    plgpu.copy_smem_to_gmem(out_tiles.at[warpgroup], out.at[work.batch, rows, work.head])  # none beyond the end
    plgpu.copy_smem_to_gmem(shared.lse.at[warpgroup], lse.at[work.batch, work.head, rows])
    plgpu.wait_smem_to_gmem(0)


def _unit(problem: AttentionProblem) -> float:
    """What scores are multiplied by to be in base 2, fused with the subtraction of the maximum; 1 where they are so.

    Plain products with a positive scale wait for it with the scale too.
    """
    plain = problem.soft_cap is None and not problem.alibi and problem.scale > 0
    return problem.scale * LOG2_E if plain else 1.0


def _bend(
    problem: AttentionProblem, scores: jax.Array, work: _Work, first_query: jax.Array, first_key: jax.Array, slopes: Any
) -> jax.Array:
    """Products of queries and keys to scores, in units of `_unit`."""
    if _unit(problem) != 1.0:
        return scores
    if problem.soft_cap is None:
        scores = scores * (problem.scale * LOG2_E)
    else:
        # cap * tanh by way of exp2: the tanh instruction is right to three digits only, before the factor cap.
        cap = problem.soft_cap
        scores = cap * LOG2_E - 2 * cap * LOG2_E / (1 + jnp.exp2(scores * (2 * LOG2_E * problem.scale / cap)))
    if slopes is not None:
        queries, keys = _counts(scores.shape)
        # In this order, so that the distances of a tile need no registers that outlive it.
        distance = jnp.abs((queries + (work.offset + first_query - first_key)) - keys)
        scores = scores - slopes[work.head] * LOG2_E * distance.astype(jnp.float32)
    return scores


def _hide(
    problem: AttentionProblem, scores: jax.Array, work: _Work, first_query: jax.Array, first_key: jax.Array
) -> jax.Array:
    """MASKED where the mask or the end of the keys hides a key; a tile that is seen as a whole is not looked at."""
    first_position = work.offset + first_query
    last_key = first_key + scores.shape[1] - 1
    whole = problem.mask.covers(first_position, first_position + ROWS - 1, first_key, last_key)

    def hide() -> jax.Array:
        queries, keys = _counts(scores.shape)
        keys = keys + first_key
        return jnp.where(problem.mask.visible(queries + first_position, keys) & (keys < problem.S), scores, MASKED)

    return lax.cond(whole & (last_key < problem.S), lambda: scores, hide)


def _counts(shape: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Row and column of each element of a tile."""
    return tuple(plgpu.broadcasted_iota(jnp.int32, shape, dim, layout=plgpu.Layout.WGMMA) for dim in (0, 1))
