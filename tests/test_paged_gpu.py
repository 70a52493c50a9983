"""The paged kernel for Hopper, in the GPU interpreter, against the float64 oracle."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu
from paged_cases import BRANCHES, KINDS, Shape, Shaping, check, chosen, tree_rows

from kernels_pallas import CacheScales, DistanceBias, PagedBlocks, Scores, explain, paged_attention

interpreted = pytest.mark.skipif(
    not hasattr(plgpu, "InterpretGPUParams"), reason="jax 0.10 has no interpreter of Mosaic GPU kernels"
)

SHAPE = Shape(H=64, Hv=64, C=16, M=12, dtype="bfloat16")
BYTES = Shape(H=64, Hv=64, C=64, M=3, dtype="bfloat16")
LENGTHS = (150, 4, 1, 80)
ROWS = ((0, 149), (3, 70), (2, 0), (1, -1), (0, 63), (0, 64))
ALL = Shaping(words=("local", 90, 0), scale=0.3, soft_cap=2.0, alibi=True, sinks=True)


@interpreted
@pytest.mark.parametrize(
    ("shape", "shaping", "stages"),
    [
        pytest.param(SHAPE, ALL, 2, id="all"),
        pytest.param(SHAPE, KINDS["causal"], 4, id="causal", marks=pytest.mark.slow),
        pytest.param(SHAPE, KINDS["window"], 2, id="window", marks=pytest.mark.slow),
        pytest.param(SHAPE, KINDS["summaries alone"], 2, id="summaries alone", marks=pytest.mark.slow),
        pytest.param(SHAPE, KINDS["fixed"], 3, id="fixed", marks=pytest.mark.slow),
        pytest.param(replace(SHAPE, H=80, Hv=48, N=3, K=1), ALL, 1, id="80/48, one slot", marks=pytest.mark.slow),
        pytest.param(
            replace(SHAPE, C=64, M=3, dtype="float16", K=4), ALL, 2, id="a block a tile", marks=pytest.mark.slow
        ),
        pytest.param(replace(SHAPE, C=8, M=20, H=128, Hv=128), ALL, 2, id="small blocks", marks=pytest.mark.slow),
    ],
)
def test_equals_the_formula(shape: Shape, shaping: Shaping, stages: int) -> None:
    blocks = PagedBlocks(keys=64, stages=stages)
    check(shape, shaping, LENGTHS, ROWS, backend="gpu", interpret=True, blocks=blocks)


@interpreted
@pytest.mark.parametrize(
    ("shape", "shaping", "stages"),
    [
        pytest.param(BYTES, ALL, 2, id="all"),
        pytest.param(replace(BYTES, H=80, Hv=48), KINDS["causal"], 1, id="80/48", marks=pytest.mark.slow),
        pytest.param(replace(BYTES, dtype="float16"), KINDS["fixed"], 3, id="fixed", marks=pytest.mark.slow),
    ],
)
def test_reads_int8(shape: Shape, shaping: Shaping, stages: int) -> None:
    blocks = PagedBlocks(keys=64, stages=stages)
    check(shape, shaping, LENGTHS, ROWS, int8=True, backend="gpu", interpret=True, blocks=blocks)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("words", [("local", 90, 0), "causal"], ids=["window", "causal"])
def test_rows_of_a_tree_see_their_own_paths(words: Any) -> None:
    """Of one that lies in two tiles, of one that a text begins with; and the last of 32 nodes."""
    shaping, blocks = Shaping(words=words, scale=0.3, soft_cap=2.0, sinks=True), PagedBlocks(keys=64, stages=2)
    trees = tree_rows((0, 124, BRANCHES), (3, 71, BRANCHES), (2, 0, (-1,)), (0, 100, (-1, *[0] * 30, 0)))
    rows, tree = chosen(*trees, [0, 3, -1, 8, 17, 18, 50, 6])
    check(SHAPE, shaping, LENGTHS, rows, tree=tree, backend="gpu", interpret=True, blocks=blocks)


@interpreted
@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, True])
@pytest.mark.parametrize("stages", [1, 2])
def test_no_races(stages: int, int8: bool) -> None:
    """And no look at entries of tables that a row has no use for: they lead out of the cache."""
    interpret = plgpu.InterpretGPUParams(detect_races=True)  # type: ignore[attr-defined, unused-ignore]
    blocks = PagedBlocks(keys=64, stages=stages)
    shape = BYTES if int8 else SHAPE
    check(shape, ALL, LENGTHS, ROWS, int8=int8, unseen=10**6, backend="gpu", interpret=interpret, blocks=blocks)


def arguments(
    H: int = 64, N: int = 4, C: int = 16, dtype: Any = jnp.bfloat16, int8: bool = False, **scores: Any
) -> dict[str, Any]:
    cache = jax.ShapeDtypeStruct((2, 9, 2, C, H), jnp.int8 if int8 else dtype)
    scale = jax.ShapeDtypeStruct(cache.shape[:4], jnp.bfloat16)
    rows = jax.ShapeDtypeStruct((3,), jnp.int32)
    return {
        "q": jax.ShapeDtypeStruct((3, N, H), dtype),
        "k": cache,
        "v": cache,
        "layer": jax.ShapeDtypeStruct((), jnp.int32),
        "tables": jax.ShapeDtypeStruct((5, 4), jnp.int32),
        "slots": rows,
        "positions": rows,
        "scores": Scores(**scores),
        "scales": CacheScales(scale, scale) if int8 else None,
    }


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({}, "our kernel was not measured"),
        ({"dtype": jnp.float32}, "float32: the tensor cores take"),
        ({"H": 72}, "H 72: it takes multiples of 16"),
        ({"H": 272}, "H 272: it takes multiples of 16 up to 256"),
        ({"C": 16, "int8": True}, "int8 in blocks of 16 positions"),
        ({"C": 64, "H": 208, "int8": True}, "H 208: it takes multiples of 16 up to 192"),
        ({"C": 64, "int8": True}, "our kernel was not measured"),
        ({"C": 24}, "blocks of 24 positions do not make a tile"),
        ({"N": 130}, "65 query heads share a key head"),
        ({"relative_bias": DistanceBias(jnp.zeros((4, 8)))}, "relative_bias"),
    ],
)
def test_says_why_it_does_not_run(changes: dict[str, Any], reason: str) -> None:
    plan = explain(paged_attention, **arguments(**changes), target="h200")
    assert plan.backend == "xla" and reason in plan.refused["gpu"] + plan.because
    assert "a100" in explain(paged_attention, **arguments(), target="a100").refused["gpu"]


def test_refuses_other_tiles() -> None:
    assert explain(paged_attention, **arguments(), target="h200", backend="gpu").blocks == PagedBlocks(
        keys=64, stages=4
    )
    with pytest.raises(ValueError, match=r"blocks\.keys = 128 must be 64"):
        jax.eval_shape(
            lambda arrays: paged_attention(**arrays, backend="gpu", blocks=PagedBlocks(keys=128), interpret=True),
            arguments(),
        )
