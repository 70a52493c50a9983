"""What a run pays for what watches over it, as shares of a step of configs/llama_5m.py (CPU time), as one JSON line.

    python -m benchmarks.guards [--rounds 40]

update_check_share  the update's norm and its test in the compiled step: the same program with and without, in turn
host_share          signals, stopping together, the watchdog and the look at a save under way, by the host a step
state_check_share   the look at every array before a save, a checkpoint.every-th of it
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import optax

from benchmarks.steps import Running, cpu_name, random_batch
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import CheckpointConfig, LimitsConfig
from maxlm.config.cli import load_config
from maxlm.processes.interruption import Interruption
from maxlm.processes.watchdog import Watchdog
from maxlm.training.finite import not_finite
from maxlm.training.step import Trainer, make_trainer

_CALLS = 10_000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=40)
    options = parser.parse_args()
    config = load_config("llama_5m")
    trainers = {"with": make_trainer(config), "without": _without_update_check(make_trainer(config))}
    steps = {name: _running(trainer, config.model.vocab_size) for name, trainer in trainers.items()}
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(options.rounds):
        for name in ("with", "without") if number % 2 else ("without", "with"):  # neither is always the first
            seconds[name].append(steps[name].go(1)[1])
    step_s = statistics.median(seconds["with"])
    pairs = [a / b for a, b in zip(seconds["with"], seconds["without"], strict=True)]
    state = steps["with"].state
    arrays = {"parameters": state.parameters, "optimizer": state.optimizer}
    check_s = statistics.median(_seconds(lambda: not_finite(arrays)) for _ in range(9))
    result = {
        "step_cpu_ms": round(1e3 * step_s, 2),
        "update_check_share": round(statistics.median(pairs) - 1, 4),
        "host_share": round(_host_seconds() / step_s, 6),
        "state_check_share": round(check_s / step_s / config.checkpoint.every, 6),
        "rounds": options.rounds,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    print(json.dumps(result))


def _running(trainer: Trainer, vocab_size: int) -> Running:
    program, state = trainer.start()
    running = Running(step=program, state=state, batch=random_batch(trainer, vocab_size))
    running.go(2)
    return running


def _seconds(call: Callable[[], Any]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


def _without_update_check(trainer: Trainer) -> Trainer:
    """Its step takes the norm of gradients alone."""
    real, calls = optax.tree.norm, itertools.count()
    first_alone = lambda tree: real(tree) if next(calls) == 0 else jnp.float32(0)
    with mock.patch.object(optax.tree, "norm", first_alone):
        lowered = trainer.step.lower(trainer.state, trainer.batch)
    return trainer._replace(step=mock.Mock(lower=lambda *_: lowered))


def _host_seconds() -> float:
    """Of one step, for the calls that the loop makes beside the program."""
    with (
        Interruption() as interruption,
        Watchdog(LimitsConfig()) as watchdog,
        Checkpointer(Path("unused"), CheckpointConfig()) as saved,
    ):
        interruption.loop_begins()
        began = time.perf_counter()
        for step in range(_CALLS):
            watchdog.step(step)
            saved.check()
            interruption.reached(step, _CALLS + 1)
        return (time.perf_counter() - began) / _CALLS


if __name__ == "__main__":
    main()
