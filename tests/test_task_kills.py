"""A real kill -9 of every task: started as users start it, killed in training, started again, the same bits."""

from __future__ import annotations

import dataclasses
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from helpers import small_run
from test_text_recipes import from_run, newest, run_config
from train_runs import ROOT, Ended, Running, losses, rows
from xla_flags import xla_flags

from maxlm.checkpoint import retention
from maxlm.config import (
    Adapter,
    AdaptiveKl,
    ClassHead,
    Classify,
    Dpo,
    Embed,
    EmbedHead,
    ExactReward,
    Grpo,
    Kto,
    LengthReward,
    Lora,
    MedusaHeads,
    Ppo,
    Preference,
    Purpose,
    Reward,
    Rollouts,
    RunConfig,
    ScalarHead,
    Sft,
    Task,
    TrainMedusa,
    serialize,
)

STEPS, EVERY = 63, 7
"""More steps than a pipe of one page has lines for: a run that is not read cannot end before it is killed."""

REWARDS = (ExactReward(key="completion"), LengthReward(at_most=8, buffer=6))
ROLLOUTS = Rollouts(prompts=7, samples=8, max_new_tokens=8, eval_prompts=4)
"""Of seven steps, so that some kills come in the midst of one."""

TASKS: dict[str, tuple[Task, Purpose, dict[str, Any]]] = {
    "sft": (Sft(neftune_alpha=1.0), Purpose.SFT, {}),
    "preference": (Preference(loss=Dpo()), Purpose.PREFERENCE, {}),
    "kto": (Preference(loss=Kto()), Purpose.KTO, {}),
    "reward": (Reward(), Purpose.PREFERENCE, {"head": ScalarHead()}),
    "classify": (Classify(), Purpose.CLASSIFY, {"head": ClassHead(n_classes=2)}),
    "embed": (Embed(), Purpose.EMBED, {"head": EmbedHead()}),
    "medusa": (TrainMedusa(), Purpose.SFT, {"medusa": MedusaHeads(n_heads=2)}),
    "grpo": (Grpo(rewards=REWARDS, rollouts=ROLLOUTS), Purpose.PROMPTS, {}),
    "ppo": (Ppo(rewards=REWARDS, rollouts=ROLLOUTS, kl=AdaptiveKl()), Purpose.PROMPTS, {}),
    "adapter": (Sft(), Purpose.SFT, {"adapter": Adapter(kind=Lora(rank=2, dropout=0.1))}),
}
"""Each task with its data, and what it changes of the model that it starts from. In `preference` and `kto` that model
stays beside the state, as the reference."""


def start(config: RunConfig, file: Path, run_dir: Path, programs: Path) -> Running:
    """`python -m maxlm.train`."""
    serialize.save(config, file)
    command = [sys.executable, "-m", "maxlm.train", "--config", str(file), f"--run_dir={run_dir}"]
    kept = {"JAX_COMPILATION_CACHE_DIR": str(programs), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1), **kept}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "bufsize": 0}
    return Running(subprocess.Popen(command, cwd=ROOT, env=environment, **pipes))


def whole(*arguments: Any) -> Ended:
    with start(*arguments) as running:
        return running.end()


def train_config(**changes: Any) -> Any:
    return small_run(batch_size=8, seq_len=48, log_every=1, eval_every=0, eval_batches=2, **changes).train


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kills")


@pytest.fixture(scope="module")
def taught(folder: Path) -> Path:
    """The run that all others start from."""
    config = run_config(folder, Sft(), Purpose.SFT, train=train_config(steps=2))
    ended = whole(config, folder / "taught.json", folder / "taught", folder / "programs")
    assert ended.code == 0, ended.err
    return folder / "taught"


@pytest.mark.nightly
@pytest.mark.parametrize("name", TASKS)
def test_killed_it_comes_to_the_same_end(name: str, folder: Path, taught: Path) -> None:
    task, purpose, change = TASKS[name]
    config = from_run(run_config(folder, task, purpose, train=train_config(steps=STEPS)), taught)
    config = dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, **change),
        checkpoint=dataclasses.replace(config.checkpoint, every=EVERY, keep_last=2),
    )
    place = lambda run: (config, folder / f"{name}.json", folder / f"{name}-{run}", folder / "programs")
    undisturbed = whole(*place("undisturbed"))
    assert undisturbed.code == 0, undisturbed.err

    rng = random.Random(name)
    with start(*place("killed")) as running:
        running.read_steps(rng.randint(EVERY, STEPS // 2))
        time.sleep(rng.uniform(0.0, 0.1))
        assert running.process.poll() is None
        running.process.kill()
        running.process.communicate()
    run_dir, reference = folder / f"{name}-killed", folder / f"{name}-undisturbed"
    reached = max(retention.finished(run_dir / "checkpoints"), default=0)
    assert reached < STEPS
    ended = whole(*place("killed"))
    assert ended.code == 0, ended.err
    assert not reached or f"continuing after step {reached} of {STEPS}" in ended.out
    assert newest(run_dir) == newest(reference)
    assert losses(run_dir) == losses(reference)
    assert rows(run_dir, "evals") == rows(reference, "evals")
