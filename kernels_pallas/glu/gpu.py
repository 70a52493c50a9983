"""Gated linear units on NVIDIA Hopper (sm_90), in Mosaic GPU: tensor-core products fed by TMA.

All kernels are one: several products over the model width in one loop, their sums in registers, and an elementwise
end. A thread block stays on its SM and takes tile after tile; one warpgroup fetches, two compute the upper and the
lower half of a tile's rows. (Rows, not columns: a wgmma reads its 64 rows of the left operand from shared memory each
time, which costs least where it multiplies them with all columns.) TMA fills what lies beyond an array with zeros and
writes nothing there, so arrays need not be whole tiles.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.compat import gpu_interpreter
from kernels_pallas.glu.activations import activate, activate_with_slope
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.targets import HOPPER_SHARED_BYTES, Family, Target

_DTYPES = ("bfloat16", "float16")
_WARPGROUPS = 2  # that compute
_ROWS = 64  # of a wgmma
_ALIGNED = 64  # columns, as many as 128 bytes hold: Mosaic swizzles whole ones only
_ROWS_ALIGNED = 8  # and rows
_SMS = 132  # of an H100 SXM or H200; with fewer SMs the blocks beyond them run later, which is only slower
_SNAKE = 16  # rows of tiles that the SMs work on together, so that weights are found in the L2 cache
_FETCHER_REGISTERS = 40
_PART = 32  # columns that the elementwise end takes at a time


def unsupported(problem: GluProblem, target: Target) -> str | None:
    """Why these kernels cannot do it, or None."""
    if target.family is not Family.GPU or not target.hopper:
        return f"target {target.name} is no NVIDIA Hopper"
    if problem.dtype.name not in _DTYPES:
        return f"dtype {problem.dtype.name} has no GPU kernel, {' and '.join(_DTYPES)} have"
    if problem.biases:
        return "b_gate and b_up are given: its kernels add none"
    if 0 in (problem.M, problem.D, problem.F):
        return f"M {problem.M}, D {problem.D}, F {problem.F}: an empty array has no tiles"
    for name, size in (("D", problem.D), ("F", problem.F)):
        if size % _ALIGNED:
            return f"{name} = {size} must be a multiple of {_ALIGNED}; {-(-size // _ALIGNED) * _ALIGNED} works"
    if problem.save == "none" and problem.down not in (None, problem.D):
        return f"w_down has Dout = {problem.down} and x has D = {problem.D}: with save='none' they must be equal"
    return None


def default_blocks(problem: GluProblem, target: Target) -> GluBlocks:
    """The largest tiles whose sums fit into registers: two sums of 128 x 128, or three of 128 x 96."""
    f, d, stages = (96, 32, 5) if problem.down else (128, 64, 4)
    return GluBlocks(m=128, f=128, d=64, stages=4, m_backward=128, f_backward=f, d_backward=d, stages_backward=stages)


def on_chip_bytes(problem: GluProblem, blocks: GluBlocks) -> int:
    """Shared memory of the larger of the call's kernels."""
    itemsize = problem.dtype.itemsize
    forward = _forward_tile(blocks).bytes(1, 2, itemsize)
    if problem.save == "ag":  # the backward has no kernel of its own
        return forward
    lefts, rights = (2, 3) if problem.down else (1, 2)
    return max(forward, _backward_tile(blocks).bytes(lefts, rights, itemsize))


class _Tile(NamedTuple):
    m: int
    f: int
    d: int
    stages: int

    def bytes(self, lefts: int, rights: int, itemsize: int) -> int:
        """In shared memory: operands of the steps in flight, a tile of results, and barriers of 8 bytes."""
        operands = self.stages * self.d * (lefts * self.m + rights * self.f)
        return itemsize * (operands + self.m * self.f) + 8 * (2 * self.stages + _WARPGROUPS)

    def check(self, lefts: int, rights: int, itemsize: int) -> None:
        """Raises ValueError where the hardware has no such tile."""
        for name, value, unit in (("m", self.m, _WARPGROUPS * _ROWS), ("f", self.f, _PART), ("d", self.d, _PART)):
            if value < 1 or value % unit:
                raise ValueError(
                    f"blocks: {name} = {value} must be a multiple of {unit}; {-(-value // unit) * unit or unit} works"
                )
        if self.f > 256:
            raise ValueError(f"blocks: f = {self.f} must be at most 256, the widest product of the hardware; 128 works")
        needed = self.bytes(lefts, rights, itemsize)
        if self.stages < 1 or needed > HOPPER_SHARED_BYTES:
            fit = [
                n
                for n in range(1, self.stages)
                if self._replace(stages=n).bytes(lefts, rights, itemsize) <= HOPPER_SHARED_BYTES
            ]
            hint = f"stages = {fit[-1]} works" if fit else "m = 128, f = 64, d = 64, stages = 3 works"
            raise ValueError(f"blocks: {self} needs {needed} bytes of the {HOPPER_SHARED_BYTES} there are; {hint}")


