"""Attention, every body against the float64 oracle: values, gradients, and what must hold whatever the numbers are."""

from __future__ import annotations

import functools
import itertools
import math
import random
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import HIDDEN, Options, attend, build, check, compare, compute, random_arrays, reference
from helpers import hlo_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import AttentionBlocks, DistanceBias, explain, flash_attention, merge_partials

# The matrix: all pairs of these values.
FACTORS: dict[str, list[Any]] = {
    "words": [
        "causal",
        "full",
        ("local", 17, 9),
        ("and", "causal", ("local", 70, 0)),
        ("or", "causal", ("prefix", 53)),
        ("and", "causal", ("chunked", 41)),
        ("or", ("and", "causal", ("local", 20, None)), ("prefix", 9)),
        ("local", None, 30),
    ],
    "dims": [(64, 64), (80, 80), (96, 96), (128, 128), (192, 128), (256, 256)],
    "lengths": [(130, 130), (3, 150), (200, 200), (40, 300), (150, 70), (128, 256)],
    "heads": [(2, 2), (4, 2), (4, 1), (6, 2)],
    "q_offset": [0, 90, -30, "array"],
    "dtype": ["float32", "bfloat16", "float16"],
    "segments": [None, "packed", "foreign"],
    "visible_to": [None, "prefix", "any"],
    "bias": [None, (40, False), (128, True)],
    "soft_cap": [None, 3.0],
    "alibi": [False, True],
    "sinks": [False, True],
    "return_lse": [False, True],
    "scale": [None, 0.2],
}


def pairwise(factors: dict[str, list[Any]]) -> list[dict[str, Any]]:
    """Combinations in which each pair of two factors' values occurs; greedy, so that the first hold the most pairs."""
    rng = random.Random(0)
    sizes = [len(values) for values in factors.values()]
    pairs_of = lambda row: set(itertools.combinations(enumerate(row), 2))
    missing = {
        ((a, x), (b, y))
        for a, b in itertools.combinations(range(len(sizes)), 2)
        for x in range(sizes[a])
        for y in range(sizes[b])
    }
    rows = []
    while missing:
        candidates = []
        for (a, x), (b, y) in rng.sample(sorted(missing), min(40, len(missing))):
            row = [rng.randrange(size) for size in sizes]
            row[a], row[b] = x, y
            candidates.append(row)
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append({name: values[i] for (name, values), i in zip(factors.items(), best, strict=True)})
    return rows


MATRIX = pairwise(FACTORS)
# The first rows hold the most pairs: those are quick tests, the next slow ones, the last of the simulator nightly.
QUICK = {"xla": 24, "tpu": 8}
NIGHTLY = {"xla": len(MATRIX), "tpu": 40}


def matrix_cases() -> list[Any]:
    cases = []
    for backend, quick in QUICK.items():
        for n, row in enumerate(MATRIX):
            marks = [pytest.mark.nightly] if n >= NIGHTLY[backend] else [pytest.mark.slow] if n >= quick else []
            cases.append(pytest.param(backend, row, id=f"{backend}-{n}", marks=marks))
    return cases


@pytest.mark.parametrize("backend, row", matrix_cases())
def test_equals_the_oracle(backend, row):
    if backend == "tpu" and row["dtype"] == "float16":
        with pytest.raises(ValueError, match="float16"):
            compute(*build(row, backend))
        return
    check(*build(row, backend))


def test_the_matrix_holds_every_pair():
    for (a, xs), (b, ys) in itertools.combinations(FACTORS.items(), 2):
        assert {(str(row[a]), str(row[b])) for row in MATRIX} == {(str(x), str(y)) for x in xs for y in ys}


# What the matrix does not reach.

both = pytest.mark.parametrize("backend", ["xla", "tpu"])
both_in_time = pytest.mark.parametrize("backend", ["xla", pytest.param("tpu", marks=pytest.mark.slow)])


