"""Training with products in 8 bits, and with weights rounded to what they will be held in."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from aot import Case, compile_all, complaints, require_compiler
from helpers import (
    FLOAT32,
    gradient_function,
    initial_parameters,
    one_device,
    packed_batch,
    place,
    small_model,
    small_run,
)
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from maxlm.config import (
    Adapter,
    Float8Products,
    Int8Products,
    Lora,
    PlainProducts,
    Products,
    RoundedWeights,
    RunConfig,
    ShardingConfig,
    TrainMedusa,
    UserError,
    WeightFormat,
)
from maxlm.models import declared
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised
from maxlm.models.weights.narrow import narrow_einsum
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.in_products import in_products

RANDOM = np.random.default_rng(0)
X, W, G = (RANDOM.normal(size=size).astype(np.float32) for size in ((2, 5, 12), (12, 3, 4), (2, 5, 3, 4)))
PRODUCT = "btd,dnh->btnh"


def with_products(products: Products, **changes: Any) -> RunConfig:
    return dataclasses.replace(small_run(**changes), execution=dataclasses.replace(FLOAT32, products=products))


def whole_numbers(x: np.ndarray, axes: tuple[int, ...]) -> np.ndarray:
    """In float64: what x becomes with a scale for each vector along those axes."""
    scale = np.abs(x).astype(np.float64).max(axes, keepdims=True) / 127
    return np.round(x / scale) * scale


def short_floats(x: np.ndarray, dtype: Any) -> np.ndarray:
    """In float64: what x becomes with one scale."""
    scale = np.float32(np.abs(x).max()) / np.float32(ml_dtypes.finfo(dtype).max)
    return (x / scale).astype(dtype).astype(np.float64) * np.float64(scale)


def product_and_slopes(products: Any) -> tuple[Any, ...]:
    y, pull = jax.vjp(lambda x, w: narrow_einsum(products, PRODUCT, x, w), X, W)
    return y, *pull(G)


def test_integers_are_summed_exactly() -> None:
    y, dx, dw = product_and_slopes(Int8Products())
    np.testing.assert_allclose(y, np.einsum(PRODUCT, whole_numbers(X, (2,)), whole_numbers(W, (0,))), rtol=1e-5)
    slopes = whole_numbers(G, (2, 3)), whole_numbers(W, (1, 2))
    np.testing.assert_allclose(dx, np.einsum("btnh,dnh->btd", *slopes), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(dw, np.einsum("btd,btnh->dnh", X, G), rtol=1e-5, atol=1e-6)


def test_short_floats_have_more_range_in_gradients() -> None:
    y, dx, dw = product_and_slopes(Float8Products())
    x, w, g = (short_floats(*pair) for pair in (
        (X, ml_dtypes.float8_e4m3fn), (W, ml_dtypes.float8_e4m3fn), (G, ml_dtypes.float8_e5m2),
    ))  # fmt: skip
    np.testing.assert_allclose(y, np.einsum(PRODUCT, x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("btnh,dnh->btd", g, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btnh->dnh", x, g), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("products", [Int8Products(), Float8Products()])
def test_products_of_zeros_are_zero(products: Any) -> None:
    y, pull = jax.vjp(lambda x, w: narrow_einsum(products, PRODUCT, x, w), jnp.zeros_like(X), jnp.zeros_like(W))
    assert all(not np.asarray(leaf).any() for leaf in (y, *pull(jnp.zeros_like(G))))


def losses(products: Products, steps: int) -> list[float]:
    config = with_products(products, steps=steps)
    trainer = make_trainer(config, one_device())
    state, found = trainer.init(), []
    for step in range(steps):
        state, output = trainer.step(state, place(packed_batch(config, seed=step % 2), trainer))
        found.append(float(output.figures["loss"]))
    return found


@pytest.mark.nightly
def test_as_much_is_learned_in_8_bits() -> None:
    plain = losses(PlainProducts(), 40)
    assert plain[-1] < plain[0] - 0.5
    for products in (Int8Products(), Float8Products(), RoundedWeights()):
        found = losses(products, 40)
        assert found != plain, "nothing was rounded"
        assert abs(found[-1] - plain[-1]) < 0.03 * plain[-1], products


@pytest.mark.parametrize(
    "form", [WeightFormat.INT4, *(pytest.param(one, marks=pytest.mark.nightly) for one in (
        WeightFormat.INT8, WeightFormat.INT4_AFFINE, WeightFormat.FP8, WeightFormat.NF4,
    ))],
)  # fmt: skip
def test_rounding_passes_gradients_on_from_where_it_comes_to(form: WeightFormat) -> None:
    """Loss and gradient are those of the plain model at the weights that `maxlm.quantize` makes."""
    config = with_products(RoundedWeights(format=form, group_size=16), steps=1)
    parameters, batch = initial_parameters(config.model, seed=1), packed_batch(config)
    held = jax.tree.map(
        lambda array, w: w if isinstance(q := quantised(w, array, form, 16), jax.Array) else q.dense(jnp.float32),
        declared(config.model),
        parameters,
    )
    plain = jax.jit(gradient_function(with_products(PlainProducts(), steps=1), one_device()))
    sums, gradients = jax.jit(gradient_function(config, one_device()))(parameters, batch)
    (want, slopes), (other, _) = plain(held, batch), plain(parameters, batch)
    np.testing.assert_allclose(sums.objective, want.objective, rtol=1e-6)
    assert abs(float(sums.objective - other.objective)) > 1e-4 * float(other.objective)
    for name, (got, wanted) in enumerate(zip(jax.tree.leaves(gradients), jax.tree.leaves(slopes), strict=True)):
        np.testing.assert_allclose(got, wanted, atol=2e-4, rtol=1e-4, err_msg=str(name))


@pytest.mark.parametrize("products", [RoundedWeights(), Int8Products()])
def test_what_is_held_in_fewer_bits_stays(products: Products) -> None:
    """The config of a run says how it was trained, also once `maxlm.quantize` has made another of it."""
    model = small_model()
    held = jax.tree.map(
        lambda array, w: quantised(w, array, WeightFormat.INT8), declared(model), initial_parameters(model)
    )
    kept = [w for w in jax.tree.leaves(held, is_leaf=lambda w: isinstance(w, Quantised)) if isinstance(w, Quantised)]
    made = jax.tree.leaves(in_products(products, model, held), is_leaf=lambda w: isinstance(w, Quantised))
    assert kept and all(any(w is other for other in made) for w in kept)


@pytest.mark.nightly
@pytest.mark.parametrize("products", [Int8Products(), Float8Products()])
def test_scales_are_of_whole_vectors_on_every_mesh(products: Products) -> None:
    """The last bits of activations differ on a mesh, and now and then one is rounded the other way."""
    parameters = initial_parameters(small_model(), seed=1)
    found = []
    for sharding, n in ((ShardingConfig(), 1), (ShardingConfig(data=2, fsdp=2, tensor=2), 8)):
        config = with_products(products, sharding=sharding)
        layout = make_layout(sharding, jax.devices()[:n])
        batch = jax.device_put(packed_batch(config), layout.sharding(layout.activation("batch", "seq")))
        sums, gradients = jax.jit(gradient_function(config, layout))(parameters, batch)
        found.append(jax.device_get((sums.objective, gradients)))
    (loss, slopes), (other, others) = found
    np.testing.assert_allclose(loss, other, rtol=1e-4)
    for one, two in zip(jax.tree.leaves(slopes), jax.tree.leaves(others), strict=True):
        assert np.linalg.norm(one - two) < 0.02 * np.linalg.norm(two)


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: RoundedWeights(format=WeightFormat.W8A8), "execution.products.format = w8a8"),
        (lambda: RoundedWeights(format=WeightFormat.DTYPE), "execution.products.format = dtype"),
        (
            lambda: dataclasses.replace(
                with_products(Int8Products()), model=small_model(adapter=Adapter(kind=Lora(rank=2)))
            ).validate(1),
            "execution.products = Int8Products is for weights that are trained, and under model.adapter",
        ),
        (
            lambda: dataclasses.replace(with_products(Float8Products()), task=TrainMedusa()).validate(1),
            "execution.products = Float8Products is for weights that are trained, and in task = TrainMedusa",
        ),
    ],
)
def test_what_cannot_be_rounded_is_refused(make: Any, words: str) -> None:
    with pytest.raises(UserError, match=re.escape(words)):
        make()


def cases(chip: str) -> dict[str, Case]:
    """Forward and backward pass of a product, in the sizes of a 7B model."""

    def lowered(products: Any) -> Any:
        def lower(devices: Sequence[Any]) -> jax.stages.Lowered:
            here = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), P())
            x, w = (
                jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=here) for shape in ((2, 2048, 4096), (4096, 32, 128))
            )
            square = lambda x, w: (narrow_einsum(products, PRODUCT, x, w).astype(jnp.float32) ** 2).sum()
            return jax.jit(jax.grad(square, (0, 1)), out_shardings=here).lower(x, w)

        return lower

    return {
        type(products).__name__: Case(lowered(products), (), 2**30, products=factors[chip])
        for products, factors in (
            (Float8Products(), {"h200": ("f8e4m3fn x f8e4m3fn", "f8e4m3fn x f8e5m2", "f8e5m2 x f8e4m3fn")}),
            (Int8Products(), {"h200": ("bf16 x bf16", "s8 x s8")}),
        )
    }


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["h200"])
def test_chips_multiply_8_bits(chip: str) -> None:
    require_compiler(chip)
    programs = cases(chip)
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]
