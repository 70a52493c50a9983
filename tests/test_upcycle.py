"""Models that start from another run's parameters, and layers that come before the pattern."""

from __future__ import annotations

import dataclasses
from pathlib import Path

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
    run_decoder,
    small_model,
    small_run,
)
from run_folder import BYTE_MODEL, make_run, parameters_of

from maxlm.config import (
    Adafactor,
    Dropless,
    Experts,
    GatedMlp,
    LmHead,
    ShardingConfig,
    SigmoidRouter,
    TopKRouter,
    UserError,
    with_experts,
)
from maxlm.data.tokenizers import Bytes
from maxlm.models import Tokens, init_parameters
from maxlm.models.upcycle import upcycle
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.warm_start import RunSource, warm_start

EXPERTS = Experts(n_experts=4, d_ff=48, router=TopKRouter(top_k=2))


def hidden(model, parameters):
    batch = packed_batch(small_run(model))
    tokens = Tokens(batch["positions"], batch["segment_ids"])
    run = jax.jit(lambda p, ids: run_decoder(model, p, plainly(), ids, tokens).hidden)
    return np.asarray(run(parameters, batch["inputs"]))


def started(source, target, parameters):
    return jax.jit(lambda old, new: upcycle(source, target, old, new))(parameters, initial_parameters(target, seed=2))


@pytest.mark.parametrize(
    ("every", "first_dense", "router"),
    [(1, 0, TopKRouter(top_k=2)), (2, 0, SigmoidRouter(top_k=3)), (1, 2, TopKRouter(top_k=3))],
)
def test_an_upcycled_model_computes_what_the_dense_one_does(every, first_dense, router):
    dense = small_model(n_layers=4)
    sparse = with_experts(dense, dataclasses.replace(EXPERTS, router=router), every=every, first_dense=first_dense)
    parameters = initial_parameters(dense, seed=1)
    upcycled = started(dense, sparse, parameters)
    want = hidden(dense, parameters)
    np.testing.assert_allclose(hidden(sparse, upcycled), want, atol=1e-5)
    assert np.abs(hidden(sparse, initial_parameters(sparse, seed=1)) - want).max() > 0.1
    # Layer 3 is the last repeat of the pattern's last entry; each of its experts is the dense layer's MLP.
    for name in ("gate_proj", "up_proj", "down_proj"):
        experts = upcycled["blocks"][str(every - 1)]["mlp"][name][-1]
        assert experts.shape[0] == 4
        assert (experts == parameters["blocks"]["0"]["mlp"][name][3]).all()
    assert np.asarray(upcycled["blocks"][str(every - 1)]["mlp"]["router"]).any()


def test_experts_go_on_as_they_are():
    sparse = with_experts(small_model(), EXPERTS)
    parameters = initial_parameters(sparse, seed=1)
    jax.tree.map(np.testing.assert_array_equal, started(sparse, sparse, parameters), parameters)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda model: dataclasses.replace(model, d_model=16), ["attention/k_proj", "[32, 2, 8]", "[16, 2, 8]"]),
        (lambda model: dataclasses.replace(model, n_layers=4), ["n_layers = 2", "4"]),
        (lambda model: dataclasses.replace(model, head=LmHead(tied=True)), ["unembed", "[64, 32]", "no such array"]),
        (
            lambda model: with_experts(model, dataclasses.replace(EXPERTS, d_ff=24)),
            ["layer 0 mlp/down_proj", "it has [48, 32]", "[4, 24, 32]", "dense model's d_ff"],
        ),
        (
            lambda model: with_experts(model, dataclasses.replace(EXPERTS, n_shared_experts=1)),
            ["layer 0 mlp/shared_experts/down_proj", "no such array", "[48, 32]"],
        ),
    ],
)
def test_what_does_not_fit_is_named_with_both_shapes(change, words):
    dense = small_model()
    target = change(dense)
    shapes = [jax.eval_shape(lambda m=m: init_parameters(m, jax.random.key(0))) for m in (dense, target)]
    with pytest.raises(UserError) as caught:
        jax.eval_shape(lambda old, new: upcycle(dense, target, old, new), *shapes)
    assert all(word in str(caught.value) for word in words), caught.value
    assert "\n" not in str(caught.value)


# From a run folder


def sparse_run(config, **sharding):
    return dataclasses.replace(config, model=with_experts(BYTE_MODEL, EXPERTS), sharding=ShardingConfig(**sharding))


def test_a_run_starts_from_the_newest_or_the_named_step_of_another(tmp_path: Path):
    config = make_run(tmp_path)
    target = sparse_run(config, expert=4, tensor=2)
    layout = make_layout(target.sharding)
    trainer = make_trainer(target, layout)
    for place_, step in ((config.run_dir, 2), (f"{config.run_dir}/checkpoints/1", 1)):
        begin = warm_start(place_, RunSource, target.model, layout, trainer, Bytes().fingerprint)
        assert begin.step == step and int(begin.state.step) == 0
        assert begin.changes == ("model.blocks.0.mlp: GatedMlp -> Experts",)
        parameters, source = begin.state.parameters, parameters_of(config, seed=step)
        np.testing.assert_array_equal(parameters["embed"], source["embed"])
        mlp = parameters["blocks"]["0"]["mlp"]
        for expert in range(4):
            np.testing.assert_array_equal(mlp["up_proj"][:, expert], source["blocks"]["0"]["mlp"]["up_proj"])
        assert mlp["up_proj"].addressable_shards[0].data.shape == (2, 1, 32, 24)
        assert not any(np.asarray(leaf).any() for leaf in jax.tree.leaves(begin.state.optimizer))


