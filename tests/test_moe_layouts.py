"""Experts on every mesh: the same choices, loss and gradients as on one device, and no traffic but the necessary."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
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
from test_layouts import LAYOUTS as dense_layouts
from test_layouts import assert_close
from test_pipeline import LAYOUTS as pipelines

from maxlm.config import (
    MESH_AXES,
    Activation,
    AdamW,
    Adapter,
    Capacity,
    ConstantSchedule,
    Context,
    Dropless,
    ExpertChoiceRouter,
    ExpertGroups,
    Experts,
    Lora,
    ModelConfig,
    NoisyTopKRouter,
    RunConfig,
    ShardingConfig,
    SigmoidRouter,
    Swish,
    TopKRouter,
    Zero,
)
from maxlm.models import declared, ops
from maxlm.models.moe import ExpertsLayer, _scores
from maxlm.models.parameters import Initializer
from maxlm.shapes import Part
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer

LAYOUTS = {
    "data8": ShardingConfig(data=8),
    "fsdp8": ShardingConfig(data=1, fsdp=8),
    "expert8": ShardingConfig(data=1, expert=8),
    "data2_expert4": ShardingConfig(data=2, expert=4),
    "fsdp4_expert2": ShardingConfig(data=1, fsdp=4, expert=2),
    "zero1_expert2": ShardingConfig(data=1, fsdp=4, expert=2, zero=Zero.OPTIMIZER),
    "zero2_expert2": ShardingConfig(data=1, fsdp=4, expert=2, zero=Zero.GRADIENTS),
    "tensor2_expert4": ShardingConfig(data=1, tensor=2, expert=4),
    "fsdp2_tensor2_expert2_sp": ShardingConfig(data=1, fsdp=2, tensor=2, expert=2, sequence_parallel=True),
    "seq8": ShardingConfig(data=1, seq=8),
    "seq2_expert4": ShardingConfig(data=1, seq=2, expert=4),
    "ring2_expert4": ShardingConfig(data=1, seq=2, expert=4, context=Context.RING),
    "ulysses2_expert4": ShardingConfig(data=1, seq=2, expert=4, context=Context.ULYSSES),
    "stage2_expert4": ShardingConfig(data=1, stage=2, expert=4),
    "stage2_fsdp2_expert2": ShardingConfig(data=1, stage=2, fsdp=2, expert=2),
    "tensor2": ShardingConfig(data=1, tensor=2),
    "stage2": ShardingConfig(data=1, stage=2),
    "data2_fsdp2_stage2": ShardingConfig(data=2, fsdp=2, stage=2),
    "data2_seq2_tensor2": ShardingConfig(data=2, seq=2, tensor=2),
    "fsdp2_seq2_stage2": ShardingConfig(data=1, fsdp=2, seq=2, stage=2),
    "stage2_tensor2_expert2": ShardingConfig(data=1, stage=2, tensor=2, expert=2),
}

DROPLESS = Experts(
    n_experts=8, d_ff=16, router=TopKRouter(top_k=2, load_balance=0.5), n_shared_experts=1, router_z_loss=0.01,
    bias=True,
)  # fmt: skip
NOISY = Experts(n_experts=8, d_ff=16, router=NoisyTopKRouter(top_k=2))
CAPACITY = Experts(
    n_experts=8, d_ff=16, router=SigmoidRouter(top_k=2), dispatch=Capacity(factor=1.0, group_size=4), routed_scaling=2.0
)
GROUPED = Experts(
    n_experts=8, d_ff=16, router=TopKRouter(top_k=2, normalize=False, groups=ExpertGroups(n_groups=4, top_groups=2))
)
SIGMOID_GROUPED = Experts(
    n_experts=8, d_ff=16, router=SigmoidRouter(top_k=3, groups=ExpertGroups(n_groups=4, top_groups=2))
)
EXPERT_CHOICE = Experts(
    n_experts=8, d_ff=16, router=ExpertChoiceRouter(), dispatch=Capacity(factor=2.0, group_size=4), router_z_loss=0.01
)


def moe_model(*moes: Experts, **changes: Any) -> ModelConfig:
    """A dense layer, then twice the pattern."""
    block = small_model().blocks[0]
    pattern = tuple(dataclasses.replace(block, mlp=moe) for moe in moes)
    return small_model(first_blocks=(block,), blocks=pattern, n_layers=1 + 2 * len(moes), **changes)


def sums_and_gradients(config: RunConfig, layout: Layout) -> Any:
    """Divided by the number of tokens that count."""
    parameters = initial_parameters(config.model, seed=1)
    gradient = jax.jit(gradient_function(config, layout))
    batch = packed_batch(config)
    seeds = np.arange(config.train.batch_size, dtype=np.uint32)
    put = lambda x, *dims: jax.device_put(x, layout.sharding(layout.activation(*dims)))
    on_mesh = {name: put(x, "batch", "seq") for name, x in batch.items()}
    results = gradient(parameters, {**on_mesh, "seeds": put(seeds, "batch")})
    return jax.device_get(jax.tree.map(lambda x: x / batch["loss_mask"].sum(), results))


def devices_of(sharding: ShardingConfig) -> list[jax.Device]:
    return jax.devices()[: math.prod(getattr(sharding, axis) for axis in MESH_AXES)]


def axes_of(sharding: ShardingConfig) -> tuple[str, ...]:
    """The mesh axes that cut anything."""
    return tuple(axis for axis in MESH_AXES if getattr(sharding, axis) > 1)


def test_every_axis_is_here_alone_and_with_each_other() -> None:
    """Of the layouts above, and of those of a dense decoder, for which an expert axis is refused."""
    dense = {*map(axes_of, dense_layouts.values()), *(axes_of(sharding) for sharding, _ in pipelines.values())}
    dense.add(("tensor",))  # on two devices, in a test of its own
    for layouts, axes in ((set(map(axes_of, LAYOUTS.values())), MESH_AXES), (dense, MESH_AXES[:-1])):
        assert {names for names in layouts if len(names) == 1} == {(axis,) for axis in axes}
        assert {pair for names in layouts for pair in itertools.combinations(names, 2)} == {
            *itertools.combinations(axes, 2)
        }


def run_of(moes: tuple[Experts, ...], sharding: ShardingConfig) -> RunConfig:
    """A pipeline has two micro-batches, of as many rows as the mesh leaves; other layouts take the batch whole."""
    return small_run(moe_model(*moes), sharding, micro_batches=2 if sharding.stage > 1 else 1)


@functools.cache
def reference(moes: tuple[Experts, ...], micro_batches: int) -> Any:
    return sums_and_gradients(small_run(moe_model(*moes), micro_batches=micro_batches), one_device())


PATTERNS = {
    "dropless_capacity": (DROPLESS, CAPACITY),
    "noisy_ec": (NOISY, EXPERT_CHOICE),
    "groups": (GROUPED, SIGMOID_GROUPED),
}
QUICK = {"fsdp2_tensor2_expert2_sp"}
# Routers differ where tokens are cut or go through experts elsewhere; the other layouts have the first pattern alone.
BOTH = {"data8", "expert8", "fsdp2_tensor2_expert2_sp", "ring2_expert4", "stage2_fsdp2_expert2", "data2_seq2_tensor2"}

# Every axis, and every way of choosing; the other pairs by night.
SLOW = {
    ("ring2_expert4", "groups"),
    ("data2_seq2_tensor2", "noisy_ec"),
    ("stage2_fsdp2_expert2", "noisy_ec"),
}


def when(name: str, pattern: str) -> list[pytest.MarkDecorator]:
    if name in QUICK and pattern == "dropless_capacity":
        return []
    return [pytest.mark.slow if (name, pattern) in SLOW else pytest.mark.nightly]


@pytest.mark.parametrize(
    ("name", "pattern"),
    [
        pytest.param(name, pattern, marks=when(name, pattern))
        for pattern in PATTERNS
        for name in LAYOUTS
        if name in BOTH or pattern == "dropless_capacity"
    ],
)
def test_layout_equals_one_device(name: str, pattern: str, capfd: pytest.CaptureFixture[str]) -> None:
    moes = PATTERNS[pattern]
    config = run_of(moes, LAYOUTS[name])
    want = reference(moes, config.train.micro_batches)
    capfd.readouterr()
    got = sums_and_gradients(config, make_layout(config.sharding, devices_of(config.sharding)))
    assert "Involuntary full rematerialization" not in capfd.readouterr().err
    assert_close(got, want, 1e-5)
    sums, gradients = got
    for stats, expected in zip(sums.router, want[0].router, strict=True):
        # Whole numbers over the same number, which devices divide differently in the last bit.
        np.testing.assert_allclose(stats.load, expected.load, rtol=1e-6)
        np.testing.assert_allclose(stats.dropped, expected.dropped, rtol=1e-6)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradients):
        least = 1e-3 if path[-1].key.endswith("_bias") else 3e-3  # a bias adds to little of what follows
        assert "router_bias" in jax.tree_util.keystr(path) or np.abs(leaf).max() > least, path


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fsdp2_tensor2_expert2_sp", pytest.param("expert8", marks=pytest.mark.nightly)])
def test_an_adapter_beside_experts_trains_as_on_one_device(name: str) -> None:
    """Attention, dense MLPs and shared experts have one; routed experts, which lie on other devices, do not move."""
    adapter = Adapter(kind=Lora(rank=2, alpha=2.0, targets=("all-linear",)))
    config = dataclasses.replace(
        small_run(moe_model(DROPLESS, adapter=adapter), LAYOUTS[name]),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule()),
    )
    alone = dataclasses.replace(config, sharding=ShardingConfig(data=1))
    layout, parameters = make_layout(config.sharding), initial_parameters(config.model, seed=1)
    rng = np.random.default_rng(2)
    grown = lambda array, x: x + 0.2 * rng.standard_normal(x.shape, np.float32) if array.part is Part.ADAPTER else x
    parameters = jax.tree.map(grown, declared(config.model), parameters)
    batch, found = packed_batch(config), []
    for one, on in ((config, layout), (alone, one_device())):
        trainer = make_trainer(one, on)
        put = lambda x, like: jax.device_put(np.array(x), like.sharding)
        state = trainer.begin(jax.tree.map(put, parameters, trainer.state.parameters))
        losses = []
        for _ in range(3):
            state, output = trainer.step(state, place(batch, trainer))
            losses.append(float(output.figures["loss"]))
        assert losses[2] < losses[1] < losses[0]
        found.append((losses, jax.device_get(state.parameters)))
    np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
    for _, after in found:
        same = lambda array, old, new: array.trained or np.testing.assert_array_equal(old, new)
        jax.tree.map(same, declared(config.model), jax.device_get(parameters), after)
    on_device = {name: jnp.asarray(x) for name, x in batch.items()}
    gradients = [
        jax.device_get(jax.jit(gradient_function(one, on))(parameters, on_device)[1])
        for one, on in ((config, layout), (alone, one_device()))
    ]
    n_tokens = batch["loss_mask"].sum()
    assert_close(*(jax.tree.map(lambda x: x / n_tokens, one) for one in gradients), 1e-5)
    assert all(np.abs(leaf).max() / n_tokens > 1e-4 for leaf in jax.tree.leaves(gradients[0]))


def layer(config: Experts) -> tuple[Any, Any]:
    return nnx.split(ExpertsLayer(config, small_model(init_std=0.3), Initializer(jax.random.key(0))))


def some_x() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(8, 16, 32)).astype(np.float32)


@pytest.mark.parametrize(
    "config", [DROPLESS, NOISY, CAPACITY, EXPERT_CHOICE, GROUPED], ids=["topk", "noisy", "sigmoid", "ec", "groups"]
)
def test_who_goes_where_is_the_same_on_every_mesh(config: Experts) -> None:
    """Choices and gates; noise included, to the last bit."""

    def routing(layout: Layout) -> tuple[Any, jax.Array]:
        graph, parameters = layer(config)

        @jax.jit
        def run(parameters: Any, x: jax.Array) -> tuple[Any, jax.Array]:
            moe = nnx.merge(graph, parameters)
            keys = jax.vmap(jax.random.key)(jnp.arange(8, dtype=jnp.uint32))
            scores = _scores(layout, x, moe.router[...])
            return moe._route(layout, x, scores, keys), moe._noise(layout, keys, x.shape[1])

        x = jax.device_put(some_x(), layout.sharding(layout.activation("batch", "seq", None)))
        return jax.device_get(run(parameters, x))

    want, noise = routing(one_device())
    for sharding in (
        ShardingConfig(data=1, expert=8),
        ShardingConfig(data=1, fsdp=2, seq=2, expert=2),
        ShardingConfig(data=2, tensor=2, seq=2),
    ):
        got, got_noise = routing(make_layout(sharding))
        np.testing.assert_array_equal(got_noise, noise)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_allclose(got.gates, want.gates, atol=1e-6, rtol=0)


BIASED = Experts(
    n_experts=8, d_ff=16, router=TopKRouter(top_k=2, bias=True), activation=Swish(), bias=True, clamp=0.8, up_offset=1.0
)


@pytest.mark.parametrize(
    "config",
    [
        BIASED,
        dataclasses.replace(BIASED, dispatch=Capacity(factor=1.0, group_size=4)),
        dataclasses.replace(BIASED, router=ExpertChoiceRouter(), dispatch=Capacity(group_size=4)),
    ],
    ids=["dropless", "capacity", "ec"],
)
def test_biases_and_a_learned_number_on_a_mesh(config: Experts) -> None:
    """Each bias is that of the row's expert, and added once, however many devices share a sum over d_ff."""
    graph, parameters = layer(config)
    values = nnx.to_pure_dict(parameters)
    for i, name in enumerate(sorted(values)):
        if name.endswith("_bias"):  # 0 at first
            values[name] = jax.random.normal(jax.random.key(i), values[name].shape) / 2

    def gradients(layout: Layout) -> Any:
        def objective(values: Any, x: jax.Array) -> tuple[jax.Array, jax.Array]:
            y, stats = nnx.merge(graph, values)(x, plainly(layout), None)
            return (jnp.sin(y) * jnp.arange(16)[:, None]).mean() + stats.auxiliary / 128, y

        x = jax.device_put(some_x(), layout.sharding(layout.activation("batch", "seq", None)))
        return jax.device_get(jax.jit(jax.grad(objective, (0, 1), has_aux=True))(values, x))

    want = gradients(one_device())
    assert all(np.abs(leaf).max() > 1e-3 for leaf in jax.tree.leaves(want))
    assert_close(gradients(make_layout(ShardingConfig(data=1, fsdp=2, tensor=2, expert=2))), want, 2e-6)


