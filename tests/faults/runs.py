"""A tiny run that cases copy, and the command on it."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from train_runs import Bench

from faults.tools import Ended, command, once


@once
def bench() -> Bench:
    """Data, config and compiled programs, gone with this process."""
    folder = Path(tempfile.mkdtemp(prefix="maxlm-faults-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    folder.chmod(0o755)  # for the cases of another user
    return Bench(folder / "bench")


def train(
    run_dir: Path,
    *overrides: str,
    environment: Mapping[str, str | None] | None = None,
    prefix: Sequence[str] = (),
    timeout: float = 120,
) -> Ended:
    """`python -m maxlm.train` in 8 steps, unless an override says else."""
    cache = {"JAX_COMPILATION_CACHE_DIR": str(bench().folder / "compiled"), "XLA_FLAGS": None}
    fast = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    words = bench().arguments(run_dir, "--train.steps=8", "--checkpoint.every=4", *overrides)
    return command(
        "maxlm.train", *words, environment={**cache, **fast, **(environment or {})}, prefix=prefix, timeout=timeout
    )


@once
def _finished() -> Path:
    run_dir = bench().folder / "finished"
    ended = train(run_dir)
    assert ended.code == 0, ended.err
    return run_dir


def finished(folder: Path) -> Path:
    """A copy of a run that is done."""
    return Path(shutil.copytree(_finished(), folder / "run"))


def unfinished(folder: Path) -> Path:
    """A copy of a run whose newest checkpoint is that of step 4."""
    run_dir = finished(folder)
    shutil.rmtree(run_dir / "checkpoints" / "8")
    return run_dir


def is_saved(run_dir: Path, step: int = 8) -> bool:
    return (run_dir / "checkpoints" / str(step) / "manifest.json").exists()
