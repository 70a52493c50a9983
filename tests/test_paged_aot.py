"""Paged attention through the chips' own compilers: legal, fitting, and without a copy of any layer of the cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from aot import CHIPS, TPUS, Case, compile_all, complaints, require_compiler, sharded
from jax.sharding import PartitionSpec as P

from kernels_pallas import CacheScales, DistanceBias, Scores, TokenTree, dispatch, masks, paged_attention
from kernels_pallas.attention.problem import Buckets
from kernels_pallas.paged.problem import PagedProblem
from kernels_pallas.targets import named

MIB = 2**20
Shape = jax.ShapeDtypeStruct

# Of one device. Llama 3 8B on two; with tables for as many texts of 32k tokens as the scalar memory takes.
LLAMA = PagedProblem(
    T=64, N=16, K=4, H=128, Hv=128, L=32, P=4096, C=16, S=63, M=2048, dtype=jnp.dtype("bfloat16"), mask=masks.causal,
    scale=128**-0.5,
)  # fmt: skip
SHAPING: dict[str, Any] = {"mask": masks.local(1023, 0), "soft_cap": 50.0, "alibi": True, "sinks": True}
PROBLEMS = {
    "llama": LLAMA,
    "float32": replace(LLAMA, N=9, K=3, L=8, C=8, dtype=jnp.dtype("float32")),
    "a head for each query head": replace(LLAMA, N=32, K=32, L=4, M=256),
    "latents": replace(LLAMA, N=16, K=1, H=640, Hv=640, one_cache=True),
    "window, cap": replace(LLAMA, K=2, H=256, Hv=256, mask=masks.local(1023, 0), soft_cap=50.0),
    "stripes, ALiBi": replace(
        LLAMA, mask=masks.local(127, 0) | (masks.causal & masks.strided(128)), alibi=True, M=128, C=32
    ),
    "learned biases, sinks": replace(LLAMA, buckets=Buckets(n=32), sinks=True),
    "trees, window": replace(LLAMA, M=1024, mask=masks.local(1023, 0), tree=True),
    "int8": replace(LLAMA, P=512, C=128, M=256, scaled=True),
    "int8, a head for each query head": replace(LLAMA, N=32, K=32, L=4, P=512, C=128, M=256, scaled=True),
    "int8, everything": replace(LLAMA, K=2, P=256, C=256, M=128, H=256, Hv=256, scaled=True, **SHAPING),
}


GPU_PROBLEMS = {
    "llama": LLAMA,
    "heads of 64": replace(LLAMA, N=9, K=3, H=64, Hv=64, L=30),
    "float16, blocks of 64": replace(LLAMA, C=64, M=128, dtype=jnp.dtype("float16")),
    "window, cap": PROBLEMS["window, cap"],
    "stripes, ALiBi": PROBLEMS["stripes, ALiBi"],
    "trees, window": PROBLEMS["trees, window"],
    "everything": replace(
        LLAMA, mask=masks.local(127, 0) | (masks.causal & masks.strided(128)), soft_cap=50.0, alibi=True, sinks=True
    ),
    "int8": replace(LLAMA, P=1024, C=64, M=512, scaled=True),
    "int8, float16, everything": replace(
        LLAMA, P=1024, C=64, M=512, H=192, Hv=192, dtype=jnp.dtype("float16"), scaled=True, **SHAPING
    ),
}
QUICK = ("learned biases, sinks", "everything", "trees, window", "int8")


@pytest.mark.parametrize(
    ("chip", "names"),
    [
        pytest.param("tpu_v5p", QUICK),
        pytest.param("h200", QUICK, marks=pytest.mark.slow),
        *(pytest.param(chip, {**PROBLEMS, **GPU_PROBLEMS}, marks=pytest.mark.nightly) for chip in CHIPS),
    ],
    ids=lambda value: value if isinstance(value, str) else "quick" if value is QUICK else "all",
)
def test_kernels_compile(chip: str, names: tuple[str, ...]) -> None:
    require_compiler(chip)
    programs = {name: case for name, case in cases(chip).items() if name in names}
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]


def cases(chip: str) -> dict[str, Case]:
    """Every program that is compiled for the chip."""
    problems = PROBLEMS if chip in TPUS else GPU_PROBLEMS
    return {name: case(problem, chip) for name, problem in problems.items()}


def case(p: PagedProblem, chip: str) -> Case:
    """All layers in a scan; texts and their blocks cut over one axis of the mesh, heads over the other."""
    backend = "tpu" if chip in TPUS else "gpu"
    per_head = {
        name: Shape(shape, jnp.float32)
        for name, shape, wanted in (
            ("alibi_slopes", (p.N,), p.alibi),
            ("sinks", (p.N,), p.sinks),
            ("table", (p.N, p.buckets.n if p.buckets else 0), p.buckets is not None),
        )
        if wanted
    }

    def run(q: jax.Array, k: jax.Array, v: jax.Array, tables: Any, slots: Any, positions: Any, *others: Any) -> Any:
        scales, heads = (CacheScales(*others[:2]), others[2:]) if p.scaled else (None, others)
        tree = TokenTree(positions, positions, slots) if p.tree else None
        arrays = dict(zip(per_head, heads, strict=True))
        bias = DistanceBias(arrays.pop("table")) if "table" in arrays else None
        scores = Scores(mask=p.mask, scale=p.scale, soft_cap=p.soft_cap, relative_bias=bias, **arrays)
        v = k if p.one_cache else v

        def layer(x: jax.Array, layer: jax.Array) -> tuple[jax.Array, None]:
            rows = layer, tables, slots, positions
            return paged_attention(x, k, v, *rows, scores, tree=tree, scales=scales, backend=backend), None

        return jax.lax.scan(layer, q, jnp.arange(p.L))[0]

    cache = lambda width: Shape((p.L, p.P, p.K, p.C, width), jnp.int8 if p.scaled else p.dtype)
    scales = [Shape((p.L, p.P, p.K, p.C), jnp.bfloat16)] * (2 if p.scaled else 0)
    texts = Shape((p.S, p.M), jnp.int32), Shape((p.T,), jnp.int32), Shape((p.T,), jnp.int32)
    rows, blocks, heads = P("data", "tensor"), P(None, "data", "tensor"), P("tensor")
    return Case(
        sharded(
            run,
            *(Shape((p.T, p.N, p.H), p.dtype), cache(p.H), cache(1 if p.one_cache else p.Hv), *texts),
            *scales,
            *per_head.values(),
            specs=(
                *(rows, blocks, blocks, P("data"), P("data"), P("data")),
                *[blocks] * len(scales),
                *[heads] * len(per_head),
            ),
            out_specs=rows,
        ),
        kernels=("paged_attention",),
        # The queries and results with their rows filled up to whole tiles; not a layer of the cache.
        temporary_bytes=2 * MIB + 8 * p.T * p.K * (16 if chip in TPUS else 64) * 128 * -(-p.H // 128),
        on_chip_bytes=dispatch.choose("paged_attention", p, named(chip), backend=backend).on_chip_bytes,
    )
