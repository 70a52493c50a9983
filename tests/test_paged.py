"""Paged attention: every shape of scores against the float64 formula, and what a row's result must not depend on."""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.experimental.pallas import tpu as pltpu
from paged_cases import KINDS, LENGTHS, ROWS, TREE_KINDS, TREES, Rows, Shape, Shaping, attend, check, texts

from kernels_pallas import (
    CacheScales,
    DistanceBias,
    PagedBlocks,
    Scores,
    TokenTree,
    explain,
    masks,
    oracle,
    paged_attention,
)

TILE = 12  # positions; three blocks
ABREAST = PagedBlocks(keys=TILE)
ALONE = PagedBlocks(keys=TILE, rows=1)


@pytest.mark.parametrize("kind", KINDS)
def test_equals_the_formula(kind: str) -> None:
    check(Shape(), KINDS[kind], LENGTHS, ROWS, blocks=ALONE)


@pytest.mark.parametrize(("kind", "rows"), [("all", 3), ("all", 9), ("strided", 9)])
def test_rows_abreast_equal_the_formula(kind: str, rows: int) -> None:
    """As on other chips: all rows in one loop, or some at a time."""
    check(Shape(), KINDS[kind], LENGTHS, ROWS, blocks=PagedBlocks(keys=TILE, rows=rows))


QUICK = ("all", "fixed")
WIDE = Shape(H=128, Hv=128, C=8, M=5)


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in KINDS]
)
def test_the_kernel_equals_the_formula(kind: str) -> None:
    check(WIDE, KINDS[kind], LENGTHS, ROWS, backend="tpu", interpret=True, blocks=PagedBlocks(keys=16))


@pytest.mark.parametrize(("kind", "blocks"), [*((kind, ALONE) for kind in TREE_KINDS), ("all", ABREAST)])
def test_a_row_of_a_tree_sees_its_own_path(kind: str, blocks: PagedBlocks) -> None:
    """As if the text had been that path, which the oracle lays out."""
    check(Shape(), TREE_KINDS[kind], LENGTHS, TREES[0], tree=TREES[1], blocks=blocks)


@pytest.mark.parametrize(
    "kind", ["all", *(pytest.param(kind, marks=pytest.mark.slow) for kind in ("causal", "strided"))]
)
def test_the_kernel_sees_trees(kind: str) -> None:
    options: dict[str, Any] = {"backend": "tpu", "interpret": True, "blocks": PagedBlocks(keys=16)}
    check(WIDE, TREE_KINDS[kind], LENGTHS, TREES[0], tree=TREES[1], **options)


@pytest.mark.parametrize("blocks", [ALONE, ABREAST], ids=str)
@pytest.mark.parametrize("one_cache", [False, True], ids=["keys and values", "latents"])
def test_int8_is_what_its_scales_say(blocks: PagedBlocks, one_cache: bool) -> None:
    """Against the formula with the numbers that they stand for; what is not written has no scale."""
    shape = Shape(K=1 if one_cache else 2)
    check(shape, KINDS["all"], LENGTHS, ROWS, int8=True, one_cache=one_cache, backend="xla", blocks=blocks)


BYTES = Shape(H=128, Hv=128, C=128, M=3)
LONG = ((300, 4, 1, 130), ((0, 299), (3, 128), (2, 0), (1, -1), (0, 127), (0, 128)))
"""Lengths and rows of texts in several blocks of int8."""


@pytest.mark.parametrize(
    ("shape", "shaping"),
    [
        (BYTES, KINDS["all"]),
        pytest.param(replace(BYTES, N=8, K=8, dtype="bfloat16"), KINDS["causal"], marks=pytest.mark.slow),
        pytest.param(replace(BYTES, Hv=256), replace(KINDS["all"], words=("local", 140, 0)), marks=pytest.mark.slow),
    ],
    ids=["all", "bfloat16", "long window"],
)
def test_the_kernel_reads_int8(shape: Shape, shaping: Shaping) -> None:
    check(shape, shaping, *LONG, int8=True, backend="tpu", interpret=True, blocks=PagedBlocks(keys=256))


