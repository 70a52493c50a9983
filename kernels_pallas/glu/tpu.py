"""Gated linear units as Mosaic TPU kernels.

One tile of the hidden values at a time: the products that meet in it, gate and up, and in the backward pass of an MLP
the gradient of the hidden values too, are all sums over the width of the model. So one loop over slices of that width
feeds two or three float32 accumulators, and after the last slice the elementwise part is done on the tile where it is.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.glu.activations import activate, activate_with_slope
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.targets import Family, Target

_DTYPES = ("float32", "bfloat16")

# Of the default limit on a kernel's VMEM, what the compiler takes for itself.
_SPARE_BYTES = 2**20

_LANES = 128
_STRIP_ROWS = 128


class _Tile(NamedTuple):
    """Rows and columns of a tile of hidden values, and the depth of a slice of the model's width."""

    m: int
    f: int
    d: int


class _Inputs(NamedTuple):
    """What a kernel reads; None where it does not."""

    x: Any  # [M, D]
    w_gate: Any  # [D, F]
    w_up: Any  # [D, F]
    b_gate: Any = None  # [1, F]
    b_up: Any = None  # [1, F]
    dh: Any = None  # [M, F]
    dy: Any = None  # [M, D]
    w_down: Any = None  # [F, D]


def unsupported(problem: GluProblem, target: Target) -> str | None:
    """Why these kernels cannot do it, or None."""
    if target.family is not Family.TPU:
        return f"target {target.name} is no TPU"
    if problem.dtype.name not in _DTYPES:
        return f"dtype {problem.dtype.name} has no TPU kernel, {' and '.join(_DTYPES)} have"
    if problem.save == "none" and problem.down not in (None, problem.D):
        return f"w_down has Dout = {problem.down} and x has D = {problem.D}: with save='none' they must be equal"
    if 0 in (problem.M, problem.D, problem.F):
        return f"M {problem.M}, D {problem.D}, F {problem.F}: an empty array has no tiles"
    return None


