"""Modules that predict further tokens: the papers' formulas, what they may see, what is counted, and what is left of
them when training is over."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
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
    plainly,
    run_decoder,
    small_model,
    small_run,
)
from run_folder import BYTE_MODEL, make_run
from test_layouts import assert_close
from test_models import attend, mlp, norm, unembed

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    AdamW,
    Adapter,
    CausalLm,
    CheckpointConfig,
    ConstantSchedule,
    Context,
    Dropless,
    Experts,
    FillInMiddle,
    Learned,
    LmHead,
    Lora,
    MedusaHeads,
    Mixed,
    ModelConfig,
    MtpModules,
    ObserveConfig,
    Orpo,
    Preference,
    PrefixLm,
    Pretrain,
    Remat,
    RunConfig,
    ScalarHead,
    ShardingConfig,
    Share,
    SigmoidRouter,
    UserError,
    Zero,
)
from maxlm.config.changes import go_on
from maxlm.config.cli import load_config
from maxlm.hub.converting import open_run
from maxlm.inference.load import load_run
from maxlm.models import Tokens, abstract_parameters, bind, declared
from maxlm.models.mtp import without_mtp
from maxlm.models.upcycle import upcycle
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory
from maxlm.shapes import arrays, decoding_flops, flops_per_token, parameter_count, prefill_flops, reading_flops
from maxlm.sharding import Layout, make_layout
from maxlm.train import main as train
from maxlm.training.ahead import ahead
from maxlm.training.objective import NextToken


def with_modules(model: ModelConfig | None = None, depth: int = 2, weight: float = 0.3) -> ModelConfig:
    return dataclasses.replace(model or small_model(n_layers=1), mtp=MtpModules(depth=depth, weight=weight))


def drawn(model: ModelConfig, seed: int = 0) -> Any:
    """Parameters of which nothing is 0 or 1, made without the compiler."""
    rng = np.random.default_rng(seed)
    about = lambda array: (array.name.endswith("scale")) + 0.2 * rng.standard_normal(array.shape)
    return jax.tree.map(lambda array: jnp.asarray(about(array), jnp.float32), declared(model))


def sums_and_gradients(config: RunConfig, layout: Layout) -> Any:
    batch = packed_batch(config)
    placed = jax.device_put(batch, layout.sharding(layout.activation("batch", "seq")))
    found = jax.device_get(jax.jit(gradient_function(config, layout))(initial_parameters(config.model, 1), placed))
    return jax.tree.map(lambda x: x / batch["loss_mask"].sum(), found)


EXPERTS = Experts(n_experts=8, d_ff=16, router=SigmoidRouter(top_k=2), dispatch=Dropless(), router_z_loss=0.01)


def of_experts(depth: int = 2) -> ModelConfig:
    block = small_model().blocks[0]
    pattern = (dataclasses.replace(block, mlp=EXPERTS),)
    return with_modules(small_model(first_blocks=(block,), blocks=pattern, n_layers=3), depth)


DENSE = {
    "fsdp4_tensor2_sp": ShardingConfig(data=1, fsdp=4, tensor=2, sequence_parallel=True),
    "ring4_fsdp2": ShardingConfig(data=1, fsdp=2, seq=4, context=Context.RING),
    "ulysses2_zero1": ShardingConfig(data=1, fsdp=4, seq=2, context=Context.ULYSSES, zero=Zero.OPTIMIZER),
    "gather4_data2": ShardingConfig(data=2, seq=4, context=Context.ALL_GATHER),
}
SPARSE = {
    "expert4_fsdp2": ShardingConfig(data=1, fsdp=2, expert=4),
    "ring2_expert4": ShardingConfig(data=1, seq=2, expert=4, context=Context.RING),
    "tensor2_expert2_zero2": ShardingConfig(data=1, fsdp=2, tensor=2, expert=2, zero=Zero.GRADIENTS),
    "stage2_expert2": ShardingConfig(data=1, fsdp=2, stage=2, expert=2),
}


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*DENSE, *SPARSE])
def test_every_layout_equals_one_device(name: str) -> None:
    sharding, model = (DENSE | SPARSE)[name], with_modules() if name in DENSE else of_experts()
    want = sums_and_gradients(small_run(model), one_device())
    got = sums_and_gradients(small_run(model, sharding), make_layout(sharding))
    assert_close(got, want, 1e-5)
    moved = jax.tree_util.tree_leaves_with_path(want[1]["mtp"])
    assert all(abs(leaf).max() > 1e-4 or path[-1].key == "router_bias" for path, leaf in moved)


@pytest.mark.nightly
@pytest.mark.parametrize("changes", [{"remat": remat} for remat in Remat] + [{"scan_layers": False}], ids=str)
def test_remat_and_loops_change_nothing(changes: dict[str, Any]) -> None:
    config = small_run(with_modules())
    other = dataclasses.replace(config, execution=dataclasses.replace(config.execution, **changes))
    assert_close(sums_and_gradients(other, one_device()), sums_and_gradients(config, one_device()), 1e-5)


@pytest.mark.nightly
@pytest.mark.parametrize("stage", [1, 2])
def test_micro_batches_change_nothing(stage: int) -> None:
    sharding = ShardingConfig(data=2, stage=stage, fsdp=4 // stage)
    model = dataclasses.replace(with_modules(), n_layers=2)
    config = small_run(model, sharding, batch_size=16, micro_batches=2)
    config.validate(8)
    want = sums_and_gradients(dataclasses.replace(config, train=small_run(batch_size=16).train), one_device())
    assert_close(sums_and_gradients(config, make_layout(sharding)), want, 1e-5)


def test_the_loss_is_that_of_the_paper() -> None:
    """Equations 21 to 25 of arXiv:2412.19437 in float64, token by token, on the model's own states: M is one matrix
    there, and what a packed document has no token of is left out. With a tied head that has a bias, and a z-loss."""
    model = with_modules(small_model(n_layers=1, head=LmHead(tied=True, bias=True)), weight=0.6)
    config = small_run(model, batch_size=2, seq_len=16, z_loss=0.01)
    parameters, batch = drawn(model), packed_batch(config, seed=1)
    without = dataclasses.replace(config, model=model.main)

    @jax.jit
    def ours(parameters: Any, batch: Any) -> Any:
        used, tokens = without_mtp(model, parameters)[1], Tokens(batch["positions"], batch["segment_ids"])
        hidden = run_decoder(model.main, used, plainly(), batch["inputs"], tokens).hidden
        plain = NextToken(without, one_device()).loss(used, None, batch, 1.0)
        return hidden, plain, NextToken(config, one_device()).loss(parameters, None, batch, 1.0)

    hidden, plain, sums = ours(parameters, batch)
    p, (B, T) = jax.tree.map(lambda x: np.asarray(x, np.float64), parameters), batch["inputs"].shape
    losses, z_losses, rms = np.zeros(2), np.zeros(2), functools.partial(norm, model.norm)
    for b in range(B):
        document, places, ids = (batch[name][b] for name in ("segment_ids", "positions", "inputs"))
        h = np.asarray(hidden[b], np.float64)
        for k in (1, 2):
            own = p["mtp"][str(k - 1)]
            M = np.concatenate([own["hidden_proj"], own["embedding_proj"]])
            x = np.zeros_like(h)
            for t in range(T):
                inside = t + k < T and document[t + k] == document[t]
                e = p["embed"][ids[t + k]] if inside else np.zeros(model.d_model)
                x[t] = np.concatenate([rms(own["hidden_norm"], h[t]), rms(own["embedding_norm"], e)]) @ M
            block, q = model.blocks[-1], own["block"]
            x = x + attend(model, block.attention, q["attention"], rms(q["attention_norm"], x), places, document)
            x = x + mlp(block.mlp, q["mlp"], rms(q["mlp_norm"], x))
            h = rms(own["final_norm"], x)
            logits = unembed(model.head, p, h)
            log_z = np.log(np.exp(logits).sum(-1))
            for t in range(T - k):
                if document[t + k] == document[t] and batch["loss_mask"][b, t + k]:
                    losses[k - 1] += log_z[t] - logits[t, batch["targets"][b, t + k]]
                    z_losses[k - 1] += 0.01 * log_z[t] ** 2
    assert losses.min() > 1
    np.testing.assert_allclose(sums.means["mtp_loss"], losses.mean(), rtol=1e-5)
    np.testing.assert_allclose(sums.objective, plain.objective + 0.6 / 2 * (losses + z_losses).sum(), rtol=1e-5)
    # What is measured on held-out text, and what everything is divided by, knows nothing of them.
    assert (sums.weight, sums.means["loss"], sums.means["z_loss"]) == (
        plain.weight,
        plain.means["loss"],
        plain.means["z_loss"],
    )


def test_what_a_module_sees() -> None:
    """Of the gradients: module k at token i sees the tokens of its document up to i + k, and nothing of others. All
    tokens of the row are different ones, and so are their places in a learned table."""
    T = 12
    model = with_modules(small_model(n_layers=1, embedded_position=Learned(), max_seq_len=T))
    segments = np.repeat([1, 2], [7, 5])[None]
    places = np.concatenate([np.arange(7), np.arange(5)])[None]
    ids = np.random.default_rng(0).permutation(64)[None, :T]
    parameters, how = drawn(model), plainly()
    batch = {"inputs": ids, "targets": ids, "segment_ids": segments, "loss_mask": np.ones((1, T), np.float32)}

    def states(table: jax.Array) -> jax.Array:
        decoder, tokens = bind(model, {**parameters, "embed": table}), Tokens(places, segments)
        hidden = decoder(decoder.embeddings(ids, tokens, how), tokens, how).hidden
        following = [(one.inputs, one.same) for one in (ahead(jax.tree.map(jnp.asarray, batch), k) for k in (1, 2))]
        return jnp.stack([x[0].sum(-1) for x, _ in decoder.further(hidden, following, tokens, how)])

    slopes = jax.jit(jax.jacrev(states))(parameters["embed"])  # [modules, T, V, D]
    assert np.isfinite(slopes).all()
    seen = np.abs(slopes).max(-1)[:, :, ids[0]] > 0
    for k in (1, 2):
        for i in range(T):
            last = max(i + m for m in range(k + 1) if i + m < T and segments[0, i + m] == segments[0, i])
            want = [segments[0, j] == segments[0, i] and j <= last for j in range(T)]
            assert seen[k - 1, i].tolist() == want, (k, i)


def test_what_is_counted() -> None:
    """Each module has a layer and M, and uses the head once more; nothing but training counts them."""
    model, plain = of_experts(depth=2), of_experts(depth=2).main
    D, V, block = model.d_model, model.vocab_size, model.blocks[-1]
    count, without = parameter_count(model), parameter_count(plain)
    attention = 2 * 4 * 8 * D + 2 * 2 * 8 * D
    experts = 3 * D * 16
    module = 2 * D * D + 3 * D + 2 * D + attention + D * 8 + 8 + 8 * experts
    assert (count.mtp, without.mtp) == (2 * module, 0)
    assert count.mtp_active == 2 * (module - 6 * experts)
    assert count.total == without.total + count.mtp == sum(array.size for array in arrays(model))
    assert count.active == without.active + count.mtp_active
    flops, before = (flops_per_token(one, 16, Remat.FULL) for one in (model, plain))
    assert flops.parameters_term == before.parameters_term + 6 * (count.mtp_active + 2 * V * D)
    assert flops.attention_term == before.attention_term * 5 // 3
    one_layer = before.recompute - flops_per_token(dataclasses.replace(plain, n_layers=2), 16, Remat.FULL).recompute
    assert flops.recompute == before.recompute + 2 * one_layer
    assert isinstance(block.mlp, Experts) and decoding_flops(model, 9) == decoding_flops(plain, 9)
    assert prefill_flops(model, 9) == prefill_flops(plain, 9) and reading_flops(model, 9) == reading_flops(plain, 9)
    memory, less = (estimate_memory(small_run(one), 1, Platform.CPU) for one in (model, plain))
    assert memory.parameters - less.parameters == 4 * count.mtp == memory.gradients - less.gradients
    assert memory.optimizer - less.optimizer == 8 * count.mtp
    assert memory.activations > less.activations and memory.logits - less.logits >= 2 * 4 * V * D


def test_deepseek_v3s_module_is_as_large_as_published() -> None:
    """README_WEIGHTS.md of the released weights: 671B, and 11.5B of the module's own, of which with embedding and head
    2.4B are used for a token; both are the layer's without M, which has 0.1B."""
    model = load_config("configs/deepseek_v3.py").model
    count, M = parameter_count(model), 2 * 7168**2
    assert model.mtp == MtpModules(depth=1, weight=0.3)
    assert (count.total - count.mtp) / 1e9 == pytest.approx(671.0, abs=0.05)
    assert (count.mtp - M) / 1e9 == pytest.approx(11.5, abs=0.05)
    assert (count.mtp_active - M + 2 * 129_280 * 7168) / 1e9 == pytest.approx(2.4, abs=0.05)