@pytest.mark.parametrize("buffer", [1.0, 1.5])
def test_what_overflows_a_buffer_is_dropped_and_counted(buffer: float) -> None:
    layout, (B, T, D, F, E, k, X) = make_layout(ShardingConfig(data=2, expert=4)), (8, 16, 32, 16, 8, 2, 4)
    rng = np.random.default_rng(2)
    x, order = some_x(), np.argsort(rng.random((B, T, E)) * np.linspace(0.4, 1, E), -1)
    choices, gates = order[..., :k].astype(np.int32), rng.random((B, T, k)).astype(np.float32)
    weights = ops.ExpertWeights(
        *(rng.normal(size=(E, *shape)).astype(np.float32) / 5 for shape in ((D, F), (D, F), (F, D)))
    )
    options = {"unit": ops.GatedUnit(Activation.SIGMOID), "config": Dropless(buffer=buffer)}
    y, computed = jax.jit(lambda *a: ops.dropless_experts(layout, *a, **options))(x, choices, gates, weights)

    # By hand: each device has one row; of what it has for a device, sorted by expert, the first `room` go.
    room = math.ceil(buffer * T * k / X)
    want = np.zeros((B, T, k), bool)
    for b in range(B):
        for device in range(X):
            own = [
                (choices[b, t, j], j, t) for t in range(T) for j in range(k) if choices[b, t, j] // (E // X) == device
            ]
            for _, j, t in sorted(own)[:room]:
                want[b, t, j] = True
    assert 0 < (~want).sum() < want.size / 2
    np.testing.assert_array_equal(computed, want)
    gate = np.einsum("btk,btke->bte", gates * want, np.eye(E)[choices])
    hidden = np.einsum("btd,edf->btef", x, weights.up_proj)
    hidden /= 1 + np.exp(-np.einsum("btd,edf->btef", x, weights.gate_proj))
    np.testing.assert_allclose(y, np.einsum("btef,efd,bte->btd", hidden, weights.down_proj, gate), atol=1e-5, rtol=0)