# T, S, N, K, words, segments, q_offset. A block of the "xla" body is 64 by 48.
CASES = {
    "one_key": (1, 1, 1, 1, "causal", False, 0),
    "seven": (7, 7, 2, 1, "causal", True, 0),
    "one_short_of_a_block": (63, 47, 2, 2, ("local", 20, 0), False, -10),
    "one_past_a_block": (65, 49, 4, 2, "causal", True, 0),
    "sees_only_itself": (100, 100, 2, 1, ("local", 0, 0), False, 0),
    "window_of_a_block": (192, 192, 1, 1, ("and", "causal", ("local", 47, 0)), False, 0),
    "window_just_over_a_block": (192, 192, 1, 1, ("and", "causal", ("local", 49, 0)), False, 0),
    "window_longer_than_all": (100, 100, 2, 1, ("local", 1000, 1000), False, 0),
    "decode": (1, 200, 4, 2, "causal", False, (199, 3)),
    "decode_in_a_window": (1, 300, 4, 2, ("and", "causal", ("local", 19, 0)), False, (299, 140)),
    "chunk_in_a_cache": (7, 150, 2, 2, "causal", True, (140, 17)),
    "chunk_over_blocks": (100, 250, 2, 1, ("and", "causal", ("local", 60, 0)), False, (150, 0)),
    "keys_end_early": (100, 7, 2, 1, "causal", False, 0),
    "past_all_keys": (100, 50, 2, 1, ("local", 15, 15), False, (0, 90)),
    "before_all_keys": (75, 75, 1, 1, "causal", False, (-70, -100)),
}


@pytest.mark.parametrize("name", CASES)
def test_edges(name):
    T, S, N, K, words, segmented, q_offset = CASES[name]
    arrays, d_out, d_lse = random_arrays(2, T, S, N, K, 8)
    arrays["q_offset"] = jnp.broadcast_to(jnp.asarray(q_offset), (2,))
    if segmented:
        kv = np.cumsum(np.random.default_rng(0).random((2, S)) < 1 / 20, axis=1)
        arrays["kv_segment_ids"] = jnp.asarray(kv, jnp.int32)
        queries = np.broadcast_to(q_offset, (2,))[:, None] + np.arange(T)
        arrays["segment_ids"] = jnp.asarray(np.take_along_axis(kv, queries.clip(0, S - 1), 1), jnp.int32)
    # Where a query sees one key its gradient is 0 by cancellation, of terms of size one.
    check(Options(words=words), arrays, d_out, d_lse, least=1.0)


@both
@pytest.mark.parametrize(
    "words",
    [
        ("or", ("local", 20, 0), ("and", "causal", ("strided", 21))),
        ("and", "causal", ("or", ("chunked", 41), ("summaries", 41, 3))),
    ],
)
def test_stripes(words, backend):
    arrays, d_out, d_lse = random_arrays(2, 130, 200, 4, 2, 16)
    arrays["q_offset"] = jnp.array([60, -15])
    check(Options(backend, words), arrays, d_out, d_lse, least=1.0)


