"""The environment that commands find: variables, users without a home, caches, memory."""

from __future__ import annotations

import functools
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path

from faults.case import Case
from faults.checkpoints import bench, train, trained, went
from faults.tools import Ended, command, flip_bit

NO_HOME: Mapping[str, str | None] = {"HOME": None, "USER": None, "LOGNAME": None, "XDG_CACHE_HOME": None}
NAMELESS = ("setpriv", "--reuid", "12345", "--clear-groups")

WORKS: dict[str, Mapping[str, str | None]] = {
    name: dict([name.split("=")])
    for name in (
        "FORCE_COLOR=1", "TTY_COMPATIBLE=1", "TTY_INTERACTIVE=1", "CLICOLOR_FORCE=1", "NO_COLOR=1", "PYTHONOPTIMIZE=1",
        "PYTHONOPTIMIZE=2", "TZ=No/Where", "OMP_NUM_THREADS=1", "JAX_DEBUG_NANS=1", "JAX_DEBUG_INFS=1",
        "JAX_LOG_COMPILES=1", "JAX_NUM_CPU_DEVICES=2", "JAX_ENABLE_COMPILATION_CACHE=0", "PYTHONWARNINGS=error",
        "JAX_ENABLE_CHECKS=1", "PYTHONHASHSEED=0", "COLUMNS=20", "TERM=dumb",
    )
}  # fmt: skip
WORKS["LC_ALL=C"] = {"LC_ALL": "C", "LANG": None, "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
REFUSED = (
    "JAX_ENABLE_X64=1",
    "JAX_DISABLE_JIT=1",
    "JAX_CHECK_TRACER_LEAKS=1",
    "JAX_NUMPY_RANK_PROMOTION=raise",
    "JAX_NUMPY_DTYPE_PROMOTION=strict",
    "JAX_TRANSFER_GUARD=disallow",
    "JAX_PLATFORMS=nope",
)


def commands(folder: Path, environment: Mapping[str, str | None], prefix: tuple[str, ...] = ()) -> Iterator[Ended]:
    """Every command there is, on one run."""
    run_dir, how = folder / "run", {"environment": environment, "prefix": prefix}
    yield train(run_dir, 2, **how)
    yield command("maxlm.inspect", str(run_dir), "--verify", "--hash", **how)
    yield command("maxlm.generate", "--run", str(run_dir), "--prompt", "the", "--max_new_tokens", "2", **how)
    yield command("maxlm.evaluate", "--run", str(run_dir), "--batches", "1", **how)
    yield command("maxlm.plan", "--config", str(bench().config), "--target", "gpu:h200:8", **how)
    texts = str(bench().folder / "texts")
    one = ("--tokenizer", "bytes", "--workers", "1")  # a second process takes an interpreter that this user may run
    yield command("maxlm.data", "prepare", texts, *one, "--out", str(folder / "data"), **how)


def works(folder: Path, environment: Mapping[str, str | None]) -> str:
    for ended in commands(folder, environment):
        went(ended)
        assert "\x1b" not in ended.out + ended.err
    return "six commands work, without control codes in pipes"


def nameless(folder: Path) -> str:
    folder.chmod(0o777)
    for ended in commands(folder, NO_HOME, NAMELESS):
        went(ended)
    return "six commands work"


def is_refused(folder: Path, variable: str) -> str:
    ended = train(folder / "run", 2, environment=dict([variable.split("=")]))
    assert ended.code == 2 and len(ended.errors) == 1, (ended.code, ended.err[-2000:])
    assert variable.split("=")[0] in ended.errors[0]
    return ended.errors[0][:80]


def damaged_programs(folder: Path, seed: int) -> str:
    """Flip a bit in each compiled program: none is run."""
    cache = folder / "cache"
    variables = {"JAX_COMPILATION_CACHE_DIR": str(cache), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    went(train(folder / "one", 2, environment=variables))
    programs = sorted(cache.glob("*-cache"))
    for program in programs:
        flip_bit(program, seed)
    ended = went(train(folder / "two", 2, environment=variables))
    assert ended.err.count("is damaged; compiled anew") == len(programs) > 1
    return f"{len(programs)} programs compiled anew"


def out_of_memory(folder: Path) -> str:
    """A model that no machine's memory holds."""
    ended = train(folder / "run", 2, "--model.d_model=1048576", "--model.blocks.0.mlp.d_ff=4194304")
    assert ended.code == 1 and len(ended.errors) == 1, (ended.code, ended.err[-2000:])
    assert "out of memory" in ended.errors[0] and "sharding.fsdp" in ended.errors[0], ended.errors
    return ended.errors[0][:80]


def elsewhere(folder: Path) -> str:
    run_dir = Path(shutil.copytree(trained(), folder / "run"))
    two = {"XLA_FLAGS": "--xla_force_host_platform_device_count=2"}
    ended = went(train(run_dir, 8, environment=two))
    line = next(line for line in ended.out.splitlines() if "going on elsewhere" in line)
    assert "going on elsewhere" not in went(train(run_dir, 10, environment=two)).out
    return line[:80]


def cases() -> Iterator[Case]:
    """The environment."""
    for what, environment in WORKS.items():
        yield Case(
            name=f"environment: {what}", expected="works", check=functools.partial(works, environment=environment)
        )
    for variable in REFUSED:
        yield Case(
            name=f"environment: {variable}",
            expected="refused in one line",
            check=functools.partial(is_refused, variable=variable),
            short=variable == "JAX_ENABLE_X64=1",
        )
    yield Case(name="environment: no home, and a user without a name", expected="every command works", check=nameless)
    for seed in range(3):
        yield Case(
            name=f"environment: a bit flipped in every compiled program, {seed}",
            expected="compiled anew",
            check=functools.partial(damaged_programs, seed=seed),
        )
    yield Case(name="environment: out of memory", expected="the largest parts, and their keys", check=out_of_memory)
    yield Case(name="environment: going on on other devices", expected="said once", check=elsewhere)