@pytest.mark.parametrize("dispatch", [Dropless(buffer=2.0), Capacity(group_size=4)])
def test_expert_parallelism_moves_tokens_by_all_to_all_alone(dispatch: Dropless | Capacity) -> None:
    layout = make_layout(ShardingConfig(data=1, expert=8))
    graph, parameters = layer(dataclasses.replace(DROPLESS, dispatch=dispatch, n_shared_experts=0))

    def objective(parameters: Any, x: jax.Array) -> jax.Array:
        y, stats = nnx.merge(graph, parameters)(x, plainly(layout), None)
        return (y * y).sum() + stats.auxiliary

    batch = layout.sharding(layout.activation("batch", "seq", None))
    shardings = jax.tree.map(
        lambda v: layout.sharding(layout.parameter(v.dims)), parameters, is_leaf=lambda v: isinstance(v, nnx.Variable)
    )
    program = jax.jit(jax.grad(objective, (0, 1)), in_shardings=(shardings, batch), out_shardings=(shardings, batch))
    lines = program.lower(parameters, some_x()).compile().as_text().splitlines()
    kind = re.compile(r" = (.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter)(?:-start)?\(")
    # Sums over axes of one device stay in programs for CPUs; newer versions name the axes.
    alone = re.compile(r"replica_groups=(\{\{0\},|mesh\[.*?\] \{('(data|fsdp|stage|seq|tensor)',?)+\})")
    found = [match.groups() for line in lines if not alone.search(line) and (match := kind.search(line))]
    assert {name for _, name in found} == {"all-to-all", "all-reduce"}
    assert sum(name == "all-to-all" and "f32" in shape for shape, name in found) == 4  # there and back, twice
    # What is summed is the router's gradient and statistics: nothing of a token's or an expert's size.
    sums = [dims for shape, name in found if name == "all-reduce" for dims in re.findall(r"\[([\d,]+)\]", shape)]
    assert max(math.prod(map(int, dims.split(","))) for dims in sums) == 32 * 8