@pytest.mark.slow
def test_the_kernel_reads_int8_of_trees_and_of_one_cache() -> None:
    options: dict[str, Any] = {"int8": True, "backend": "tpu", "interpret": True, "blocks": PagedBlocks(keys=128)}
    check(BYTES, TREE_KINDS["all"], LENGTHS, TREES[0], tree=TREES[1], **options)
    check(BYTES, KINDS["all"], *LONG, one_cache=True, **options)


def test_rows_of_no_tree_are_as_ever() -> None:
    """To the bit, where others of the call are of one."""
    k, v, tables = texts(Shape(), LENGTHS, seed=1)
    slots, positions = (np.array(x, np.int32) for x in zip(*ROWS, strict=True))
    q = np.random.default_rng(2).normal(size=(len(ROWS), Shape.N, Shape.H)).astype(np.float32)
    run = functools.partial(
        attend, q, k, v, jnp.int32(0), Rows(tables, slots, positions), shaping=TREE_KINDS["all"], blocks=ALONE
    )
    alone = TokenTree(positions, positions, np.where(positions < 0, 0, 1).astype(np.int32))
    np.testing.assert_array_equal(run(), run(tree=alone))


@pytest.mark.slow
@pytest.mark.parametrize(
    "shape",
    [
        Shape(N=3, K=1, H=256, Hv=128, C=16, M=3, dtype="bfloat16"),
        Shape(N=12, K=1, H=128, Hv=256, C=8, M=5),
        Shape(N=3, K=3, H=128, Hv=128, C=32, M=2, L=1, dtype="bfloat16"),
    ],
    ids=str,
)
def test_shapes_of_the_kernel(shape: Shape) -> None:
    check(shape, KINDS["all"], LENGTHS, ROWS, backend="tpu", interpret=True)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["all", "causal", "trees", "int8"])
def test_the_kernel_has_no_races(kind: str, capfd: pytest.CaptureFixture[str]) -> None:
    """In the simulator of a TPU with two cores, whose memory starts as NaN and whose copies arrive late; which refuses
    to read beyond an array, where the tables lead from whatever the rows need not look at."""
    interpret = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, random_seed=0, dma_execution_mode="on_wait"
    )
    try:
        options = {"backend": "tpu", "interpret": interpret, "blocks": PagedBlocks(keys=16)}
        if kind == "trees":
            check(WIDE, TREE_KINDS["all"], LENGTHS, TREES[0], tree=TREES[1], **options)
        elif kind == "int8":
            check(BYTES, KINDS["all"], *LONG, unseen=10**6, int8=True, **options)
        else:
            check(WIDE, KINDS[kind], LENGTHS, ROWS, unseen=10**6, **options)
    finally:
        pltpu.reset_tpu_interpret_mode_state()
    assert "RACE DETECTED" not in capfd.readouterr().out  # later versions of jax raise


@pytest.mark.parametrize("rows", [((1, -1), (1, -1)), ((1, -1), (3, 22), (1, -1), (2, 0))], ids=["none", "between"])
def test_the_kernel_with_rows_that_are_none(rows: tuple[tuple[int, int], ...]) -> None:
    """At the ends and alone, where a row starts no copies and none are started for it."""
    check(WIDE, KINDS["sinks"], LENGTHS, rows, backend="tpu", interpret=True, blocks=PagedBlocks(keys=16))


def test_one_cache_is_read_once_and_means_the_same() -> None:
    """Keys and values that are one array, as of latent attention."""
    k, _, tables = texts(WIDE, LENGTHS, seed=0)
    slots, positions = (np.array(x, np.int32) for x in zip(*ROWS, strict=True))
    q = np.random.default_rng(1).normal(size=(len(ROWS), 4, 128)).astype(np.float32)

    def run(backend: str, **options: Any) -> Any:
        attend = lambda q, k, *rest: paged_attention(q, k, k, *rest, Scores(), backend=backend, **options)
        return jax.jit(attend)(q, k, jnp.int32(1), tables, slots, positions)

    want = oracle.paged_attention(q, k, k, 1, tables, slots, positions)
    for got in (run("xla"), run("tpu", interpret=True)):
        np.testing.assert_allclose(got, want, rtol=0, atol=5e-6 * np.abs(want).max())


