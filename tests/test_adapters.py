"""Adapters: what each computes, what is trained, and what stays as it is."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    gradient_function,
    initial_parameters,
    one_device,
    packed_batch,
    place,
    plainly,
    small_model,
    small_run,
)
from helpers import run_decoder as run

from maxlm.config import (
    Activation,
    AdaLora,
    AdamW,
    Adapter,
    AdapterKind,
    BaseFormat,
    Bottleneck,
    ConstantSchedule,
    Context,
    DyLora,
    Ia3,
    Lora,
    ModelConfig,
    ShardingConfig,
    UserError,
)
from maxlm.models import Tokens, abstract_parameters, bind, declared, ops
from maxlm.models.adapters import base_of, changed
from maxlm.models.merging import Weighted, merged, scaled, unmerged, weighted_sum
from maxlm.models.ops.ring import in_ring_order
from maxlm.models.weights.around import MlpAfter, SmallMlp
from maxlm.models.weights.low_rank import LowRank
from maxlm.shapes import PREFIX, Part, arrays
from maxlm.sharding import make_layout
from maxlm.training import make_trainer

BIASED = small_model(
    blocks=tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, qkv_bias=True))
        for block in small_model().blocks
    )
)
KINDS = {
    "lora": Lora(rank=2, rank_stabilized=True),
    "dora": Lora(rank=3, dora=True, targets=("q_proj", "mlp/*_proj")),
    "ia3": Ia3(),
    "series": Bottleneck(size=3),
    "parallel": Bottleneck(size=3, parallel=True, scale=4.0, targets=("down_proj",)),
    "dylora": DyLora(rank=2),
    "adalora": AdaLora(rank=3, target_rank=2),
}
nightly = [pytest.param(kind, marks=pytest.mark.nightly) for kind in ("lora", "ia3", "series", "dylora", "adalora")]


def with_adapter(kind: AdapterKind, model: ModelConfig = BIASED, **more: Any) -> ModelConfig:
    return dataclasses.replace(model, adapter=Adapter(kind=kind, **more))


@functools.cache
def forward(model: ModelConfig) -> Any:
    """Parameters -> logits of some tokens, [2, 9, V]."""
    ids = np.random.default_rng(0).integers(0, model.vocab_size, (2, 9), np.int32)
    tokens = Tokens(np.broadcast_to(np.arange(9, dtype=np.int32), ids.shape))

    @jax.jit
    def logits(parameters: Any) -> jax.Array:
        hidden = run(model, parameters, plainly(), ids, tokens).hidden
        return ops.logits(hidden, bind(model, parameters).unembedding)

    return logits


def base_tree(parameters: Any) -> Any:
    return {name: tree for name, tree in parameters.items() if name != PREFIX}


def varied(model: ModelConfig, parameters: Any, seed: int = 0) -> Any:
    """With other numbers in all arrays of the adapter, and in biases, which begin as zeros."""
    rng = np.random.default_rng(seed)

    def one(array: Any, x: Any) -> Any:
        moved = array.part is Part.ADAPTER or array.name.endswith("bias")
        return x + 0.2 * rng.standard_normal(x.shape, np.float32) if moved else x

    return jax.tree.map(one, declared(model), parameters)


@pytest.mark.parametrize("kind", ["dora", "parallel", *nightly])
def test_an_adapter_begins_as_its_base_and_ends_in_it(kind: str) -> None:
    model = with_adapter(KINDS[kind])
    parameters = initial_parameters(model)
    logits, plain = forward(model), forward(base_of(model))
    np.testing.assert_allclose(logits(parameters), plain(base_tree(parameters)), atol=2e-5)
    parameters = varied(model, parameters)
    found = logits(parameters)
    assert np.abs(found - plain(base_tree(parameters))).max() > 0.05
    if isinstance(KINDS[kind], Bottleneck):
        with pytest.raises(UserError, match="Bottleneck is a layer of its own"):
            merged(model, parameters)
        return
    whole = jax.jit(merged, static_argnums=0)(model, parameters)
    np.testing.assert_allclose(plain(whole), found, atol=5e-5)
    if kind == "dora":
        with pytest.raises(UserError, match="keep the base"):
            unmerged(model, whole, parameters[PREFIX])
        return
    again = jax.jit(unmerged, static_argnums=0)(model, whole, parameters[PREFIX])
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-6), again, parameters)


@pytest.mark.parametrize("base", [BaseFormat.FLOAT32, BaseFormat.NF4], ids=str)
def test_what_is_declared_is_what_is_built(base: BaseFormat) -> None:
    model = with_adapter(Lora(dora=True), base=base, full=("embed",))
    built = jax.eval_shape(lambda: initial_parameters(model))
    planned = abstract_parameters(model, one_device())
    assert jax.tree.map(lambda x: (x.shape, x.dtype), built) == jax.tree.map(lambda x: (x.shape, x.dtype), planned)
    trained = {array.name for array in arrays(model) if array.trained}
    names = [f"{name}_proj/{part}" for name in "qv" for part in ("a", "b", "magnitude")]
    assert trained == {"embed", *(f"adapter/blocks/0/attention/{name}" for name in names)}


def test_a_patterns_that_names_nothing_is_refused() -> None:
    with pytest.raises(UserError, match=r"targets has 'q_prok', and no array .* use q_proj or .*"):
        arrays(with_adapter(Lora(targets=("q_prok",))))
    with pytest.raises(UserError, match=r"full has 'lm_head'"):
        arrays(with_adapter(Lora(), full=("lm_head",)))
    with pytest.raises(UserError, match=r"full has blocks/0/attention/q_proj, which .*targets has too"):
        arrays(with_adapter(Lora(), full=("q_proj",)))
    with pytest.raises(UserError, match=r"in targets and inputs_of"):
        arrays(with_adapter(Ia3(targets=("mlp/*",))))


@pytest.mark.nightly  # in CI a run does it, in 4 bits
@pytest.mark.parametrize("kind", ["lora", "ia3", "parallel"])
def test_a_step_leaves_the_base_bit_for_bit(kind: str) -> None:
    bases = {"lora": BaseFormat.NF4, "ia3": BaseFormat.INT8, "parallel": BaseFormat.BFLOAT16}
    config = dataclasses.replace(
        small_run(with_adapter(KINDS[kind], base=bases[kind])),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule(), weight_decay=0.1),
    )
    trainer = make_trainer(config, one_device())
    step, state = trainer.start()
    before = jax.tree.map(np.array, state.parameters)
    batch = place(packed_batch(config), trainer)
    losses = []
    for _ in range(3):
        state, output = step(state, batch)
        losses.append(float(output.figures["loss"]))
    assert losses[2] < losses[1] < losses[0]
    jax.tree.map(np.testing.assert_array_equal, base_tree(before), base_tree(state.parameters))
    moved = jax.tree.map(lambda old, new: bool(np.any(old != new)), before[PREFIX], state.parameters[PREFIX])
    assert all(jax.tree.leaves(moved))


def test_gradients_are_the_projected_ones() -> None:
    """Of W + s A B: dA = s dW B^T and dB = s A^T dW, with dW of a model that has the sum as its weight."""
    kind = Lora(rank=2, alpha=6.0)
    model = with_adapter(kind, small_model())
    config, plain = small_run(model), small_run(small_model())
    parameters = varied(model, initial_parameters(model))
    batch = {name: jnp.asarray(x) for name, x in packed_batch(config).items()}
    _, found = jax.jit(gradient_function(config, one_device()))(parameters, batch)
    _, whole = jax.jit(gradient_function(plain, one_device()))(merged(model, parameters), batch)
    for name in ("q_proj", "v_proj"):
        d = np.asarray(whole["blocks"]["0"]["attention"][name], np.float64)
        own = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters[PREFIX]["blocks"]["0"]["attention"][name])
        da, db = np.einsum("ldnh,lrnh->ldr", d, own["b"]), np.einsum("ldr,ldnh->lrnh", own["a"], d)
        of_name = found[PREFIX]["blocks"]["0"]["attention"][name]
        np.testing.assert_allclose(of_name["a"], 3 * da, atol=1e-5 * np.abs(da).max() * 3, rtol=1e-4)
        np.testing.assert_allclose(of_name["b"], 3 * db, atol=1e-5 * np.abs(db).max() * 3, rtol=1e-4)
    assert jax.tree.leaves(found["blocks"]) == []


def low_rank(s: float, W: Any, own: Any, length: Any = None) -> Any:
    """W + s A B; with magnitudes, each output as long as its own, and the length below not differentiated."""
    whole = W + s * np.einsum("dr,rnh->dnh", own["a"], own["b"] * own.get("diagonal", np.ones(2))[:, None, None])
    return whole * own["magnitude"] / length if "magnitude" in own else whole


@pytest.mark.parametrize(
    ("kind", "weight"),
    [
        (Lora(rank=2, alpha=6.0), functools.partial(low_rank, 3.0)),
        (Lora(rank=2, alpha=6.0, rank_stabilized=True, dora=True), functools.partial(low_rank, 6 / 2**0.5)),
        (AdaLora(rank=2, target_rank=1, alpha=1.0), functools.partial(low_rank, 0.5)),
        (Ia3(targets=("q_proj",)), lambda W, own, _: W * own["outputs"]),
    ],
    ids=["lora", "dora, stabilised", "adalora", "ia3"],
)
def test_gradients_are_finite_differences(kind: AdapterKind, weight: Any) -> None:
    """Of one matrix with an adapter, in float64 numpy, number by number, by (f(x + h) - f(x - h)) / 2h."""
    model = with_adapter(kind, small_model(d_model=4))
    matrix = next(array for array in arrays(base_of(model)) if array.name == "blocks/0/attention/q_proj")
    sizes = dict(zip(matrix.dims, (1, 3, 2, 2), strict=True)) | {"rank": 2, "vector": 2}
    rng = np.random.default_rng(4)
    names = [array for array in arrays(model) if array.name.startswith(f"{PREFIX}/{matrix.name}/")]
    own = {
        array.name.rpartition("/")[2]: rng.standard_normal([sizes[dim] for dim in array.dims if dim != "layers"])
        for array in names
        if array.name.rpartition("/")[2] in ("a", "b", "diagonal", "magnitude", "outputs")
    }
    W, x, c = rng.standard_normal((3, 2, 2)), rng.standard_normal((1, 5, 3)), rng.standard_normal((1, 5, 2, 2))
    length = np.sqrt((low_rank(6 / 2**0.5, W, {k: own[k] for k in "ab"}) ** 2).sum(0)) if "magnitude" in own else None

    def formula(own: Any) -> float:
        return float((c * np.tanh(np.einsum("btd,dnh->btnh", x, weight(W, own, length)))).sum())

    def ours(own: Any) -> jax.Array:
        adapter = Adapter(kind=kind)
        y = ops.project(one_device(), "btd,dnh->btnh", single(x), changed(adapter, single(W), own), None)
        return (single(c) * jnp.tanh(y)).sum()

    single = lambda x: jnp.asarray(x, jnp.float32)
    value, found = jax.jit(jax.value_and_grad(ours))(jax.tree.map(single, own))
    np.testing.assert_allclose(value, formula(own), rtol=1e-5)
    for name, array in own.items():
        wanted, h = np.zeros(array.shape), 1e-6
        for at in np.ndindex(array.shape):
            step = np.zeros(array.shape)
            step[at] = h
            up, down = (formula({**own, name: array + sign * step}) for sign in (1, -1))
            wanted[at] = (up - down) / (2 * h)
        assert np.abs(wanted).max() > 0.1
        np.testing.assert_allclose(found[name], wanted, rtol=1e-4, atol=2e-5, err_msg=name)


@pytest.mark.nightly
def test_gradients_are_the_same_on_a_mesh() -> None:
    model = with_adapter(Lora(rank=2, dora=True, targets=("all-linear",)), small_model())
    config, parameters = small_run(model), varied(model, initial_parameters(model))
    batch = {name: jnp.asarray(x) for name, x in packed_batch(config).items()}
    _, found = jax.jit(gradient_function(config, one_device()))(parameters, batch)
    sharding = ShardingConfig(data=2, fsdp=2, tensor=2)
    layout = make_layout(sharding)
    sharded = jax.device_put(parameters, jax.tree.map(lambda x: x.sharding, abstract_parameters(model, layout)))
    _, cut = jax.jit(gradient_function(dataclasses.replace(config, sharding=sharding), layout))(sharded, batch)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max())
    jax.tree.map(close, cut, found)


def product(weight: Any, x: np.ndarray) -> np.ndarray:
    """Of [B, T, D] and a weight [D, F]."""
    return np.asarray(ops.project(one_device(), "btd,df->btf", jnp.asarray(x), weight))


def test_what_dropout_and_nested_ranks_draw() -> None:
    """With identities for A and B, and nothing else, what is left of x can be seen."""
    x = 1 + np.random.default_rng(0).random((3, 40, 16), np.float32)
    keys = jax.vmap(jax.random.key)(jnp.array([5, 5, 6]))
    identity = jnp.eye(16)
    seen = LowRank(jnp.zeros((16, 16)), identity, identity, None, keys, 1.0, 0.25, False)
    y = product(seen, x)
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / 0.75, rtol=1e-6)
    assert 0.7 < kept.mean() < 0.8
    assert np.array_equal(kept[0], kept[1]) and not np.array_equal(kept[0], kept[2])
    np.testing.assert_array_equal(product(dataclasses.replace(seen, keys=None), x), x)
    for sharding in (ShardingConfig(data=1, fsdp=2, tensor=4), ShardingConfig(data=1, seq=2, context=Context.RING)):
        layout = make_layout(sharding, jax.devices()[: 8 if sharding.seq == 1 else 2])
        there, whole = (in_ring_order(layout, {"x": jnp.asarray(one)})["x"] for one in (np.tile(x, (2, 1, 1))[:4], y))
        four = dataclasses.replace(seen, keys=jax.vmap(jax.random.key)(jnp.array([5, 5, 6, 5])))
        run_there = jax.jit(lambda w, x, layout=layout: ops.project(layout, "btd,df->btf", x, w))
        np.testing.assert_array_equal(run_there(four, there)[:3], whole)
    keys = jax.vmap(jax.random.key)(jnp.arange(64))
    y = product(dataclasses.replace(seen, keys=keys, dropout=0.0, nested=True), np.ones((64, 1, 16), np.float32))[:, 0]
    first = (y != 0).sum(1)
    np.testing.assert_allclose(y, np.where(np.arange(16) < first[:, None], 16 / first[:, None], 0), rtol=1e-6)
    assert first.min() >= 1 and first.max() == 16 and len(set(first)) > 10


def test_a_bottleneck_is_as_its_formula() -> None:
    rng = np.random.default_rng(0)
    D, r, x = 6, 3, rng.standard_normal((2, 4, 5))
    w, down, d, up, u = (rng.standard_normal(s) for s in ((5, D), (D, r), (r,), (r, D), (D,)))
    mlp = SmallMlp(*(jnp.asarray(one, jnp.float32) for one in (down, d, up, u)), Activation.RELU, 4.0)
    y = x @ w
    expected = y + 4 * (np.maximum(y @ down + d, 0) @ up + u)
    found = product(MlpAfter(jnp.asarray(w, jnp.float32), mlp), x.astype(np.float32))
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-4)


def added(model: ModelConfig, of: dict[str, Any], name: str) -> np.ndarray:
    """scale A B of a matrix of the first block, 0 where there is none: [layers, D, numbers]."""
    assert model.adapter is not None and isinstance(model.adapter.kind, Lora)
    group, last = name.split("/")
    if last not in (own := of["blocks"]["0"].get(group, {})):
        return np.zeros(())
    a, b = (np.asarray(own[last][part], np.float64) for part in ("a", "b"))
    return model.adapter.kind.scale * np.einsum("ldr,lro->ldo", a, b.reshape(*b.shape[:2], -1))


def test_a_sum_of_adapters_adds_what_each_adds() -> None:
    rng = np.random.default_rng(0)

    def drawn(kind: Lora) -> tuple[ModelConfig, dict[str, Any]]:
        model = with_adapter(kind, small_model())
        return model, jax.tree.map(lambda array: rng.standard_normal(array.shape), declared(model)[PREFIX])

    one, of_one = drawn(Lora(rank=2))
    two, of_two = drawn(Lora(rank=3, alpha=5.0, targets=("q_proj", "up_proj")))
    adapter, arrays_of_sum = weighted_sum([Weighted(one, of_one, 0.7), Weighted(two, of_two, -2.0)])
    both = dataclasses.replace(small_model(), adapter=adapter)
    assert jax.tree.map(jnp.shape, arrays_of_sum) == jax.tree.map(lambda a: a.shape, declared(both)[PREFIX])
    half = dataclasses.replace(one, adapter=scaled(one.adapter, 0.5))
    for name in ("attention/q_proj", "attention/v_proj", "mlp/up_proj"):
        expected = 0.7 * added(one, of_one, name) - 2 * added(two, of_two, name)
        np.testing.assert_allclose(added(both, arrays_of_sum, name), expected, atol=1e-4)
        np.testing.assert_allclose(added(half, of_one, name), 0.5 * added(one, of_one, name))


@pytest.mark.nightly
def test_adalora_drops_the_triplets_of_least_importance() -> None:
    """Against its equations in numpy, from what the step before left and the gradients of a step by itself."""
    kind = AdaLora(rank=4, target_rank=2, warmup=1, final=2, every=1, orthogonality=0.3)
    config = small_run(with_adapter(kind, small_model()), steps=8)
    config = dataclasses.replace(
        config, optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule(), weight_decay=0.0)
    )
    trainer, batch = make_trainer(config, one_device()), packed_batch(config)
    step, state = trainer.start()
    gradient = jax.jit(gradient_function(config, one_device()))
    flat = lambda x, rank_last: np.moveaxis(np.asarray(x, np.float64), -1 if rank_last else 1, 1).reshape(2, 4, -1)
    last: Any = None
    for t in range(8):
        before = jax.tree.map(lambda x: np.array(x, np.float64), state.parameters[PREFIX]["blocks"]["0"]["attention"])
        _, slopes = gradient(state.parameters, {k: jnp.asarray(x) for k, x in batch.items()})
        slopes = jax.tree.map(lambda x: np.asarray(x, np.float64), slopes[PREFIX]["blocks"]["0"]["attention"])
        state, output = step(state, place(batch, trainer))
        scores, penalty = [], 0.0
        after = jax.tree.map(np.array, state.parameters[PREFIX]["blocks"]["0"]["attention"])
        for name in ("q_proj", "v_proj"):
            score = np.zeros((2, 4))
            for part in ("a", "b", "diagonal"):
                w = flat(before[name][part], part == "a") if part != "diagonal" else before[name][part][..., None]
                g = flat(slopes[name][part], part == "a") if part != "diagonal" else slopes[name][part][..., None]
                g = g / float(np.sum(batch["loss_mask"]))
                if part != "diagonal":
                    excess = np.einsum("lri,lsi->lrs", w, w) - np.eye(4)
                    penalty += (excess**2).sum()
                    g += 0.3 * 4 * np.einsum("lrs,lsi->lri", excess, w)
                old = [before[name][f"{part}_{mean}"] for mean in ("importance", "uncertainty")]
                i, u = (flat(x, part == "a") if part != "diagonal" else x[..., None] for x in old)
                i = 0.85 * i + 0.15 * np.abs(w * g)
                u = 0.85 * u + 0.15 * np.abs(np.abs(w * g) - i)
                score += (i * u).mean(-1)
                found = after[name][f"{part}_importance"]
                found = flat(found, part == "a") if part != "diagonal" else found[..., None]
                np.testing.assert_allclose(found, i, rtol=2e-3, atol=1e-9)
            scores.append(score)
        np.testing.assert_allclose(output.figures["orthogonality"], penalty, rtol=1e-4)
        mean_rank = 2 + 2 * (1 - np.clip((t - 1) / (8 - 1 - 2), 0, 1)) ** 3
        here = np.stack([after[name]["diagonal"] for name in ("q_proj", "v_proj")]) != 0
        if 1 <= t <= 6:
            ranked = np.sort(np.concatenate(scores).ravel())[::-1]
            expected = np.stack(scores) >= ranked[round(4 * mean_rank) - 1] * (1 - 1e-6)
            np.testing.assert_array_equal(here, expected)
        if t == 7:
            np.testing.assert_array_equal(here, last)
        last = here
        assert float(output.figures["adapter_rank"]) == here.sum() / 4
    assert here.sum() == 8
    with pytest.raises(UserError, match=r"warmup = 1 and final = 2 leave none of train.steps = 3"):
        make_trainer(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=3)), one_device())
