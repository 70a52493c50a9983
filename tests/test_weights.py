"""Weights in 8 bits, against float64 and against the same model with its weights rounded by hand."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import latent_model, one_device, small_model, small_run, through_cache, with_attention
from hypothesis import given, settings
from hypothesis import strategies as st
from run_folder import parameters_of

from maxlm.config import (
    Activation,
    Experts,
    KernelConfig,
    LmHead,
    ShardingConfig,
    TopKRouter,
    WeightFormat,
    with_experts,
)
from maxlm.inference.held import held
from maxlm.models import Execution, Unembedding, ops
from maxlm.models.weights.by_channel import Int8
from maxlm.sharding import make_layout

RNG = np.random.default_rng(0)


@given(st.integers(0, 2**32 - 1), st.sampled_from([(0,), (1,), (0, 1), (2,)]), st.floats(1e-20, 1e20))
@settings(max_examples=25, deadline=None)
def test_no_number_is_off_by_more_than_half_a_scale(seed: int, axes: tuple[int, ...], size: float) -> None:
    w = np.random.default_rng(seed).normal(size=(3, 4, 5)).astype(np.float32) * np.float32(size)
    w[0] = 0
    held = Int8.of(jnp.asarray(w), axes)
    largest = np.abs(w.astype(np.float64)).max(axes, keepdims=True)
    error = np.abs(np.asarray(held.dense(jnp.float32), np.float64) - w)
    assert held.values.dtype == jnp.int8
    assert (error <= largest / 254 * (1 + 1e-5)).all()
    assert (np.asarray(held.dense(jnp.float32))[0] == 0).all()


def by_hand(w: np.ndarray, *axes: int) -> np.ndarray:
    """float64: the nearest of 255 equal steps from -max to max, for each slice over the axes."""
    step = np.abs(w.astype(np.float64)).max(axes, keepdims=True) / 127
    return np.round(w / np.where(step == 0, 1, step)) * step


def table_by_hand(table: np.ndarray) -> np.ndarray:
    """The same for every 32 numbers of a row, or as many as divide it, with steps in bfloat16."""
    parts = table.reshape(len(table), -1, math.gcd(table.shape[1], 32))
    step = (np.abs(parts).max(2, keepdims=True) / np.float32(127)).astype(ml_dtypes.bfloat16).astype(np.float64)
    return (np.round(parts / np.where(step == 0, 1, step)) * step).reshape(table.shape)


def test_products_take_them() -> None:
    layout, (B, T, D, N, H, F, V) = one_device(), (2, 3, 16, 4, 8, 24, 10)
    draw = lambda *shape: RNG.normal(size=shape).astype(np.float32)
    x, heads, bias = draw(B, T, D), draw(B, T, N, H), draw(N, H)
    into, back, gate, up, table = draw(D, N, H), draw(N, H, D), draw(D, F), draw(D, F), draw(V, D)
    shift, rows = draw(V), by_hand(table, 1)
    held = lambda w, *axes: Int8.of(jnp.asarray(w), axes)
    ids = RNG.integers(0, V, (B, T)).astype(np.int32)

    @jax.jit
    def all_of_them() -> tuple[jax.Array, ...]:
        return (
            ops.project(layout, "btd,dnh->btnh", jnp.asarray(x), held(into, 0), jnp.asarray(bias)),
            ops.project(layout, "btnh,nhd->btd", jnp.asarray(heads), held(back, 0, 1)),
            ops.glu(
                layout, KernelConfig(), jnp.asarray(x), held(gate, 0), held(up, 0), None, None,
                activation=Activation.RELU,
            ),
            ops.embed(layout, held(table, 1), jnp.asarray(ids), jnp.float32),
            ops.logits(jnp.asarray(x[:, 0]), Unembedding(held(table, 1))),
            ops.logits(
                jnp.asarray(x[:, 0]),
                Unembedding(ops.unit_rows(held(table, 1)), jnp.asarray(shift), scale=3.0, soft_cap=2.0),
            ),
        )  # fmt: skip

    gates = np.maximum(np.einsum("btd,df->btf", x, by_hand(gate, 0)), 0)
    want = (
        np.einsum("btd,dnh->btnh", x, by_hand(into, 0)) + bias,
        np.einsum("btnh,nhd->btd", heads, by_hand(back, 0, 1)),
        gates * np.einsum("btd,df->btf", x, by_hand(up, 0)),
        by_hand(table, 1)[ids],
        x[:, 0] @ by_hand(table, 1).T,
        2 * np.tanh((3 * x[:, 0] @ (rows / np.linalg.norm(rows, axis=1, keepdims=True)).T + shift) / 2),
    )
    for got, exact in zip(all_of_them(), want, strict=True):
        np.testing.assert_allclose(got, exact, atol=2e-5, rtol=1e-5)


SUMMED = {
    "q_proj": (-3,), "k_proj": (-3,), "v_proj": (-3,), "o_proj": (-3, -2),
    "gate_proj": (-2,), "up_proj": (-2,), "down_proj": (-2,),
    "q_down_proj": (-2,), "kv_down_proj": (-2,), "k_rope_proj": (-2,),
}  # fmt: skip
"""Axes that each product sums over."""
TABLES = ("embed", "unembed")
"""No other array is held in 8 bits: norms, biases, routers."""

EXPERTS = with_experts(
    small_model(vocab_size=264, n_layers=3),
    Experts(n_experts=4, d_ff=24, router=TopKRouter(top_k=2), n_shared_experts=1),
    first_dense=1,
)
MODELS = {
    "tied": with_attention(small_model(vocab_size=264, head=LmHead(tied=True)), qkv_bias=True),
    "norm head": small_model(
        vocab_size=264, head=LmHead(tied=True, normalized=True, bias=True, soft_cap=3.0), embedding_scale=2.0
    ),
    "experts": EXPERTS,
    "latents": latent_model(small_model(vocab_size=264), query_rank=8),
}


@pytest.mark.parametrize("name", ["tied", "norm head", "latents", pytest.param("experts", marks=pytest.mark.slow)])
def test_a_model_says_what_its_rounded_weights_say(name: str) -> None:
    model, sharding = MODELS[name], ShardingConfig(data=1, fsdp=2, tensor=2)
    parameters = parameters_of(small_run(model))

    def rounded(path: Any, x: jax.Array) -> jax.Array:
        if path[-1].key in TABLES:
            return jnp.asarray(table_by_hand(np.asarray(x)), jnp.float32)
        axes = SUMMED.get(path[-1].key)
        return x if axes is None else jnp.asarray(by_hand(np.asarray(x), *axes), jnp.float32)

    how = Execution.of(small_run(model=model), layout := make_layout(sharding, jax.devices()[:4])).decoding(layout)
    place = lambda parameters, weights=WeightFormat.DTYPE: held(parameters, model, how, weights)
    in_8_bits = place(parameters, WeightFormat.INT8)
    texts = np.random.default_rng(1).integers(0, 264, (2, 12)).tolist()
    read = lambda parameters: np.stack(through_cache(model, parameters, how, texts, widths=[4]))
    want, got, full = map(
        read, (place(jax.tree_util.tree_map_with_path(rounded, parameters)), in_8_bits, place(parameters))
    )
    np.testing.assert_allclose(got, want, atol=2e-5, rtol=1e-5)
    assert 1e-3 < np.abs(got - full).max() < 0.1 * np.abs(full).max()

    for path, leaf in jax.tree_util.tree_leaves_with_path(in_8_bits):
        name = [key.key for key in path if isinstance(key, jax.tree_util.DictKey)][-1]
        of_scales = isinstance(path[-1], jax.tree_util.GetAttrKey) and path[-1].name == "scales"
        of_what = jnp.bfloat16 if name in TABLES else jnp.float32
        assert leaf.dtype == (of_what if of_scales or name not in {*SUMMED, *TABLES} else jnp.int8), path
