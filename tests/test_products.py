"""Training with products in 8 bits, and with weights rounded to what they will be held in."""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import qwix
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
    Capacity,
    DelayedScaling,
    ExpertChoiceRouter,
    Experts,
    Float8Products,
    Int8Products,
    Lora,
    PlainProducts,
    Products,
    RoundedWeights,
    RunConfig,
    ShardingConfig,
    TopKRouter,
    TrainMedusa,
    UserError,
    WeightFormat,
)
from maxlm.models import declared
from maxlm.models.ops.narrow_groups import narrow_grouped
from maxlm.models.weights.holding import quantised
from maxlm.models.weights.kinds import Quantised
from maxlm.models.weights.narrow import narrow_einsum, scales_of
from maxlm.sharding import make_layout
from maxlm.training import Trainer, make_trainer
from maxlm.training.in_products import in_products
from maxlm.training.keeper import Keeper
from maxlm.training.spikes import Spikes

RANDOM = np.random.default_rng(0)
X, W, G = (RANDOM.normal(size=size).astype(np.float32) for size in ((2, 5, 12), (12, 3, 4), (2, 5, 3, 4)))
PRODUCT = "btd,dnh->btnh"
FLOATS = "f8e4m3fn x f8e4m3fn", "f8e4m3fn x f8e5m2", "f8e5m2 x f8e4m3fn"


DELAYED = Float8Products(scaling=DelayedScaling(history=4))


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


def test_qwix_makes_the_same_products() -> None:
    """Another library, told what is to be rounded how: forward, and for the gradient of activations. Its integers have
    127.5 steps on each side where ours have 127, so that of them errors are compared."""

    def errors(products: Any, dtypes: tuple[Any, Any], **axes: tuple[int, ...]) -> list[list[np.ndarray]]:
        held = lambda name, x, dtype: qwix.quantize(jnp.asarray(x), dtype, channelwise_axes=axes.get(name, ()))
        forward, back = dtypes
        theirs = (
            qwix.einsum(PRODUCT, held("x", X, forward), held("w", W, forward)),
            qwix.einsum("btnh,dnh->btd", held("g", G, back), held("w_back", W, forward)),
        )
        exact = np.einsum(PRODUCT, X, W), np.einsum("btnh,dnh->btd", G, W)
        return [[np.asarray(y) - right for y, right in zip(of, exact, strict=True)] for of in
                (product_and_slopes(products)[:2], theirs)]  # fmt: skip

    ours, theirs = errors(Float8Products(), (jnp.float8_e4m3fn, jnp.float8_e5m2))
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)
    axes = {"x": (0, 1), "w": (1, 2), "g": (0, 1), "w_back": (0,)}
    ours, theirs = errors(Int8Products(), (jnp.int8, jnp.int8), **axes)
    for one, other in zip(ours, theirs, strict=True):
        assert np.std(one) < 1.1 * np.std(other) < 0.05


