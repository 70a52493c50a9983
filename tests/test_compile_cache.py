"""Compiled programs kept between processes: what is damaged is not run."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm import compile_cache, surroundings

ROOT = Path(__file__).parent.parent

_PROGRAM = """
import jax, jax.numpy as jnp
from maxlm.compile_cache import enable_compilation_cache
before = jax.jit(lambda x: x + 3)(1)  # jax has opened its cache by now
print("folder", enable_compilation_cache())
events = []
jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
print("result", jax.jit(lambda x: jnp.sort(x * 2)[::-1])(jnp.arange(3)).tolist())
print("hits", sum(name.endswith("cache_hits") for name in events))
"""


def run(folder: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(ROOT),
        "JAX_COMPILATION_CACHE_DIR": str(folder),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        **variables,
    }
    done = subprocess.run([sys.executable, "-c", _PROGRAM], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "result [4, 2, 0]" in done.stdout
    return done


@pytest.mark.parametrize("limit", ["-1", pytest.param("100000000", marks=pytest.mark.nightly)])
def test_a_program_whose_bytes_have_changed_is_compiled_anew(tmp_path: Path, limit: str) -> None:
    bounded = {"JAX_COMPILATION_CACHE_MAX_SIZE": limit}
    assert "hits 0" in run(tmp_path, **bounded).stdout
    programs = sorted(tmp_path.glob("*-sha256-cache"))
    assert programs
    assert f"hits {len(programs)}" in (again := run(tmp_path, **bounded)).stdout and not again.stderr
    for program in programs:
        body = bytearray(program.read_bytes())
        body[len(body) // 2] ^= 1
        program.write_bytes(body)
    damaged = run(tmp_path, **bounded)
    assert "hits 0" in damaged.stdout
    assert damaged.stderr.count("is damaged; compiled anew") == len(programs)
    assert f"hits {len(programs)}" in run(tmp_path, **bounded).stdout


def test_without_a_known_cache_or_a_home_nothing_is_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import jax

    before = jax.config.values["jax_compilation_cache_dir"]
    try:
        jax.config.update("jax_compilation_cache_dir", str(tmp_path))
        monkeypatch.setattr(compile_cache, "_check_programs", lambda: False)
        assert compile_cache.enable_compilation_cache() is None
        assert jax.config.values["jax_compilation_cache_dir"] is None
        monkeypatch.undo()
        monkeypatch.delenv("HOME")
        monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        monkeypatch.setattr(os, "getuid", lambda: 12345)  # who has no name
        assert surroundings.cache_folder("jax") is None
        assert compile_cache.enable_compilation_cache() is None
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_a_relative_cache_folder_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    monkeypatch.setenv("XDG_CACHE_HOME", "here")
    assert surroundings.cache_folder("jax") == Path("/home/somebody/.cache/maxlm/jax")


def test_no_control_codes_where_nobody_looks(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "CLICOLOR_FORCE"):
        monkeypatch.setenv(name, "1")
    found = surroundings.console()
    found.print("[bold red]red[/]")
    assert capsys.readouterr().out == "red\n"
    assert not found.is_terminal and not found.is_interactive


_KEEPING = """
import resource, sys, threading
from maxlm.compile_cache import keep_freed_memory
if sys.argv[1] == "keep":
    keep_freed_memory()
faults = []
def work():
    for _ in range(3):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        block = bytes(2**27)  # 128 MiB, freed at once
        memoryview(block)[:: 4096].tobytes()
        del block
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print(*faults)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library keeps what it likes")
@pytest.mark.parametrize(("word", "again"), [("keep", False), ("not", True)])
def test_a_freed_block_is_used_again_and_its_pages_are_not_made_anew(word: str, again: bool) -> None:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", _KEEPING, word], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    first, *later = map(int, done.stdout.split())
    assert first > 10_000
    assert (min(later) > 10_000) is again
