"""`maxlm.check`: everything passes as it is, and each planted fault makes its row fail."""

from __future__ import annotations

import functools
import json
import math
import os
import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pytest
from helpers import ONE_OF_A_FAMILY, one_device

from kernels_pallas import masks
from kernels_pallas.attention import xla as attention_xla
from maxlm import check
from maxlm.checking.against_oracle import kernels
from maxlm.checking.dealt_twice import data_order
from maxlm.checking.equal_gradients import equal_gradients
from maxlm.checking.going_on import checkpointed, going_on
from maxlm.checking.shrinking import fit_mesh, mesh_kinds, shrink, without_balancing
from maxlm.checking.sight import sight
from maxlm.checking.small_batches import small_batch
from maxlm.checking.verdicts import CheckRow, Verdict, rounding
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    Activation,
    Backend,
    BlockConfig,
    Capacity,
    Dtype,
    Experts,
    GatedMlp,
    GroupedQuery,
    LmHead,
    ModelConfig,
    RmsNorm,
    RunConfig,
    Sandwich,
    ShardingConfig,
    TopKRouter,
    UserError,
    serialize,
    with_experts,
)
from maxlm.config.cli import load_config
from maxlm.data import orders
from maxlm.models import init_parameters, ops
from maxlm.plan.machines import parse_machine
from maxlm.sharding import Layout, make_layout
from maxlm.training import keeper as keeping
from maxlm.training import step as stepping
from maxlm.training.objective import NextToken, Sums
from maxlm.training.state import TrainState
from maxlm.training.step import Trainer, make_trainer

ROOT = Path(__file__).parent.parent


def smaller(model: ModelConfig) -> ModelConfig:
    """One layer of a small model."""
    (block,) = model.blocks
    mlp = block.mlp if isinstance(block.mlp, Experts) else replace(block.mlp, d_ff=32)
    attention = replace(block.attention, n_heads=2, n_kv_heads=2, head_dim=8)
    return replace(model, vocab_size=32, d_model=16, n_layers=1, blocks=(replace(block, attention=attention, mlp=mlp),))


@pytest.fixture(scope="module")
def config() -> RunConfig:
    """Smaller than the command has it: what is checked takes its sizes from the config."""
    small = shrink(load_config(f"{ROOT}/configs/tiny.py"), 1).config
    train = replace(small.train, batch_size=4, seq_len=16)
    return replace(small, model=smaller(small.model), train=train)


@functools.cache
def parameters_of(model: ModelConfig) -> Any:
    return jax.jit(lambda: init_parameters(model, jax.random.key(0)))()


def verdicts(rows: Iterator[CheckRow]) -> dict[str, Verdict]:
    return {row.name: row.verdict for row in rows}


# What is checked


@pytest.mark.parametrize("name", ONE_OF_A_FAMILY)
def test_every_preset_shrinks_to_what_a_mesh_of_twos_can_hold(name: str) -> None:
    whole = load_config(f"{ROOT}/configs/{name}.py")
    assert whole.target is not None
    devices = parse_machine(whole.target).devices
    small = shrink(whole, devices)
    small.config.validate(small.devices)
    kinds = mesh_kinds(whole.sharding, devices) or ["data"]
    sizes = small.config.sharding.sizes(small.devices)
    assert [axis for axis, size in sizes.items() if size == 2] == kinds
    assert set(sizes.values()) <= {1, 2}

    def parts(model: ModelConfig) -> list[tuple[type, ...]]:
        """Classes of what a layer is made of."""
        return [(type(b.attention), type(b.attention.position), type(b.mlp), type(b.residual)) for b in model.blocks]

    assert parts(small.config.model) == parts(whole.model)
    assert small.config.execution == whole.execution and small.config.model.norm == whole.model.norm
    assert type(small.config.optimizer) is type(whole.optimizer)


def test_each_change_is_told() -> None:
    small = shrink(load_config(f"{ROOT}/configs/llama3_8b_qlora.py"), 1)
    assert "model.d_model 4096 -> 128" in small.changes and "task Sft -> Pretrain" in small.changes
    assert "model.blocks.0.attention.n_kv_heads 8 -> 2" in small.changes
    assert any(line.startswith("model.adapter ") for line in small.changes)
    assert not [line for line in small.changes if "head_dim" in line or "dtype" in line]


