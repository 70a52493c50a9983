"""Masks against enumeration, and the float64 oracle against central differences and values found by hand."""

from __future__ import annotations

import math

import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import LEARNED, mask_of
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import masks, oracle
from kernels_pallas.attention.problem import Buckets

# The oracle itself.


@pytest.mark.parametrize("soft_cap", [None, 1.5])
@pytest.mark.parametrize("words", ["causal", ("or", ("local", 1, 2), ("prefix", 3))])
def test_oracle_gradients_are_slopes(words, soft_cap):
    """Along a random direction of each argument, against central differences."""
    rng = np.random.default_rng(0)
    B, T, S, N, K, H, Hv = 2, 5, 7, 4, 2, 3, 2
    learned = {
        "q": rng.normal(size=(B, T, N, H)),
        "k": rng.normal(size=(B, S, K, H)),
        "v": rng.normal(size=(B, S, K, Hv)),
        "bias_table": rng.normal(size=(N, 4)),
        "sinks": rng.normal(size=N),
    }
    d_out, d_lse = rng.normal(size=(B, T, N, Hv)), rng.normal(size=(B, N, T))
    options = {
        "mask": words,
        "segment_ids": rng.integers(0, 2, (B, T)),
        "kv_segment_ids": rng.integers(0, 2, (B, S)),
        "q_offset": np.array([2, 0]),
        "soft_cap": soft_cap,
        "alibi_slopes": rng.random(N),
        "bucket_rule": (6, True),
    }

    def run(q, k, v, **rest):
        return oracle.attention(q, k, v, d_out, d_lse, **options, **rest)

    def loss(**values):
        result = run(**values)
        return (result.out * d_out).sum() + (result.lse * d_lse).sum()

    result = run(**learned)
    gradients = dict(zip(LEARNED, (result.dq, result.dk, result.dv, result.d_bias_table, result.d_sinks), strict=True))
    for name, value in learned.items():
        step = 1e-5 * rng.normal(size=value.shape)
        slope = loss(**learned | {name: value + step}) - loss(**learned | {name: value - step})
        assert slope == pytest.approx(2 * (gradients[name] * step).sum(), rel=1e-7), name


def test_oracle_by_hand():
    """Two keys with scores log 3 and 0 get the weights 3/4 and 1/4; a sink of score log 4 takes half."""
    q, k = np.ones((1, 1, 1, 1)), np.array([math.log(3), 0.0, 9.0]).reshape(1, 3, 1, 1)
    v = np.array([4.0, 8.0, 100.0]).reshape(1, 3, 1, 1)
    result = oracle.attention(q, k, v, np.ones((1, 1, 1, 1)), q_offset=1)
    assert result.out.item() == pytest.approx(5) and result.lse.item() == pytest.approx(math.log(4))
    result = oracle.attention(q, k, v, np.ones((1, 1, 1, 1)), q_offset=1, sinks=[math.log(4)])
    assert result.out.item() == pytest.approx(2.5) and result.lse.item() == pytest.approx(math.log(8))
    # ALiBi takes slope * distance off: key 0 is at distance 1.
    result = oracle.attention(q, k, v, np.ones((1, 1, 1, 1)), q_offset=1, alibi_slopes=[math.log(3)])
    assert result.out.item() == pytest.approx(6)


@pytest.mark.parametrize(
    "n, max_distance, bidirectional", [(32, 128, True), (32, 128, False), (8, 20, True), (2, 9, False)]
)
def test_buckets_are_those_of_the_formula(n, max_distance, bidirectional):
    buckets = Buckets(n=n, max_distance=max_distance, bidirectional=bidirectional)
    starts, numbers = zip(*buckets.steps(), strict=True)
    for distance in range(-2 * max_distance, 2 * max_distance):
        want = oracle.t5_bucket(distance, n, max_distance, bidirectional)
        assert buckets.bucket(distance) == want
        assert numbers[np.searchsorted(starts, distance, side="right") - 1] == want


# Masks.

ATOMS = st.one_of(
    st.just("causal"),
    st.just("full"),
    st.tuples(st.just("local"), st.none() | st.integers(0, 30), st.none() | st.integers(0, 30)),
    st.tuples(st.just("prefix"), st.integers(1, 40)),
    st.tuples(st.just("chunked"), st.integers(1, 20)),
)
WORDS = st.recursive(ATOMS, lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner), max_leaves=4)
STRIPES = st.one_of(
    st.tuples(st.just("strided"), st.integers(1, 20)),
    st.integers(1, 20).flatmap(lambda size: st.tuples(st.just("summaries"), st.just(size), st.integers(1, size))),
)
STRIPED = st.recursive(
    ATOMS | STRIPES, lambda inner: st.tuples(st.sampled_from(["and", "or"]), inner, inner), max_leaves=4
)
FAST = settings(max_examples=150, deadline=None, derandomize=True, database=None)


