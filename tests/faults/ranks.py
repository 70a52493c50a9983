"""A run of two ranks of which one does something else: both end together, soon, and say why."""

from __future__ import annotations

import contextlib
import functools
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from train_runs import Running, free_port
from xla_flags import xla_flags

from faults.case import Case
from faults.runs import bench
from faults.tools import ROOT, command, variables
from maxlm.checkpoint.lock import lock_run

SOON_S = 15.0
"""What both may take, on a machine that does nothing else; cases that share one take a few times as long."""
LONG = ("--train.steps=100000", "--train.eval_every=0", "--checkpoint.every=100000", "--train.log_every=1")

RAISES = """\
import maxlm.recipes.pretrain as p
before = p.FileFeed.next
def next(self, step, state):
    if step == 5:
        raise OSError("the network drive is gone")
    return before(self, step, state)
p.FileFeed.next = next
"""
FORGETS = RAISES.replace('raise OSError("the network drive is gone")', "import time; time.sleep(1000)")
PREPARES_SLOWLY = """\
import time
import maxlm.recipes.pretrain as p
before = p.ensure_prepared
p.ensure_prepared = lambda data: (time.sleep(35), before(data))
"""
OTHER_DATA = """\
import maxlm.recipes.pretrain as p
p.open_batches = lambda *a, f=p.open_batches, **k: (b := f(*a, **k), setattr(b, "fingerprint", "f00d"))[0]
"""
"""Python that is run before the command."""


def variables_of(rank: int, port: int, size: int = 2, devices: int = 2) -> dict[str, str]:
    return {
        "JAX_COORDINATOR_ADDRESS": f"localhost:{port}",
        "JAX_NUM_PROCESSES": str(size),
        "JAX_PROCESS_ID": str(rank),
        "XLA_FLAGS": xla_flags(devices),
        "JAX_COMPILATION_CACHE_DIR": str(bench().folder / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }


def start(
    run_dir: Path, environment: Mapping[str, str], *overrides: str, first: str = "", root: Path = ROOT
) -> Running:
    """One rank, as `python -m maxlm.train`; `first` is Python that is run before."""
    words = bench().arguments(run_dir, *overrides)
    program = [
        "-c",
        f"{first}\nfrom maxlm.config.cli import run_command\nfrom maxlm.train import command\nrun_command(command)",
    ]
    return Running(
        subprocess.Popen(
            [sys.executable, *(program if first else ["-m", "maxlm.train"]), *words],
            cwd=root,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            bufsize=0,
            env=variables({**environment, "PYTHONPATH": str(root)}),
        )
    )


@contextlib.contextmanager
def two(
    run_dir: Path, *overrides: str, other: tuple[str, ...] = (), first: Mapping[int, str] | None = None,
    root_of_1: Path = ROOT,
) -> Iterator[list[Running]]:  # fmt: skip
    """Both ranks; `other`: more options of rank 1; `first`: Python that a rank runs before."""
    port, before = free_port(), first or {}
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(
                start(
                    run_dir,
                    variables_of(rank, port),
                    *overrides,
                    *(other if rank == 1 else ()),
                    first=before.get(rank, ""),
                    root=root_of_1 if rank == 1 else ROOT,
                )
            )
            for rank in range(2)
        ]


def end(running: list[Running], codes: tuple[int, ...], *words: str, within: float = 8 * SOON_S) -> str:
    """All of them end with these codes, say these words in one line, and nothing that a C++ library has to say."""
    began = time.monotonic()
    ended = [one.end(timeout=within) for one in running]
    seconds = time.monotonic() - began
    assert tuple(one.code for one in ended) == codes, ended
    for one in ended:
        if one.code > 0:
            assert len(one.errors) == 1 and all(word in one.errors[0] for word in words), one
            assert not any(word in one.err for word in ("Traceback", "stack trace", "absl::")), one.err
    said = next(one.errors[0] for one in ended if one.code > 0)
    return f"{codes}, {seconds:.0f} s: {said.removeprefix('error: ')[:90]}"


class Different(NamedTuple):
    """An option that rank 1 alone has, and the key that both name."""

    option: str
    key: str