def test_a_mesh_on_fewer_devices_loses_its_slow_axes() -> None:
    whole = ShardingConfig(data=2, fsdp=2, tensor=2, sequence_parallel=True)
    fitted = fit_mesh(whole, 4)
    assert fitted == replace(whole, data=1)
    assert fit_mesh(whole, 1) is None


def test_a_nan_passes_nothing() -> None:
    for make in (CheckRow.at_most, CheckRow.more_than):
        assert make("x", float("nan"), 1.0, "").verdict is Verdict.FAILED
    assert rounding(Dtype.FLOAT32, "cpu") < rounding(Dtype.FLOAT32, "gpu") < rounding(Dtype.FLOAT32, "tpu")


def test_rows_of_small_batches_count_differently_many_tokens(config: RunConfig) -> None:
    batch = small_batch(config, 0)
    assert len(set(batch["loss_mask"].sum(1).tolist())) > 1
    assert batch["segment_ids"].max(1).tolist() == [1, 2, 3, 4]
    assert not np.array_equal(batch["inputs"], small_batch(config, 1)["inputs"])


# Sight


def seen(config: RunConfig) -> dict[str, Verdict]:
    return verdicts(sight(config, one_device(), parameters_of(config.model)))


def test_a_mask_that_is_off_by_one_is_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops, "causal", lambda window, pattern: masks.local(None, 1))
    found = seen(config)
    assert found["causality, xla: gradients"] is found["causality, xla: tokens"] is Verdict.FAILED


def test_documents_that_see_each_other_are_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    as_it_is = seen(config)
    ours = {f"{what}, xla: {how}" for what in ("causality", "packed documents") for how in ("gradients", "tokens")}
    others = {f"what a token sees, {other}" for other in ("tpu", "gpu", "cudnn")}
    assert as_it_is == dict.fromkeys(ours, Verdict.PASSED) | dict.fromkeys(others, Verdict.NOT_HERE)
    original = ops.attention

    def blind(*arguments: Any, segment_ids: Any = None, **others: Any) -> jax.Array:
        return original(*arguments, segment_ids=None, **others)

    monkeypatch.setattr(ops, "attention", blind)
    found = seen(config)
    assert found["packed documents, xla: gradients"] is found["packed documents, xla: tokens"] is Verdict.FAILED
    assert found["causality, xla: gradients"] is Verdict.PASSED


@pytest.mark.nightly
def test_a_kernel_that_the_config_names_must_be_here(config: RunConfig) -> None:
    named = replace(config.execution, kernels=replace(config.execution.kernels, attention=Backend.TPU))
    with pytest.raises(UserError, match=r"execution\.kernels\.attention = tpu"):
        seen(replace(config, execution=named))


@pytest.mark.nightly
def test_of_experts_with_a_fixed_room_gradients_alone_are_compared(config: RunConfig) -> None:
    experts = Experts(n_experts=4, d_ff=16, router=TopKRouter(top_k=2), dispatch=Capacity())
    found = seen(replace(config, model=with_experts(config.model, experts)))
    assert found["causality, xla: gradients"] is Verdict.PASSED
    assert found["causality, xla: tokens"] is Verdict.NOT_HERE


# Gradients


def compared(config: RunConfig, mesh: Layout | None) -> list[CheckRow]:
    return list(equal_gradients(config, one_device(), mesh, parameters_of(config.model)))


def test_a_micro_batch_with_a_wrong_weight_is_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    """The mean over micro-batches of their means, as careless accumulation has it."""
    good = compared(config, None)
    assert [row.verdict for row in good] == [Verdict.PASSED, Verdict.NOT_HERE]
    original = NextToken.loss

    def own_mean(self: NextToken, params: Any, frozen: Any, batch: Any, counted: Any) -> Sums:
        sums = original(self, params, frozen, batch, counted)
        return sums._replace(objective=sums.objective / sums.weight, weight=sums.weight * 0 + 1.0)

    monkeypatch.setattr(NextToken, "loss", own_mean)
    bad = compared(config, None)
    assert bad[0].verdict is Verdict.FAILED, str(bad[0])


