"""`python -m maxlm.average`, on checkpoints of a run with Muon and an average; such a run stopped and gone on with."""

from __future__ import annotations

import dataclasses
import json
import re
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
from run_folder import make_run
from train_runs import flip_byte, inspect, rows

from maxlm import train
from maxlm.average import main
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    ConstantSchedule,
    Ema,
    Muon,
    ObserveConfig,
    RunConfig,
    ShardingConfig,
    UserError,
    serialize,
)
from maxlm.data.tokenizers import Bytes
from maxlm.hub.models import load_run
from maxlm.models import declared
from maxlm.recipes.pretrain import HeldOutText
from maxlm.training import NextToken
from maxlm.training.optimizers import make_optimizer
from maxlm.training.state import init_state

MUON = Muon(learning_rate=1e-2, schedule=ConstantSchedule(), average=Ema(decay=0.8))
KEPT = [0.1, 2 / 11, 3 / 12, 4 / 13]
"""min(0.8, (1 + t) / (10 + t))"""
KEEP_ALL = CheckpointConfig(every=1, keep_last=4)


class Steps(NamedTuple):
    """A run folder with the ends of four steps, whose gradients are random numbers."""

    folder: Path
    config: RunConfig
    states: list[Any]
    """Parameters and optimizer's state before the first step, and after each."""
    step: Any
    """State and number of the step -> next state."""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Steps:
    config = make_run(tmp_path_factory.mktemp("average"))
    folder = Path(config.run_dir).parent / "steps"
    config = dataclasses.replace(config, optimizer=MUON, checkpoint=KEEP_ALL, run_dir=str(folder))
    optimizer = make_optimizer(MUON, lambda count: 0.1, declared(config.model), layers=config.model.repeats)
    update = jax.jit(lambda gradients, state: optimizer.update(gradients, state[1], state[0]))

    def step(state: Any, number: int) -> Any:
        rng = np.random.default_rng(number)
        gradients = jax.tree.map(lambda x: rng.normal(size=x.shape).astype(np.float32), state[0])
        updates, after = update(gradients, state)
        return optax.apply_updates(state[0], updates), after

    begin = load_run(folder.parent / "run").parameters
    states = [(begin, optimizer.init(begin))]
    Bytes().save(folder / "tokenizer")
    serialize.save(config, folder / "config.json")
    with Checkpointer(folder / "checkpoints", KEEP_ALL) as checkpointer:
        for number in (1, 2, 3, 4):
            parameters, state = step(states[-1], number)
            states.append((parameters, state))
            meta = {"tokenizer": Bytes().fingerprint}
            checkpointer.save(number, params=parameters, optimizer={"optimizer": state}, meta=meta)
    return Steps(folder, config, states, step)


def test_an_optimizer_goes_on_bit_for_bit(made: Steps, tmp_path: Path) -> None:
    """From the second of four checkpoints, with momentum, AdamW's moments and the average."""
    shutil.copytree(made.folder / "checkpoints", tmp_path / "checkpoints")
    for step in (3, 4):
        shutil.rmtree(tmp_path / f"checkpoints/{step}")
    wanted = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), made.states[0])
    with Checkpointer(tmp_path / "checkpoints", KEEP_ALL) as checkpointer:
        restored = checkpointer.restore_latest(params=wanted[0], optimizer={"optimizer": wanted[1]})
    assert restored is not None and restored.step == 2
    state = restored.params, restored.optimizer["optimizer"]
    for step in (3, 4):
        state = made.step(state, step)
    for got, want in zip(*map(jax.tree.leaves, (state, made.states[-1])), strict=True):
        np.testing.assert_array_equal(got, want)


def assert_mean(place: Path, shares: list[float], of: list[Any]) -> None:
    for got, *parts in zip(*map(jax.tree.leaves, (load_run(place).parameters, *of)), strict=True):
        want = sum(share * np.asarray(part, np.float64) for share, part in zip(shares, parts, strict=True))
        np.testing.assert_allclose(got, want, rtol=1e-6, atol=1e-7)
        assert got.dtype == np.float32


def test_the_mean_of_steps(made: Steps, tmp_path: Path) -> None:
    """With weights and without; it is a run folder like others, of the latest step."""
    ends = [parameters for parameters, _ in made.states]
    main([str(made.folder), "--last", "3", "--out", str(tmp_path / "even")])
    main([str(made.folder), "--out", str(tmp_path / "odd"), "--steps", "4", "2", "--weights", "3", "1"])
    assert_mean(tmp_path / "even", [1 / 3] * 3, ends[2:])
    assert_mean(tmp_path / "odd", [0.75, 0.25], [ends[4], ends[2]])
    assert [load_run(tmp_path / name).step for name in ("even", "odd")] == [4, 4]
    assert json.loads((tmp_path / "odd/config.json").read_text())["run_dir"] == str(tmp_path / "odd")


def test_the_mean_of_runs(made: Steps, tmp_path: Path) -> None:
    """One of them named by a checkpoint; the step is the later one, the config the first one's."""
    main([str(made.folder.parent / "run"), str(made.folder / "checkpoints/3"), "--out", str(tmp_path / "soup")])
    assert_mean(tmp_path / "soup", [0.5, 0.5], [made.states[0][0], made.states[3][0]])
    assert load_run(tmp_path / "soup").step == 3


