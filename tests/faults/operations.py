"""The n-th file operation in the run folder fails, for every n: the run goes on, or ends in one line; nothing good is
lost, and the same command reaches the same end.

`python -m faults.operations KIND CONFIG RUN_DIR` does one kind. Its children are forked after the imports: each has a
jax of its own, that costs little.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import itertools
import json
import os
import shutil
import signal
import sys
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from faults.case import Case
from faults.runs import bench
from faults.tools import ROOT, command

KINDS = ("open", "write", "flush", "fsync", "mkdir", "replace", "rename", "unlink", "rmdir", "truncate")
LAST = 8
SHORT_RUN = (f"--train.steps={LAST}", "--checkpoint.every=4", "--observe.sample_tokens=0", "--train.eval_batches=1")
SECONDS = 90


class Failing:
    """Counts operations of one kind on files below a folder, and lets the n-th fail."""

    def __init__(self, kind: str, n: int, folder: Path) -> None:
        self.kind, self.n, self.folder = kind, n, str(folder)
        self.count, self.where = 0, ""

    def seen(self, kind: str, place: Any) -> None:
        """Raises where it is this operation's turn."""
        text = os.fsdecode(place) if isinstance(place, str | bytes | os.PathLike) else ""
        if isinstance(place, int):
            with contextlib.suppress(OSError):
                text = os.readlink(f"/proc/self/fd/{place}")
        if kind != self.kind or not os.path.abspath(text).startswith(self.folder):
            return
        self.count += 1
        if self.count == self.n:
            self.where = text
            raise OSError(errno.EIO, os.strerror(errno.EIO), text)

    def install(self) -> None:
        """Take the place of Python's own."""
        for name, kind in {
            "mkdir": "mkdir", "replace": "replace", "rename": "rename", "unlink": "unlink", "remove": "unlink",
            "rmdir": "rmdir", "fsync": "fsync", "ftruncate": "truncate", "truncate": "truncate", "open": "open",
        }.items():  # fmt: skip
            setattr(os, name, self._before(kind, getattr(os, name)))
        opened = io.open

        @functools.wraps(opened)
        def open_(file: Any, mode: str = "r", *more: Any, **named: Any) -> Any:
            if not isinstance(file, int):
                self.seen("open", file)
            stream = opened(file, mode, *more, **named)
            return stream if set(mode).isdisjoint("wax+") else Watched(stream, self, file)

        io.open = builtins.open = open_  # type: ignore[assignment]

    def _before(self, kind: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(call)
        def watched(*words: Any, **named: Any) -> Any:
            self.seen(kind, words[0] if words else "")
            return call(*words, **named)

        return watched


class Watched:
    """A file that is written, as `Failing` sees it."""

    def __init__(self, stream: Any, failing: Failing, place: Any) -> None:
        self._stream, self._failing, self._place = stream, failing, place

    def write(self, data: Any) -> Any:
        self._failing.seen("write", self._place)
        return self._stream.write(data)

    def flush(self) -> None:
        self._failing.seen("flush", self._place)
        self._stream.flush()

    def __enter__(self) -> Watched:
        return self

    def __exit__(self, *error: Any) -> None:
        self._stream.close()

    def __iter__(self) -> Any:
        return iter(self._stream)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def in_a_child(config: str, run_dir: Path, failing: Failing | None) -> dict[str, Any]:
    """One run; how it ended."""
    reading, writing = os.pipe()
    if pid := os.fork():
        os.close(writing)
        with os.fdopen(reading) as stream:
            answer = stream.read()
        _, status = os.waitpid(pid, 0)
        return json.loads(answer) if answer else {"outcome": f"status {status}", "count": 0, "where": ""}
    os.close(reading)
    signal.alarm(SECONDS)  # a run that hangs ends by it
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    from maxlm.checkpoint.state_hash import state_hash
    from maxlm.config import UserError
    from maxlm.config.cli import parse_run
    from maxlm.train import main

    asked = parse_run(["--config", config, f"--run_dir={run_dir}", *SHORT_RUN], prog="", description="")
    if failing is not None:
        failing.install()
    try:
        main(asked.config)
        outcome = "0"
    except UserError as error:
        outcome = f"{error.exit_code}: {error}"
    except OSError as error:  # the command line says it with the file
        outcome = f"1: {error}" if error.filename else traceback.format_exc()
    except BaseException:
        outcome = traceback.format_exc()
    answer = {"outcome": outcome, "count": 0, "where": "", "hash": ""}
    if failing is not None:
        answer |= {"count": failing.count, "where": failing.where}
        failing.kind = ""  # what follows is not the run's
    with contextlib.suppress(UserError):
        answer["hash"] = state_hash((run_dir / "checkpoints").absolute(), LAST)
    os.write(writing, json.dumps(answer).encode())
    os._exit(0)


def main(kind: str, config: str, folder: Path) -> int:
    """Every operation of a kind; the last line of output is what was seen."""
    import maxlm.recipes  # noqa: F401  # what children would import

    reference = in_a_child(config, folder / "reference", None)
    assert reference["outcome"] == "0" and reference["hash"], reference
    went_on = ended = 0
    for n in itertools.count(1):
        run_dir = folder / str(n)
        first = in_a_child(config, run_dir, Failing(kind, n, run_dir))
        if first["count"] < n and first["outcome"] == "0":
            print(f"{n - 1} operations: {went_on} runs went on, {ended} ended in one line; same bits afterwards")
            return 0
        outcome = first["outcome"]
        place = first["where"].removeprefix(str(run_dir))
        if outcome != "0" and (outcome[:2] not in ("1:", "2:") or "\n" in outcome):
            print(f"{kind} number {n} ({place}): {outcome}")
            return 1
        went_on, ended = went_on + (outcome == "0"), ended + (outcome != "0")
        again = first if outcome == "0" else in_a_child(config, run_dir, None)
        if again["outcome"] != "0" or again["hash"] != reference["hash"]:
            print(f"{kind} number {n} ({place}): first {outcome}; then {again}; state differs or is lost")
            return 1
        shutil.rmtree(run_dir)
    raise AssertionError


def every(kind: str, folder: Path) -> str:
    cache = {"JAX_COMPILATION_CACHE_DIR": str(bench().folder / "compiled"), "XLA_FLAGS": None}
    fast = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}
    done = command(
        "faults.operations", kind, str(bench().config), str(folder), environment={**cache, **fast}, timeout=3600
    )
    last = done.out.strip().splitlines()[-1:] or [done.err]
    assert done.code == 0, last[0]
    return last[0]


def cases() -> Iterator[Case]:
    for kind in KINDS:
        yield Case(
            name=f"file operations: every {kind} in the run folder fails once",
            expected="goes on, or one line; nothing good is lost",
            check=functools.partial(every, kind),
        )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], sys.argv[2], Path(sys.argv[3])))
