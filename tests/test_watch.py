"""What is seen of a step: norms by layer against direct computation, and the first thing that is not finite."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np
import pytest
from helpers import gradient_function, one_device, packed_batch, plainly, small_model, small_run
from train_runs import Bench, rows, scalars

from maxlm.config import AdamW, ConstantSchedule, Dtype, LossScale, RunConfig
from maxlm.models import Tokens, bind, init_parameters
from maxlm.models.decoder import run_block
from maxlm.training import NextToken, make_trainer
from maxlm.training.state import TrainState
from maxlm.training.watch import watch_row

MODEL = small_model(first_blocks=small_model().blocks, n_layers=3)


def config(**execution: Any) -> RunConfig:
    base = small_run(MODEL, batch_size=4, seq_len=16)
    return dataclasses.replace(
        base,
        execution=dataclasses.replace(base.execution, **execution),
        optimizer=AdamW(learning_rate=1e-2, schedule=ConstantSchedule(), clip_norm=None),
    )


@functools.cache
def trainer() -> Any:
    return make_trainer(config(), one_device())


def layers_of(tree: Any) -> list[Any]:
    """Nested dicts of each layer's arrays."""
    stacked = [jax.tree.map(lambda x, i=i: x[i], tree["blocks"]["0"]) for i in range(2)]
    return [tree["first_blocks"]["0"], *stacked]


def norm(tree: Any) -> float:
    return float(np.sqrt(sum(np.square(np.float64(leaf)).sum() for leaf in jax.tree.leaves(tree))))


@pytest.fixture(scope="module")
def seen() -> tuple[dict[str, Any], TrainState, TrainState, dict[str, Any]]:
    """The row, the state before a step and after it, and the step's figures."""
    state, batch = trainer().init(), trainer().place(packed_batch(config()))
    before = jax.tree.map(np.array, state)
    row = watch_row(MODEL, trainer().look(state, batch))
    after, output = trainer().step(state, batch)
    return row, before, jax.tree.map(np.array, after), jax.device_get(output.figures)


def test_norms_are_those_of_the_step(seen: Any) -> None:
    """Of the gradient by Adam's first moment, (1 - b1) times it after one step; of the update by what has changed."""
    row, before, after, figures = seen
    [moment] = [
        leaf.mu for leaf in jax.tree.leaves(after.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(leaf, "mu")
    ]
    gradient = jax.tree.map(lambda x: np.float64(x) / 0.1, moment)
    update = jax.tree.map(lambda new, old: np.float64(new) - old, after.parameters, before.parameters)
    for key, tree, rtol in (("gradient_norm", gradient, 1e-5), ("parameter_norm", before.parameters, 1e-5)):
        np.testing.assert_allclose(row[key], [norm(layer) for layer in layers_of(tree)], rtol=rtol)
        for name in ("embed", "unembed", "final_norm"):
            np.testing.assert_allclose(row[f"{key}/{name}"], norm(tree[name]), rtol=rtol)
    ratios = [norm(new) / norm(old) for new, old in zip(layers_of(update), layers_of(before.parameters), strict=True)]
    np.testing.assert_allclose(row["update_ratio"], ratios, rtol=1e-3)
    np.testing.assert_allclose(
        row["update_ratio/embed"], norm(update["embed"]) / norm(before.parameters["embed"]), rtol=1e-3
    )
    others = [row[f"gradient_norm/{name}"] for name in ("embed", "unembed", "final_norm")]
    np.testing.assert_allclose(np.linalg.norm([*row["gradient_norm"], *others]), figures["grad_norm"], rtol=1e-5)
    np.testing.assert_allclose(row["loss"], figures["loss"], rtol=1e-6)


@pytest.mark.nightly
def test_activations_are_those_of_the_blocks_alone(seen: Any) -> None:
    row, before, *_ = seen
    batch = packed_batch(config())
    tokens, how = Tokens(batch["positions"], batch["segment_ids"]), plainly()
    decoder = bind(MODEL, before.parameters)
    x = decoder.embeddings(batch["inputs"], tokens, how)
    one = jax.jit(lambda parameters, x: run_block(MODEL, MODEL.blocks[0], parameters, x, tokens, how))
    size = lambda x: (np.sqrt(np.mean(np.square(np.float64(x)))), np.abs(x).max())
    np.testing.assert_allclose((row["embeddings_rms"], row["embeddings_max"]), size(x), rtol=1e-5)
    for layer, parameters in enumerate(layers_of(before.parameters)):
        x = one(parameters, x)
        np.testing.assert_allclose((row["block_rms"][layer], row["block_max"][layer]), size(x), rtol=1e-5)
    np.testing.assert_allclose((row["hidden_rms"], row["hidden_max"]), size(decoder.final_norm(x)), rtol=1e-5)


def poisoned(path: tuple[str, ...], where: Any, value: float) -> Any:
    def change(parameters: Any, batch: Any) -> None:
        array = functools.reduce(lambda tree, key: tree[key], path, parameters)
        array[where] = value

    return change


def tiny_norm(parameters: Any, batch: Any) -> None:
    """Logits are finite, and the norm's gradient 1e25, whose square is not."""
    parameters["final_norm"]["scale"][:] = 1e-10
    parameters["unembed"] *= np.float32(1e25)


def bad_mask(parameters: Any, batch: Any) -> None:
    batch["loss_mask"][2, 3] = np.inf


BLOCK = ("blocks", "0")
FAULTS = {
    "output of block 2's mlp (forward); the parameter mlp/up_proj of block 2 is not finite": poisoned(
        (*BLOCK, "mlp", "up_proj"), (1, 3, 3), np.nan
    ),
    "output of block 1's attention (forward); the parameter attention/o_proj of block 1 is not finite": poisoned(
        (*BLOCK, "attention", "o_proj"), (0, 0, 0, 0), np.inf
    ),
    "output of block 0's mlp (forward); the parameter mlp/down_proj of block 0 is not finite": poisoned(
        ("first_blocks", "0", "mlp", "down_proj"), (0, 0), np.nan
    ),
    "the embeddings (forward); the parameter embed is not finite": poisoned(("embed",), slice(None), np.nan),
    "output of block 1's mlp (forward)": poisoned((*BLOCK, "mlp", "down_proj"), (0, ...), 3e38),
    "output of the final norm (forward); the parameter final_norm/scale is not finite": poisoned(
        ("final_norm", "scale"), 5, np.inf
    ),
    "the loss": bad_mask,
    "norm of the gradient of final_norm/scale": tiny_norm,
}


@pytest.mark.parametrize("words", [*FAULTS, None])
def test_the_first_fault_is_named(words: str | None) -> None:
    state, batch = jax.tree.map(np.array, trainer().init()), packed_batch(config())
    if words is not None:
        FAULTS[words](state.parameters, batch)
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, trainer().state)
    assert trainer().first_not_finite(state, trainer().place(batch)) == words


