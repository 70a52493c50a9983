"""Grouped products as Mosaic TPU kernels.

Rows are cut into tiles, groups where they end; a tile that two groups share is visited once for each, and each visit
writes its own rows alone. Which visit is of which tile and group is computed outside and prefetched as scalars, so that
as many visits run as there are. Consecutive visits of a group find its matrix where it is.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem
from kernels_pallas.targets import Family, Target

_DTYPES = ("float32", "bfloat16")

# Of the default limit on a kernel's VMEM, what the compiler takes for itself beyond the arrays that are counted.
_PRODUCT_SPARE_BYTES = 2 * 2**20
_GRADIENT_SPARE_BYTES = 2**20

_LANES = 128


class _Tile(NamedTuple):
    """Rows, columns, and depth of one step of the sum; of the weights' gradient a tile is depth x columns."""

    m: int
    columns: int
    depth: int


class _Tiles(NamedTuple):
    """Of the three kernels."""

    forward: _Tile
    rows: _Tile
    weights: _Tile

    @classmethod
    def of(cls, problem: GroupedProblem, blocks: GroupedBlocks) -> _Tiles:
        """No larger than the arrays; rows in whole sublanes, beyond the array if need be.

        Raises:
            ValueError: Mosaic TPU cuts arrays into 32 bytes of rows by 128 columns, or takes a dimension whole.
        """
        sublanes = 32 // problem.dtype.itemsize
        for name, size in vars(blocks).items():
            whole = {"m": None, "f": problem.F, "d": problem.D}[name[0]]
            unit = sublanes if whole is None else _LANES
            if size % unit and (whole is None or size < whole):
                nearest = max(unit, round(size / unit) * unit)
                other = "" if whole is None else f" or at least {whole}"
                raise ValueError(f"blocks: {name} = {size} must be a multiple of {unit}{other}; use {nearest}")
        m = _round_up(problem.M, sublanes)
        clip = lambda tile, F, D: _Tile(min(tile.m, m), min(tile.columns, F), min(tile.depth, D))
        b, D, F = blocks, problem.D, problem.F
        return cls(
            clip(_Tile(b.m, b.f, b.d), F, D),
            clip(_Tile(b.m_rows, b.d_rows, b.f_rows), D, F),
            clip(_Tile(b.m_weights, b.f_weights, b.d_weights), F, D),
        )


class _Visits(NamedTuple):
    """Of tiles, in their order: which group each is for, the group's rows [begin, end), and where its tiles start."""

    begin: Any  # [groups]
    end: Any  # [groups]
    shift: Any  # [groups]: the visit v of a group is to the tile v + shift
    group: Any  # [visits]

    def tile(self, visit: Any) -> Any:
        """The visited tile."""
        return visit + self.shift[self.group[visit]]


def unsupported(problem: GroupedProblem, target: Target) -> str | None:
    """Why these kernels cannot do it, or None."""
    if target.family is not Family.TPU:
        return f"target {target.name} is no TPU"
    for name, dtype in (("dtype", problem.dtype), ("weight dtype", problem.weight_dtype)):
        if dtype.name not in _DTYPES:
            return f"{name} {dtype.name} has no TPU kernel, {' and '.join(_DTYPES)} have"
    if 0 in (problem.M, problem.D, problem.F, problem.E):
        return f"M {problem.M}, D {problem.D}, F {problem.F}, E {problem.E}: an empty array has no tiles"
    return None


