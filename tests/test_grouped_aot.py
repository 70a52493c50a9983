"""Grouped products through the chips' own compilers: legal, fitting, and without what `ragged_dot` becomes there."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from aot import GPUS, TPUS, Case, compile_all, complaints, require_compiler, sharded
from jax.sharding import PartitionSpec as P

from kernels_pallas import dispatch, grouped_matmul
from kernels_pallas.grouped.problem import GroupedProblem
from kernels_pallas.targets import named

MIB = 2**20
Shape = jax.ShapeDtypeStruct

MANY = GroupedProblem(M=16384, D=2048, F=768, E=128, dtype=jnp.dtype("bfloat16"), weight_dtype=jnp.dtype("bfloat16"))
FEW = GroupedProblem(M=16384, D=4096, F=14336, E=8, dtype=jnp.dtype("bfloat16"), weight_dtype=jnp.dtype("bfloat16"))
RAGGED = GroupedProblem(M=1000, D=200, F=1000, E=6, dtype=jnp.dtype("bfloat16"), weight_dtype=jnp.dtype("float32"))
PLAIN = GroupedProblem(M=8192, D=1024, F=512, E=8, dtype=jnp.dtype("float32"), weight_dtype=jnp.dtype("float32"))
# Down projections of Qwen 3 and DeepSeekMoE on 8 devices: the tiles of large groups have most rows.
QWEN = GroupedProblem(M=262_144, D=768, F=2048, E=16, dtype=jnp.dtype("bfloat16"), weight_dtype=jnp.dtype("bfloat16"))
DEEPSEEK = replace(QWEN, M=98_304, D=1408, E=8)
PROBLEMS = {"128 groups": MANY, "8 groups": FEW, "16 large groups": QWEN, "8 large groups": DEEPSEEK, "ragged": RAGGED,
            "float32": PLAIN}  # fmt: skip


# One chip always; further ones by night.
@pytest.mark.parametrize("chip", [pytest.param(c, marks=() if c == "tpu_v5p" else pytest.mark.nightly) for c in TPUS])
def test_kernels_compile(chip: str) -> None:
    require_compiler(chip)
    programs = {name: case for name, case in cases(chip).items() if name in PROBLEMS}
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]


@pytest.mark.parametrize(
    "chip", [pytest.param(c, marks=() if c == "h200" else pytest.mark.nightly) for c in (*TPUS, *GPUS)]
)
def test_why_the_tables_do_not_take_ragged_dot(chip: str) -> None:
    """On GPUs it copies the masked rows for each group; on TPUs our masks, for rows of no group, are copies."""
    require_compiler(chip)
    names = ["ragged_dot", "auto"]
    reports = compile_all(chip, __name__, names)
    assert [reports[name].error for name in names] == [None, None]
    ragged, auto = (reports[name].temporary_bytes for name in names)
    assert ragged >= (64 * MIB if chip in TPUS else MANY.E * MANY.M * MANY.D * 2)
    assert auto <= (MIB if chip in TPUS else 64 * MIB)


def cases(chip: str) -> dict[str, Case]:
    """Every program that is compiled for the chip."""
    found = {"ragged_dot": case(MANY, chip, "xla"), "auto": case(MANY, chip, "auto")}
    return found | {name: case(problem, chip, "tpu") for name, problem in PROBLEMS.items() if chip in TPUS}


def case(p: GroupedProblem, chip: str, backend: str) -> Case:
    """grouped_matmul and its gradients, with rows of its own on each device and the same matrices."""

    def run(x: jax.Array, w: jax.Array, sizes: jax.Array, dy: jax.Array) -> Any:
        out, pull = jax.vjp(lambda x, w: grouped_matmul(x, w, sizes, backend=backend), x, w)
        dx, dw = pull(dy)
        return out, dx, dw

    x, w, dy = Shape((p.M, p.D), p.dtype), Shape((p.E, p.D, p.F), p.weight_dtype), Shape((p.M, p.F), p.dtype)
    rows = P("data")
    copied = sum(p.M * -(-columns // 128) * 128 * p.dtype.itemsize for columns in (p.D, p.F) if columns % 128)
    return Case(
        sharded(
            run,
            *(x, w, Shape((p.E,), jnp.int32), dy),
            specs=(rows, P(), rows, rows),
            out_specs=(rows, rows, rows),
        ),
        kernels=("grouped_forward", "grouped_row_gradient", "grouped_weight_gradient"),
        # The lists of visits; copies of rows whose columns do not fill lanes; weights of another dtype as the products
        # take them.
        temporary_bytes=MIB + copied + (w.size * p.dtype.itemsize if p.weight_dtype != p.dtype else 0),
        on_chip_bytes=dispatch.choose("grouped_matmul", p, named(chip), backend=backend).on_chip_bytes,
    )