def test_a_stack_that_the_stages_cannot_cut_is_still_a_start(tmp_path: Path):
    """Three layers of a pattern become one before it and two stages of one."""
    source = dataclasses.replace(BYTE_MODEL, n_layers=3)
    parameters = initial_parameters(source, seed=1)
    config = make_run(tmp_path, parameters, model=source)
    model = dataclasses.replace(source, first_blocks=source.blocks)
    target = dataclasses.replace(config, model=model, sharding=ShardingConfig(fsdp=2, stage=2, tensor=2))
    target.validate(8)
    layout = make_layout(target.sharding)
    begin = warm_start(config.run_dir, RunSource, model, layout, make_trainer(target, layout), Bytes().fingerprint)
    q_proj = begin.state.parameters["blocks"]["0"]["attention"]["q_proj"]
    assert q_proj.addressable_shards[0].data.shape == (1, 16, 2, 8)
    np.testing.assert_array_equal(q_proj, parameters["blocks"]["0"]["attention"]["q_proj"][1:])


def test_another_tokenizer_a_damaged_or_missing_step_and_a_missing_run_are_refused(tmp_path: Path):
    config = make_run(tmp_path)
    target = sparse_run(config)
    layout = one_device()
    trainer = make_trainer(target, layout)

    def complaint(place_: str, tokenizer: str = Bytes().fingerprint) -> str:
        with pytest.raises(UserError) as caught:
            warm_start(place_, RunSource, target.model, layout, trainer, tokenizer)
        assert str(caught.value).startswith(f"checkpoint.init_from = {place_}: ")
        return str(caught.value)

    assert "tokenizer 0000" not in complaint(config.run_dir, "0000") and "has 0000" in complaint(config.run_dir, "0000")
    assert "no finished checkpoint of step 7" in complaint(f"{config.run_dir}/checkpoints/7")
    assert "is this a run folder?" in complaint(str(tmp_path / "nowhere"))
    damaged = next(
        path for path in (Path(config.run_dir) / "checkpoints" / "2" / "params").rglob("*") if path.is_file()
    )
    damaged.write_bytes(damaged.read_bytes() + b"x")
    assert "checkpoint is damaged" in complaint(f"{config.run_dir}/checkpoints/2")


# Layers before the pattern


def test_first_blocks_compute_what_the_same_layers_do_in_the_pattern():
    """The same parameters, stacked otherwise; with gradients, and recomputed in the backward pass."""
    pattern = small_model(n_layers=3)
    first = dataclasses.replace(pattern, first_blocks=pattern.blocks)
    parameters = initial_parameters(pattern, seed=1)
    moved = started(pattern, first, parameters)
    assert moved["first_blocks"]["0"]["mlp"]["up_proj"].shape == (32, 48)
    results = []
    for model, values in ((pattern, parameters), (first, moved)):
        config = small_run(model)
        gradient = jax.jit(gradient_function(config, one_device()))
        sums, gradients = gradient(values, packed_batch(config))
        results.append((sums.objective / 200, jax.tree.map(lambda x: x / 200, gradients)))
    (objective, gradients), (got_objective, got_gradients) = results
    np.testing.assert_allclose(got_objective, objective, atol=1e-5)
    moved_gradients = upcycle(pattern, first, gradients, got_gradients)
    jax.tree.map(lambda g, w: np.testing.assert_allclose(g, w, atol=1e-5), got_gradients, moved_gradients)
    assert max(float(jnp.abs(g).max()) for g in jax.tree.leaves(got_gradients["first_blocks"])) > 1e-2


@pytest.mark.slow
def test_adafactor_counts_the_layers_of_the_stack_alone():
    """31 of 33: its factored dims must be larger, and d_model is 32."""
    block = small_model().blocks[0]
    config = small_run(small_model(n_layers=33, first_blocks=(block, block)))
    config = dataclasses.replace(config, optimizer=Adafactor(min_factored_dim=1))
    shapes = {leaf.shape for leaf in jax.tree.leaves(make_trainer(config, one_device()).state.optimizer)}
    assert (31, 48) in shapes and (31, 32, 48) not in shapes


@pytest.mark.slow
def test_first_blocks_run_before_a_pipeline():
    wide = dataclasses.replace(small_model().blocks[0], mlp=GatedMlp(d_ff=64))
    model = small_model(n_layers=3, first_blocks=(wide,))
    losses = []
    for sharding, n in ((ShardingConfig(), 1), (ShardingConfig(fsdp=2, stage=2, tensor=2), 8)):
        config = small_run(model, sharding, micro_batches=2)
        config.validate(n)
        trainer = make_trainer(config, make_layout(sharding, jax.devices()[:n]))
        _, metrics = trainer.step(trainer.init(), place(packed_batch(config), trainer))
        losses.append((float(metrics.figures["loss"]), float(metrics.figures["grad_norm"])))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize("n_layers", [1, 2])
def test_a_number_of_layers_that_does_not_fit_is_refused(n_layers):
    blocks = small_model().blocks * 2
    with pytest.raises(
        UserError, match=r"model.n_layers = . is not the 1 of model.first_blocks and a multiple of the 2"
    ):
        small_model(n_layers=n_layers, blocks=blocks, first_blocks=blocks[:1])
    assert small_model(n_layers=5, blocks=blocks, first_blocks=blocks[:1]).repeats == 2


def test_experts_before_the_pattern_are_refused():
    block = dataclasses.replace(small_model().blocks[0], mlp=dataclasses.replace(EXPERTS, dispatch=Dropless()))
    with pytest.raises(UserError, match=r"model.first_blocks.0.mlp has Experts; use a GatedMlp"):
        small_model(n_layers=3, first_blocks=(block,))
