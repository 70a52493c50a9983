"""SIGKILL at any moment: the same command always reaches the same end, bit for bit."""

from __future__ import annotations

import functools
import random
import time
from collections.abc import Iterator
from pathlib import Path

from train_runs import STEPS, Running, final_hash, inspect, losses

from faults.case import Case
from faults.runs import bench
from faults.tools import once
from maxlm.checkpoint import retention

ROUNDS, KILLS = 10, 10
# A state that takes as long to write as two steps take, so that saving hardly ever ends.
LARGER = "--model.d_model=128", "--checkpoint.every=2", f"--train.steps={STEPS}", "--train.eval_every=0"
MOMENTS = ("starting", "training", "saving")


@once
def undisturbed() -> Path:
    run_dir = bench().folder / "undisturbed"
    ended = bench().run(run_dir, *LARGER)
    assert ended.code == 0, ended.err
    return run_dir


def wait_for(moment: str, running: Running, run_dir: Path, rng: random.Random) -> None:
    match moment:
        case "starting":
            time.sleep(rng.uniform(0.0, 5.0))
        case "training":
            running.read_steps(rng.randint(1, 4))
            time.sleep(rng.uniform(0.0, 0.05))
        case "saving":
            running.read_steps(1)
            while running.process.poll() is None and not retention.temporary(run_dir / "checkpoints"):
                running.read_steps(1)


def killed_again_and_again(seed: int, kills: int, folder: Path) -> str:
    run_dir, rng, reached, moments = folder / "run", random.Random(seed), [], []
    reference = undisturbed()
    for _ in range(kills):
        moments.append(rng.choice(MOMENTS))
        with bench().start(run_dir, *LARGER) as running:
            wait_for(moments[-1], running, run_dir, rng)
            running.process.kill()
            running.process.communicate()
        reached.append(max(retention.finished(run_dir / "checkpoints"), default=0))
    assert reached == sorted(reached), f"a finished step was lost: {reached}"
    ended = bench().run(run_dir, *LARGER)
    assert ended.code == 0, ended.err
    assert final_hash(run_dir) == final_hash(reference) and losses(run_dir) == losses(reference)
    bad = [step for step in inspect(run_dir, "--verify")["steps"] if step["status"] != "ok"]
    assert not bad, bad
    counts = ", ".join(f"{moments.count(moment)} {moment}" for moment in MOMENTS)
    return f"killed {counts}; same bits at step {STEPS}"


def cases() -> Iterator[Case]:
    for number in range(ROUNDS):
        yield Case(
            name=f"kills: {KILLS} at random moments, round {number + 1}",
            expected="the same command ends with the same bits",
            check=functools.partial(killed_again_and_again, number, KILLS),
        )