def default_blocks(problem: GroupedProblem, target: Target) -> GroupedBlocks:
    """The cheapest tiles that fit the default VMEM limit of the chip."""
    # Each group adds a tile on average: of the rows that are computed, at most a fifth in vain, if groups are large.
    rows = [m for m in (256, 512, 1024) if 4 * m * problem.E <= problem.M] or [128]
    sizes = (128, 256, 512, 768, 1024, 1536, 2048)

    def cheapest(
        D: int, F: int, depths: Iterable[int], n_bytes: Callable[..., int], cost: Callable[..., float]
    ) -> _Tile:
        tiles = {_Tile(m, min(f, F), min(d, D)) for m, f, d in itertools.product(rows, sizes, depths)}
        fitting = (t for t in tiles if n_bytes(problem, D, F, t) <= target.kernel_bytes)
        return min(fitting, key=lambda t: (cost(problem, D, F, t), t))

    def of_product(D: int, F: int) -> _Tile:
        even = [d for d in (256, 512, 1024, 2048) if D % d == 0] or [512]
        return cheapest(D, F, [*even, D], _product_bytes, _product_cost)

    ahead, back = of_product(problem.D, problem.F), of_product(problem.F, problem.D)
    weights = cheapest(problem.D, problem.F, sizes, _gradient_bytes, _gradient_cost)
    return GroupedBlocks(
        m=ahead.m,
        f=ahead.columns,
        d=ahead.depth,
        m_rows=back.m,
        f_rows=back.depth,
        d_rows=back.columns,
        m_weights=weights.m,
        f_weights=weights.columns,
        d_weights=weights.depth,
    )


def on_chip_bytes(problem: GroupedProblem, blocks: GroupedBlocks) -> int:
    """VMEM of the largest of the kernels: two copies of each tile that moves, the accumulator, and a reserve."""
    tiles = _Tiles.of(problem, blocks)
    return max(
        _product_bytes(problem, problem.D, problem.F, tiles.forward),
        _product_bytes(problem, problem.F, problem.D, tiles.rows),
        _gradient_bytes(problem, problem.D, problem.F, tiles.weights),
    )


