"""Runs that learn from rewards: they learn what is rewarded and nothing else, and go on after a kill as if there had
been none."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers import small_run
from train_runs import rows

from maxlm.checkpoint.state_hash import state_hash
from maxlm.config import (
    AdamW,
    Adapter,
    BadReward,
    BatchMean,
    ByteTokenizer,
    CheckpointConfig,
    ConstantSchedule,
    Conversations,
    DataConfig,
    Dataset,
    FixedKl,
    FunctionReward,
    GroupMean,
    Grpo,
    LeaveOneOut,
    Lora,
    ObserveConfig,
    ParameterFormat,
    Ppo,
    PrepareConfig,
    Purpose,
    Reinforced,
    Rollouts,
    RunConfig,
    Sft,
    UserError,
)
from maxlm.recipes import recipe
from maxlm.recipes.rewards import RewardSum
from maxlm.recipes.rollouts import RolloutFeed
from maxlm.recipes.writing import PolicyWriter
from maxlm.training import loop
from maxlm.training.loop import run

pytestmark = pytest.mark.usefixtures("programs_kept")

LETTERS = "abcdefgh"


def walk(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """A little decision process: each of three letters is worth 1/3 if it is an odd number of places from the one
    before it. The best is 1; letters by chance have 1/2."""
    said = (prompt + completion)[:4]
    odd = sum((ord(a) - ord(b)) % 2 for a, b in itertools.pairwise(said) if a in LETTERS and b in LETTERS)
    return odd / 3 if len(completion) == 3 else 0.0


def arm(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
    """A bandit: the first letter is worth its place in the alphabet, the best 1."""
    return LETTERS.find(completion[:1]) / (len(LETTERS) - 1) if completion[:1] in LETTERS else 0.0


FUNCTIONS: dict[str, Callable[..., float]] = {"walk": walk, "arm": arm}


@pytest.fixture(scope="module", autouse=True)
def on_one_device() -> Iterator[None]:
    """test_policy_objective.py compares eight with one."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "all_devices", lambda: jax.devices()[:1])
        yield


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With a run that writes three letters after one, any letters."""
    folder, rng = tmp_path_factory.mktemp("rollouts"), random.Random(0)
    with (folder / "letters.jsonl").open("w") as file:
        for _ in range(800):
            asked, *said = (rng.choice(LETTERS) for _ in range(4))
            file.write(json.dumps({"prompt": asked, "completion": "".join(said), "n": rng.random()}) + "\n")
    start = run_config(folder, Sft(), Purpose.SFT)
    train = dataclasses.replace(start.train, steps=40, batch_size=32)
    run(dataclasses.replace(start, train=train, run_dir=str(folder / "start")), recipe)
    return folder


def run_config(folder: Path, task: Any, purpose: Purpose = Purpose.PROMPTS, **changes: Any) -> RunConfig:
    documents = Conversations(paths=(str(folder / "letters.jsonl"),), purpose=purpose, template="raw")
    data = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.1, workers=1)
    base = small_run(batch_size=16, seq_len=8, steps=4, log_every=1)
    values = {
        "model": dataclasses.replace(base.model, vocab_size=384),
        "data": DataConfig(datasets=(Dataset(path=str(folder / f"data-{purpose.value}"), prepare=data),)),
        "train": dataclasses.replace(base.train, eval_every=0),
        "optimizer": AdamW(learning_rate=3e-3, schedule=ConstantSchedule()),
        "checkpoint": CheckpointConfig(
            every=2, keep_last=9, init_from=None if purpose is Purpose.SFT else str(folder / "start")
        ),
        "observe": ObserveConfig(sample_tokens=0),
        "task": task,
        "run_dir": str(folder / f"{type(task).__name__.lower()}"),
    }
    return dataclasses.replace(base, **values | changes)


WALK, ARM = (FunctionReward(name="walk"),), (FunctionReward(name="arm"),)
ROLLOUTS = Rollouts(prompts=8, samples=4, max_new_tokens=4, slots=8, eval_prompts=16)
reinforce = functools.partial(recipe, functions=FUNCTIONS)


NIGHTLY = pytest.mark.nightly


@pytest.mark.parametrize(
    ("task", "steps"),
    [
        pytest.param(Grpo(rewards=WALK, advantage=GroupMean(divide_by_std=False)), 40, marks=NIGHTLY),
        (Ppo(rewards=WALK, kl=FixedKl(beta=0.001)), 60),
        pytest.param(Grpo(rewards=WALK, advantage=LeaveOneOut()), 40, marks=NIGHTLY),
        pytest.param(Grpo(rewards=WALK, advantage=BatchMean()), 40, marks=NIGHTLY),
        pytest.param(Grpo(rewards=ARM), 40, marks=NIGHTLY),
        pytest.param(Grpo(rewards=ARM, advantage=LeaveOneOut()), 40, marks=NIGHTLY),
        pytest.param(Ppo(rewards=ARM), 60, marks=NIGHTLY),
    ],
    ids=["grpo", "ppo", "rloo", "reinforce", "arm-grpo", "arm-rloo", "arm-ppo"],
)
def test_the_best_policy_is_found(folder: Path, tmp_path: Path, task: Reinforced, steps: int) -> None:
    rollouts = dataclasses.replace(ROLLOUTS, prompts=16, eval_prompts=64, slots=32)
    if isinstance(task, Ppo):
        rollouts = dataclasses.replace(rollouts, prompts=64, samples=1, epochs=2)
    config = run_config(folder, dataclasses.replace(task, rollouts=rollouts), run_dir=str(tmp_path / "run"))
    train = dataclasses.replace(config.train, steps=steps, batch_size=64, log_every=10)
    config = dataclasses.replace(config, train=train, checkpoint=dataclasses.replace(config.checkpoint, every=steps))
    assert run(config, reinforce).step == steps
    [measured] = rows(tmp_path / "run", "evals")
    assert measured["eval_reward"] > 0.93
    seen = rows(tmp_path / "run", "rollouts")
    assert seen[0]["reward"] < 0.6, "it did not know it before"
    assert all(row["sampler_largest"] < 1e-4 for row in seen)


@NIGHTLY
def test_policy_and_critic_are_held_in_bfloat16(folder: Path, tmp_path: Path) -> None:
    """And go on so: a run of two steps, and two more."""
    task = Ppo(rewards=WALK, rollouts=dataclasses.replace(ROLLOUTS, prompts=32, samples=1))
    config = run_config(folder, task, run_dir=str(tmp_path / "run"))
    optimizer = dataclasses.replace(config.optimizer, parameter_format=ParameterFormat.BFLOAT16)
    for steps in (2, 4):
        train = dataclasses.replace(config.train, steps=steps)
        assert run(dataclasses.replace(config, train=train, optimizer=optimizer), reinforce).step == steps


class Killed(Exception):
    pass


def killing(method: Any, at: int) -> Any:
    calls = itertools.count()

    @functools.wraps(method)
    def called(self: Any, *args: Any, **kwargs: Any) -> Any:
        if next(calls) == at:
            raise Killed
        return method(self, *args, **kwargs)

    return called


TASKS = [
    Grpo(rewards=WALK, rollouts=dataclasses.replace(ROLLOUTS, epochs=2), kl_weight=0.05, redraws=2),
    Ppo(rewards=WALK, rollouts=dataclasses.replace(ROLLOUTS, prompts=32, samples=1)),
]


@pytest.mark.parametrize(
    ("task", "cls", "method", "call"),
    [
        (TASKS[0], PolicyWriter, "write", 2),
        (TASKS[1], RolloutFeed, "next", 3),
        pytest.param(TASKS[0], RolloutFeed, "next", 5, marks=NIGHTLY),
        pytest.param(TASKS[1], PolicyWriter, "write", 1, marks=NIGHTLY),
    ],
    ids=["grpo while it writes", "ppo between steps", "grpo between steps", "ppo while it writes"],
)
def test_run_that_was_killed_ends_as_one_that_was_not(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: Reinforced, cls: type, method: str, call: int
) -> None:
    def config(name: str) -> RunConfig:
        made = run_config(folder, task, run_dir=str(tmp_path / name))
        steps = task.rollouts.steps(16)
        checkpoint = dataclasses.replace(made.checkpoint, every=steps)
        return dataclasses.replace(made, checkpoint=checkpoint, train=dataclasses.replace(made.train, steps=2 * steps))

    run(config("whole"), reinforce)
    with monkeypatch.context() as patch:
        patch.setattr(cls, method, killing(getattr(cls, method), call))
        with pytest.raises(Killed):
            run(config("killed"), reinforce)
    run(config("killed"), reinforce)
    steps = config("whole").train.steps
    one, other = (state_hash(tmp_path / name / "checkpoints", steps) for name in ("whole", "killed"))
    assert one == other


def test_adapter_learns_from_rewards_on_a_frozen_base(folder: Path, tmp_path: Path) -> None:
    task = Grpo(rewards=WALK, rollouts=ROLLOUTS, kl_weight=0.05)
    config = run_config(folder, task, run_dir=str(tmp_path / "run"))
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, adapter=Adapter(kind=Lora(rank=2, alpha=4)))
    )
    assert run(config, reinforce).step == 4
    row = rows(tmp_path / "run", "metrics")[-1]
    assert row["reference_kl"] > 0, "after two steps it is not the base any more"


def test_equal_rewards_teach_nothing_and_are_counted(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, Grpo(rewards=(FunctionReward(name="one"),), rollouts=ROLLOUTS), run_dir=str(tmp_path))
    result = run(config, functools.partial(recipe, functions={"one": lambda prompt, completion, record: 1.0}))
    assert result.loss == 0.0
    for row in rows(tmp_path, "rollouts"):
        assert row["equal_groups"] == 1.0 and row["reward"] == 1.0


def test_bad_rewards_stop_the_run_or_are_skipped(folder: Path, tmp_path: Path) -> None:
    def odd(prompt: str, completion: str, record: Mapping[str, Any]) -> float:
        return float("nan") if prompt in "ace" else walk(prompt, completion, record)

    asked = functools.partial(recipe, functions={"odd": odd})
    task = Grpo(rewards=(FunctionReward(name="odd"),), rollouts=ROLLOUTS)
    with pytest.raises(UserError, match=r"task.rewards.0: odd, of prompt \d+ and the completion .* nan"):
        run(run_config(folder, task, run_dir=str(tmp_path / "stop")), asked)
    task = dataclasses.replace(task, on_bad_reward=BadReward.SKIP)
    run(run_config(folder, task, run_dir=str(tmp_path / "skip")), asked)
    assert all(row["skipped"] > 0 for row in rows(tmp_path / "skip", "rollouts"))
    assert all(np.isfinite(row["loss"]) for row in rows(tmp_path / "skip", "metrics"))


def test_changed_reward_is_noticed_when_a_run_goes_on(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, Grpo(rewards=WALK, rollouts=ROLLOUTS), run_dir=str(tmp_path))
    run(dataclasses.replace(config, train=dataclasses.replace(config.train, steps=2)), reinforce)
    with pytest.raises(UserError, match="--allow_change data"):
        run(config, functools.partial(recipe, functions={"walk": arm}))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompts": 5}, "train.batch_size = 16 must divide the 20 completions"),
        ({"prompts": 32, "samples": 1}, "leaves GroupMean nothing to compare a completion with"),
        ({"epochs": 3}, "checkpoint.every = 2 must be a multiple of 6"),
        ({"max_new_tokens": 9}, "prompts are too long; the first"),
    ],
)
def test_rollouts_that_do_not_fit_are_refused(folder: Path, changes: dict[str, Any], words: str) -> None:
    task = Grpo(rewards=WALK, rollouts=dataclasses.replace(ROLLOUTS, **changes))
    with pytest.raises(UserError, match=words):
        run(run_config(folder, task), reinforce)


def test_start_and_prompts_must_be_there(folder: Path, tmp_path: Path) -> None:
    config = run_config(folder, Grpo(rewards=WALK, rollouts=ROLLOUTS), run_dir=str(tmp_path))
    alone = dataclasses.replace(config, checkpoint=CheckpointConfig(every=2))
    with pytest.raises(UserError, match=r"task = Grpo trains a model that can answer already: checkpoint.init_from"):
        run(alone, reinforce)
    with pytest.raises(UserError, match="prepared for something else"):
        run(dataclasses.replace(config, data=run_config(folder, Sft(), Purpose.SFT).data), reinforce)
    with pytest.raises(UserError, match="text_weight"):
        run(dataclasses.replace(config, task=Ppo(rewards=WALK, text_weight=1.0, rollouts=ROLLOUTS)), reinforce)
    no_number = Ppo(rewards=WALK, critic=str(folder / "start"), rollouts=ROLLOUTS)
    with pytest.raises(UserError, match=r"task\.critic = .* model.head is LmHead"):
        run(dataclasses.replace(config, task=no_number), reinforce)


@NIGHTLY
def test_what_was_rewarded_in_the_wrong_order_is_not_learned(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The control: each completion has the reward of another one."""
    right = RewardSum.__call__

    def shuffled(self: RewardSum, completions: Any) -> Any:
        judged = right(self, completions)
        return judged._replace(total=np.random.default_rng(0).permutation(judged.total))

    monkeypatch.setattr(RewardSum, "__call__", shuffled)
    rollouts = dataclasses.replace(ROLLOUTS, prompts=16, eval_prompts=64, slots=32)
    config = run_config(folder, Grpo(rewards=WALK, rollouts=rollouts), run_dir=str(tmp_path))
    train = dataclasses.replace(config.train, steps=40, batch_size=64, log_every=10)
    run(
        dataclasses.replace(config, train=train, checkpoint=dataclasses.replace(config.checkpoint, every=40)), reinforce
    )
    assert rows(tmp_path, "rollouts")[-1]["reward"] < 0.6
