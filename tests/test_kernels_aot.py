"""The kernels through the chips' own compilers: legal, fitting, without spills, and with nothing of size T x S around.

`cases` lists every program of a chip; the process that compiles them builds the same list. Shapes are those of one
device, and every program runs under shard_map on a whole machine, so that none may hold a collective.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from aot import CHIPS, TPUS, Case, compile_all, complaints, require_compiler, sharded
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec as P

from kernels_pallas import (
    AttentionBlocks,
    DistanceBias,
    GluBlocks,
    dispatch,
    flash_attention,
    fused_glu,
    fused_glu_mlp,
    masks,
)
from kernels_pallas.attention.problem import AttentionProblem, Buckets
from kernels_pallas.decision import load_table, meets
from kernels_pallas.glu.problem import GluProblem
from kernels_pallas.targets import named

MIB = 2**20
Shape = jax.ShapeDtypeStruct

CAUSAL = AttentionProblem(
    B=1, T=4096, S=4096, N=32, K=8, H=128, Hv=128, dtype=jnp.dtype("bfloat16"), mask=masks.causal, scale=128**-0.5
)
# Other widths are rows of the tuning tables.
ATTENTION = {
    "attention, as many key heads": replace(CAUSAL, K=32),
    "attention, grouped heads": CAUSAL,
    "attention, a window": replace(CAUSAL, mask=masks.causal & masks.local(1023, 0)),
    "attention, packed segments": replace(CAUSAL, segments=True),
    "attention, a union of masks": replace(
        CAUSAL, mask=(masks.causal & masks.chunked(300)) | masks.prefix(70), segments=True, soft_cap=20.0
    ),
    "attention, strided": replace(CAUSAL, mask=masks.local(63, 0) | (masks.causal & masks.strided(64))),
    "attention, summaries of chunks": replace(
        CAUSAL, mask=masks.causal & (masks.chunked(300) | masks.summaries(300, 8)), segments=True
    ),
    "attention, keys wider than values": replace(CAUSAL, K=32, H=192),
    "attention, ends of its own": replace(CAUSAL, mask=masks.causal.opened(), visible_to=True),
    "attention, a window, ends and segments": replace(
        CAUSAL, mask=masks.local(1023, 0).opened(), visible_to=True, segments=True
    ),
    "attention, soft cap and ALiBi": replace(CAUSAL, soft_cap=50.0, alibi=True),
    "attention, learned biases": replace(CAUSAL, buckets=Buckets(n=32)),
}

LLAMA = GluProblem(M=8192, D=4096, F=11008, dtype=jnp.dtype("bfloat16"), act="silu", save="none")
GLU = {
    f"{op}, 11008 columns, save={save}": replace(LLAMA, save=save, down=4096 if op == "fused_glu_mlp" else None)
    for op in ("fused_glu", "fused_glu_mlp")
    for save in ("none", "ag")
}

FAST = ("tpu_v5p", "h200")
ESSENTIAL = {
    "attention, packed segments",
    "fused_glu, 11008 columns, save=none",
    "fused_glu_mlp, 11008 columns, save=none",
}
GROUPS = {
    "essential": lambda name: name in ESSENTIAL,
    "attention": lambda name: name.startswith("attention") and name not in ESSENTIAL,
    "glu": lambda name: name.startswith("fused_glu") and name not in ESSENTIAL,
    "table": lambda name: name.startswith("row"),
}


def when(chip: str, group: str) -> list[pytest.MarkDecorator]:
    """Of a chip of each kind what is essential in the quick tests, one kernel's cases in the slow ones; the rest by
    night."""
    if chip not in FAST or group in ("attention", "table"):
        return [pytest.mark.nightly]
    return [] if group == "essential" else [pytest.mark.slow]


@pytest.mark.parametrize(
    ("chip", "group"), [pytest.param(chip, group, marks=when(chip, group)) for chip in CHIPS for group in GROUPS]
)
def test_compiles(chip: str, group: str) -> None:
    programs = {name: case for name, case in cases(chip).items() if GROUPS[group](name)}
    require_compiler(chip)
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]


@pytest.mark.parametrize("chip", FAST)
def test_planted_faults_are_found(chip: str) -> None:
    require_compiler(chip)
    programs = planted(chip)
    reports = compile_all(chip, __name__, programs)
    found = {name: " ".join(complaints(case, reports[name])) for name, case in programs.items()}
    expected = {
        "planted scores": "holds a tensor [4096, 4096]",
        "planted memory": "allocates",
        "planted collective": "collectives are ['all-reduce'], not []",
        "planted absence": "kernels are []",
        "planted limit": f"double asks for {60 * MIB:,} bytes of VMEM",
        "planted spill": "crowded spills",
        "planted size": {"tpu_v5p": "memory space vmem", "h200": "exceeds available shared memory"}[chip],
    }
    assert {name: line for name, line in found.items() if expected[name] not in line} == {}


def cases(chip: str) -> dict[str, Case]:
    """Every program that is compiled for the chip."""
    backend = "tpu" if chip in TPUS else "gpu"
    found = {"attention, forward only": attention(CAUSAL, chip, backend, backward=False)}
    found |= {
        name: attention(problem, chip, backend)
        for name, problem in ATTENTION.items()
        if backend == "tpu" or problem.buckets is None  # the GPU kernels have no learned biases
    }
    found |= {name: glu(problem, chip, backend) for name, problem in GLU.items()}
    for number, row in enumerate(load_table(chip)["rows"]):
        if row["backend"] == backend:
            found[f"row {number} of the table, {row['op']} {row['match']}"] = of_row(row, chip)
    return found | planted(chip)


def attention(
    p: AttentionProblem,
    chip: str,
    backend: str,
    *,
    backward: bool = True,
    blocks: AttentionBlocks | None = None,
) -> Case:
    """flash_attention and its gradients on each device."""
    heads = P("data", None, "tensor")
    operands = {
        "q": (Shape((p.B, p.T, p.N, p.H), p.dtype), heads),
        "k": (Shape((p.B, p.S, p.K, p.H), p.dtype), heads),
        "v": (Shape((p.B, p.S, p.K, p.Hv), p.dtype), heads),
        "d_out": (Shape((p.B, p.T, p.N, p.Hv), p.dtype), heads),
    }
    large = [shape for shape, _ in operands.values()]
    if p.segments:
        operands["segment_ids"] = (Shape((p.B, p.T), jnp.int32), P("data"))
        operands["kv_segment_ids"] = (Shape((p.B, p.S), jnp.int32), P("data"))
    if p.visible_to:
        operands["visible_to"] = (Shape((p.B, p.T), jnp.int32), P("data"))
    if p.alibi:
        operands["alibi_slopes"] = (Shape((p.N,), jnp.float32), P("tensor"))
    if p.buckets:
        operands["relative_bias"] = (Shape((p.N, p.buckets.n), jnp.float32), P("tensor"))
    if p.sinks:
        operands["sinks"] = (Shape((p.N,), jnp.float32), P("tensor"))

    def run(*values: jax.Array) -> Any:
        given: dict[str, Any] = dict(zip(operands, values, strict=True))
        q, k, v, d_out = (given.pop(name) for name in ("q", "k", "v", "d_out"))
        if p.buckets:
            given["relative_bias"] = DistanceBias(
                given["relative_bias"], p.buckets.max_distance, p.buckets.bidirectional
            )
        given |= {"mask": p.mask, "scale": p.scale, "soft_cap": p.soft_cap, "backend": backend, "blocks": blocks}
        attend = functools.partial(flash_attention, **given)
        if not backward:
            return attend(q, k, v)
        out, pull = jax.vjp(attend, q, k, v)
        return out, *pull(d_out)

    # TPU kernels read and write layouts of their own, [B, heads, positions, width padded to lanes]: at most a copy of
    # every argument and result. GPU kernels work on the arrays as they are.
    lanes = lambda width: -(-width // 128) * 128
    copies = sum(shape.size // shape.shape[-1] * lanes(shape.shape[-1]) for shape in large) * p.dtype.itemsize
    rows = 4 * p.B * p.N * p.T  # float32 numbers per query: the logsumexp and, backward, delta
    shards, specs = zip(*operands.values(), strict=True)
    plan = dispatch.choose("flash_attention", p, named(chip), backend=backend, blocks=blocks)
    return Case(
        sharded(run, *shards, specs=specs, out_specs=heads),
        kernels=("attention_forward", "attention_backward") if backward else ("attention_forward",),
        temporary_bytes=(1 + backward) * (rows + copies * (chip in TPUS)) + MIB,
        square=min(p.T, p.S),
        on_chip_bytes=plan.on_chip_bytes if backward else None,  # the model is of the larger of both passes
    )


def glu(p: GluProblem, chip: str, backend: str, blocks: GluBlocks | None = None) -> Case:
    """fused_glu, or with p.down fused_glu_mlp, and its gradients on each device, without their sums over devices."""
    arguments = [
        (Shape((p.M, p.D), p.dtype), P("data")),
        (Shape((p.D, p.F), p.dtype), P(None, "tensor")),
        (Shape((p.D, p.F), p.dtype), P(None, "tensor")),
    ]
    if p.down is not None:
        arguments.append((Shape((p.F, p.down), p.dtype), P("tensor")))
    if p.biases:
        arguments += 2 * [(Shape((p.F,), p.dtype), P("tensor"))]
    op = fused_glu if p.down is None else fused_glu_mlp
    d_out = Shape((p.M, p.down or p.F), p.dtype)
    out_spec = P("data", "tensor") if p.down is None else P("data")

    def run(d_out: jax.Array, *values: jax.Array) -> Any:
        def apply(*values: jax.Array) -> jax.Array:
            biases = dict(zip(("b_gate", "b_up"), values[-2:], strict=True)) if p.biases else {}
            arrays = values[:-2] if p.biases else values
            return op(*arrays, **biases, act=p.act, save=p.save, backend=backend, blocks=blocks)

        out, pull = jax.vjp(apply, *values)
        return out, *pull(d_out)

    shards, specs = zip(*arguments, strict=True)
    # Arrays of M x F that may exist together: the gradients of both products, the hidden values where they are not the
    # result, and both products where they are kept; and the gradient of x once more.
    # On TPU7x, moreover, the compiler keeps copies of the gradients in another layout.
    hidden = 2 + (p.down is not None) + 2 * (p.save == "ag") + 2 * (chip == "tpu_7x")
    return Case(
        sharded(run, d_out, *shards, specs=(out_spec, *specs), out_specs=(out_spec, *specs)),
        kernels={
            "ag": ("glu_forward",),
            "none": ("glu_forward", "glu_pre_gradients" if p.down is None else "glu_mlp_pre_gradients"),
        }[p.save],
        temporary_bytes=(hidden * p.M * p.F + p.M * p.D) * p.dtype.itemsize + MIB,
        on_chip_bytes=dispatch.choose(op.__name__, p, named(chip), backend=backend, blocks=blocks).on_chip_bytes,
    )


def of_row(row: dict[str, Any], chip: str) -> Case:
    """A row of a tuning table, for a problem that meets its conditions."""
    of_attention = row["op"] == "flash_attention"
    problem: Any = CAUSAL if of_attention else LLAMA
    known_masks = {str(mask): mask for mask in (masks.full, *(known.mask for known in ATTENTION.values()))}
    for key, wanted in row["match"].items():
        bound, field = (key[:4], key[4:]) if key[:4] in ("min_", "max_") else ("", key)
        here = getattr(problem, field)
        value = max(here, wanted) if bound == "min_" else min(here, wanted) if bound == "max_" else wanted
        value = known_masks[value] if field == "mask" else jnp.dtype(value) if field == "dtype" else value
        problem = replace(problem, **{field: value})
    if row["op"] == "fused_glu_mlp":
        problem = replace(problem, down=problem.D)
    assert meets(problem, row["match"])
    body = (dispatch.ATTENTION if of_attention else dispatch.GLU)[row["backend"]]
    blocks = replace(body.default_blocks(problem, named(chip)), **row["blocks"])
    return (attention if of_attention else glu)(problem, chip, row["backend"], blocks=blocks)


def planted(chip: str) -> dict[str, Case]:
    """Programs with the faults that the other cases must not have."""
    rows = Shape((4096, 64), jnp.float32)
    by_row = {"specs": (P("data"),), "out_specs": P("data")}
    sound = {"kernels": (), "temporary_bytes": MIB, "square": 4096}
    found = {
        "planted scores": Case(
            sharded(lambda x: jax.nn.softmax(x @ x.T) @ x, rows, **by_row), **sound | {"temporary_bytes": 2**30}
        ),
        "planted memory": Case(sharded(_wide, rows, **by_row), **sound | {"square": None}),
        "planted collective": Case(sharded(lambda x: lax.psum(x, "data"), rows, **by_row), **sound | {"square": None}),
        "planted absence": Case(sharded(jnp.exp, rows, **by_row), **sound | {"kernels": ("attention_forward",)}),
    }
    if chip in TPUS:
        for name, size, limit in (("planted limit", 512, 60 * MIB), ("planted size", 65536, None)):
            double = functools.partial(_double_on_tpu, limit)
            found[name] = Case(
                sharded(double, Shape((size, 128), jnp.float32), **by_row),
                kernels=("double",),
                temporary_bytes=MIB,
            )
    else:
        for name, size in (("planted spill", 128), ("planted size", 1024)):
            found[name] = Case(
                sharded(_crowded_on_gpu, Shape((size, 128), jnp.float32), **by_row),
                kernels=("crowded",),
                temporary_bytes=MIB,
            )
    return found


def _wide(x: jax.Array) -> jax.Array:
    """Half a GiB between two products."""
    weights = jnp.tile(x[:64], (1, 512))
    return jnp.exp(x @ weights) @ weights.T


def _double_on_tpu(limit: int | None, x: jax.Array) -> jax.Array:
    def kernel(x: Any, out: Any) -> None:
        out[...] = 2 * x[...]

    return pl.pallas_call(
        kernel, out_shape=x, compiler_params=pltpu.CompilerParams(vmem_limit_bytes=limit), name="double"
    )(x)


def _crowded_on_gpu(x: jax.Array) -> jax.Array:
    """Two tiles of 128 x 128 float32 alive in a loop of one warpgroup: twice the registers that a thread has."""

    def kernel(x: Any, out: Any, tile: Any, barriers: Any) -> None:
        plgpu.copy_gmem_to_smem(x, tile, barriers.at[0])
        plgpu.barrier_wait(barriers.at[0])
        a, b = lax.fori_loop(0, 9, lambda _, ab: (jnp.exp(ab[1]) + ab[0], jnp.exp(ab[0]) * ab[1]), (tile[...],) * 2)
        tile[...] = a + b
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(tile, out)
        plgpu.wait_smem_to_gmem(0)

    return plgpu.kernel(
        kernel,
        out_type=Shape(x.shape, x.dtype),
        scratch_types=[plgpu.SMEM(x.shape, x.dtype), plgpu.Barrier(num_barriers=1)],
        compiler_params=plgpu.CompilerParams(lowering_semantics=plgpu.LoweringSemantics.Warpgroup),
        kernel_name="crowded",
    )(x)