def test_the_average_that_a_run_keeps(made: Steps, tmp_path: Path) -> None:
    """It is the sum over the parameters that the run began with and those of its steps."""
    main([str(made.folder), "--ema", "--out", str(tmp_path / "ema")])
    shares = [np.prod(KEPT), *((1 - KEPT[t]) * np.prod(KEPT[t + 1 :]) for t in range(4))]
    assert_mean(tmp_path / "ema", shares, [parameters for parameters, _ in made.states])


def test_a_damaged_average_is_refused(made: Steps, tmp_path: Path) -> None:
    run = shutil.copytree(made.folder, tmp_path / "run")
    flip_byte(run / "checkpoints/4", "optimizer")
    with pytest.raises(UserError, match="checkpoints/4"):
        main([str(run), "--ema", "--out", str(tmp_path / "out")])
    main([str(run), "--last", "2", "--out", str(tmp_path / "mean")])  # parameters are as they were


def test_what_cannot_be_averaged_is_refused_in_a_line(made: Steps, tmp_path: Path) -> None:
    run, other = made.folder, tmp_path / "other"
    shutil.copytree(run, other)  # its checkpoints do not say what model they are of: the config does
    model = dataclasses.replace(made.config.model, norm=dataclasses.replace(made.config.model.norm, eps=1e-3))
    serialize.save(dataclasses.replace(made.config, model=model), other / "config.json")

    def told(*words: str) -> str:
        with pytest.raises(UserError) as error:
            main([*words, "--out", str(tmp_path / "out")])
        assert "\n" not in str(error.value)
        return str(error.value)

    assert "alone is its own mean; name more runs" in told(str(run))
    assert "no checkpoint of step 9; there are 1, 2, 3, 4" in told(str(run), "--steps", "9")
    assert "--last 5, and there are only checkpoints of 1, 2, 3, 4; a run" in told(str(run), "--last", "5")
    assert "both choose checkpoints" in told(str(run), "--last", "2", "--steps", "1")
    assert "3 numbers for 2 checkpoints" in told(str(run), "--last", "2", "--weights", "1", "1", "1")
    assert "are all 0" in told(str(run), "--last", "2", "--weights", "0", "0")
    assert "is named twice" in told(str(run), str(run))
    assert "is one checkpoint" in told(str(run / "checkpoints/3"), "--last", "2")
    assert "no finished checkpoint" in told(str(tmp_path))
    assert re.search(r"another model than .*: model.norm.eps: 1e-05 -> 0.001;", told(str(run), str(other)))
    assert re.search(r"keeps no average.*; train with optimizer.average", told(str(run.parent / "run"), "--ema"))
    assert not (tmp_path / "out").exists()


@pytest.mark.nightly
@pytest.mark.usefixtures("programs_kept")
def test_a_real_run_with_an_average(made: Steps, tmp_path: Path) -> None:
    """From another run's parameters. Its average's held-out loss is the one that the run has said; killed after three
    steps of four it comes to the same bits; another optimizer, or none to average, is another state."""
    config = dataclasses.replace(
        made.config,
        train=dataclasses.replace(made.config.train, steps=4, eval_batches=1),
        checkpoint=dataclasses.replace(KEEP_ALL, init_from=str(made.folder)),
        observe=ObserveConfig(sample_tokens=0),
        run_dir=str(tmp_path / "run"),
    )
    train.main(config)
    main([config.run_dir, "--ema", "--out", str(tmp_path / "ema")])
    ends = [made.states[-1][0], *(load_run(config.run_dir, step=step).parameters for step in (1, 2, 3, 4))]
    shares = [np.prod(KEPT), *((1 - KEPT[t]) * np.prod(KEPT[t + 1 :]) for t in range(4))]
    assert_mean(tmp_path / "ema", shares, ends)
    found = load_run(tmp_path / "ema", sharding=ShardingConfig())
    row = HeldOutText(config, found.layout, NextToken(config, found.layout))(4, init_state(found.parameters, None))
    said = rows(tmp_path / "run", "evals")[-1]
    assert "eval_average_loss" not in row and said["step"] == 4
    assert said["eval_average_loss"] == pytest.approx(row["eval_loss"], rel=1e-5)
    assert abs(said["eval_average_loss"] - said["eval_loss"]) > 1e-4

    shutil.copytree(tmp_path / "run", tmp_path / "stopped")
    shutil.rmtree(tmp_path / "stopped/checkpoints/4")
    train.main(dataclasses.replace(config, run_dir=str(tmp_path / "stopped")))
    one, other = (inspect(tmp_path / name, "--hash") for name in ("run", "stopped"))
    assert one["hash_step"] == other["hash_step"] == 4 and one["hash"] == other["hash"]

    plain = dataclasses.replace(config, optimizer=dataclasses.replace(MUON, average=None))
    with pytest.raises(UserError, match=r"optimizer.average: .* was trained with Ema, the config says None"):
        train.main(plain)
    with pytest.raises(UserError, match=r"optimizer: .* was trained with Muon, the config says AdamW"):
        train.main(dataclasses.replace(config, optimizer=AdamW()))