def test_delayed_scales_are_those_of_the_largest_number_of_some_steps() -> None:
    """With them numbers are rounded as theirs are, and larger ones are the largest; what stands for their gradient is
    the largest numbers now."""
    history = np.array([[[1.0, 3, 2], [0.5, 0, 0.25], [7, 1, 2]], [[0, 0, 0], [0, 2, 0], [0, 0, 0]]], np.float32)
    want = [[3 * 4 / 448, 0.5 * 4 / 448, 7 * 4 / 57344], [1, 2 * 4 / 448, 1]]
    np.testing.assert_allclose(scales_of(history, 2), want, rtol=1e-6)

    def rounded(x: np.ndarray, scale: float, dtype: Any) -> np.ndarray:
        top = float(ml_dtypes.finfo(dtype).max)
        return np.clip(x / np.float32(scale), -top, top).astype(dtype).astype(np.float64) * np.float64(scale)

    scales = np.array([1 / 256, np.abs(W).max() / 100, np.abs(G).max() / 57344], np.float32)
    product = lambda x, w, scales: narrow_einsum(Float8Products(scaling=DelayedScaling()), PRODUCT, x, w, scales)
    y, pull = jax.vjp(product, X, W, scales)
    dx, dw, largest = pull(G)
    x, w = (rounded(*of, ml_dtypes.float8_e4m3fn) for of in ((X, scales[0]), (W, scales[1])))
    g = rounded(G, scales[2], ml_dtypes.float8_e5m2)
    assert np.abs(x).max() == 448 / 256 < np.abs(X).max(), "some were larger"
    np.testing.assert_allclose(y, np.einsum(PRODUCT, x, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dx, np.einsum("btnh,dnh->btd", g, w), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(dw, np.einsum("btd,btnh->dnh", x, g), rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(largest, [np.abs(X).max(), np.abs(W).max(), np.abs(G).max()])


@pytest.fixture(scope="module")
def delayed() -> tuple[RunConfig, Trainer]:
    config = with_products(DELAYED, steps=4, micro_batches=2)
    return config, make_trainer(config, one_device())


def test_the_state_remembers_the_largest_numbers(delayed: tuple[RunConfig, Trainer]) -> None:
    """Of weights they are those of the parameters of each step and layer, the newest first; a step that was not finite
    leaves none."""
    config, trainer = delayed
    batch, state, seen = place(packed_batch(config), trainer), trainer.init(), list[np.ndarray]()
    for broken in (False, True, False):
        weight = state.parameters["blocks"]["0"]["attention"]["q_proj"]
        if not broken:
            seen.insert(0, np.abs(weight).max((1, 2, 3)))
        one = batch | ({"loss_mask": batch["loss_mask"] * np.nan} if broken else {})
        state, _ = trainer.step(state, one)
    assert int(state.skipped) == 1
    history = np.asarray(state.stability.largest["blocks/0/attention/q_proj"])
    assert history.shape == (2, 3, 4)
    np.testing.assert_array_equal(history[:, 1, :2], np.stack(seen, 1))
    assert (history[..., :2] > 0).all() and (history[..., 2:] == 0).all()


def test_an_infinite_number_is_no_good_step(delayed: tuple[RunConfig, Trainer]) -> None:
    """Clipped to the largest one of 8 bits it makes finite losses and gradients."""
    config, trainer = delayed
    begun = trainer.init()
    attention = begun.parameters["blocks"]["0"]["attention"]
    attention["q_proj"] = attention["q_proj"].at[0, 0, 0, 0].set(jnp.inf)
    before = jax.device_get(begun)
    state, out = trainer.step(begun, place(packed_batch(config), trainer))
    assert np.isfinite(out.figures["loss"]) and int(state.skipped) == int(state.skipped_in_row) == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.stability), before.stability)
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(state.parameters), before.parameters)


@pytest.mark.nightly
def test_micro_batches_have_the_largest_of_all(delayed: tuple[RunConfig, Trainer]) -> None:
    """As their batch has, in a first step, whose scales are 1."""
    config, trainer = delayed
    whole = make_trainer(with_products(DELAYED, steps=4), one_device())
    states = [one.step(one.init(), place(packed_batch(config), one))[0] for one in (trainer, whole)]
    for one, two in zip(*(jax.tree.leaves(state.stability.largest) for state in states), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-4)