DIFFERENT = (
    Different("--optimizer.learning_rate=0.002", "optimizer.learning_rate = 0.002 here and 0.003 on rank 0"),
    Different("--train.seed=5", "train.seed = 5 here and 0 on rank 0"),
    Different("--checkpoint.every=7", "checkpoint.every"),
    Different("--train.steps=9", "train.steps"),
    Different("--train.eval_every=3", "train.eval_every"),
    Different("--model.d_model=64", "model.d_model"),
    Different("--run_dir=/tmp/elsewhere", "run_dir"),
    Different("--data.seed=1", "data.seed"),
    Different("--execution.dtype=bfloat16", "execution.dtype"),
)


def differs(option: str, key: str, folder: Path) -> str:
    with two(folder / "run", other=(option,)) as both:
        return end(both, (2, 2), key, "rank 1, host ")


def clone(place: Path) -> Path:
    for name in ("maxlm", "kernels_pallas", "configs"):
        shutil.copytree(ROOT / name, place / name, ignore=shutil.ignore_patterns("__pycache__"))
    return place


def other_folder(folder: Path) -> str:
    """The same relative run_dir, from another working directory: as on a host without the shared file system."""
    elsewhere = clone(folder / Path(*["deeper"] * len(ROOT.parts)))  # where the same way up leads to another place
    with two(Path(os.path.relpath(folder / "run", ROOT)), root_of_1=elsewhere) as both:
        return end(both, (2, 2), "rank 1, host ", "does not see the folder that rank 0 has locked")


def other_code(folder: Path) -> str:
    other = clone(folder / "clone")
    with (other / "maxlm/training/losses.py").open("a") as file:
        file.write("# changed\n")
    with two(folder / "run", root_of_1=other) as both:
        return end(both, (2, 2), "source code", "rank 1, host ")


def other_data(folder: Path) -> str:
    with two(folder / "run", first={1: OTHER_DATA}) as both:
        return end(both, (2, 2), "data = 'f00d' here", "rank 1, host ")


def raises(rank: int, folder: Path) -> str:
    with two(folder / "run", *LONG, first={rank: RAISES}) as both:
        return end(both, (1, 1), f"rank {rank}, host ", "step 5: OSError: the network drive is gone")


def hit(rank: int, number: signal.Signals, codes: tuple[int, int], words: tuple[str, ...], folder: Path) -> str:
    """A signal to one rank in the midst of training."""
    with two(folder / "run", *LONG) as both:
        both[0].read_steps(3)
        both[rank].send(number)
        if number is not signal.SIGSTOP:
            return end(both, codes, *words)
        seen = end([both[1 - rank]], (codes[1 - rank],), *words)
        both[rank].send(signal.SIGCONT)
        return f"{seen}; the other, woken: {both[rank].end(timeout=60).code}"


def stops(rank: int, number: signal.Signals, folder: Path) -> str:
    """A signal to one rank saves on both."""
    with two(folder / "run", *LONG) as both:
        both[0].read_steps(3)
        both[rank].send(number)
        ended = [one.end(timeout=60) for one in both]
    assert [one.code for one in ended] == [75, 75], ended
    (step,) = [path.name for path in (folder / "run/checkpoints").iterdir()]
    assert (folder / "run/checkpoints" / step / "manifest.json").exists()
    return f"(75, 75), saved step {step}"


def full_disk(rank: int, folder: Path) -> str:
    with two(folder / "run", *LONG, "--checkpoint.every=4") as both:
        both[0].read_steps(1)
        for limited in range(2):
            if limited == rank:
                resource.prlimit(both[limited].process.pid, resource.RLIMIT_FSIZE, (3000, 3000))
        return end(both, (2, 2), f"rank {rank}, host ", "checkpoint could not be written")


def missing(rank: int, folder: Path) -> str:
    with start(folder / "run", variables_of(1 - rank, free_port()), "--limits.join_s=5") as alone:
        return end([alone], (2,), f"rank {rank}", "did not", "limits.join_s")


def doubled(rank: int, folder: Path) -> str:
    """Three processes, of which two call themselves the same."""
    port = free_port()
    with contextlib.ExitStack() as stack:
        numbers = (0, 1, 1) if rank == 1 else (0, 0, 1)
        all_of_them = []
        for number in numbers:
            environment = variables_of(number, port, size=3)
            all_of_them.append(stack.enter_context(start(folder / "run", environment, "--limits.join_s=10")))
        # One that comes after the others have ended finds nobody.
        return end(all_of_them, (2, 2, 2), f"rank {rank}")