@FAST
@given(words=STRIPED, q_offset=st.integers(-60, 60))
def test_masks_show_what_their_words_say(words, q_offset):
    q, k = np.arange(50) + q_offset, np.arange(60)
    want = oracle.mask_matrix(words, q, k)
    np.testing.assert_array_equal(np.broadcast_to(mask_of(words).visible(q[:, None], k[None]), want.shape), want)


@FAST
@given(
    words=STRIPED,
    first_q=st.integers(-60, 60),
    n_q=st.integers(1, 40),
    first_k=st.integers(0, 60),
    n_k=st.integers(1, 40),
    as_array=st.booleans(),
)
def test_whole_blocks_of_masks(words, first_q, n_q, first_k, n_k, as_array):
    """Nothing visible is ever skipped, and a block is only called covered if it is."""
    mask = mask_of(words)
    q, k = np.arange(first_q, first_q + n_q), np.arange(first_k, first_k + n_k)
    seen = oracle.mask_matrix(words, q, k)
    scalar = jnp.int32 if as_array else int
    block = [scalar(x) for x in (q[0], q[-1], k[0], k[-1])]
    assert mask.touches(*block) or not seen.any()
    assert seen.all() or not mask.covers(*block)
    start, stop = mask.key_range(*block[:2])
    all_keys = np.arange(200)
    keys = np.flatnonzero(oracle.mask_matrix(words, q, all_keys).any(0))
    assert all(start <= x < stop for x in keys)
    start, stop = mask.query_range(*block[2:])
    all_queries = np.arange(-150, 200)
    queries = all_queries[oracle.mask_matrix(words, all_queries, k).any(1)]
    assert all(start <= x < stop for x in queries)


@FAST
@given(
    words=ATOMS, first_q=st.integers(0, 60), n_q=st.integers(1, 40), first_k=st.integers(0, 60), n_k=st.integers(1, 40)
)
def test_simple_masks_skip_all_they_can(words, first_q, n_q, first_k, n_k):
    """For a mask of one word every answer about a block is exact."""
    mask = mask_of(words)
    q, k = np.arange(first_q, first_q + n_q), np.arange(first_k, first_k + n_k)
    seen = oracle.mask_matrix(words, q, k)
    block = int(q[0]), int(q[-1]), int(k[0]), int(k[-1])
    assert mask.touches(*block) == seen.any()
    assert mask.covers(*block) == seen.all()
    everywhere = np.arange(-200, 400)
    keys = np.flatnonzero(oracle.mask_matrix(words, q, np.arange(400)).any(0))
    queries = everywhere[oracle.mask_matrix(words, everywhere, k).any(1)]
    for (start, stop), found, least, end in (
        (mask.key_range(*block[:2]), keys, 0, 399),
        (mask.query_range(*block[2:]), queries, -200, 399),
    ):
        if len(found):
            assert (max(start, least), min(stop - 1, end)) == (found[0], found[-1])
        else:
            assert start >= stop


@FAST
@given(words=STRIPED)
def test_masks_that_are_windows(words):
    window = mask_of(words).as_window()
    q, k = np.arange(-50, 100), np.arange(100)
    if window is not None:
        np.testing.assert_array_equal(
            oracle.mask_matrix(("local", *window), q, k), oracle.mask_matrix(words, q, k), err_msg=str(window)
        )


def test_windows_by_any_name():
    assert masks.causal.as_window() == (None, 0)
    assert (masks.causal & masks.local(9, 4) & masks.local(20, 2)).as_window() == (9, 0)
    assert (
        masks.prefix(3).as_window() is masks.chunked(3).as_window() is (masks.causal | masks.full).as_window() is None
    )


@FAST
@given(words=WORDS, T=st.integers(1, 40), S=st.integers(1, 40), q_offset=st.integers(-20, 40))
def test_counting_what_is_visible(words, T, S, q_offset):
    want = oracle.mask_matrix(words, np.arange(T) + q_offset, np.arange(S)).sum()
    assert masks.count_visible(mask_of(words), T, S, q_offset) == want


@pytest.mark.parametrize(
    "make",
    [
        lambda: masks.local(-1, 0),
        lambda: masks.local(0, -2),
        lambda: masks.prefix(0),
        lambda: masks.chunked(0),
        lambda: masks.strided(0),
        lambda: masks.summaries(4, 0),
    ],
)
def test_masks_of_nothing_are_refused(make):
    with pytest.raises(ValueError, match=r"= -?\d+(, last = 0)? must be"):
        make()
