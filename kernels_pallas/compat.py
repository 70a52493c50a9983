"""Where the versions of jax that this package runs on differ."""

from __future__ import annotations

from typing import Any

import jax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu


def gpu_interpreter(interpret: Any) -> Any:
    """The `interpret` argument of `plgpu.kernel`: True stands for the GPU interpreter with its defaults.

    Raises:
        ValueError: interpret is True and this jax has no GPU interpreter.
    """
    if interpret is not True:
        return interpret
    if not hasattr(plgpu, "InterpretGPUParams"):
        raise ValueError(f"interpret = True needs the GPU interpreter of jax 0.11, not {jax.__version__}; use a GPU")
    return plgpu.InterpretGPUParams()


def transposed(ref: Any) -> Any:
    """A matrix in shared memory, read transposed: `ref.T`, which jax 0.10 has another name for."""
    return ref.T if jax.__version_info__ >= (0, 11) else plgpu.transpose_ref(ref, (1, 0))


def add_product(total: jax.Array, x: jax.Array, y: Any, copy: Any) -> jax.Array:
    """total + x @ y on the tensor cores, inside a kernel: x [M, K] in registers, y [K, N] in shared memory.

    The GPU interpreter (up to jax 0.12) has no accumulators that start with a value; `copy` as in `start_product`.
    """
    if copy is None:
        return pl.run_state(lambda sums: plgpu.wgmma(sums, x, y))(plgpu.ACC.init(total))

    def multiply(sums: Any) -> jax.Array:
        start_product(sums, x, y, copy)
        return sums[...]

    M, N = total.shape
    return total + pl.run_scoped(multiply, plgpu.ACC((M, N), total.dtype))


def start_product(sums: Any, x: jax.Array, y: Any, copy: Any) -> None:
    """sums += x @ y on the tensor cores, inside a kernel: x [M, K] in registers, y [K, N] in shared memory.

    It is done after `plgpu.wgmma_wait(0)`. The GPU interpreter (up to jax 0.12) knows no factors in registers: for it
    `copy` is a place for x in shared memory, and None otherwise.
    """
    if copy is not None:
        copy[...] = x
        plgpu.commit_smem()
    plgpu.wgmma(sums, x if copy is None else copy, y)


def load_row(ref: Any, layout: Any) -> jax.Array:
    """A whole array in shared memory, into registers in the given layout."""
    load: Any = plgpu.load  # jax 0.10 wants an index
    return load(ref, layout=layout) if jax.__version_info__ >= (0, 11) else load(ref, (), layout=layout)
