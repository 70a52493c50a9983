"""configs/grpo_sort.py learns what its rewards say; with the rewards of others it forgets what it knew."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize(
    ("steps", "shuffled_steps", "gain"),
    [
        pytest.param(60, 30, 0.06, marks=pytest.mark.slow),
        pytest.param(100, 100, 0.12, marks=pytest.mark.nightly),
    ],
)
def test_sorting_is_learned_from_its_own_rewards_alone(
    tmp_path: Path, steps: int, shuffled_steps: int, gain: float
) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "tests/sort_pair.py", str(tmp_path), str(steps), str(shuffled_steps)]
    done = subprocess.run(
        command, cwd=ROOT, env=environment | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert 0.6 < found["before"] < 0.82
    assert found["after"] > found["before"] + gain
    assert found["greedy"] > 0.88
    assert found["shuffled"] < 0.2