def asleep_in_a_step(folder: Path) -> str:
    """A rank whose main thread hangs, though the process lives: the stacks of both, and an end as asked."""
    limits = ("--limits.step_s=5", "--limits.end_stuck_run=True")
    with two(folder / "run", *LONG, *limits, first={1: FORGETS}) as both:
        ended = [one.end(timeout=90) for one in both]
    assert [one.code for one in ended] == [1, 1], ended
    assert any("what each thread is doing" in one.err and "thread MainThread:" in one.err for one in ended)
    return "(1, 1), stacks printed"


def slow_preparation(folder: Path) -> str:
    with two(folder / "run", "--train.steps=2", "--train.eval_every=0", first={0: PREPARES_SLOWLY}) as both:
        ended = [one.end(timeout=200) for one in both]
    assert [one.code for one in ended] == [0, 0], ended
    assert "waiting for rank 0" in ended[1].out and "to prepare the data" in ended[1].out, ended[1].out
    return "(0, 0), rank 1 said that it waited"


def preparation_limit(folder: Path) -> str:
    with two(folder / "run", "--limits.prepare_s=3", first={0: PREPARES_SLOWLY}) as both:
        return end(both, (2, 2), "rank 1, host ", "did not prepare the data within 3 s", "limits.prepare_s")


def in_use(folder: Path) -> str:
    with lock_run(folder / "run"), two(folder / "run") as both:
        return end(both, (2, 2), "rank 0, host ", "in use by process")


def slurm_without_srun(folder: Path) -> str:
    slurm = {"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2", "SLURM_PROCID": "0", "SLURM_LOCALID": "0"}
    ended = command("maxlm.train", *bench().arguments(folder / "run"), environment=slurm, timeout=30)
    assert ended.code == 2 and "no srun started this process" in ended.errors[0], ended
    return f"2, {ended.seconds:.0f} s"


def cases() -> Iterator[Case]:
    both_end = "both exit 2 soon, and name the key"
    for option, key in DIFFERENT:
        yield Case(
            name=f"ranks: rank 1 alone has {option}",
            expected=both_end,
            check=functools.partial(differs, option, key),
            short=option.startswith("--train.seed"),
        )
    yield Case(name="ranks: rank 1 has other source code", expected=both_end, check=other_code)
    yield Case(name="ranks: rank 1 sees another run folder", expected="both exit 2", check=other_folder)
    yield Case(name="ranks: the run folder is in use", expected="both exit 2, for one reason", check=in_use)
    yield Case(name="ranks: rank 1 has other data", expected=both_end, check=other_data)
    for rank in (0, 1):
        yield Case(
            name=f"ranks: rank {rank} raises in step 6",
            expected="both exit 1 soon, with rank, host, step and reason",
            check=functools.partial(raises, rank),
            short=rank == 1,
        )
        killed = ("step", "ended without a word"), (-9, 1) if rank == 0 else (1, -9)
        asleep = ("step", "gave no sign of life"), (1, 1)
        for number, (words, codes) in {signal.SIGKILL: killed, signal.SIGSTOP: asleep}.items():
            yield Case(
                name=f"ranks: rank {rank} gets {number.name}",
                expected="the other exits 1 soon, and names it",
                check=functools.partial(hit, rank, number, codes, (f"rank {rank}, host ", *words)),
                short=rank == 0 and number is signal.SIGKILL,
            )
        for number in (signal.SIGTERM, signal.SIGINT):
            yield Case(
                name=f"ranks: rank {rank} gets {number.name}",
                expected="both save the same step and exit 75",
                check=functools.partial(stops, rank, number),
            )
        yield Case(
            name=f"ranks: the disk of rank {rank} is full",
            expected="both exit 2 soon, and name the rank",
            check=functools.partial(full_disk, rank),
        )
        yield Case(
            name=f"ranks: rank {rank} is never started",
            expected="the other exits 2 after limits.join_s, and names it",
            check=functools.partial(missing, rank),
            short=rank == 1,
        )
        yield Case(
            name=f"ranks: two processes are rank {rank}",
            expected="all exit 2 soon, and name both",
            check=functools.partial(doubled, rank),
        )
    yield Case(
        name="ranks: one hangs in a step",
        expected="stacks after limits.step_s, and an end where asked for",
        check=asleep_in_a_step,
    )
    yield Case(
        name="ranks: preparation of 35 s on rank 0", expected="the other waits, and says so", check=slow_preparation
    )
    yield Case(name="ranks: preparation takes longer than its limit", expected="both exit 2", check=preparation_limit)
    yield Case(
        name="ranks: Slurm's variables without srun",
        expected="exit 2 at once, with the remedy",
        check=slurm_without_srun,
    )