@pytest.mark.nightly
@pytest.mark.parametrize("sharding", [{"fsdp": 2, "tensor": 2}, {"stage": 2}, {"seq": 2}], ids=str)
def test_a_mesh_equals_one_device(config: RunConfig, sharding: dict[str, int]) -> None:
    (block,) = config.model.blocks
    model = replace(config.model, n_layers=2, blocks=(block,))
    mesh = make_layout(ShardingConfig(data=1).with_sizes(sharding), jax.devices()[: math.prod(sharding.values())])
    *_, row = compared(replace(config, model=model), mesh)
    assert row.verdict is Verdict.PASSED, str(row)


@pytest.mark.nightly
def test_keys_at_wrong_places_on_a_mesh_are_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.lax, "axis_index", lambda axis: 0)
    mesh = make_layout(ShardingConfig(data=1, seq=2), jax.devices()[:2])
    *_, row = compared(config, mesh)
    assert row.verdict is Verdict.FAILED, str(row)


@pytest.mark.nightly
def test_bfloat16_is_compared_with_what_it_costs(config: RunConfig) -> None:
    half = replace(config, execution=replace(config.execution, dtype=Dtype.BFLOAT16))
    first, second, _ = compared(half, None)
    assert first.verdict is second.verdict is Verdict.PASSED
    assert first.seen is not None and first.seen > 1e-3, "or it was computed in float32"


def test_balancing_losses_are_left_out_of_comparisons() -> None:
    model = shrink(load_config(f"{ROOT}/configs/tiny_moe.py"), 1).config.model
    (block,) = without_balancing(model).blocks
    assert isinstance(block.mlp, Experts) and isinstance(block.mlp.router, TopKRouter)
    assert block.mlp.router.load_balance == 0


# A run


class Started(NamedTuple):
    config: RunConfig
    trainer: Trainer
    step: jax.stages.Compiled

    def rows(self, folder: Path) -> list[CheckRow]:
        """Of a new state."""
        config = replace(self.config, run_dir=str(folder))
        return list(checkpointed(config, one_device(), self.trainer, self.step, self.trainer.init()))


@pytest.fixture(scope="module")
def started(config: RunConfig) -> Started:
    trainer = make_trainer(config, one_device(), NextToken(config, one_device()))
    step, _ = trainer.start()
    return Started(config, trainer, step)


def test_a_checkpoint_is_what_it_was(started: Started, tmp_path: Path) -> None:
    assert [row.verdict for row in started.rows(tmp_path)] == [Verdict.PASSED, Verdict.PASSED]


@pytest.mark.parametrize("verify", [True, False])
def test_a_flipped_byte_is_seen(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verify: bool
) -> None:
    """Also where nobody compares checksums: as another bit, as no finite number, or because nothing can be read."""
    finish = Checkpointer._finish

    def damaging(self: Checkpointer, step: int) -> None:
        finish(self, step)
        largest = max((tmp_path / "checkpoints" / str(step) / "params").rglob("*"), key=lambda p: p.stat().st_size)
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 1
        largest.write_bytes(content)

    monkeypatch.setattr(Checkpointer, "_finish", damaging)
    changed = replace(started.config, checkpoint=replace(started.config.checkpoint, verify=verify))
    try:
        rows = started._replace(config=changed).rows(tmp_path)
    except UserError as error:
        assert ("damaged" if verify else "not finite") in str(error)
    else:
        assert not verify and rows[0].verdict is Verdict.FAILED