def test_a_run_is_used_without_them(tmp_path: Path) -> None:
    """What is loaded is the model without modules, bit by bit; what is converted says what was passed over."""
    model = with_modules(BYTE_MODEL)
    parameters = drawn(model)
    config = make_run(tmp_path, parameters, model=model)
    run = load_run(config.run_dir)
    assert run.config.model == BYTE_MODEL
    jax.tree.map(np.testing.assert_array_equal, run.parameters, {k: x for k, x in parameters.items() if k != "mtp"})
    opened = open_run(Path(config.run_dir))
    assert opened.model == BYTE_MODEL and {name.split("/")[0] for name in opened.ignored} == {"mtp"}


@pytest.mark.nightly
def test_it_writes_what_the_model_without_them_writes(tmp_path: Path) -> None:
    texts = []
    for name, model in (("with", with_modules(BYTE_MODEL)), ("without", BYTE_MODEL)):
        (tmp_path / name).mkdir()
        run = load_run(make_run(tmp_path / name, model=model).run_dir)
        texts.append(run.generate("document", max_new_tokens=8).text)
    assert texts[0] == texts[1]


def test_modules_come_from_a_run_that_has_them() -> None:
    """The others are new; without `model.mtp` those that are there are left."""
    one, three, none = with_modules(depth=1), with_modules(depth=3), with_modules().main
    old, new = drawn(one, 1), drawn(three, 2)
    more = upcycle(one, three, old, new)
    same = lambda a, b: jax.tree.map(np.testing.assert_array_equal, a, b)
    same(more["mtp"], {"0": old["mtp"]["0"], "1": new["mtp"]["1"], "2": new["mtp"]["2"]})
    same({**more, "mtp": 0}, {**old, "mtp": 0})
    same(upcycle(one, none, old, without_mtp(three, new)[1]), without_mtp(one, old)[1])
    same(upcycle(none, one, without_mtp(three, new)[1], old), {**new, "mtp": old["mtp"]})