def _forward_tile(blocks: GluBlocks) -> _Tile:
    return _Tile(blocks.m, blocks.f, blocks.d, blocks.stages)


def _backward_tile(blocks: GluBlocks) -> _Tile:
    return _Tile(blocks.m_backward, blocks.f_backward, blocks.d_backward, blocks.stages_backward)


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
    """h = act(a) * g with a = x @ w_gate, g = x @ w_up.

    Args:
        x: [M, D].
        w_gate, w_up: [D, F] in x's dtype.
        b_gate, b_up: None.

    Returns:
        (h,), or (h, a, g) with `problem.save == "ag"`: [M, F] in x's dtype.
    """

    def finish(a: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        h = activate(problem.act, a, problem.beta) * g
        return (h, a, g) if problem.save == "ag" else (h,)

    products = [_Product(0, w_gate), _Product(0, w_up)]
    results = 3 if problem.save == "ag" else 1
    return _products("glu_forward", _forward_tile(blocks), [x], products, None, finish, results, interpret)


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
    """(da, dg) from dh [M, F]; a and g are made again and never leave the chip. Arguments as in `forward`."""

    def finish(a: jax.Array, g: jax.Array, dh: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activate_with_slope(problem.act, a, problem.beta)
        return dh * g * slope, dh * value

    products = [_Product(0, w_gate), _Product(0, w_up)]
    return _products("glu_pre_gradients", _backward_tile(blocks), [x], products, dh, finish, 2, interpret)


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
    """(da, dg, h), each [M, F], from dy [M, D] and w_down [F, D]; other arguments as in `forward`.

    a, g and dh = dy @ w_down^T are all sums over the model width, hence one loop with three sums.
    """

    def finish(a: jax.Array, g: jax.Array, dh: jax.Array) -> tuple[jax.Array, ...]:
        value, slope = activate_with_slope(problem.act, a, problem.beta)
        return dh * g * slope, dh * value, value * g

    products = [_Product(0, w_gate), _Product(0, w_up), _Product(1, w_down, transposed=True)]
    return _products("glu_mlp_pre_gradients", _backward_tile(blocks), [x, dy], products, None, finish, 3, interpret)


class _Product(NamedTuple):
    left: int
    """Which of the left operands."""
    right: jax.Array
    """[D, F], or [F, D] where transposed."""
    transposed: bool = False


def _products(
    name: str,
    tile: _Tile,
    lefts: list[jax.Array],
    products: list[_Product],
    extra: jax.Array | None,
    finish: Callable[..., tuple[jax.Array, ...]],
    results: int,
    interpret: Any,
) -> tuple[jax.Array, ...]:
    """finish(*sums, extra) in float32 for each tile, with sums = lefts[i] [M, D] @ right; extra and results: [M, F]."""
    tile.check(len(lefts), len(products), lefts[0].dtype.itemsize)
    rows_given, dtype = lefts[0].shape[0], lefts[0].dtype
    lefts = [_whole_rows(left) for left in lefts]
    extra = None if extra is None else _whole_rows(extra)
    (M, D), F = lefts[0].shape, products[0].right.shape[1]
    m_tiles, f_tiles, steps = pl.cdiv(M, tile.m), pl.cdiv(F, tile.f), pl.cdiv(D, tile.d)
    rows = tile.m // _WARPGROUPS
    parts = [slice(start, start + _PART) for start in range(0, tile.f, _PART)]

    # wgmma wants both of its operands swizzled alike.
    transforms = _transforms(math.gcd(tile.d, tile.f), dtype)

    def pipeline(step: Callable[..., Any], context: Callable[..., Any], m: Any, f: Any) -> Any:
        left = plgpu.BlockSpec((tile.m, tile.d), lambda k: (m, k), transforms=transforms)
        right = plgpu.BlockSpec((tile.d, tile.f), lambda k: (k, f), transforms=transforms)
        turned = plgpu.BlockSpec((tile.f, tile.d), lambda k: (f, k), transforms=transforms)
        return plgpu.emit_pipeline_warp_specialized(
            step,
            grid=(steps,),
            memory_registers=_FETCHER_REGISTERS,
            in_specs=[left] * len(lefts) + [turned if p.transposed else right for p in products],
            wg_axis="warpgroup",
            num_compute_wgs=_WARPGROUPS,
            max_concurrent_steps=tile.stages,
            compute_context=context,
        )

    def kernel(*refs: Any) -> None:
        n = len(lefts) + len(products)
        operands, extra_ref, outs = refs[:n], refs[n : len(refs) - results], refs[len(refs) - results :]

        def block(operand_buffers: Any, end_buffer: Any, extra_arrived: Any) -> None:
            warpgroup = lax.axis_index("warpgroup")

            @plgpu.nd_loop((m_tiles * f_tiles,), collective_axes="sm")
            def _(loop: plgpu.NDLoopInfo) -> None:
                m, f = plgpu.planar_snake(loop.index[0], (m_tiles, f_tiles), 0, _SNAKE)
                window = (pl.ds(m * tile.m + warpgroup * rows, rows), pl.ds(f * tile.f, tile.f))

                def step(_: Any, *blocks_and_sums: Any) -> Any:
                    *blocks, sums = blocks_and_sums
                    for product, right, total in zip(products, blocks[len(lefts) :], sums, strict=True):
                        left = blocks[product.left].at[pl.ds(warpgroup * rows, rows)]
                        plgpu.wgmma(total, left, right.T if product.transposed else right)
                    plgpu.wgmma_wait(0)
                    return sums

                def compute(run: Callable[[Any], Any]) -> None:
                    def with_sums(*sums: Any) -> None:
                        # The last tile's results have left the buffer.
                        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                        if extra is not None:
                            for i, part in enumerate(parts):
                                plgpu.copy_gmem_to_smem(
                                    extra_ref[0].at[window].at[:, part],
                                    end_buffer.at[warpgroup, i],
                                    extra_arrived.at[warpgroup],
                                )
                        run(sums)
                        totals = [total[...] for total in sums]
                        if extra is not None:
                            plgpu.barrier_wait(extra_arrived.at[warpgroup])

                        # A loop, for all columns at once would need more registers than there are. Registers have no
                        # index: each turn takes the parts in front and sends them to the back.
                        def finish_part(i: Any, queue: Any) -> Any:
                            values, *rest = queue
                            columns = pl.ds(i * _PART, _PART)
                            extras = [] if extra is None else [end_buffer[warpgroup, i].astype(jnp.float32)]
                            for j, (result, out) in enumerate(zip(finish(*values, *extras), outs, strict=True)):
                                plgpu.wait_smem_to_gmem(0 if j else 1, wait_read_only=True)
                                end_buffer[warpgroup, i] = result.astype(dtype)
                                plgpu.commit_smem()
                                plgpu.copy_smem_to_gmem(end_buffer.at[warpgroup, i], out.at[window].at[:, columns])
                            return (*rest, values)

                        queue = tuple(tuple(total[:, part] for total in totals) for part in parts)
                        lax.fori_loop(0, len(parts), finish_part, queue)

                    pl.run_scoped(with_sums, *[plgpu.ACC((rows, tile.f), jnp.float32) for _ in products])

                pipeline(step, compute, m, f)(*operands, allocations=operand_buffers)

            plgpu.wait_smem_to_gmem(0)

        pl.run_scoped(
            block,
            operand_buffers=pipeline(_nothing, _nothing, 0, 0).get_allocations(*operands),
            end_buffer=plgpu.SMEM((_WARPGROUPS, len(parts), rows, _PART), dtype, transforms=_transforms(_PART, dtype)),
            extra_arrived=plgpu.Barrier(num_arrivals=len(parts), num_barriers=_WARPGROUPS),
            collective_axes="warpgroup",
        )

    found = plgpu.kernel(
        kernel,
        out_type=tuple(jax.ShapeDtypeStruct((M, F), dtype) for _ in range(results)),
        grid=(min(_SMS, m_tiles * f_tiles),),
        grid_names=("sm",),
        num_threads=_WARPGROUPS + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name=name,
        interpret=gpu_interpreter(interpret),
    )(*lefts, *(p.right for p in products), *(() if extra is None else (extra,)))
    return tuple(array[:rows_given] for array in found)


def _whole_rows(array: jax.Array) -> jax.Array:
    return jnp.pad(array, ((0, -array.shape[0] % _ROWS_ALIGNED), (0, 0)))


def _nothing(*_: Any, **__: Any) -> None:
    """What memory a pipeline needs does not depend on its body."""


def _transforms(columns: int, dtype: Any) -> tuple[Any, ...]:
    """How wgmma and TMA want a tile of so many columns to lie in shared memory."""
    swizzle = plgpu.find_swizzle(columns * dtype.itemsize * 8)
    return plgpu.TilingTransform((8, swizzle // dtype.itemsize)), plgpu.SwizzleTransform(swizzle)
