"""The Hopper kernels of gated linear units: their numbers in the GPU interpreter; what compilers say is elsewhere."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import oracle
from kernels_pallas.glu import gpu
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.targets import Family, Target

H200 = Target("h200", Family.GPU, hopper=True)
CEILINGS = {"bfloat16": (1e-2, 1e-2), "float16": (2e-3, 4e-3)}  # of values and of gradients, by the largest
KERNELS = ("forward", "pre_gradients", "mlp_pre_gradients")

INTERPRETER: Any = getattr(plgpu, "InterpretGPUParams", None)
interpreted = pytest.mark.skipif(
    INTERPRETER is None, reason="jax 0.10 has no GPU interpreter to run the kernels in; jax 0.11 has"
)


class Arguments(NamedTuple):
    x: jax.Array
    w_gate: jax.Array
    w_up: jax.Array
    w_down: jax.Array
    dh: jax.Array
    dy: jax.Array


def arguments(p: GluProblem) -> Arguments:
    """Random, such that every sum is of size one."""
    rng = np.random.default_rng(0)
    draw = lambda *shape, scale=1.0: jnp.asarray(rng.normal(size=shape) * scale, p.dtype)
    width = p.D**-0.5
    w_gate, w_up, w_down = draw(p.D, p.F, scale=width), draw(p.D, p.F, scale=width), draw(p.F, p.D, scale=width)
    return Arguments(draw(p.M, p.D), w_gate, w_up, w_down, draw(p.M, p.F), draw(p.M, p.D))


def problem(M: int, D: int, F: int, **changes: Any) -> GluProblem:
    dtype = jnp.dtype(changes.pop("dtype", "bfloat16"))
    return GluProblem(**{"M": M, "D": D, "F": F, "dtype": dtype, "act": "silu", "save": "none"} | changes)


def run(kernel: str, p: GluProblem, v: Arguments, blocks: GluBlocks, interpret: Any = True) -> tuple[jax.Array, ...]:
    if kernel == "forward":
        return gpu.forward(p, blocks, v.x, v.w_gate, v.w_up, None, None, interpret=interpret)
    if kernel == "pre_gradients":
        return gpu.pre_gradients(p, blocks, v.x, v.w_gate, v.w_up, None, None, v.dh, interpret=interpret)
    return gpu.mlp_pre_gradients(p, blocks, v.x, v.w_gate, v.w_up, v.w_down, None, None, v.dy, interpret=interpret)


def assert_right(kernel: str, p: GluProblem, found: tuple[jax.Array, ...], v: Arguments) -> None:
    """Compares with float64."""
    x, w_gate, w_up, w_down, dh, dy = (np.asarray(array, np.float64) for array in v)
    r = oracle.glu(x, w_gate, w_up, dy @ w_down.T if kernel == "mlp_pre_gradients" else dh, act=p.act)
    names = {"pre_gradients": ("da", "dg"), "mlp_pre_gradients": ("da", "dg", "h")}.get(
        kernel, ("h", "a", "g") if p.save == "ag" else ("h",)
    )
    value, gradient = CEILINGS[p.dtype.name]
    for name, array in zip(names, found, strict=True):
        wanted = getattr(r, name)
        assert array.dtype == p.dtype and array.shape == wanted.shape
        error = np.abs(np.asarray(array, np.float64) - wanted).max() / np.abs(wanted).max()
        assert error <= (gradient if name in ("da", "dg") else value), (name, error)


def blocks_for(kernel: str, p: GluProblem) -> GluBlocks:
    return gpu.default_blocks(replace(p, down=p.D) if kernel == "mlp_pre_gradients" else p, H200)


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize(
    "p",
    [
        problem(256, 256, 256, act="gelu", dtype="float16", save="ag"),  # whole tiles, as many steps as stages
        problem(130, 320, 192),  # the last tile of each axis is ragged, and more steps than stages
        problem(5, 64, 64, act="relu", save="ag"),  # less than a tile
    ],
    ids=lambda p: f"{p.M}x{p.D}x{p.F}",
)
def test_numbers(kernel: str, p: GluProblem) -> None:
    values = arguments(p)
    assert_right(kernel, p, run(kernel, p, values, blocks_for(kernel, p)), values)


@interpreted
@pytest.mark.parametrize("kernel", KERNELS)
def test_a_block_takes_several_tiles_without_races(kernel: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The buffer of results is free again when the next tile's are written, and that of dh when it is fetched."""
    monkeypatch.setattr(gpu, "_SMS", 2)
    p = problem(200, 192, 320, save="ag")
    values = arguments(p)
    found = run(kernel, p, values, blocks_for(kernel, p), INTERPRETER(detect_races=True))
    assert_right(kernel, p, found, values)


@interpreted
@pytest.mark.parametrize("f, d, stages", [(64, 64, 3), (32, 32, 2), (128, 64, 2)])
def test_other_blocks(f: int, d: int, stages: int) -> None:
    p = problem(130, 192, 192)
    values = arguments(p)
    blocks = replace(gpu.default_blocks(p, H200), f_backward=f, d_backward=d, stages_backward=stages)
    assert_right("mlp_pre_gradients", p, run("mlp_pre_gradients", p, values, blocks), values)


@pytest.mark.parametrize(
    "changes, why",
    [
        ({"dtype": jnp.dtype("float32")}, "dtype float32 has no GPU kernel, bfloat16 and float16 have"),
        ({"biases": True}, "b_gate and b_up are given"),
        ({"D": 4100}, "D = 4100 must be a multiple of 64; 4160 works"),
        ({"F": 11010}, "F = 11010 must be a multiple of 64; 11072 works"),
        ({"down": 2048}, "Dout = 2048 and x has D = 4096"),
        ({"M": 0}, "an empty array has no tiles"),
    ],
)
def test_what_is_unsupported(changes: dict[str, Any], why: str) -> None:
    p = problem(8192, 4096, 11008)
    assert gpu.unsupported(p, H200) is None
    assert why in (gpu.unsupported(replace(p, **changes), H200) or "")


def test_only_hopper_is_supported() -> None:
    p = problem(8192, 4096, 11008)
    for target in (Target("cpu", Family.CPU), Target("tpu_v5p", Family.TPU), Target("a100", Family.GPU)):
        assert target.name in (gpu.unsupported(p, target) or "")


@pytest.mark.parametrize("mlp", [False, True], ids=["glu", "mlp"])
@pytest.mark.parametrize("D, F", [(4096, 11008), (4096, 14336), (8192, 28672), (2048, 5632)])
def test_default_blocks_fit(D: int, F: int, mlp: bool) -> None:
    p = problem(8192, D, F, down=D if mlp else None)
    assert gpu.unsupported(p, H200) is None
    assert gpu.on_chip_bytes(p, gpu.default_blocks(p, H200)) <= 232448


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"m": 64}, "m = 64 must be a multiple of 128; 128 works"),
        ({"f": 100}, "f = 100 must be a multiple of 32; 128 works"),
        ({"d": 0}, "d = 0 must be a multiple of 32; 32 works"),
        ({"f": 512}, "f = 512 must be at most 256"),
        ({"stages": 6}, "of the 232448 there are; stages = 4 works"),
    ],
)
def test_errors_of_blocks_name_what_works(changes: dict[str, int], message: str) -> None:
    p = problem(128, 128, 128)
    with pytest.raises(ValueError, match=message):
        run("forward", p, arguments(p), replace(gpu.default_blocks(p, H200), **changes))