@pytest.mark.parametrize(
    "shape",
    [
        Shape(dtype="bfloat16"),
        Shape(N=6, K=1, H=5, Hv=3),
        Shape(N=3, K=3, Hv=16, C=16, M=3),
        Shape(C=1, M=40, L=1),
        Shape(dtype="float16"),
    ],
    ids=str,
)
@pytest.mark.parametrize("blocks", [None, ABREAST], ids=["default", "abreast"])
def test_shapes_and_dtypes(shape: Shape, blocks: PagedBlocks | None) -> None:
    check(shape, KINDS["all"], LENGTHS, ROWS, blocks=blocks)


@functools.cache
def _alone(kind: str, slot: int, position: int) -> np.ndarray:
    """[N, Hv] of one query in the company of one row without a token, in a narrow table."""
    shape = Shape(M=-(-max(LENGTHS) // Shape.C))
    k, v, tables = texts(shape, LENGTHS, seed=3)
    rows = Rows(tables, np.array([slot, 0], np.int32), np.array([position, -1], np.int32))
    q = np.stack([_query(slot, position)] * 2)
    return np.asarray(attend(q, k, v, jnp.int32(1), rows, shaping=KINDS[kind], blocks=ALONE))[0]


def _query(slot: int, position: int) -> np.ndarray:
    return np.random.default_rng([slot, position + 1]).normal(size=(Shape.N, Shape.H)).astype(np.float32)


@st.composite
def _companies(draw: Any) -> tuple[list[tuple[int, int]], int]:
    """2, 8 or 32 rows of any texts, and a shuffle of the blocks."""
    token = st.integers(0, len(LENGTHS) - 1).flatmap(
        lambda slot: st.tuples(st.just(slot), st.integers(-1, LENGTHS[slot] - 1))
    )
    T = draw(st.sampled_from((2, 8, 32)))
    return draw(st.lists(token, min_size=T, max_size=T)), draw(st.integers(0, 2**16))


@settings(max_examples=25, deadline=None)
@given(company=_companies(), kind=st.sampled_from(("causal", "all")))
def test_a_row_depends_on_nothing_else(company: tuple[list[tuple[int, int]], int], kind: str) -> None:
    """To the bit, whatever the number of rows, their company, the places of the blocks and the tables' width."""
    rows, seed = company
    k, v, tables = texts(Shape(M=24), LENGTHS, seed)
    q = np.stack([_query(*row) for row in rows])
    order = np.random.default_rng(seed).permutation(len(LENGTHS))  # slot numbers are shuffled too
    slots = np.argsort(order)[[slot for slot, _ in rows]].astype(np.int32)
    positions = np.array([position for _, position in rows], np.int32)
    got = attend(q, k, v, jnp.int32(1), Rows(tables[order], slots, positions), shaping=KINDS[kind], blocks=ALONE)
    for row, (slot, position) in enumerate(rows):
        np.testing.assert_array_equal(got[row], _alone(kind, slot, position), strict=True)


def test_other_rows_only_add_steps() -> None:
    """Rows abreast wait for the longest: the tiles that a shorter one does not have leave it as it is."""
    shape, lengths = Shape(M=60), (5, 5, 5, 230)
    k, v, tables = texts(shape, lengths, seed=0)
    q = np.stack([_query(0, 4)] * 4)
    run = functools.partial(attend, q, k, v, jnp.int32(0), shaping=KINDS["all"], blocks=ABREAST)
    short = run(Rows(tables, np.array([0, 1, 2, 3], np.int32), np.array([4, 4, 4, 1], np.int32)))
    long = run(Rows(tables, np.array([0, 1, 2, 3], np.int32), np.array([4, 4, 4, 229], np.int32)))
    np.testing.assert_array_equal(short[:3], long[:3])


@pytest.mark.parametrize("rows", [1, 4], ids=["alone", "abreast"])
def test_a_step_reads_the_cache_where_it_lies(rows: int) -> None:
    """Attention of every layer in a scan that also carries the cache: temporaries are tiles, never a layer."""
    T, N, K, H, C, M, L = 4, 6, 2, 32, 16, 64, 3
    shapes = {
        "q": jax.ShapeDtypeStruct((T, N, H), jnp.float32),
        "k": jax.ShapeDtypeStruct((L, T * M, K, C, H), jnp.float32),
        "tables": jax.ShapeDtypeStruct((T, M), jnp.int32),
        "rows": jax.ShapeDtypeStruct((T,), jnp.int32),
    }

    def run(q: Any, k: Any, v: Any, tables: Any, slots: Any, positions: Any) -> Any:
        def layer(carry: Any, layer: Any) -> Any:
            x, k, v = carry
            block = tables[slots, positions // C]
            k, v = (c.at[layer, block, :, positions % C].set(x[:, :K]) for c in (k, v))
            blocks = PagedBlocks(keys=64, rows=rows)
            return (paged_attention(x, k, v, layer, tables, slots, positions, Scores(), blocks=blocks), k, v), None

        return jax.lax.scan(layer, (q, k, v), jnp.arange(L))[0]

    arguments = shapes["q"], shapes["k"], shapes["k"], shapes["tables"], shapes["rows"], shapes["rows"]
    program = jax.jit(run, donate_argnums=(1, 2)).lower(*arguments).compile()
    tiles = 2 * T * 64 * K * H * 4
    layer = T * M * K * C * H * 4
    assert program.memory_analysis().temp_size_in_bytes < 6 * tiles < layer


def test_a_window_of_blocks_is_the_rows_own() -> None:
    """Where a row starts and ends: at the blocks of its own first and last key, however long its text is."""
    problem = explain(paged_attention, **ARGUMENTS | {"scores": Scores(mask=masks.local(9, 0))}).problem
    first, stop = problem.blocks_of(jnp.array([-1, 0, 8, 15, 24, 25, 63], jnp.int32))
    np.testing.assert_array_equal(first, [0, 0, 0, 0, 0, 1, 3])
    np.testing.assert_array_equal(stop, [0, 1, 1, 1, 2, 2, 4])


def test_what_a_window_left_may_be_anything() -> None:
    """Blocks before it and after the query are given up: what the tables name there is not even numbers."""
    shape, window = Shape(M=40), Shaping(words=("local", 5, 0))
    k, v, tables = texts(shape, (160,), seed=0)
    first = (150 - 5) // shape.C
    spoiled = tables.copy()
    spoiled[0, :first] = spoiled[0, 150 // shape.C + 1 :] = 0  # what the engine gives up
    q = _query(0, 150)[None]
    here = np.array([0], np.int32), np.array([150], np.int32)
    whole = attend(q, k, v, jnp.int32(0), Rows(tables, *here), shaping=window, blocks=ALONE)
    np.testing.assert_array_equal(
        whole, attend(q, k, v, jnp.int32(0), Rows(spoiled, *here), shaping=window, blocks=ALONE)
    )


ARGUMENTS: dict[str, Any] = {
    "q": jax.ShapeDtypeStruct((3, 4, 8), jnp.float32),
    "k": jax.ShapeDtypeStruct((2, 9, 2, 16, 8), jnp.float32),
    "v": jax.ShapeDtypeStruct((2, 9, 2, 16, 8), jnp.float32),
    "layer": jax.ShapeDtypeStruct((), jnp.int32),
    "tables": jax.ShapeDtypeStruct((5, 4), jnp.int32),
    "slots": jax.ShapeDtypeStruct((3,), jnp.int32),
    "positions": jax.ShapeDtypeStruct((3,), jnp.int32),
    "scores": Scores(),
}
TREE = TokenTree(*[jax.ShapeDtypeStruct((3,), jnp.int32)] * 3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": jax.ShapeDtypeStruct((3, 1, 4, 8), jnp.float32)}, r"q \[3, 1, 4, 8\] must be \[T, N, H\]"),
        ({"q": jax.ShapeDtypeStruct((3, 3, 8), jnp.float32)}, "q has 3 heads and k has 2"),
        ({"v": jax.ShapeDtypeStruct((2, 9, 2, 16, 8), jnp.bfloat16)}, "v is bfloat16 and q is float32"),
        ({"v": jax.ShapeDtypeStruct((2, 8, 2, 16, 8), jnp.float32)}, r"v \[2, 9, 2, 16\] with a width of its own"),
        ({"slots": jax.ShapeDtypeStruct((4,), jnp.int32)}, r"slots is int32\[4\]; it must be int32\[3\]"),
        ({"positions": jax.ShapeDtypeStruct((3,), jnp.float32)}, "positions is float32"),
        ({"tables": jax.ShapeDtypeStruct((5,), jnp.int32)}, r"tables is int32\[5\]; it must be int32\[S, M\]"),
        ({"scores": Scores(mask=masks.local(3, 1))}, "shows keys after the query"),
        ({"scores": Scores(mask=masks.causal | masks.prefix(3))}, "shows keys after the query"),
        ({"scores": Scores(sinks=jnp.zeros(3))}, r"scores.sinks \(3,\) must be \[4\]"),
        (
            {"tree": TokenTree(*[jax.ShapeDtypeStruct((4,), jnp.int32)] * 3)},
            r"places is int32\[4\]; it must be int32\[3\]",
        ),
        ({"tree": TREE, "scores": Scores(alibi_slopes=jnp.zeros(4))}, "tree: biases by distance"),
        ({"tree": TREE, "scores": Scores(relative_bias=DistanceBias(jnp.zeros((4, 8))))}, "tree: biases by distance"),
        ({"backend": "cuda"}, "backend = 'cuda' is unknown to paged_attention"),
        ({"blocks": PagedBlocks(keys=0)}, "must be a positive integer"),
    ],
)
def test_says_what_is_wrong(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        explain(paged_attention, **ARGUMENTS | changes)


def _int8(K: int, C: int) -> dict[str, Any]:
    """Arguments that are a cache of int8 in bfloat16's place."""
    codes, scales = jax.ShapeDtypeStruct((2, 9, K, C, 128), jnp.int8), jax.ShapeDtypeStruct((2, 9, K, C), jnp.bfloat16)
    return {"k": codes, "v": codes, "scales": CacheScales(scales, scales)}


def test_where_the_kernel_runs() -> None:
    """What Mosaic cannot have is said, and goes to XLA."""
    wide = {name: jax.ShapeDtypeStruct((*ARGUMENTS[name].shape[:-1], 128), jnp.bfloat16) for name in "qkv"}
    narrow = explain(paged_attention, **ARGUMENTS, target="tpu_v5e")
    assert narrow.backend == "xla" and "give q, k and v zeros up to 128" in narrow.refused["tpu"]
    plan = explain(paged_attention, **ARGUMENTS | wide, target="tpu_v5e")
    assert plan.backend == "tpu" and plan.blocks == PagedBlocks(keys=512)
    for changes, reason in (
        ({name: jax.ShapeDtypeStruct((*wide[name].shape[:-2], 8, 128), jnp.bfloat16) for name in "kv"}, "rows of 16"),
        ({"tables": jax.ShapeDtypeStruct((64, 2048), jnp.int32)}, "bytes of scalar memory"),
        ({name: jax.ShapeDtypeStruct(wide[name].shape, jnp.float16) for name in "qkv"}, "float16 is rejected"),
        (_int8(K=2, C=32), "int8 in blocks of 32 positions"),
        (_int8(K=1, C=128), "1 key heads a device"),
    ):
        refused = explain(paged_attention, **ARGUMENTS | wide | changes, target="tpu_v5e")
        assert refused.backend == "xla" and reason in refused.refused["tpu"]


def test_int8_goes_to_the_kernel_and_half_is_read() -> None:
    """At the end of full tables: 4 blocks of 128 keys of 2 heads, 128 wide, in 130 bytes."""
    q = {"q": jax.ShapeDtypeStruct((3, 4, 128), jnp.bfloat16)}
    plan = explain(paged_attention, **ARGUMENTS | q | _int8(K=2, C=128), target="tpu_v5e")
    assert plan.backend == "tpu" and "scaled" in str(plan)
    assert plan.hbm_bytes == 3 * (4 * 128 * 2 * 2 * 130 + 4 * 256 * 2)


def test_explain_counts_what_is_read() -> None:
    """At the end of full tables: 64 keys of 2 heads, or a window of them."""
    plan = explain(paged_attention, **ARGUMENTS, target="cpu")
    assert plan.backend == "xla"
    assert plan.hbm_bytes == 3 * (64 * 2 * 16 + 4 * 16) * 4
    window = explain(paged_attention, **ARGUMENTS | {"scores": Scores(mask=masks.local(9, 0))}, target="cpu")
    assert window.hbm_bytes == 3 * (10 * 2 * 16 + 4 * 16) * 4
    assert window.flops == 3 * 2 * 4 * 10 * 16