@pytest.mark.nightly
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (poisoned((*BLOCK, "mlp", "down_proj"), (1, ...), 6e4), "output of block 2's mlp (forward)"),
        (lambda parameters, batch: None, "gradient of final_norm/scale"),
    ],
)
def test_float16_that_overflows(change: Any, words: str) -> None:
    """In an activation; and, by a scale of its loss that is too large, in a gradient."""
    made = config(dtype=Dtype.FLOAT16, loss_scale=LossScale(initial=2.0**24))
    narrow = make_trainer(made, one_device())
    state, batch = jax.tree.map(np.array, narrow.init()), packed_batch(made)
    change(state.parameters, batch)
    assert words in str(narrow.first_not_finite(state, narrow.place(batch)))


def test_the_embeddings_keep_their_bits_and_an_eighth_of_their_gradient() -> None:
    made = small_run(small_model(n_layers=1), batch_size=2, seq_len=8, embedding_gradient=0.125)
    parameters, batch = init_parameters(made.model, jax.random.key(0)), packed_batch(made)
    objective, tokens = NextToken(made, one_device()), Tokens(batch["positions"], batch["segment_ids"])
    weights = np.random.default_rng(0).normal(size=(2, 8, made.model.d_model)).astype(np.float32)

    def begun(table: jax.Array) -> tuple[jax.Array, jax.Array]:
        x = objective._begun(bind(made.model, parameters | {"embed": table}), batch, tokens)
        return (weights * x).sum(), x

    gradient, x = jax.jit(jax.grad(begun, has_aux=True))(parameters["embed"])
    np.testing.assert_array_equal(x, parameters["embed"][batch["inputs"]])
    want = np.zeros(gradient.shape)
    np.add.at(want, batch["inputs"], np.float64(weights))
    np.testing.assert_allclose(gradient, want / 8, rtol=1e-5, atol=1e-6)


@pytest.mark.nightly
def test_the_gradient_of_the_embeddings_shrinks_alone() -> None:
    """The loss keeps its bits, and so does every other gradient."""
    made = small_run(small_model(n_layers=1), batch_size=2, seq_len=8)
    parameters, batch = init_parameters(made.model, jax.random.key(0)), packed_batch(made)
    shrunk = dataclasses.replace(made, train=dataclasses.replace(made.train, embedding_gradient=0.125))
    (sums, whole), (same, small) = (
        jax.jit(gradient_function(one, one_device()))(parameters, batch) for one in (made, shrunk)
    )
    assert float(sums.objective) == float(same.objective)
    assert np.abs(whole["embed"]).max() > 0
    np.testing.assert_allclose(small.pop("embed"), 0.125 * whole.pop("embed"), rtol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, small, whole)


@pytest.mark.nightly
def test_a_run_is_watched_and_its_fault_named(tmp_path_factory: pytest.TempPathFactory, tmp_path: Any) -> None:
    bench, run_dir = Bench.of_session(tmp_path_factory), tmp_path / "run"
    ended = bench.run(run_dir, "--observe.watch=20", "--train.steps=40")
    assert ended.code == 0, ended.err
    found = rows(run_dir, "watch")
    assert [row["step"] for row in found] == [20, 40]
    assert [len(row["gradient_norm"]) for row in found] == [2, 2]
    [step] = [row for row in rows(run_dir) if row["step"] == 40]
    assert found[1]["loss"] == pytest.approx(step["loss"], rel=1e-5)
    shown = {tag for tag, _, _ in scalars(run_dir / "tensorboard")}
    assert {"watch/gradient_norm/layer_1", "watch/update_ratio/embed", "watch/block_rms/layer_0"} <= shown