@pytest.mark.nightly
def test_a_run_goes_on_with_its_scales(delayed: tuple[RunConfig, Trainer], tmp_path: Path) -> None:
    """Bit for bit; with another history it has the newest of it; with other products it goes on without, and one that
    had none begins with none."""
    config, trainer = delayed
    config = dataclasses.replace(config, run_dir=str(tmp_path))
    batch = place(packed_batch(config), trainer)
    state, _ = trainer.step(trainer.init(), batch)

    def keeper(config: RunConfig) -> Keeper:
        return Keeper(config, trainer.layout, {"data": "", "tokenizer": ""}, allow_change=(), warn=lambda _: None)

    with keeper(config) as first:
        assert first.restore(trainer.state) is None
        first.begin()
        first.save(state, 1, {}, Spikes(config, {}), {})
        first.wait()
    with keeper(config) as second:
        restored = second.restore(trainer.state)
    assert restored is not None
    for steps in (2, 6):
        scaling = dataclasses.replace(FLOAT32, products=Float8Products(scaling=DelayedScaling(history=steps)))
        longer = dataclasses.replace(config, execution=scaling)
        with keeper(longer) as one:
            found = one.restore(make_trainer(longer, trainer.layout).state)
        assert found is not None
        for name, kept in found.stability.largest.items():
            want = np.asarray(state.stability.largest[name])
            assert kept.shape[-1] == steps and not kept[..., 4:].any()
            np.testing.assert_array_equal(kept[..., :4], want[..., :steps])
    plainly = dataclasses.replace(config, execution=FLOAT32)
    wanted = dataclasses.replace(trainer.state, stability=trainer.state.stability._replace(largest=None))
    with keeper(plainly) as third:
        other = third.restore(wanted)
        assert other is not None and other.stability.largest is None
        third.begin()
        third.save(dataclasses.replace(other, step=other.step + 1), 2, {}, Spikes(plainly, {}), {})
        third.wait()
    with keeper(config) as fourth:
        again = fourth.restore(trainer.state)
    assert again is not None and not any(np.asarray(x).any() for x in again.stability.largest.values())
    ends = [jax.device_get(trainer.step(one, batch)[0]) for one in (state, restored)]
    jax.tree.map(np.testing.assert_array_equal, *ends)


@pytest.mark.parametrize("products", [Int8Products(), Float8Products()])
def test_grouped_products_are_those_of_each_group(products: Any) -> None:
    """One group is empty, and rows of none are no numbers; of 8-bit floats there is one scale for all rows and one for
    all matrices, of integers one a row and one an output of each."""
    rng, sizes, n = np.random.default_rng(1), np.array([3, 0, 2], np.int32), 5
    x, w, g = (rng.normal(size=size).astype(np.float32) for size in ((7, 12), (3, 12, 4), (7, 4)))
    of_row = np.repeat(np.arange(3), sizes)
    x[n:], g[n:] = np.nan, np.inf

    @jax.jit
    def product_and_slopes(x: jax.Array, w: jax.Array, g: jax.Array) -> tuple[jax.Array, ...]:
        y, pull = jax.vjp(lambda x, w: narrow_grouped(products, x, w, jnp.asarray(sizes)), x, w)
        return y, *pull(g)

    y, dx, dw = product_and_slopes(x, w, g)
    if isinstance(products, Int8Products):
        forward = whole_numbers(x[:n], (1,)), whole_numbers(w, (1,))
        backward = whole_numbers(g[:n], (1,)), whole_numbers(w, (2,))
        summed = x[:n], g[:n]
    else:
        rows, matrices = (short_floats(one, ml_dtypes.float8_e4m3fn) for one in (x[:n], w))
        slopes = short_floats(g[:n], ml_dtypes.float8_e5m2)
        forward, backward, summed = (rows, matrices), (slopes, matrices), (rows, slopes)
    outer = np.einsum("md,mf->mdf", *summed)
    want = (
        np.einsum("md,mdf->mf", forward[0], forward[1][of_row]),
        np.einsum("mf,mdf->md", backward[0], backward[1][of_row]),
        np.stack([outer[of_row == e].sum(0) for e in range(3)]),
    )
    for got, wanted in zip((y[:n], dx[:n], dw), want, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)
    assert not np.asarray(y[n:]).any() and not np.asarray(dx[n:]).any()


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
    for products in (Int8Products(), Float8Products(), DELAYED, RoundedWeights()):
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
@pytest.mark.parametrize(
    "experts",
    [
        Experts(n_experts=4, d_ff=16, router=TopKRouter(top_k=2)),
        Experts(n_experts=4, d_ff=16, router=TopKRouter(top_k=2), dispatch=Capacity(factor=2.0)),
        Experts(n_experts=4, d_ff=16, router=ExpertChoiceRouter(), dispatch=Capacity(factor=2.0)),
    ],
    ids=["dropless", "capacity", "expert_choice"],
)
@pytest.mark.parametrize("products", [Int8Products(experts=True), Float8Products(experts=True)])
def test_experts_are_in_8_bits_on_every_mesh(products: Any, experts: Experts) -> None:
    """The loss is near the plain one; the gradient is no more than twice as far from the plain one as with attention
    alone in 8 bits, and on a mesh no farther from this one."""
    (block,) = small_model().blocks
    model = small_model(blocks=(dataclasses.replace(block, mlp=experts),))
    parameters, found = initial_parameters(model, seed=1), list[Any]()
    for wanted, sharding, n in (
        (PlainProducts(), ShardingConfig(), 1),
        (dataclasses.replace(products, experts=False), ShardingConfig(), 1),
        (products, ShardingConfig(), 1),
        (products, ShardingConfig(data=1, fsdp=2, expert=2, tensor=2), 8),
    ):
        config = with_products(wanted, model=model, sharding=sharding)
        layout = make_layout(sharding, jax.devices()[:n])
        batch = jax.device_put(packed_batch(config), layout.sharding(layout.activation("batch", "seq")))
        sums, gradients = jax.jit(gradient_function(config, layout))(parameters, batch)
        mlp = gradients["blocks"]["0"]["mlp"]
        found.append(jax.device_get((sums.objective, [mlp[f"{name}_proj"] for name in ("gate", "up", "down")])))
    plain, attention, here, there = found
    assert here[0] != attention[0], "experts were not rounded"
    apart = lambda one, two: max(np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(one[1], two[1], strict=True))
    np.testing.assert_allclose([here[0], there[0]], plain[0], rtol=0.01)
    assert max(apart(here, plain), apart(there, here)) < 2 * apart(attention, plain) < 0.5


