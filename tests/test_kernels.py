"""The kernels against their formulas in float64 numpy, values and gradients."""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import hlo_shapes
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas import Causal, flash_attention, fused_glu, mixed_einsum


def formula(q, k, v, d_out, *, window=None, segments=None, kv_segments=None, q_offset=0, scale=None):
    """softmax(scale q k^T + mask) v and its gradients for the cotangent d_out, one dense float64 matrix per head."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    B, T, N, H = q.shape
    S, K = k.shape[1:3]
    G = N // K
    scale = 1 / math.sqrt(H) if scale is None else scale
    out, dq, dk, dv = np.zeros_like(q), np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    offsets = np.broadcast_to(q_offset, (B,))
    kv_segments = segments if kv_segments is None else kv_segments
    for b in range(B):
        position, key = offsets[b] + np.arange(T)[:, None], np.arange(S)[None, :]
        seen = key <= position
        if window is not None:
            seen &= position - key < window
        if segments is not None:
            seen &= segments[b][:, None] == kv_segments[b][None, :]
        for n in range(N):
            scores = np.where(seen, scale * q[b, :, n] @ k[b, :, n // G].T, -np.inf)
            top = scores.max(1, keepdims=True)
            weights = np.exp(scores - np.where(np.isfinite(top), top, 0))
            total = weights.sum(1, keepdims=True)
            p = weights / np.where(total == 0, 1, total)
            out[b, :, n] = p @ v[b, :, n // G]
            dp = d_out[b, :, n] @ v[b, :, n // G].T
            ds = p * (dp - (p * dp).sum(1, keepdims=True))
            dq[b, :, n] = scale * ds @ k[b, :, n // G]
            dk[b, :, n // G] += scale * ds.T @ q[b, :, n]
            dv[b, :, n // G] += p.T @ d_out[b, :, n]
    return out, dq, dk, dv


@functools.partial(jax.jit, static_argnames=("mask", "scale"))
def value_and_gradients(q, k, v, d_out, segments=None, kv_segments=None, q_offset=0, *, mask=Causal(), scale=None):
    attend = lambda q, k, v: flash_attention(
        q, k, v, mask=mask, segment_ids=segments, kv_segment_ids=kv_segments, q_offset=q_offset, scale=scale
    )
    out, pull = jax.vjp(attend, q, k, v)
    return out, *pull(d_out)


def random_qkv(B, T, S, N, K, H, seed=0, dtype=jnp.float32):
    rng = np.random.default_rng(seed)
    shapes = (B, T, N, H), (B, S, K, H), (B, S, K, H), (B, T, N, H)
    return [jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes]


def random_segments(B, T, seed=0, mean=20):
    return np.cumsum(np.random.default_rng(seed).random((B, T)) < 1 / mean, axis=1).astype(np.int32)


def check(got, want, atol):
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert np.isfinite(np.asarray(g, np.float32)).all(), name
        np.testing.assert_allclose(np.asarray(g, np.float64), w, atol=atol, rtol=atol, err_msg=name)


# T, S, N, K, window, segments, q_offset. A block is 128 long, so that the longer ones have several.
CASES = {
    "one_token": (1, 1, 1, 1, None, False, 0),
    "seven": (7, 7, 2, 1, None, True, 0),
    "one_short_of_a_block": (127, 127, 2, 2, 50, False, 0),
    "one_past_a_block": (129, 129, 4, 2, None, True, 0),
    "ragged": (200, 200, 4, 1, None, False, 0),
    "three_blocks": (384, 384, 2, 1, None, False, 0),
    "window_one": (200, 200, 2, 1, 1, False, 0),
    "window_small": (300, 300, 2, 1, 17, True, 0),
    "window_of_a_block": (384, 384, 1, 1, 128, False, 0),
    "window_just_over_a_block": (384, 384, 1, 1, 130, False, 0),
    "window_of_two_blocks_and_some": (400, 400, 1, 1, 290, False, 0),
    "window_longer_than_all": (200, 200, 1, 1, 1000, False, 0),
    "decode_one": (1, 200, 4, 2, None, False, (199, 3)),
    "decode_one_window": (1, 300, 4, 2, 20, False, (299, 140)),
    "chunk_in_cache": (7, 300, 2, 2, None, True, (290, 17)),
    "chunk_over_blocks": (200, 500, 2, 1, 130, False, (300, 0)),
    "keys_end_early": (200, 7, 2, 1, None, False, 0),
    "window_past_the_keys": (200, 100, 2, 1, 30, False, (0, 90)),  # late queries see nothing
    "queries_before_all_keys": (150, 150, 1, 1, None, False, (-140, -200)),
    "offset_scalar": (100, 260, 2, 1, None, True, 160),
}


@pytest.mark.parametrize("name", CASES)
def test_attention_equals_the_formula(name):
    T, S, N, K, window, segmented, q_offset = CASES[name]
    q, k, v, d_out = random_qkv(2, T, S, N, K, 8)
    segments = kv_segments = None
    if segmented:
        kv_segments = random_segments(2, S)
        offsets = np.broadcast_to(q_offset, (2,))
        segments = np.stack([kv_segments[b, offsets[b] : offsets[b] + T] for b in range(2)])
    got = value_and_gradients(q, k, v, d_out, segments, kv_segments, jnp.asarray(q_offset), mask=Causal(window))
    want = formula(q, k, v, d_out, window=window, segments=segments, kv_segments=kv_segments, q_offset=q_offset)
    check(got, want, 2e-5)


@settings(max_examples=30, deadline=None, derandomize=True, database=None)
@given(
    window=st.sampled_from([None, 1, 60, 128, 200]),
    offsets=st.lists(st.integers(-150, 400), min_size=2, max_size=2),
    seed=st.integers(0, 2**31),
    mean=st.sampled_from([3, 40, 400]),
)
def test_any_offsets_and_segments(window, offsets, seed, mean):
    """Segments in any order, on queries and keys that have nothing to do with each other; four shapes compiled."""
    q, k, v, d_out = random_qkv(2, 140, 270, 2, 1, 4, seed)
    rng = np.random.default_rng(seed)
    segments, kv_segments = rng.integers(0, mean, (2, 140)), rng.integers(0, mean, (2, 270)) // 3
    got = value_and_gradients(q, k, v, d_out, segments, kv_segments, np.array(offsets), mask=Causal(window))
    want = formula(
        q, k, v, d_out, window=window, segments=segments, kv_segments=kv_segments, q_offset=np.array(offsets)
    )
    check(got, want, 2e-5)


def test_long_sequences_take_larger_blocks():
    """Above 4096 keys a block is 512; queries keep theirs."""
    q, k, v, d_out = random_qkv(1, 130, 4300, 1, 1, 4)
    got = value_and_gradients(q, k, v, d_out, None, None, 4100, mask=Causal(700))
    check(got, formula(q, k, v, d_out, window=700, q_offset=4100), 2e-5)


def test_a_query_without_keys_gives_exact_zeros():
    q, k, v, d_out = random_qkv(2, 200, 200, 2, 1, 8)
    segments = np.zeros((2, 200), np.int32)
    kv_segments = segments.copy()
    segments[0, 40:170] = 7  # a segment that no key has
    segments[1] = 7
    out, dq, dk, dv = map(np.asarray, value_and_gradients(q, k, v, d_out, segments, kv_segments))
    assert (out[0, 40:170] == 0).all() and (dq[0, 40:170] == 0).all()
    assert all((x[1] == 0).all() for x in (out, dq, dk, dv))
    assert np.isfinite(np.concatenate([x.ravel() for x in (out, dq, dk, dv)])).all()
    assert (out[0, :40] != 0).all() and (dk[0, 1:40] != 0).all()


@pytest.mark.parametrize("scale", [0.0, 0.3, 2.0])
def test_scale(scale):
    q, k, v, d_out = random_qkv(1, 20, 20, 2, 1, 8)
    check(value_and_gradients(q, k, v, d_out, scale=scale), formula(q, k, v, d_out, scale=scale), 2e-5)


@pytest.mark.parametrize("shift", [-500.0, 0.0, 500.0])
def test_scores_of_any_size(shift):
    """Scores of some hundreds, growing along the keys so that every block moves the running maximum, or of one sign."""
    q, k, v, d_out = random_qkv(1, 300, 300, 1, 1, 8)
    k = 30 * k * jnp.linspace(0.1, 1, 300)[None, :, None, None]
    q, k = q.at[..., 0].set(10.0), k.at[..., 0].set(shift * math.sqrt(8) / 10)
    got, want = value_and_gradients(q, k, v, d_out), formula(q, k, v, d_out)
    # A float32 score of 500 carries an error of about 3e-5, and so do the weights.
    np.testing.assert_allclose(got[0], want[0], atol=1e-3)
    for g, w in zip(got[1:], want[1:], strict=True):
        assert np.linalg.norm(g - w) < 1e-3 * np.linalg.norm(w)


@pytest.mark.parametrize("head_dim", [16, 112])
def test_bfloat16(head_dim):
    """Inputs that are bfloat16 to begin with, so that only the arithmetic differs from the formula."""
    q, k, v, d_out = random_qkv(2, 200, 200, 4, 2, head_dim, dtype=jnp.bfloat16)
    segments = random_segments(2, 200, mean=100)
    got = value_and_gradients(q, k, v, d_out, segments)
    want = formula(q, k, v, d_out, segments=segments)
    for name, g, w in zip(("out", "dq", "dk", "dv"), got, want, strict=True):
        assert g.dtype == jnp.bfloat16
        # bfloat16 rounds to 8 bits: one rounding each of the scaled query, the weights and the result, with relative
        # errors of at most 2^-8 and of about 2^-9.3 on average.
        g = np.asarray(g, np.float64)
        error = np.linalg.norm(g - w) / np.linalg.norm(w)
        assert error < 2**-7, (name, error)
        # Roundings go either way; a scale that was itself rounded would show here.
        bias = (g * w).sum() / (w * w).sum() - 1
        assert abs(bias) < 1e-3, (name, bias)


def test_what_is_hidden_does_not_matter():
    """Other keys and values outside the window and in other segments: not one bit of the output changes."""
    q, k, v, d_out = random_qkv(1, 300, 300, 2, 1, 8)
    segments = np.repeat([[0, 1]], [150, 150], axis=1)
    run = lambda k, v: value_and_gradients(q, k, v, d_out, segments, mask=Causal(40))[0]
    out = run(k, v)
    for touched, unchanged in (
        (slice(0, 150), slice(150, 300)),  # the other document
        (slice(100, 300), slice(0, 100)),  # the future
        (slice(150, 200), slice(239, 300)),  # before the window: query 239 sees keys 200 .. 239
    ):
        other = run(k.at[:, touched].set(50.0), v.at[:, touched].set(-50.0))
        np.testing.assert_array_equal(other[:, unchanged], out[:, unchanged])
        assert (other[:, touched] != out[:, touched]).any(-1).all()


def test_memory_grows_linearly():
    """No array of the compiled forward and backward pass has two dims as long as the sequence."""
    T = 2048
    q, k, v, d_out = (jax.ShapeDtypeStruct((1, T, 2, 8), jnp.float32) for _ in range(4))
    square = lambda text: [shape for _, shape in hlo_shapes(text) if sum(size >= T for size in shape) >= 2]
    ours = value_and_gradients.lower(q, k, v, d_out, mask=Causal(300)).compile().as_text()
    assert any(T in shape for _, shape in hlo_shapes(ours)) and not square(ours)

    dense = lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=True).sum()
    assert square(jax.jit(jax.grad(dense)).lower(q, k, v).compile().as_text()), "the search itself is broken"


def test_misfits_are_refused():
    q, k, v, _ = random_qkv(2, 8, 10, 4, 2, 8)
    ids = jnp.zeros((2, 8), jnp.int32)
    with pytest.raises(ValueError, match="K divides 4 query heads"):
        flash_attention(q, jnp.zeros((2, 10, 3, 8)), jnp.zeros((2, 10, 3, 8)))
    with pytest.raises(ValueError, match="k and v must be"):
        flash_attention(q, k, v[:, :5])
    with pytest.raises(ValueError, match="k and v must be"):
        flash_attention(q, k[:1], v[:1])
    with pytest.raises(ValueError, match="kv_segment_ids is given without segment_ids"):
        flash_attention(q, k, v, kv_segment_ids=ids)
    with pytest.raises(ValueError, match=r"kv_segment_ids \(2, 8\)"):
        flash_attention(q, k, v, segment_ids=ids)  # 8 segments for 10 keys
    with pytest.raises(ValueError, match=r"segment_ids \(1, 8\)"):
        flash_attention(q, q, q, segment_ids=ids[:1])
    with pytest.raises(ValueError):
        flash_attention(q, k, v, q_offset=jnp.zeros((3,), jnp.int32))


@pytest.mark.parametrize("subscripts", ["btd,df->btf", "btd,dnh->btnh", "btnh,nhd->btd", "td,vd->tv"])
@pytest.mark.parametrize("formats", [("float32", "float32"), ("bfloat16", "float32"), ("bfloat16", "bfloat16")])
def test_mixed_einsum(subscripts, formats):
    sizes = {"b": 2, "t": 5, "d": 6, "f": 7, "n": 3, "h": 4, "v": 9}
    dims, out_dims = subscripts.split("->")
    rng = np.random.default_rng(0)
    normal = lambda letters, dtype: jnp.asarray(rng.normal(size=[sizes[c] for c in letters]), dtype)
    x_dims, w_dims = dims.split(",")
    x, w, g = normal(x_dims, formats[0]), normal(w_dims, formats[1]), normal(out_dims, formats[0])
    y, pull = jax.vjp(functools.partial(mixed_einsum, subscripts), x, w)
    dx, dw = pull(g)
    assert y.dtype == dx.dtype == x.dtype and dw.dtype == w.dtype

    x64, g64 = np.asarray(x, np.float64), np.asarray(g, np.float64)
    w64 = np.asarray(w.astype(x.dtype), np.float64)  # what enters the product
    tolerance = lambda dtype: 1e-5 if dtype == "float32" else 2**-7
    for got, want, dtype in (
        (y, np.einsum(subscripts, x64, w64), formats[0]),
        (dx, np.einsum(f"{out_dims},{w_dims}->{x_dims}", g64, w64), formats[0]),
        # Of two bfloat16 factors the products are exact in float32: a float32 weight's gradient is summed that finely.
        (dw, np.einsum(f"{x_dims},{out_dims}->{w_dims}", x64, g64), formats[1]),
    ):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), want, rtol=tolerance(dtype), atol=tolerance(dtype) * np.abs(want).max()
        )


def _gelu_tanh(x):
    return 0.5 * x * (1 + math.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


ACTIVATIONS = {
    "silu": lambda x: x / (1 + math.exp(-x)),
    "gelu": lambda x: 0.5 * x * (1 + math.erf(x / math.sqrt(2))),
    "gelu_tanh": _gelu_tanh,
    "relu": lambda x: max(x, 0.0),
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "identity": lambda x: x,
}


@pytest.mark.parametrize("biases", [False, True])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_glu(act, biases):
    rng = np.random.default_rng(0)
    x, w_gate, w_up = rng.normal(size=(2, 3, 8)), rng.normal(size=(8, 5)), rng.normal(size=(8, 5))
    b_gate, b_up = (rng.normal(size=5), rng.normal(size=5)) if biases else (None, None)
    direction = [None if a is None else rng.normal(size=a.shape) for a in (x, w_gate, w_up, b_gate, b_up)]
    d_out = rng.normal(size=(2, 3, 5))

    def glu64(x, w_gate, w_up, b_gate, b_up):
        gate, up = x @ w_gate + (0 if b_gate is None else b_gate), x @ w_up + (0 if b_up is None else b_up)
        return np.vectorize(ACTIVATIONS[act])(gate) * up

    arguments = x, w_gate, w_up, b_gate, b_up
    narrow = [None if a is None else jnp.asarray(a, jnp.float32) for a in arguments]
    y, pull = jax.vjp(lambda *a: fused_glu(*a, act=act), *narrow)
    np.testing.assert_allclose(y, glu64(*arguments), rtol=1e-5, atol=1e-5)
    # The gradient along a random direction against a central difference, for each argument by itself.
    for i, (gradient, step) in enumerate(zip(pull(jnp.asarray(d_out, jnp.float32)), direction, strict=True)):
        if step is None:
            continue
        there, back = list(arguments), list(arguments)
        there[i], back[i] = arguments[i] + 1e-6 * step, arguments[i] - 1e-6 * step
        slope = ((glu64(*there) - glu64(*back)) * d_out).sum() / 2e-6
        np.testing.assert_allclose((np.asarray(gradient, np.float64) * step).sum(), slope, rtol=2e-5, atol=2e-5)


def test_glu_gradients_keep_the_weights_format():
    x = jnp.ones((2, 8), jnp.bfloat16)
    w_gate, w_up, bias = jnp.ones((8, 4), jnp.float32), jnp.ones((8, 4), jnp.bfloat16), jnp.ones(4, jnp.float32)
    y, pull = jax.vjp(fused_glu, x, w_gate, w_up, bias, bias)
    assert y.dtype == jnp.bfloat16
    assert [g.dtype.name for g in pull(y)] == ["bfloat16", "float32", "bfloat16", "float32", "float32"]


def test_glu_bias_gradient_sums_many_tokens():
    """4096 equal terms: a sum that runs in bfloat16 would stall at 256."""
    x, w, bias = jnp.zeros((4096, 2), jnp.bfloat16), jnp.zeros((2, 3)), jnp.ones(3)
    glu = lambda b_up: fused_glu(x, w, w, bias, b_up, act="identity").astype(jnp.float32).sum()
    np.testing.assert_array_equal(jax.jit(jax.grad(glu))(bias), np.full(3, 4096.0))


def test_unknown_activation_is_refused():
    with pytest.raises(ValueError, match=r"act = 'swish' is unknown; use one of \['gelu'"):
        fused_glu(jnp.ones((1, 2)), jnp.ones((2, 2)), jnp.ones((2, 2)), act="swish")