def test_what_does_not_go_together() -> None:
    model = small_model()
    for changes, words in (
        ({"head": ScalarHead()}, r"model.mtp predicts tokens, of which model.head = ScalarHead makes no logits"),
        ({"medusa": MedusaHeads()}, r"under model.medusa that is not; use model.mtp = None"),
        ({"adapter": Adapter(kind=Lora())}, r"under model.adapter that is not; use model.mtp = None"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(model, mtp=MtpModules(), **changes)
    run = small_run(with_modules(depth=3))
    observe = dataclasses.replace(run.observe, sample_tokens=0)
    run = dataclasses.replace(run, observe=observe)
    run.validate(1)
    fim = Mixed(shares=(Share(prediction=CausalLm()), Share(prediction=FillInMiddle())))
    dataclasses.replace(run, task=Pretrain(predict=fim)).validate(1)
    mixed = Mixed(shares=(Share(prediction=CausalLm()), Share(prediction=PrefixLm())))
    for changes, words in (
        ({"task": Pretrain(predict=mixed)}, r"task.predict.shares.1.prediction = PrefixLm lets tokens see"),
        ({"task": Preference(loss=Orpo())}, r"model.mtp has modules, which task = Preference does not train"),
        ({"train": dataclasses.replace(run.train, seq_len=3)}, r"model.mtp.depth = 3 predicts beyond the windows"),
    ):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(run, **changes).validate(1)


def test_its_weight_may_change_in_a_run_and_its_depth_not() -> None:
    run = small_run(with_modules(weight=0.3))
    (told,) = go_on(run, small_run(with_modules(weight=0.1)), (), "step 5", 5)
    assert str(told) == "model.mtp.weight: 0.3 -> 0.1"
    with pytest.raises(UserError, match=r"model.mtp.depth: step 5 was trained with 2, the config says 1"):
        go_on(run, small_run(with_modules(depth=1)), (), "step 5", 5)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A run on prepared bytes, with experts, whose learning rate does not change."""
    config = make_run(tmp_path_factory.mktemp("mtp"), model=dataclasses.replace(of_experts(1), vocab_size=264))
    return dataclasses.replace(
        config,
        train=dataclasses.replace(config.train, batch_size=16, micro_batches=2, log_every=1, eval_batches=1),
        optimizer=AdamW(learning_rate=0.01, schedule=ConstantSchedule()),
        observe=ObserveConfig(sample_tokens=0),
        sharding=ShardingConfig(data=2, fsdp=2, expert=2),
    )


@pytest.mark.nightly
def test_a_run_that_goes_on_is_the_same(prepared: RunConfig, tmp_path: Path) -> None:
    """With another weight it is another; the modules and their routers' biases learn, and the log tells of both."""

    def trained(name: str, *steps: tuple[int, float]) -> tuple[Any, list[dict[str, Any]]]:
        for n, weight in steps:
            model = dataclasses.replace(prepared.model, mtp=MtpModules(weight=weight))
            train_config = dataclasses.replace(prepared.train, steps=n)
            config = dataclasses.replace(prepared, model=model, train=train_config, run_dir=str(tmp_path / name))
            result = train(config)
        assert result.run.config.model == prepared.model.main and "mtp" not in result.run.parameters
        with Checkpointer(tmp_path / name / "checkpoints", CheckpointConfig()) as saved:
            shapes = abstract_parameters(prepared.model, one_device())
            parameters = saved.restore_params(4, shapes).params
        rows = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        return jax.device_get(parameters), rows

    (whole, rows), (again, _), (other, _) = (
        trained(name, *steps)
        for name, steps in (
            ("whole", [(4, 0.3)]),
            ("again", [(2, 0.3), (4, 0.3)]),
            ("other", [(2, 0.3), (4, 0.1)]),
        )
    )
    assert_close(again, whole, 1e-6)
    module = whole["mtp"]["0"]
    assert np.abs(other["mtp"]["0"]["hidden_proj"] - module["hidden_proj"]).max() > 1e-4
    assert np.abs(module["block"]["mlp"]["router_bias"]).max() >= 0.001
    steps = [row for row in rows if "mtp_loss" in row]
    assert len(steps) == 4 and steps[-1]["mtp_loss"] < steps[0]["mtp_loss"]
    assert len(steps[0]["moe_load_entropy"]) == 3  # of two layers, and of the module
