"""A tiny data set and a config file, and `python -m maxlm.train` on them in processes of their own."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import io
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from xla_flags import xla_flags

import maxlm.inspect
from maxlm.config import ByteTokenizer, Files, PrepareConfig
from maxlm.data.prepare import prepare

ROOT = Path(__file__).parent.parent
STEPS = 60
"""More rows than a pipe of one page holds, so that a run whose output is not read cannot end."""

_CONFIG = """\
from maxlm.config import (
    AdamW, CheckpointConfig, CosineSchedule, DataConfig, Dataset, Dtype, ExecutionConfig, ObserveConfig, Remat,
    RunConfig, TrainConfig, llama,
)


def get_config():
    model = llama(vocab_size=320, d_model=32, n_layers=2, n_heads=4, d_ff=64, max_seq_len=64)
    return RunConfig(
        model=model,
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=DataConfig(datasets=(Dataset(path=%r),)),
        train=TrainConfig(steps=%d, batch_size=8, seq_len=32, log_every=1, eval_every=25, eval_batches=2),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=2)),
        checkpoint=CheckpointConfig(every=20),
        observe=ObserveConfig(sample_prompt="the ", sample_tokens=4),
    )
"""


class Ended(NamedTuple):
    """What a process left behind."""

    code: int
    out: str
    err: str

    @property
    def errors(self) -> list[str]:
        return [line for line in self.err.splitlines() if line.startswith("error: ")]


class Bench:
    """The data, the config file and the cache of compiled programs that all runs share."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.data, self.config = folder, folder / "data", folder / "config.py"
        texts = folder / "texts"
        folder.mkdir(exist_ok=True)
        with self._alone():
            if self.config.exists():
                return
            texts.mkdir()
            rng = random.Random(0)
            words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 8))) for _ in range(200)]
            for i in range(100):
                (texts / f"{i}.txt").write_text(" ".join(rng.choices(words, k=500)))
            documents = Files(paths=(str(texts),))
            recipe = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.1, workers=1)
            prepare(recipe, self.data)
            self.config.write_text(_CONFIG % (str(self.data), STEPS))

    @contextlib.contextmanager
    def _alone(self) -> Iterator[None]:
        """Keep the other test processes out."""
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield

    @classmethod
    def of_session(cls, factory: pytest.TempPathFactory) -> Bench:
        """The one that all test processes of this session share."""
        base = factory.getbasetemp()
        return cls((base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "train-runs")

    def arguments(self, run_dir: Path, *overrides: str) -> list[str]:
        return ["--config", str(self.config), f"--run_dir={run_dir}", *overrides]

    def start(
        self,
        run_dir: Path,
        *overrides: str,
        devices: int = 1,
        environment: dict[str, str] | None = None,
    ) -> Running:
        """The command in a process."""
        process = subprocess.Popen(
            [sys.executable, "-m", "maxlm.train", *self.arguments(run_dir, *overrides)],
            cwd=ROOT,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,  # so that what `readline` leaves stays in the pipe
            env={
                **os.environ,
                "XLA_FLAGS": xla_flags(devices),
                "JAX_COMPILATION_CACHE_DIR": str(self.folder / "compiled"),
                "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
                **(environment or {}),
            },
        )
        return Running(process)

    def start_two(self, stack: contextlib.ExitStack, run_dir: Path, *overrides: str) -> list[Running]:
        """One run in two processes of four devices each."""
        joined = {"JAX_COORDINATOR_ADDRESS": f"localhost:{free_port()}", "JAX_NUM_PROCESSES": "2"}
        return [
            stack.enter_context(
                self.start(run_dir, *overrides, devices=4, environment={**joined, "JAX_PROCESS_ID": str(index)})
            )
            for index in range(2)
        ]

    def run(self, run_dir: Path, *overrides: str, devices: int = 1) -> Ended:
        with self.start(run_dir, *overrides, devices=devices) as running:
            return running.end()

    @functools.cached_property
    def reference(self) -> Path:
        """A run that nothing disturbed; copy it before changing it."""
        run_dir = self.folder / "reference"
        with self._alone():
            if not (run_dir / "report.html").exists():
                ended = self.run(run_dir)
                assert ended.code == 0, ended.err
        return run_dir


class Running:
    """A process of `Bench.start`. Its output goes through a pipe of one page: it waits while a test does not read."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdout is not None
        fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        self.process = process
        self._out = ""

    def __enter__(self) -> Running:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
            self.process.communicate()

    def read_until(self, text: str) -> None:
        """Read output up to a line that holds `text`, and no further."""
        stream = self.process.stdout
        assert stream is not None
        while line := stream.readline().decode():
            self._out += line
            if text in line:
                return
        raise AssertionError(f"{text!r} never came:\n{self._out}\n{self.end().err}")

    def read_steps(self, n: int) -> None:
        """Read until `n` more steps are logged."""
        for _ in range(n):
            self.read_until("  loss ")

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait_until_default(self, number: signal.Signals) -> None:
        """Wait until the process no longer catches the signal."""
        while True:
            status = Path(f"/proc/{self.process.pid}/status").read_text()
            (mask,) = re.findall(r"SigCgt:\s*(\w+)", status)
            if not int(mask, 16) >> (number - 1) & 1:
                return
            time.sleep(0.01)

    def end(self, timeout: float = 240) -> Ended:
        """Read the rest and wait."""
        out, err = self.process.communicate(timeout=timeout)
        return Ended(self.process.returncode, self._out + out.decode(), err.decode())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def inspect(run_dir: Path, *flags: str) -> dict[str, Any]:
    """The report of `python -m maxlm.inspect`."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        maxlm.inspect.main([str(run_dir), "--json", *flags])
    return json.loads(out.getvalue())


def final_hash(run_dir: Path) -> str:
    """The hash of the state after STEPS steps."""
    report = inspect(run_dir, "--hash")
    assert report["hash_step"] == STEPS
    return report["hash"]


def rows(run_dir: Path, name: str = "metrics") -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]


def losses(run_dir: Path) -> list[tuple[int, float]]:
    """Each row's step and loss, in the order of the file."""
    return [(row["step"], row["loss"]) for row in rows(run_dir)]


def contents(folder: Path) -> dict[str, str]:
    """The hash of every file, but for the lock's, which holds the number of the last process."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def flip_byte(step: Path, item: str = "params") -> Path:
    """Change one byte in the middle of the largest array file of a checkpoint's item, and return that file."""
    file = max((path for path in (step / item).rglob("*") if path.is_file()), key=lambda path: path.stat().st_size)
    body = bytearray(file.read_bytes())
    body[len(body) // 2] ^= 1
    file.write_bytes(body)
    return file


def scalars(folder: Path) -> list[tuple[str, int, float]]:
    """(tag, step, value) of all event files; TFRecord framing is length, crc, data, crc."""
    from tensorboardX.proto.event_pb2 import Event

    found = []
    for path in sorted(folder.glob("events*")):
        data, at = path.read_bytes(), 0
        while at < len(data):
            size = int.from_bytes(data[at : at + 8], "little")
            event = Event.FromString(data[at + 12 : at + 12 + size])
            found += [(value.tag, event.step, value.simple_value) for value in event.summary.value]
            if event.HasField("session_log"):
                found.append(("restart", event.step, 0.0))
            at += 16 + size
    return found