def forward(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    x: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """[M, F] in x's dtype."""
    return _rows_by_weights("grouped_forward", problem, _Tiles.of(problem, blocks).forward, x, w, sizes, 0, interpret)


def row_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    dy: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """dx [M, D] in dy's dtype for the cotangent dy [M, F]."""
    return _rows_by_weights(
        "grouped_row_gradient", problem, _Tiles.of(problem, blocks).rows, dy, w, sizes, 1, interpret
    )


def weight_gradient(
    problem: GroupedProblem,
    blocks: GroupedBlocks,
    x: jax.Array,
    dy: jax.Array,
    sizes: jax.Array,
    *,
    interpret: Any = None,
) -> jax.Array:
    """dw [E, D, F] in problem.weight_dtype."""
    M, D, F, E = problem.M, problem.D, problem.F, problem.E
    tile = _Tiles.of(problem, blocks).weights
    visits, count = _visits(sizes, M, tile.m, at_least=1)
    columns = lambda size, axis: pl.BlockSpec((tile.m, size), lambda *ids: (_Visits(*ids[3:]).tile(ids[2]), ids[axis]))
    return pl.pallas_call(
        _weights_kernel,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(D, tile.depth), pl.cdiv(F, tile.columns), count),
            in_specs=[columns(tile.depth, 0), columns(tile.columns, 1)],
            out_specs=pl.BlockSpec(
                (None, tile.depth, tile.columns), lambda i, j, v, *visits: (_Visits(*visits).group[v], i, j)
            ),
            scratch_shapes=[pltpu.VMEM((tile.depth, tile.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((E, D, F), problem.weight_dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * F, transcendentals=0, bytes_accessed=_gradient_traffic(problem, D, F, tile)
        ),
        interpret=interpret or False,
        name="grouped_weight_gradient",
    )(*visits, x, dy)


def _weights_kernel(*refs: Any) -> None:
    *scalars, x, dy, out, total = refs
    m = x.shape[0]
    first, begin, end, _ = _here(_Visits(*scalars), pl.program_id(2), m)

    @pl.when(first <= begin)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    @pl.when(begin < end)
    def add() -> None:
        own = _inside(first, (m, 1), begin, end)
        # Both, as the rows that are not of this group need not be numbers.
        read = lambda ref: jnp.where(own, ref[...], jnp.zeros_like(ref))
        total[...] += _dot(read(x), read(dy), 0, 0)

    @pl.when(first + m >= end)
    def finish() -> None:
        out[...] = total[...].astype(out.dtype)


def _rows_by_weights(
    name: str,
    problem: GroupedProblem,
    tile: _Tile,
    rows: jax.Array,
    w: jax.Array,
    sizes: jax.Array,
    axis: int,
    interpret: Any,
) -> jax.Array:
    """Each row times its group's matrix, summed over axis `axis` of that."""
    (M, D), E, F = rows.shape, w.shape[0], w.shape[2 - axis]
    # The rows of no group are one more, whose tiles are written without a product.
    visits, count = _visits(jnp.append(sizes, M - sizes.sum()), M, tile.m, at_least=0)

    def matrix(j: Any, v: Any, k: Any, *visits: Any) -> tuple[Any, ...]:
        e = jnp.minimum(_Visits(*visits).group[v], E - 1)
        return (e, k, j) if axis == 0 else (e, j, k)

    return pl.pallas_call(
        functools.partial(_rows_kernel, n_groups=E, D=D, axis=axis),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(visits),
            grid=(pl.cdiv(F, tile.columns), count, pl.cdiv(D, tile.depth)),
            in_specs=[
                pl.BlockSpec((tile.m, tile.depth), lambda j, v, k, *visits: (_Visits(*visits).tile(v), k)),
                pl.BlockSpec(
                    (None, tile.depth, tile.columns) if axis == 0 else (None, tile.columns, tile.depth), matrix
                ),
            ],
            out_specs=pl.BlockSpec((tile.m, tile.columns), lambda j, v, k, *visits: (_Visits(*visits).tile(v), j)),
            scratch_shapes=[pltpu.VMEM((tile.m, tile.columns), jnp.float32)],
        ),
        out_shape=jax.ShapeDtypeStruct((M, F), rows.dtype),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "arbitrary", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * F,
            transcendentals=0,
            bytes_accessed=_product_traffic(problem, D, F, tile),
        ),
        interpret=interpret or False,
        name=name,
    )(*visits, rows, w)


def _rows_kernel(*refs: Any, n_groups: int, D: int, axis: int) -> None:
    *scalars, rows, w, out, total = refs
    step = pl.program_id(2)
    m, depth = rows.shape
    first, begin, end, e = _here(_Visits(*scalars), pl.program_id(1), m)

    @pl.when(step == 0)
    def start() -> None:
        total[...] = jnp.zeros_like(total)

    def read(ref: Any, axis: int) -> jax.Array:
        """A tile; where the last slice reaches beyond D, what it holds there is no number to sum."""
        if D % depth == 0:
            return ref[...]
        inside = _inside(step * depth, tuple(depth if i == axis else 1 for i in range(2)), 0, D, axis)
        return jnp.where(inside, ref[...], jnp.zeros_like(ref))

    @pl.when(e < n_groups)
    def add() -> None:
        total[...] += _dot(read(rows, 1), read(w, axis), 1, axis)

    @pl.when(step == pl.num_programs(2) - 1)
    def finish() -> None:
        own = _inside(first, (m, 1), begin, end)
        out[...] = jnp.where(own, total[...].astype(out.dtype), out[...])


def _visits(sizes: jax.Array, M: int, m: int, *, at_least: int) -> tuple[_Visits, jax.Array]:
    """Every tile of every group, `at_least` one (0 or 1) of an empty group, and how many there are."""
    tiles = pl.cdiv(M, m)
    end = jnp.cumsum(sizes)
    begin = end - sizes
    first = jnp.minimum(begin // m, tiles - 1)
    count = jnp.where(sizes > 0, (end - 1) // m - first + 1, at_least)
    last_visit = jnp.cumsum(count)
    # No more than this, as every group but one adds at most one visit to those of the tiles.
    visit = jnp.arange(tiles + sizes.shape[0] - 1 + at_least)
    group = jnp.minimum((last_visit[None, :] <= visit[:, None]).sum(1), sizes.shape[0] - 1)
    scalars = (begin, end, first - (last_visit - count), group)
    return _Visits(*(values.astype(jnp.int32) for values in scalars)), last_visit[-1]


def _here(visits: _Visits, visit: jax.Array, m: int) -> tuple[jax.Array, ...]:
    """The tile's first row; the group's rows [begin, end); the group."""
    e = visits.group[visit]
    return visits.tile(visit) * m, visits.begin[e], visits.end[e], e


def _inside(first: jax.Array, shape: tuple[int, ...], begin: Any, end: Any, axis: int = 0) -> jax.Array:
    """Which of the positions from `first` on along the axis lie in [begin, end): boolean of the shape."""
    positions = first + lax.broadcasted_iota(jnp.int32, shape, axis)
    return (positions >= begin) & (positions < end)


def _dot(x: jax.Array, y: jax.Array, x_axis: int, y_axis: int) -> jax.Array:
    # float32 follows jax.default_matmul_precision, as in XLA; bfloat16 has one precision, and Mosaic refuses others.
    precision = None if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    dims = (((x_axis,), (y_axis,)), ((), ()))
    return lax.dot_general(x, y, dims, precision=precision, preferred_element_type=jnp.float32)


def _round_up(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


# Of a product of rows [M, D] -> [M, F], be it forward or of the rows' gradient, and of the weights' gradient [D, F]:
# VMEM, HBM traffic, and the cost that tiles are chosen by.


def _product_bytes(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> int:
    m, f, d = tile.m, _round_up(tile.columns, _LANES), _round_up(tile.depth, _LANES)
    return 2 * (m * d + d * f + m * f) * problem.dtype.itemsize + m * f * 4 + _PRODUCT_SPARE_BYTES


def _gradient_bytes(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> int:
    m, f, d = tile.m, _round_up(tile.columns, _LANES), _round_up(tile.depth, _LANES)
    # Rows as they arrive, twice, and without those of other groups.
    rows = 3 * m * (d + f) * problem.dtype.itemsize
    return rows + d * f * (2 * problem.weight_dtype.itemsize + 4) + _GRADIENT_SPARE_BYTES


def _product_traffic(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> int:
    """What a visit has in common with the next is not fetched again."""
    M, E, n_visits = problem.M, problem.E, _n_visits(problem, tile)
    n_rows, n_matrices = (M, E) if tile.depth == D else (n_visits * tile.m, n_visits)
    return (pl.cdiv(F, tile.columns) * n_rows * D + n_matrices * D * F + M * F) * problem.dtype.itemsize


def _gradient_traffic(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> int:
    rows = problem.M * (pl.cdiv(F, tile.columns) * D + pl.cdiv(D, tile.depth) * F)
    return rows * problem.dtype.itemsize + problem.E * D * F * problem.weight_dtype.itemsize


# In the time of one byte of HBM traffic TPUs do 160 to 560 operations, and VMEM moves some 20 bytes.
_FLOPS_PER_BYTE = 256
_VMEM_SPEED = 20


def _product_cost(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> float:
    n_rows = _n_visits(problem, tile) * tile.m
    sums = 8 * n_rows * F * pl.cdiv(D, tile.depth)  # every step reads and writes them
    return _product_traffic(problem, D, F, tile) + 2 * n_rows * D * F / _FLOPS_PER_BYTE + sums / _VMEM_SPEED


def _gradient_cost(problem: GroupedProblem, D: int, F: int, tile: _Tile) -> float:
    n_visits = _n_visits(problem, tile)
    sums = 8 * n_visits * D * F
    flops = 2 * n_visits * tile.m * D * F
    return _gradient_traffic(problem, D, F, tile) + flops / _FLOPS_PER_BYTE + sums / _VMEM_SPEED


def _n_visits(problem: GroupedProblem, tile: _Tile) -> int:
    """With groups that end anywhere."""
    return pl.cdiv(problem.M, tile.m) + problem.E - 1