@settings(max_examples=20, deadline=None, derandomize=True, database=None)
@given(
    words=st.sampled_from(["causal", ("or", ("local", 30, 60), ("prefix", 20))]),
    offsets=st.lists(st.integers(-150, 300), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
    n_segments=st.sampled_from([1, 3, 40]),
)
def test_any_offsets_and_segments(words, offsets, seed, n_segments):
    """Segments in any order, on queries and keys that have nothing to do with each other; two shapes compiled."""
    arrays, d_out, d_lse = random_arrays(2, 100, 150, 2, 1, 4, seed=seed)
    rng = np.random.default_rng(seed)
    arrays["segment_ids"] = jnp.asarray(rng.integers(0, n_segments, (2, 100)), jnp.int32)
    arrays["kv_segment_ids"] = jnp.asarray(rng.integers(0, n_segments, (2, 150)), jnp.int32)
    arrays["q_offset"] = jnp.asarray(offsets, jnp.int32)
    check(Options(words=words), arrays, d_out, d_lse, least=1.0)


def test_default_blocks_of_long_sequences():
    """Above 4096 keys a block is 512; queries keep theirs. Of one head the scores of two rows fit a CPU's cache."""
    arrays, d_out, d_lse = random_arrays(1, 130, 4300, 1, 1, 4)
    default = AttentionBlocks(q=128, k=512, q_backward=128, k_backward=512, rows=2)
    options = Options(words=("and", "causal", ("local", 700, 0)), q_offset=4100)
    plan = explain(flash_attention, *(arrays[name] for name in "qkv"), backend="xla")
    assert plan.blocks == default
    check(replace(options, blocks=default), arrays, d_out, d_lse)


@pytest.mark.parametrize("scale", [0.0, 2.0])
def test_scale(scale):
    arrays, d_out, d_lse = random_arrays(1, 20, 20, 2, 1, 8)
    check(Options(scale=scale), arrays, d_out, d_lse)


@pytest.mark.parametrize("shift", [-500.0, 0.0, 500.0])
def test_scores_of_any_size(shift):
    """Scores of some hundreds, growing along the keys so that every block moves the running maximum, or of one sign."""
    arrays, d_out, d_lse = random_arrays(1, 200, 200, 1, 1, 8)
    k = 30 * arrays["k"] * jnp.linspace(0.1, 1, 200)[None, :, None, None]
    arrays["q"] = arrays["q"].at[..., 0].set(10.0)
    arrays["k"] = k.at[..., 0].set(shift * math.sqrt(8) / 10)
    got, want = compute(Options(), arrays, d_out, d_lse), reference(Options(), arrays, d_out, d_lse)
    # A float32 score of 500 carries an error of about 3e-5, and so do the weights.
    np.testing.assert_allclose(got["out"], want["out"], atol=1e-3)
    np.testing.assert_allclose(got["lse"], want["lse"], atol=1e-3)
    for name in ("d_q", "d_k", "d_v"):
        assert np.linalg.norm(got[name] - want[name]) < 1e-3 * np.linalg.norm(want[name]), name


@both_in_time
def test_bfloat16_errs_on_neither_side(backend):
    """Roundings go either way; a scale that was itself rounded would show here."""
    arrays, d_out, d_lse = random_arrays(2, 200, 200, 4, 2, 112, dtype="bfloat16")
    options = Options(backend=backend, return_lse=False)
    got, want = compute(options, arrays, d_out, d_lse), reference(options, arrays, d_out, d_lse)
    for name in ("out", "d_q", "d_k", "d_v"):
        g, w = np.asarray(got[name], np.float64), want[name]
        assert np.linalg.norm(g - w) < 2**-7 * np.linalg.norm(w), name
        assert abs((g * w).sum() / (w * w).sum() - 1) < 1e-3, name


# Properties.


@both
def test_a_query_without_keys_gives_exact_zeros(backend):
    arrays, d_out, d_lse = random_arrays(2, 200, 200, 2, 1, 8)
    segments = np.zeros((2, 200), np.int32)
    arrays["kv_segment_ids"] = jnp.asarray(segments)
    segments[0, 40:170] = 7  # a segment that no key has
    segments[1] = 7
    arrays["segment_ids"] = jnp.asarray(segments)
    got = {name: np.asarray(value) for name, value in compute(Options(backend=backend), arrays, d_out, d_lse).items()}
    assert all(np.isfinite(value).all() for value in got.values())
    assert all((got[name][1] == 0).all() for name in ("out", "d_q", "d_k", "d_v"))
    assert (got["out"][0, 40:170] == 0).all() and (got["d_q"][0, 40:170] == 0).all()
    assert (got["lse"][1] < HIDDEN).all() and (got["lse"][0, :, 40:170] < HIDDEN).all()
    assert (got["out"][0, :40] != 0).all() and (got["d_k"][0, 1:40] != 0).all()


def test_what_is_hidden_does_not_matter():
    """Other keys and values outside the window and in other segments: not one bit of the output changes."""
    arrays, d_out, d_lse = random_arrays(1, 300, 300, 2, 1, 8)
    arrays["segment_ids"] = jnp.asarray(np.repeat([[0, 1]], [150, 150], axis=1))
    options = Options(words=("and", "causal", ("local", 39, 0)))
    run = lambda k, v: np.asarray(compute(options, arrays | {"k": k, "v": v}, d_out, d_lse)["out"])
    k, v = arrays["k"], arrays["v"]
    out = run(k, v)
    for touched, unchanged in (
        (slice(0, 150), slice(150, 300)),  # the other document
        (slice(100, 300), slice(0, 100)),  # the future
        (slice(150, 200), slice(239, 300)),  # before the window: query 239 sees keys 200 .. 239
    ):
        other = run(k.at[:, touched].set(50.0), v.at[:, touched].set(-50.0))
        np.testing.assert_array_equal(other[:, unchanged], out[:, unchanged])
        assert (other[:, touched] != out[:, touched]).any(-1).all()


@both_in_time
def test_packing_equals_separate_runs(backend):
    """Two documents in one row, and each by itself: values and gradients."""
    arrays, d_out, d_lse = random_arrays(1, 180, 180, 2, 1, 8)
    arrays["segment_ids"] = jnp.asarray(np.repeat([[4, 2]], 90, axis=1), jnp.int32)
    options = Options(backend=backend)
    packed = compute(options, arrays, d_out, d_lse)
    for own in (slice(0, 90), slice(90, 180)):
        part = {name: arrays[name][:, own] for name in "qkv"}
        alone = compute(options, part, d_out[:, own], d_lse[:, :, own])
        packed_part = {name: value[..., own] if name == "lse" else value[:, own] for name, value in packed.items()}
        compare(packed_part, {name: np.asarray(value, np.float64) for name, value in alone.items()}, "float32")


@both_in_time
def test_merged_key_halves_equal_the_whole(backend):
    """Values and gradients: those of the parts pass through their logsumexps."""
    arrays, d_out, d_lse = random_arrays(1, 130, 256, 2, 1, 8)
    options = Options(backend=backend, words=("or", "causal", ("prefix", 40)))

    def merged(q, k, v):
        parts = []
        for first in (
            0,
            128,
        ):  # the second half's keys lie 128 positions earlier than they did, and so must its queries
            words = options.words if first == 0 else "causal"
            half = {"q": q, "k": k[:, first : first + 128], "v": v[:, first : first + 128]}
            parts.append(attend(replace(options, words=words, q_offset=60 - first), half))
        return merge_partials(parts)

    @jax.jit
    def run(arrays, d_out, d_lse):
        (out, lse), pull = jax.vjp(merged, *(arrays[name] for name in "qkv"))
        return dict(zip(("out", "lse", "d_q", "d_k", "d_v"), (out, lse, *pull((d_out, d_lse))), strict=True))

    want = reference(replace(options, q_offset=60), arrays, d_out, d_lse)
    compare(run(arrays, d_out, d_lse), want, "float32")


@both
def test_an_offset_known_early_or_late_is_the_same(backend):
    arrays, d_out, d_lse = random_arrays(2, 130, 300, 2, 1, 8)
    options = Options(backend=backend, words=("and", "causal", ("local", 90, None)), q_offset=140)
    early = compute(options, arrays, d_out, d_lse)
    late = compute(replace(options, q_offset=None), arrays | {"q_offset": jnp.int32(140)}, d_out, d_lse)
    for name in early:
        np.testing.assert_array_equal(early[name], late[name], err_msg=name)
    compare(early, reference(options, arrays, d_out, d_lse), "float32")


@both_in_time
def test_vmap_equals_a_loop(backend):
    """Over queries, keys, values and offsets."""
    arrays, d_out, d_lse = random_arrays(3, 70, 130, 2, 1, 8)
    arrays["q_offset"] = jnp.asarray([60, 0, -5], jnp.int32)
    split = lambda x: x[:, None]  # rows of a batch of one
    options = Options(backend=backend)
    together = jax.vmap(functools.partial(compute, options))(
        {name: split(value) for name, value in arrays.items()}, split(d_out), split(d_lse)
    )
    want = reference(options, arrays, d_out, d_lse)
    compare({name: value[:, 0] for name, value in together.items()}, want, "float32")


def test_on_two_devices():
    """Inside shard_map, whose check of what varies over the mesh stays on."""
    arrays, d_out, d_lse = random_arrays(2, 70, 60, 2, 1, 8)
    arrays["alibi_slopes"] = jnp.array([0.5, 0.1])
    mesh = jax.make_mesh((2,), ("rows",), (jax.sharding.AxisType.Auto,), devices=jax.devices()[:2])
    rows, whole = jax.P("rows"), jax.P()
    specs = {name: whole if name == "alibi_slopes" else rows for name in arrays}
    both_devices = jax.shard_map(
        functools.partial(attend, Options()), mesh=mesh, in_specs=(specs,), out_specs=(rows, rows)
    )

    @jax.jit
    def run(arrays, d_out, d_lse):
        inputs = {name: arrays[name] for name in "qkv"}
        (out, lse), pull = jax.vjp(lambda inputs: both_devices(arrays | inputs), inputs)
        return {"out": out, "lse": lse} | {f"d_{name}": value for name, value in pull((d_out, d_lse))[0].items()}

    compare(run(arrays, d_out, d_lse), reference(Options(), arrays, d_out, d_lse), "float32")


def test_without_jit():
    arrays, d_out, d_lse = random_arrays(1, 50, 70, 2, 1, 8)
    out, lse = attend(Options(q_offset=20), arrays)
    want = reference(Options(q_offset=20), arrays, d_out, d_lse)
    compare({"out": out, "lse": lse}, want, "float32")


@both
def test_remat_that_saves_the_results_never_runs_the_forward_again(backend):
    """Counted in the traced gradient; a policy that saves nothing shows that the count could be higher."""
    arrays, _, _ = random_arrays(1, 32, 32, 2, 1, 8)
    # Both results are used further, so that the gradient needs them, and the projection before gives something to redo.
    loss = lambda q: sum(
        (x * x).sum() for x in attend(Options(backend=backend), arrays | {"q": jnp.sin(q) * arrays["q"]})
    )
    save = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    count = lambda f: _count(
        jax.make_jaxpr(jax.grad(f))(arrays["q"]).jaxpr, "scan" if backend == "xla" else "pallas_call"
    )
    forward_and_backward = count(loss)
    assert count(jax.checkpoint(loss, policy=save)) == forward_and_backward
    nothing = jax.checkpoint_policies.nothing_saveable
    assert count(jax.checkpoint(loss, policy=nothing)) == forward_and_backward + 1


def _count(jaxpr: Any, primitive: str) -> int:
    """How often a jaxpr runs a primitive; not what is inside of that primitive."""
    # jax 0.10 leaves it to XLA to remove a kernel whose results nobody uses.
    used = {id(x) for equation in jaxpr.eqns for x in equation.invars} | {id(x) for x in jaxpr.outvars}
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == primitive:
            total += any(id(x) in used for x in equation.outvars)
            continue
        for value in jax.tree.leaves(equation.params, is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += _count(inner, primitive)
    return total


def test_slopes_are_constants():
    arrays, d_out, _ = random_arrays(1, 20, 20, 2, 1, 8)
    loss = lambda slopes: (attend(Options(), arrays | {"alibi_slopes": slopes})[0] * d_out).sum()
    np.testing.assert_array_equal(jax.grad(loss)(jnp.ones(2)), np.zeros(2))


@both
def test_memory_grows_linearly(backend):
    """No array of the compiled forward and backward pass has two dims as long as the sequence."""
    T = 2048
    array = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
    arrays, d_out, d_lse = {name: array(1, T, 2, 8) for name in "qkv"}, array(1, T, 2, 8), array(1, 2, T)
    square = lambda text: [shape for _, shape in hlo_shapes(text) if sum(size >= T for size in shape) >= 2]
    options = Options(backend=backend, words=("and", "causal", ("local", 300, 0)))
    ours = compute.lower(options, arrays, d_out, d_lse).compile().as_text()
    assert any(T in shape for _, shape in hlo_shapes(ours)) and not square(ours)

    dense = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True).sum()
    naive = jax.jit(jax.grad(dense)).lower(*(arrays[name] for name in "qkv")).compile().as_text()
    assert square(naive), "the search itself is broken"


MISFITS = {
    "k of other rows": ({"k": (1, 10, 2, 8)}, r"k must be \[2, S, K, 8\]"),
    "k of another width": ({"k": (2, 10, 2, 4)}, r"k must be \[2, S, K, 8\]"),
    "v of another length": ({"v": (2, 5, 2, 8)}, r"k must be \[2, S, K, 8\]"),
    "heads that do not divide": ({"k": (2, 10, 3, 8), "v": (2, 10, 3, 8)}, r"k has 3.* use one of \[1, 2, 4\]"),
    "three dims": ({"q": (8, 4, 8)}, "q .* has 3 dims"),
    "no keys": ({"k": (2, 0, 2, 8), "v": (2, 0, 2, 8)}, "no dim may be empty"),
    "key segments alone": ({"kv_segment_ids": (2, 10)}, "kv_segment_ids is given without segment_ids"),
    "segments for other keys": ({"segment_ids": (2, 8)}, r"kv_segment_ids is int32\[2, 8\].*\[2, 10\]"),
    "segments of other rows": ({"segment_ids": (1, 8), "kv_segment_ids": (2, 10)}, r"^segment_ids is int32\[1, 8\]"),
    "offsets of other rows": ({"q_offset": (3,)}, r"q_offset is int32\[3\]; it must be"),
    "slopes of other heads": ({"alibi_slopes": (2,)}, r"alibi_slopes \(2,\) must be \[4\]"),
    "sinks of other heads": ({"sinks": (5,)}, r"sinks \(5,\) must be \[4\]"),
    "a table of other heads": ({"bias_table": (2, 8)}, r"table \(2, 8\) must be \[4, buckets\]"),
    "an odd table": ({"bias_table": (4, 7)}, "7 buckets"),
}


@pytest.mark.parametrize("name", MISFITS)
def test_misfits_are_refused(name):
    changes, message = MISFITS[name]
    shapes = {"q": (2, 8, 4, 8), "k": (2, 10, 2, 8), "v": (2, 10, 2, 8)} | changes
    integers = "segment_ids", "kv_segment_ids", "q_offset"
    arrays = {key: jnp.zeros(shape, jnp.int32 if key in integers else jnp.float32) for key, shape in shapes.items()}
    with pytest.raises(ValueError, match=message):
        attend(Options(bucket_rule=(40, False)), arrays)


def test_wrong_options_are_refused():
    arrays, _, _ = random_arrays(1, 4, 4, 2, 1, 8)
    q, k, v = (arrays[name] for name in "qkv")
    with pytest.raises(ValueError, match=r"soft_cap = -1\.0 must be positive"):
        flash_attention(q, k, v, soft_cap=-1.0)
    with pytest.raises(ValueError, match="mask = 'causal' is no mask"):
        flash_attention(q, k, v, mask="causal")
    with pytest.raises(ValueError, match="k is bfloat16 and q is float32; cast them"):
        flash_attention(q, k.astype(jnp.bfloat16), v)
    with pytest.raises(ValueError, match="backend = 'triton' is unknown"):
        flash_attention(q, k, v, backend="triton")
    with pytest.raises(ValueError, match="max_distance = 4 must be more than 4"):
        flash_attention(q, k, v, relative_bias=DistanceBias(jnp.zeros((2, 8)), 4))
    with pytest.raises(ValueError, match="parts is empty"):
        merge_partials([])