def test_a_run_that_goes_on_otherwise_is_seen(
    started: Started, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One that forgets the optimizer's moments."""
    restore = keeping.Keeper.restore

    def forgetful(self: keeping.Keeper, wanted: TrainState) -> TrainState | None:
        state = restore(self, wanted)
        return None if state is None else replace(state, optimizer=jax.tree.map(lambda x: x * 0, state.optimizer))

    state, batch = started.trainer.init(), started.trainer.place(small_batch(started.config, 0))
    state, _ = started.step(state, batch)  # so that there are moments
    monkeypatch.setattr(keeping.Keeper, "restore", forgetful)
    config = replace(started.config, run_dir=str(tmp_path))
    rows = checkpointed(config, one_device(), started.trainer, started.step, state)
    assert [row.verdict for row in rows] == [Verdict.FAILED, Verdict.FAILED]


@pytest.mark.nightly
def test_a_loss_that_does_not_fall_is_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(verdicts(going_on(config, one_device())).values()) == {Verdict.PASSED}
    monkeypatch.setattr(stepping, "learning_rate_schedule", lambda *_: lambda step: -1e-3)
    found = verdicts(going_on(config, one_device()))
    assert found["loss falls on one batch"] is Verdict.FAILED
    assert found["checkpoint: restored = saved"] is Verdict.PASSED


# Data and kernels


def test_an_order_by_chance_is_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert set(verdicts(data_order(config, config.data, one_device())).values()) == {Verdict.PASSED}
    monkeypatch.setattr(orders, "_seed_of", lambda seed, source: random.getrandbits(32))
    assert set(verdicts(data_order(config, config.data, one_device())).values()) == {Verdict.FAILED}


def test_a_kernel_that_is_off_by_five_percent_is_seen(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    found = verdicts(kernels(config))
    ours = {name: verdict for name, verdict in found.items() if verdict is not Verdict.NOT_HERE}
    names = {f"{op} = formula, xla" for op in ("attention", "paged attention", "gated unit")}
    assert ours == dict.fromkeys(names, Verdict.PASSED)
    forward = attention_xla.forward

    def wrong(*arguments: Any, **options: Any) -> tuple[jax.Array, jax.Array]:
        out, lse = forward(*arguments, **options)
        return 1.05 * out, lse

    monkeypatch.setattr(attention_xla, "forward", wrong)
    row = next(row for row in kernels(config) if row.name == "attention = formula, xla")
    assert row.verdict is Verdict.FAILED


# The command


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    environment |= {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "maxlm.check", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)


def test_what_raises_is_a_row_that_failed(
    config: RunConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The other rows are told, the exit code is 1, and JSON has it all."""
    from maxlm.checking import checklist

    def broken(*_: Any) -> Iterator[CheckRow]:
        yield CheckRow.at_most("first", 0, 0, "")
        raise RuntimeError("no\nluck")

    names = ("sight", "equal_gradients", "going_on", "kernels")
    quiet: dict[str, Callable[..., Iterator[CheckRow]]] = {name: lambda *_: iter(()) for name in names}
    for name, rows in (quiet | {"data_order": broken}).items():
        monkeypatch.setattr(checklist, name, rows)
    monkeypatch.setattr(check, "_force_devices", lambda count: None)
    out = tmp_path / "check.json"
    assert check.main(["--config", "tiny", "--json", str(out)]) == check.EXIT_FAILED
    assert "1 passed, 1 FAILED, 0 not here" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert [row["verdict"] for row in found["rows"]] == ["passed", "failed"]
    assert found["rows"][1]["note"] == "RuntimeError: no luck"


@pytest.mark.slow
@pytest.mark.nightly
@pytest.mark.parametrize(
    "name", ["tiny", "tiny_moe", "mixtral8x7b", "deepseek_v3", "palm_8b", "bloom_176b", "glm_130b"]
)
def test_the_command_passes(name: str, tmp_path: Path) -> None:
    out = tmp_path / "check.json"
    done = python("--config", name, "--json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert {row["verdict"] for row in found["rows"]} == {"passed", "not_here"}
    assert any(row["name"].startswith("mesh ") and row["verdict"] == "passed" for row in found["rows"])


@pytest.mark.slow
@pytest.mark.nightly
def test_other_kinds_of_blocks_pass(tmp_path: Path) -> None:
    """Of Gemma 2: windows in every other layer, caps on scores and logits, norms around."""
    attention = GroupedQuery(n_heads=8, n_kv_heads=4, head_dim=32, soft_cap=50.0)
    blocks = tuple(
        BlockConfig(
            attention=replace(attention, window=window),
            mlp=GatedMlp(d_ff=512, activation=Activation.GELU_TANH),
            residual=Sandwich(),
        )
        for window in (4096, None)
    )
    model = replace(
        load_config(f"{ROOT}/configs/tiny.py").model,
        blocks=blocks,
        norm=RmsNorm(one_plus=True),
        embedding_scale=16.0,
        head=LmHead(tied=True, soft_cap=30.0),
    )
    serialize.save(replace(load_config(f"{ROOT}/configs/tiny.py"), model=model), tmp_path / "config.json")
    done = python("--config", str(tmp_path / "config.json"))
    assert done.returncode == 0, done.stdout + done.stderr