def forward(
    problem: GluProblem,
    blocks: GluBlocks,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """(h,) or, with problem.save == "ag", (h, a, g): [M, F] each, in x's dtype."""

    def finish(a: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        h = activate(problem.act, a, problem.beta) * g
        return (h, a, g) if problem.save == "ag" else (h,)

    inputs = _Inputs(x, w_gate, w_up, _row(b_gate), _row(b_up))
    tile = _Tile(blocks.m, blocks.f, blocks.d)
    return _call("glu_forward", problem, tile, inputs, finish, _forward_outputs(problem), interpret)


def pre_gradients(
    problem: GluProblem,
    blocks: GluBlocks,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    dh: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """Gradients (da, dg) for the cotangent dh [M, F], with a and g computed again: [M, F] each, in x's dtype."""

    def finish(a: jax.Array, g: jax.Array, dh: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activate_with_slope(problem.act, a, problem.beta)
        return dh * g * slope, dh * value

    inputs = _Inputs(x, w_gate, w_up, _row(b_gate), _row(b_up), dh=dh)
    return _call("glu_pre_gradients", problem, _backward_tile(blocks), inputs, finish, 2, interpret)


def mlp_pre_gradients(
    problem: GluProblem,
    blocks: GluBlocks,
    x: jax.Array,
    w_gate: jax.Array,
    w_up: jax.Array,
    w_down: jax.Array,
    b_gate: jax.Array | None,
    b_up: jax.Array | None,
    dy: jax.Array,
    *,
    interpret: Any = None,
) -> tuple[jax.Array, ...]:
    """(da, dg, h) for the cotangent dy [M, D] of h @ w_down [F, D]: [M, F] each, in x's dtype."""

    def finish(a: jax.Array, g: jax.Array, dh: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activate_with_slope(problem.act, a, problem.beta)
        return dh * g * slope, dh * value, value * g

    inputs = _Inputs(x, w_gate, w_up, _row(b_gate), _row(b_up), dy=dy, w_down=w_down)
    return _call("glu_mlp_pre_gradients", problem, _backward_tile(blocks), inputs, finish, 3, interpret)


def default_blocks(problem: GluProblem, target: Target) -> GluBlocks:
    """Those that move the fewest bytes among the tiles that fit the default VMEM limit of the chip."""
    budget = target.kernel_bytes - _SPARE_BYTES
    ahead = _cheapest(problem, 2, lambda tile: _forward_bytes(problem, tile) <= budget)
    back = _cheapest(problem, _backward_sums(problem), lambda tile: _backward_bytes(problem, tile) <= budget)
    return GluBlocks(m=ahead.m, f=ahead.f, d=ahead.d, m_backward=back.m, f_backward=back.f, d_backward=back.d)


def on_chip_bytes(problem: GluProblem, blocks: GluBlocks) -> int:
    """VMEM of the larger of the call's kernels: two copies of each tile that moves, the accumulators, and a reserve."""
    return _SPARE_BYTES + max(
        _forward_bytes(problem, _clip(problem, _Tile(blocks.m, blocks.f, blocks.d))),
        _backward_bytes(problem, _clip(problem, _backward_tile(blocks))),
    )


def _cheapest(problem: GluProblem, n_sums: int, fits: Callable[[_Tile], bool]) -> _Tile:
    # Slices of 256 or more keep the matrix unit busy between two updates of the accumulators.
    depths = [d for d in (512, 384, 256) if problem.D % d == 0] or [512]
    tiles = (
        _clip(problem, _Tile(m, f, d))
        for m, f, d in itertools.product((128, 256, 512, 1024, 2048), (128, 256, 512, 768, 1024), depths)
    )
    return min(filter(fits, tiles), key=lambda tile: (_hbm_bytes(problem, tile, n_sums), -tile.d))


def _call(
    name: str,
    problem: GluProblem,
    tile: _Tile,
    inputs: _Inputs,
    finish: Callable[..., tuple[jax.Array, ...]],
    n_outputs: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """Sum the products over D tile by tile, and make of each tile's sums its part of the outputs [M, F]."""
    M, D, F = problem.M, problem.D, problem.F
    _check(problem, tile)
    tile = _clip(problem, tile)
    rows = pl.BlockSpec((tile.m, tile.d), lambda i, j, k: (i, k))
    columns = pl.BlockSpec((tile.d, tile.f), lambda i, j, k: (k, j))
    bias = pl.BlockSpec((1, tile.f), lambda i, j, k: (0, j))
    hidden = pl.BlockSpec((tile.m, tile.f), lambda i, j, k: (i, j))
    down = pl.BlockSpec((tile.f, tile.d), lambda i, j, k: (j, k))
    specs = _Inputs(rows, columns, columns, bias, bias, hidden, rows, down)
    given = _Inputs(*(None if i is None else spec for i, spec in zip(inputs, specs, strict=True)))
    n_sums = 2 if inputs.dy is None else 3
    n_hidden = n_outputs + (inputs.dh is not None)
    grid = (pl.cdiv(M, tile.m), pl.cdiv(F, tile.f), pl.cdiv(D, tile.d))
    return pl.pallas_call(
        functools.partial(_kernel, finish=finish, D=D, depth=tile.d),
        grid=grid,
        in_specs=[given],
        out_specs=[hidden] * n_outputs,
        out_shape=[jax.ShapeDtypeStruct((M, F), problem.dtype)] * n_outputs,
        scratch_shapes=[[pltpu.VMEM((tile.m, tile.f), jnp.float32)] * n_sums],
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel", "arbitrary")),
        cost_estimate=pl.CostEstimate(
            flops=2 * M * D * F * n_sums,
            transcendentals=M * F,
            bytes_accessed=_hbm_bytes(problem, tile, n_sums) + n_hidden * M * F * problem.dtype.itemsize,
        ),
        interpret=interpret or False,
        name=name,
    )(inputs)


def _kernel(inputs: _Inputs, *refs: Any, finish: Callable[..., tuple[jax.Array, ...]], D: int, depth: int) -> None:
    *outputs, sums = refs
    step = pl.program_id(2)

    @pl.when(step == 0)
    def start() -> None:
        for total in sums:
            total[...] = jnp.zeros_like(total)

    def read(ref: Any, axis: int) -> jax.Array:
        """A tile; where the last slice reaches beyond D, what it holds there is no number to sum."""
        tile = ref[...]
        if D % depth == 0:
            return tile
        inside = lax.broadcasted_iota(jnp.int32, tile.shape, axis) < D - step * depth
        return jnp.where(inside, tile, jnp.zeros_like(tile))

    x = read(inputs.x, 1)
    sums[0][...] += _dot(x, read(inputs.w_gate, 0), 0)
    sums[1][...] += _dot(x, read(inputs.w_up, 0), 0)
    if inputs.dy is not None:
        sums[2][...] += _dot(read(inputs.dy, 1), read(inputs.w_down, 1), 1)

    @pl.when(step == pl.num_programs(2) - 1)
    def end() -> None:
        # In strips: what the elementwise part keeps between its operations would take VMEM by the tile otherwise.
        n_rows = math.gcd(sums[0].shape[0], _STRIP_ROWS)

        @pl.loop(0, sums[0].shape[0] // n_rows)
        def strip(i: jax.Array) -> None:
            rows = pl.ds(pl.multiple_of(i * n_rows, n_rows), n_rows)
            a, g, *dh = (total[rows] for total in sums)
            if inputs.b_gate is not None:
                a, g = a + inputs.b_gate[...].astype(jnp.float32), g + inputs.b_up[...].astype(jnp.float32)
            if inputs.dh is not None:
                dh = [inputs.dh[rows].astype(jnp.float32)]
            for output, value in zip(outputs, finish(a, g, *dh), strict=True):
                output[rows] = value.astype(output.dtype)


def _dot(x: jax.Array, w: jax.Array, w_axis: int) -> jax.Array:
    # float32 follows jax.default_matmul_precision, as in XLA; bfloat16 has one precision, and Mosaic refuses others.
    precision = None if x.dtype == jnp.float32 else lax.Precision.DEFAULT
    return lax.dot_general(x, w, (((1,), (w_axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)


def _row(bias: jax.Array | None) -> jax.Array | None:
    return None if bias is None else bias.reshape(1, -1)


def _backward_tile(blocks: GluBlocks) -> _Tile:
    return _Tile(blocks.m_backward, blocks.f_backward, blocks.d_backward)


def _clip(problem: GluProblem, tile: _Tile) -> _Tile:
    """No larger than the arrays; rows in whole sublanes, beyond the array if need be."""
    m = min(tile.m, _round_up(problem.M, _sublanes(problem)))
    return _Tile(m, min(tile.f, problem.F), min(tile.d, problem.D))


def _round_up(size: int, unit: int) -> int:
    return pl.cdiv(size, unit) * unit


def _sublanes(problem: GluProblem) -> int:
    return 32 // problem.dtype.itemsize


def _check(problem: GluProblem, tile: _Tile) -> None:
    """Mosaic TPU cuts arrays into 32 bytes of rows by 128 columns, or takes a dimension of columns whole."""
    units = (_sublanes(problem), _LANES, _LANES)
    for name, size, whole, unit in zip("mfd", tile, (problem.M, problem.F, problem.D), units, strict=True):
        if size < 1 or (size % unit and (size < whole or name == "m")):
            nearest = max(unit, round(size / unit) * unit)
            other = "" if name == "m" else f" or at least {whole}"
            raise ValueError(f"blocks: {name} = {size} must be a multiple of {unit}{other}; use {nearest}")


def _forward_outputs(problem: GluProblem) -> int:
    return 3 if problem.save == "ag" else 1


def _vmem_bytes(tile: _Tile, itemsize: int, n_sums: int, n_hidden: int) -> int:
    """n_hidden: tiles [m, f] of arguments and results."""
    m, f, d = tile.m, _round_up(tile.f, _LANES), _round_up(tile.d, _LANES)
    moving = (n_sums - 1) * m * d + n_sums * d * f + n_hidden * m * f
    return 2 * moving * itemsize + n_sums * m * f * 4


def _forward_bytes(problem: GluProblem, tile: _Tile) -> int:
    return _vmem_bytes(tile, problem.dtype.itemsize, 2, _forward_outputs(problem))


def _backward_bytes(problem: GluProblem, tile: _Tile) -> int:
    if problem.save == "ag":
        return 0  # no kernel
    return _vmem_bytes(tile, problem.dtype.itemsize, _backward_sums(problem), 3)


def _backward_sums(problem: GluProblem) -> int:
    return 2 if problem.down is None else 3


def _hbm_bytes(problem: GluProblem, tile: _Tile, n_sums: int) -> int:
    """What the tiles of the products' factors move, each anew for every tile of hidden values."""
    n_tiles = pl.cdiv(problem.M, tile.m) * pl.cdiv(problem.F, tile.f)
    return n_tiles * problem.D * ((n_sums - 1) * tile.m + n_sums * tile.f) * problem.dtype.itemsize
