"""Weights of fewer bits: their layouts and errors in float64 numpy, and products with them."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers import one_device, small_model
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.checkpoint.store import named_leaves
from maxlm.config import ShardingConfig, WeightFormat
from maxlm.models import declared, init_parameters, ops
from maxlm.models.weights.by_channel import Float8, Int8Activations, Int8Outliers
from maxlm.models.weights.by_group import ByGroup, group_of
from maxlm.models.weights.by_layer import ByLayer, slices
from maxlm.models.weights.holding import GROUP, format_of, kinds_of, quantised, shardings, with_kinds
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.models.weights.normal_float import LEVELS, NormalFloat4, dynamic_map
from maxlm.models.weights.watched import SeenInputs, Watched
from maxlm.sharding import make_layout

RNG = np.random.default_rng(0)
SIZES = st.floats(1e-15, 1e15)
SEEDS = st.integers(0, 2**32 - 1)


def draw(seed: int, size: float, *shape: int) -> np.ndarray:
    w = np.random.default_rng(seed).normal(size=shape) * np.exp(np.random.default_rng(seed + 1).normal(size=shape[-1]))
    return (w * size).astype(np.float32)


def by_hand(held: ByGroup) -> np.ndarray:
    """float64, from the bytes: of a group, the first half lies in the low bits."""
    values, scales = np.asarray(held.values), np.asarray(held.scales, np.float64)
    at, groups = values.ndim + held.axis, scales.shape[held.axis]
    values, scales = np.moveaxis(values, at, 0), np.moveaxis(scales, at, 0)
    offsets = None if held.offsets is None else np.moveaxis(np.asarray(held.offsets, np.float64), at, 0)
    of_group = len(values) // groups
    rows = []
    for g in range(groups):
        part = values[g * of_group : (g + 1) * of_group]
        codes = np.concatenate([part % 16, part // 16]).astype(np.float64) if part.dtype == np.uint8 else part
        if offsets is None and part.dtype == np.uint8:
            codes = codes - 8
        rows.append(codes * scales[g] + (0 if offsets is None else offsets[g]))
    return np.moveaxis(np.concatenate(rows), 0, at)


@given(SEEDS, SIZES, st.booleans())
@settings(max_examples=20, deadline=None)
def test_no_number_in_4_bits_is_off_by_more_than_its_scale_allows(seed: int, size: float, symmetric: bool) -> None:
    w = draw(seed, size, 3, 32, 5)
    w[1, :16] = 0
    held = ByGroup.of(jnp.asarray(w), -2, 16, symmetric=symmetric)
    scales = np.repeat(np.asarray(held.scales, np.float64), 16, 1)
    exact = by_hand(held)
    assert held.shape == w.shape and held.group == 16 and held.values.nbytes == w.size // 2
    np.testing.assert_allclose(np.asarray(held.dense(jnp.float32)), exact, rtol=1e-6, atol=1e-6 * scales.max())
    assert (np.abs(exact - w) <= scales * (0.54 if symmetric else 1.07) + 1e-45).all()
    assert (exact[1, :16] == 0).all()
    largest = np.abs(w.reshape(3, 2, 16, 5)).max(2)
    if symmetric:  # the formula of the scale
        np.testing.assert_array_equal(held.scales, (largest / np.float32(7.5)).astype(ml_dtypes.bfloat16))
    else:
        assert (exact[w == 0] == 0).all()


@given(SEEDS, SIZES)
@settings(max_examples=20, deadline=None)
def test_floats_of_8_bits_are_off_by_a_sixteenth(seed: int, size: float) -> None:
    w = draw(seed, size, 7, 5)
    held = Float8.of(jnp.asarray(w), (0,))
    largest = np.abs(w).max(0)
    exact = np.asarray(held.values).astype(np.float64) * np.asarray(held.scales, np.float64)
    assert held.values.dtype == jnp.float8_e4m3fn
    np.testing.assert_allclose(np.asarray(held.dense(jnp.float32)), exact, rtol=1e-6)
    assert (np.abs(exact - w) <= np.maximum(np.abs(w) / 16, largest / 458_752) * (1 + 1e-5)).all()


def test_nf4_is_that_of_bitsandbytes_bit_for_bit() -> None:
    """A matrix [outputs, inputs] that bitsandbytes 0.50.2 quantised once: codes in pairs, the first in the high bits;
    scales by its generic path (that of CPUs has thresholds that are off by up to 1/2000 of a gap)."""
    with np.load(Path(__file__).parent / "nf4_reference.npz", allow_pickle=False) as stored:
        known = dict(stored)
    w = known["w"].astype(np.float32)
    held = NormalFloat4.of(jnp.asarray(w.T), 1, 1)
    pairs = np.asarray(held.codes()).T.reshape(-1, 2)
    np.testing.assert_array_equal(LEVELS, known["levels"])
    np.testing.assert_array_equal(dynamic_map(), known["map"])
    np.testing.assert_array_equal(pairs[:, 0] << 4 | pairs[:, 1], known["packed"])
    np.testing.assert_array_equal(held.absmax, known["absmax"])
    np.testing.assert_array_equal(held.scales, known["scales"])
    assert float(held.mean) == known["mean"]
    np.testing.assert_array_equal(np.asarray(held.dense(jnp.float32)).T[3:5], known["row"])
    assert sum(x.nbytes for x in jax.tree.leaves(held)) * 8 / w.size == pytest.approx(4.127, abs=6e-3)


def test_nf4_of_stacks_and_several_dims_is_that_of_each_matrix() -> None:
    w = draw(3, 0.02, 2, 3, 64, 4, 2)  # two layers, [3, 64] inputs, [4, 2] outputs
    held = NormalFloat4.of(jnp.asarray(w), 2, 2)
    for layer in range(2):
        flat = NormalFloat4.of(jnp.asarray(w[layer].reshape(192, 8)), 1, 1)
        for name in ("absmax", "scales", "mean"):
            np.testing.assert_array_equal(getattr(held[layer], name), getattr(flat, name))
        want = np.asarray(flat.dense(jnp.float32)).reshape(3, 64, 4, 2)
        np.testing.assert_array_equal(held[layer].dense(jnp.float32), want)
        np.testing.assert_array_equal(held.dense(jnp.float32)[layer], want)
    blocks = np.abs(w).reshape(2, 3, 1, 64, 4, 2).max(3, keepdims=True)
    off = np.abs(np.asarray(held.dense(jnp.float32)) - w).reshape(2, 3, 1, 64, 4, 2)
    spread = np.abs(blocks - blocks.mean((1, 2, 3, 4, 5), keepdims=True)).max()
    assert (off <= 0.153 * blocks + 0.01 * spread).all()


def rounded(x: np.ndarray) -> np.ndarray:
    """float64 [tokens, I] in 8 bits by token."""
    step = np.abs(x).max(1, keepdims=True) / 127
    return np.round(x / np.where(step == 0, 1, step)) * step


def test_products_with_every_kind() -> None:
    layout, (B, T, N, H, D) = one_device(), (2, 3, 2, 64, 20)
    x = RNG.normal(size=(B, T, N, H)).astype(np.float32)
    x[0, 1, 1, 7], x[1, 2, 0, 3] = 9.0, -40.0
    w = draw(1, 0.05, N, H, D)
    ids = (0, 1)
    kinds: dict[str, Weight] = {
        "fp8": Float8.of(jnp.asarray(w), ids),
        "w8a8": Int8Activations.of(jnp.asarray(w), ids),
        "outliers": Int8Outliers.of(jnp.asarray(w), ids),
        "int4": ByGroup.of(jnp.asarray(w), -2, 32),
        "affine": ByGroup.of(jnp.asarray(w), -2, 32, symmetric=False),
        "nf4": NormalFloat4.of(jnp.asarray(w), 2, 1),
        "watched": Watched(jnp.asarray(w), SeenInputs.none(N * H)),
    }
    product = jax.jit(lambda held: ops.project(layout, "btnh,nhd->btd", jnp.asarray(x), held))
    rows = x.reshape(B * T, -1).astype(np.float64)
    beyond = np.where(np.abs(rows) > 6, rows, 0)
    for name, held in kinds.items():
        dense = np.asarray(held.dense(jnp.float32), np.float64).reshape(-1, D)  # type: ignore[union-attr]
        seen = {"w8a8": rounded(rows), "outliers": rounded(rows - beyond) + beyond}.get(name, rows)
        np.testing.assert_allclose(product(held).reshape(-1, D), seen @ dense, atol=3e-5, err_msg=name)
    # The outliers' whole use: theirs is the error of rows that have one.
    exact = rows @ w.reshape(-1, D)
    error = {
        name: np.abs(np.asarray(product(held)).reshape(-1, D) - exact)[[1, 5]].max() for name, held in kinds.items()
    }
    assert error["outliers"] < 0.5 * error["w8a8"]


def test_a_weight_is_the_same_in_a_loop_over_layers() -> None:
    layout, (L, D, F) = one_device(), (3, 64, 64)
    w, x = draw(2, 0.05, L, D, F), RNG.normal(size=(1, 2, D)).astype(np.float32)
    arrays = [
        Int8Outliers.of(jnp.asarray(w), (1,)),
        ByGroup.of(jnp.asarray(w), -2, 16),
        NormalFloat4.of(jnp.asarray(w), 1, 1),
    ]

    @jax.jit
    def loop(held: Any) -> jax.Array:
        sliced, of_layer = slices(held)
        turn = lambda x, one: (jnp.tanh(ops.project(layout, "btd,df->btf", x, of_layer(one))), None)
        return jax.lax.scan(turn, x, sliced)[0]

    for held in (jnp.asarray(w), *arrays):
        want = jnp.asarray(x)
        layers = [jax.tree.map(lambda array, i=i: array[i], held) for i in range(L)]
        for layer in layers:
            want = jnp.tanh(ops.project(layout, "btd,df->btf", want, layer))
        np.testing.assert_allclose(loop(held), want, atol=1e-6)
        np.testing.assert_allclose(loop(ByLayer(tuple(layers), jnp.arange(L))), want, atol=1e-6)


def test_what_a_watched_weight_sees_comes_back_as_a_gradient() -> None:
    layout, (B, T, N, H, D) = one_device(), (2, 3, 2, 4, 5)
    x, w = RNG.normal(size=(B, T, N, H)).astype(np.float32), draw(4, 1.0, N, H, D)

    @jax.jit
    def both(seen: SeenInputs) -> tuple[jax.Array, SeenInputs]:
        product = lambda seen: ops.project(layout, "btnh,nhd->btd", jnp.asarray(x), Watched(jnp.asarray(w), seen))
        y, pull = jax.vjp(product, seen)
        return y, pull(jnp.ones_like(y))[0]

    y, seen = both(SeenInputs.none(N * H))
    rows = x.reshape(-1, N * H).astype(np.float64)
    np.testing.assert_allclose(y.reshape(-1, D), rows @ w.reshape(-1, D), atol=1e-5)
    np.testing.assert_allclose(seen.gram, rows.T @ rows, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(seen.size, np.abs(rows).sum(0), rtol=1e-6)
    np.testing.assert_array_equal(seen.largest, np.abs(x).reshape(-1, N * H).max(0))


@pytest.mark.parametrize(
    ("size", "wanted", "found"), [(576, 128, 64), (1536, 128, 128), (80, 128, 16), (9, 128, None), (12, 128, None)]
)
def test_groups_divide_what_they_are_of(size: int, wanted: int, found: int | None) -> None:
    assert group_of(size, wanted) == found


def test_every_format_of_a_model_on_a_mesh() -> None:
    """Which arrays become what, where they lie, and that a tree is found again from its arrays' names."""
    model = small_model(d_model=64, vocab_size=264)
    parameters = jax.jit(functools.partial(init_parameters, model))(jax.random.key(0))
    layout = make_layout(ShardingConfig(data=1, fsdp=2, tensor=2), jax.devices()[:4])
    for wanted in WeightFormat:
        hold = lambda array, w, wanted=wanted: quantised(w, array, wanted, GROUP)
        held = jax.jit(lambda tree, hold=hold: jax.tree.map(hold, declared(model), tree))(parameters)
        placed = jax.device_put(held, shardings(layout, model, held))
        for array in jax.tree.leaves(declared(model)):
            *path, name = array.name.split("/")
            weight: Any = functools.reduce(lambda place, key: place[key], [*path, name], placed)
            assert isinstance(weight, Quantised) == (format_of(array, wanted) is not WeightFormat.DTYPE)
            if isinstance(weight, Quantised):
                assert weight.shape == array.shape and (array.inputs or wanted is WeightFormat.DTYPE)
                whole = layout.sharding(layout.parameter(array.dims)).shard_shape(array.shape)
                part = weight.values.sharding.shard_shape(weight.values.shape)
                assert np.prod(part) <= np.prod(whole), array.name
        named = named_leaves(held)
        again = with_kinds(model, kinds_of(model, held), named, parameters)
        assert jax.tree.structure(again) == jax.tree.structure(held)
        assert all(a is named.get(name, a) for name, a in named_leaves(again).items() if a.dtype != jnp.float32)