@pytest.mark.nightly
@pytest.mark.parametrize("products", [Int8Products(), Float8Products(), DELAYED])
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
            lambda: with_products(DELAYED, sharding=ShardingConfig(data=1, stage=2)).validate(2),
            "execution.products.scaling = DelayedScaling takes the largest number of a step, and a pipeline",
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
    """Forward and backward pass of a product, in the sizes of a 7B model; and of 8 experts, an eighth as wide."""

    def lowered(function: Any, *arguments: tuple[tuple[int, ...], Any]) -> Any:
        def lower(devices: Sequence[Any]) -> jax.stages.Lowered:
            here = NamedSharding(Mesh(np.array(devices[:1]), ("data",)), P())
            given = [jax.ShapeDtypeStruct(shape, dtype, sharding=here) for shape, dtype in arguments]
            square = lambda *of: (function(*of).astype(jnp.float32) ** 2).sum()
            return jax.jit(jax.grad(square, (0, 1)), out_shardings=here).lower(*given)

        return lower

    def with_largest(x: jax.Array, w: jax.Array, scales: jax.Array) -> jax.Array:
        return narrow_einsum(Float8Products(scaling=DelayedScaling()), PRODUCT, x, w, scales)

    dense = ((2, 2048, 4096), jnp.bfloat16), ((4096, 32, 128), jnp.bfloat16)
    grouped = ((4096, 4096), jnp.bfloat16), ((8, 4096, 1792), jnp.bfloat16), ((8,), jnp.int32)
    found = {"delayed": Case(lowered(with_largest, *dense, ((3,), jnp.float32)), (), 2**30, products=FLOATS)}
    for products, factors in ((Float8Products(), FLOATS), (Int8Products(), ("bf16 x bf16", "s8 x s8"))):
        name = type(products).__name__
        of_layer = functools.partial(narrow_einsum, products, PRODUCT)
        of_experts = functools.partial(narrow_grouped, products)
        found[name] = Case(lowered(of_layer, *dense), (), 2**30, products=factors)
        found[f"experts, {name}"] = Case(lowered(of_experts, *grouped), (), 2**29, products=factors)
    return found


@pytest.mark.nightly
@pytest.mark.parametrize("chip", ["h200", "tpu_7x"])
def test_chips_multiply_8_bits(chip: str) -> None:
    require_compiler(chip)
    programs = cases(chip)
    reports = compile_all(chip, __name__, programs)
    assert not [line for name, case in programs.items() for line in complaints(case, reports[name])]
