"""Paged attention for NVIDIA Hopper (sm_90), as one Pallas Mosaic GPU kernel.

A thread block has one row and one key head: its query heads are rows of a wgmma tile of 64, most of them empty, since
what decoding waits for is memory. The blocks that the row may see come from where they lie into a ring of `stages`
tiles in shared memory, each asked for as soon as its place is free. Codes of int8 are rewritten there, tile by tile, as
the numbers that wgmma takes.

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

from kernels_pallas.attention.gpu_tile import LOG2_E, ROWS, along, load
from kernels_pallas.attention.problem import MASKED
from kernels_pallas.compat import add_product, gpu_interpreter, load_row, transposed
from kernels_pallas.paged.problem import CacheScales, PagedBlocks, PagedOperands, PagedProblem, TokenTree
from kernels_pallas.targets import HOPPER_SHARED_BYTES, Target

_KEYS = 64


def unsupported(problem: PagedProblem, target: Target) -> str | None:
    """Why the Hopper kernel cannot do this; or None."""
    p = problem
    if not target.hopper:
        return f"the kernel is written for sm_90 (H100, H200), and the target is {target.name}"
    if p.dtype.name not in ("bfloat16", "float16"):
        return f"{p.dtype.name}: the tensor cores take bfloat16 and float16"
    if p.buckets is not None:
        return "relative_bias: only the xla and tpu bodies look biases up"
    if p.group > ROWS:
        return f"{p.group} query heads share a key head, and a tile has {ROWS} rows"
    for name, width in (("H", p.H), ("Hv", p.Hv)):
        most = 192 if p.scaled else 256  # codes of more would spill registers
        if width % 16 or not 16 <= width <= most:
            return f"{name} {width}: it takes multiples of 16 up to {most}"
    if p.scaled and p.C != _KEYS:
        return f"int8 in blocks of {p.C} positions, whose scales are no line of {2 * _KEYS} bytes; use {_KEYS}"
    if p.C % 8 or _KEYS % p.C:
        return f"blocks of {p.C} positions do not make a tile of {_KEYS}; use 8, 16, 32 or 64"
    return None


def default_blocks(problem: PagedProblem, target: Target) -> PagedBlocks:
    """As many tiles in flight as let two thread blocks share a processor, or one."""
    fits = lambda stages, blocks: blocks * on_chip_bytes(problem, _blocks(stages)) <= HOPPER_SHARED_BYTES
    return next(_blocks(stages) for blocks in (2, 1) for stages in (4, 3, 2) if fits(stages, blocks))


def _blocks(stages: int) -> PagedBlocks:
    return PagedBlocks(keys=_KEYS, stages=stages)


def on_chip_bytes(problem: PagedProblem, blocks: PagedBlocks) -> int:
    """Shared memory of a thread block."""
    p = problem
    of_key = (p.H + p.Hv) * p.dtype.itemsize
    tiles = blocks.keys * (blocks.stages * (p.H + p.Hv) + of_key if p.scaled else blocks.stages * of_key)
    # jax keeps 2048 for reductions, and each array starts at a multiple of 1024 bytes.
    return ROWS * max(p.H, p.Hv) * p.dtype.itemsize + tiles + 1024 * (p.alibi + p.sinks + 2 * p.scaled) + 1024 + 2048


class _Inputs(NamedTuple):
    q: Any  # [T, K, 64, H]
    k: Any  # [L, P, K, C, H]
    v: Any  # [L, P, K, C, Hv]
    layer: Any  # [1]
    tables: Any  # [S * M]
    slots: Any  # [T]
    positions: Any  # [T]
    first: Any  # [T]: entries [first, last) of the row's table
    last: Any  # [T]
    slopes: Any  # [K, 64] float32 in base 2, or None
    sinks: Any  # [K, 64] float32 in base 2, or None
    tree: TokenTree | None
    scales: CacheScales | None  # [L, P, K, C] each


class _Codes(NamedTuple):
    """Tiles as they come of a cache of int8."""

    k: Any  # [stages, keys, H]
    v: Any  # [stages, keys, Hv]
    k_scales: Any  # [stages, keys]
    v_scales: Any  # [stages, keys]


class _Shared(NamedTuple):
    q_or_out: Any  # [64, H] and [64, Hv] in the same place
    k: Any  # [stages, keys, H]; or [keys, H], what codes stand for
    v: Any  # [stages, keys, Hv]; or [keys, Hv]
    codes: _Codes | None
    slopes: Any  # [64], or None
    sinks: Any  # [64], or None
    p: Any  # [64, keys] for the interpreter only
    row_ready: Any  # barriers: queries, slopes and sinks have arrived
    k_ready: Any  # a tile's keys have arrived
    v_ready: Any


def forward(problem: PagedProblem, blocks: PagedBlocks, operands: PagedOperands, *, interpret: Any = None) -> jax.Array:
    """[T, N, Hv] in q's dtype, of a problem that is not `unsupported`.

    Args:
        blocks: `keys` is 64, `stages` the number of tiles in shared memory.
        interpret: True, or an object of the GPU interpreter's parameters, to run without a GPU.

    Raises:
        ValueError: blocks of other sizes.
    """
    p = problem
    if blocks.keys != _KEYS:
        raise ValueError(f"blocks.keys = {blocks.keys} must be {_KEYS}")
    first, last = p.blocks_of(operands.positions, operands.tree)
    per_head = lambda x: None if x is None else _in_tile(x.reshape(p.K, p.group) * LOG2_E, 1)
    inputs = _Inputs(
        _in_tile(operands.q.reshape(p.T, p.K, p.group, p.H), 2),
        operands.k,
        operands.v,
        operands.layer[None],
        operands.tables.reshape(-1),
        operands.slots,
        operands.positions,
        first,
        last,
        per_head(operands.alibi_slopes),
        per_head(operands.sinks),
        operands.tree,
        operands.scales,
    )
    in_ring = lambda dtype, *of_key: plgpu.SMEM((blocks.stages, blocks.keys, *of_key), dtype)
    tile = lambda width: plgpu.SMEM((blocks.keys, width), p.dtype) if p.scaled else in_ring(p.dtype, width)
    ring = lambda: plgpu.Barrier(num_barriers=blocks.stages, num_arrivals=blocks.count(p.C) * (1 + p.scaled))
    shared = _Shared(
        q_or_out=plgpu.RefUnion(plgpu.SMEM((ROWS, p.H), p.dtype), plgpu.SMEM((ROWS, p.Hv), p.dtype)),
        k=tile(p.H),
        v=tile(p.Hv),
        codes=None
        if operands.scales is None
        else _Codes(
            in_ring(jnp.int8, p.H), in_ring(jnp.int8, p.Hv), *(in_ring(scale.dtype) for scale in operands.scales)
        ),
        slopes=plgpu.SMEM((ROWS,), jnp.float32) if p.alibi else None,
        sinks=plgpu.SMEM((ROWS,), jnp.float32) if p.sinks else None,
        p=plgpu.SMEM((ROWS, blocks.keys), p.dtype) if interpret else None,
        row_ready=plgpu.Barrier(num_barriers=1, num_arrivals=1 + p.alibi + p.sinks),
        k_ready=ring(),
        v_ready=ring(),
    )
    out = plgpu.kernel(
        lambda x, out, shared: _attend(p, blocks, x, out, shared),
        out_type=jax.ShapeDtypeStruct((p.T, p.K, ROWS, p.Hv), p.dtype),
        scratch_types=[shared],
        grid=(p.T, p.K),
        grid_names=("row", "head"),
        num_threads=1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="paged_attention",
        interpret=gpu_interpreter(interpret),
    )(inputs)
    return out[:, :, : p.group].reshape(p.T, p.N, p.Hv)


def _attend(p: PagedProblem, blocks: PagedBlocks, x: _Inputs, out: Any, shared: _Shared) -> None:
    """Attention of one row's query heads to one key head, by online softmax in base 2."""
    row, head, n_blocks = lax.axis_index("row"), lax.axis_index("head"), blocks.count(p.C)
    first, last, position = x.first[row], x.last[row], x.positions[row]
    tree = None if x.tree is None else TokenTree(*(of_rows[row] for of_rows in x.tree))
    n_tiles = pl.cdiv(last - first, n_blocks)
    q, result = shared.q_or_out
    codes = shared.codes
    if codes is None or x.scales is None:
        copied = [(x.k, shared.k, shared.k_ready), (x.v, shared.v, shared.v_ready)]
    else:
        copied = [(x.k, codes.k, shared.k_ready), (x.v, codes.v, shared.v_ready)]
        copied += [(x.scales.k, codes.k_scales, shared.k_ready), (x.scales.v, codes.v_scales, shared.v_ready)]

    def fetch(tile: jax.Array) -> None:
        """Copy a tile's blocks; past the last block this one again, which is near by then."""
        place = lax.rem(tile, jnp.int32(blocks.stages))
        for i in range(n_blocks):
            entry = jnp.minimum(first + tile * n_blocks + i, last - 1)
            block = x.tables[x.slots[row] * p.M + entry]
            rows = pl.ds(i * p.C, p.C)
            for cache, tiles, ready in copied:
                plgpu.copy_gmem_to_smem(cache.at[x.layer[0], block, head], tiles.at[place, rows], ready.at[place])

    plgpu.copy_gmem_to_smem(x.q.at[row, head], q, shared.row_ready.at[0])
    for source, target in ((x.slopes, shared.slopes), (x.sinks, shared.sinks)):
        if source is not None:
            plgpu.copy_gmem_to_smem(source.at[head], target, shared.row_ready.at[0])
    for tile in range(blocks.stages):
        pl.when(tile < n_tiles)(functools.partial(fetch, jnp.int32(tile)))
    plgpu.barrier_wait(shared.row_ready.at[0])

    def add_tile(tile: jax.Array, carry: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        acc, top, total = carry
        place = lax.rem(tile, jnp.int32(blocks.stages))
        k, v = (shared.k.at[place], shared.v.at[place]) if codes is None else (shared.k, shared.v)
        begin = (first + tile * n_blocks) * p.C

        def multiply(sums: Any) -> jax.Array:
            plgpu.wgmma(sums, q, transposed(k))
            plgpu.wgmma_wait(0)
            return sums[...]

        plgpu.barrier_wait(shared.k_ready.at[place])
        if codes is not None:
            _decode(codes.k.at[place], k)
        scores = pl.run_scoped(multiply, plgpu.ACC((ROWS, blocks.keys), jnp.float32))
        if codes is not None:  # of what a sum is over, all numbers have one scale: it comes after
            scores = scores * along(_scales(codes.k_scales.at[place]), scores.shape, 1)
        keys = begin + plgpu.broadcasted_iota(jnp.int32, scores.shape, 1, layout=plgpu.Layout.WGMMA)
        scores = _bend(p, scores, keys, position, shared)
        seen = p.seen(position, keys, tree) & (keys < p.M * p.C)
        scores = jnp.where(seen, scores, MASKED)
        new_top = jnp.maximum(top, scores.max(1))
        shrink = jnp.exp2(top - new_top)
        weights = jnp.exp2(scores - along(new_top, scores.shape, 0))
        total = total * shrink + weights.sum(1)
        acc = acc * along(shrink, acc.shape, 0)
        plgpu.barrier_wait(shared.v_ready.at[place])

        if codes is None:
            _forget_unseen(p, v, begin, position, tree)
        else:
            v_scales = along(_scales(codes.v_scales.at[place]), weights.shape, 1)
            weights = jnp.where(seen, weights * v_scales, 0.0)
            _decode(codes.v.at[place], v)
        acc = add_product(acc, weights.astype(p.dtype), v, shared.p)
        pl.when(tile + blocks.stages < n_tiles)(lambda: fetch(tile + blocks.stages))
        return acc, new_top, total

    # Above the score of a hidden key, which so weighs 0 even where no other has been seen.
    top, total = jnp.full((ROWS,), MASKED / 2, jnp.float32), jnp.zeros((ROWS,), jnp.float32)
    if shared.sinks is not None:  # one more key, whose value is 0
        top, total = shared.sinks[...], jnp.ones((ROWS,), jnp.float32)
    acc, _, total = lax.fori_loop(0, n_tiles, add_tile, (jnp.zeros((ROWS, p.Hv), jnp.float32), top, total))
    total = jnp.where(total > 0, total, 1.0)
    result[...] = (acc * along(1 / total, acc.shape, 0)).astype(p.dtype)
    plgpu.commit_smem()
    plgpu.copy_smem_to_gmem(result, out.at[row, head])
    plgpu.wait_smem_to_gmem(0)


def _forget_unseen(p: PagedProblem, v: Any, begin: jax.Array, position: jax.Array, tree: TokenTree | None) -> None:
    """Make values [keys, Hv] from key `begin` on 0 where nothing is seen: places that were not written, or by another
    text, need not hold numbers."""
    start, _ = p.mask.key_range(position, position)
    reached = position if tree is None else tree.first - 1

    @pl.when((begin < start) | (begin + _KEYS - 1 > reached))
    def _only_seen() -> None:
        for part in _parts(v):
            rows = begin + plgpu.broadcasted_iota(jnp.int32, part.shape, 0, layout=plgpu.Layout.WGMMA)
            seen = (rows >= start) & (rows <= position) if tree is None else p.seen(position, rows, tree)
            part[...] = jnp.where(seen, part[...], jnp.zeros(part.shape, p.dtype))
        plgpu.commit_smem()


def _decode(codes: Any, numbers: Any) -> None:
    """Codes [keys, width] as the numbers that the tensor cores multiply, which hold them exactly."""
    for source, target in zip(_parts(codes), _parts(numbers), strict=True):
        target[...] = load_row(source, plgpu.Layout.WGMMA).astype(target.dtype)
    plgpu.commit_smem()


def _parts(tile: Any) -> list[Any]:
    """Of [keys, width], few columns at a time, which need few registers."""
    width = 64 if tile.shape[1] % 64 == 0 else tile.shape[1]
    return [tile.at[:, pl.ds(column, width)] for column in range(0, tile.shape[1], width)]


def _scales(row: Any) -> jax.Array:
    """float32 [keys], along the columns of a tile of scores."""
    return load(row, 0).astype(jnp.float32)


def _bend(p: PagedProblem, scores: jax.Array, keys: jax.Array, position: jax.Array, shared: _Shared) -> jax.Array:
    """Products of queries and keys to scores in base 2."""
    if p.soft_cap is None:
        scores = scores * (p.scale * LOG2_E)
    else:
        # cap * tanh by way of exp2: the tanh instruction is right to three digits only, before the factor cap.
        cap = p.soft_cap
        scores = cap * LOG2_E - 2 * cap * LOG2_E / (1 + jnp.exp2(scores * (2 * LOG2_E * p.scale / cap)))
    if shared.slopes is not None:
        distance = jnp.abs(keys - position).astype(jnp.float32)
        scores = scores - along(shared.slopes[...], scores.shape, 0) * distance
    return scores


def _in_tile(x: jax.Array, dim: int) -> jax.Array:
    """Zeros up to 64 rows."""
    return jnp.pad(x, [(0, ROWS - x.shape[dim] if d == dim else 0) for d in range(x.ndim)])
