"""What a run tells, and where: a place that fails or hangs is said once and switched off; the run trains and saves."""

from __future__ import annotations

import html
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from faults.case import Case
from faults.runs import finished, is_saved, train
from faults.tools import command, small_disk

OFF = "it is switched off, the run goes on without it"


def folder(path: Path) -> None:
    path.mkdir(parents=True)


def file(path: Path) -> None:
    path.write_text("no folder")


def full(path: Path) -> None:
    """Every write fails: No space left on device."""
    path.symlink_to("/dev/full")


def hanging(path: Path) -> None:
    """Nobody reads it, so that it cannot be opened."""
    os.mkfifo(path)


class Place(NamedTuple):
    name: str
    spoil: Callable[[Path], None]
    override: str = "--train.log_every=1"


PLACES = (
    Place("metrics.jsonl", folder),
    Place("metrics.jsonl", full),
    Place("metrics.jsonl", hanging),
    Place("evals.jsonl", full),
    Place("samples.jsonl", folder),
    Place("run.json", folder),
    Place("run.json", full),
    Place("tensorboard", file),
    Place("loss.png", folder),
    Place("report.html", folder),
    Place("profile", file, "--train.profile_steps=2:4"),
)


def spoiled(place: Place, home: Path) -> str:
    run_dir = home / "run"
    run_dir.mkdir()
    place.spoil(run_dir / place.name)
    return goes_on(run_dir, str(run_dir / place.name), place.override)


def goes_on(run_dir: Path, name: str, *overrides: str, path: str | None = None, step: int = 8) -> str:
    """Trains and saves, and says once that `name` is off."""
    environment = {} if path is None else {"PYTHONPATH": f"{path}:{os.environ['PYTHONPATH']}"}
    ended = train(run_dir, *overrides, environment=environment)
    assert ended.code == 0 and is_saved(run_dir, step), (ended.code, ended.err)
    lines = [line for line in ended.out.splitlines() if OFF in line]
    assert len(lines) == 1 and lines[0].startswith(f"warning: {name}: "), ended.out
    assert "Traceback" not in ended.err, ended.err
    for record in ("run.json", "report.html"):
        if (run_dir / record).is_file() and not (run_dir / record).is_symlink():
            text = html.unescape((run_dir / record).read_text())
            assert name in text, f"{record} does not name it"
    return lines[0].removeprefix(f"warning: {name}: ")[:60]


def full_tensorboard(home: Path) -> str:
    run_dir = home / "run"
    with small_disk(run_dir / "tensorboard", 4096):
        return goes_on(run_dir, str(run_dir / "tensorboard"), "--train.log_every=1", "--train.steps=40", step=40)


_WANDB = """\
import time

def bad(*words, **named):
    {bad}

class Run:
    define_metric = log = finish = lambda *words, **named: None

def init(**named):
    return Run()

{where} = bad
"""
_BAD = {"raises": 'raise ConnectionError("no network")', "hangs": "time.sleep(1000)", "leaves": "raise SystemExit(1)"}


def wandb(where: str, how: str, home: Path) -> str:
    (home / "wandb.py").write_text(_WANDB.format(bad=_BAD[how], where=where if where == "init" else f"Run.{where}"))
    name = "observe.wandb_project = 'p'"
    return goes_on(home / "run", name, "--observe.wandb_project=p", path=str(home))


def no_wandb(home: Path) -> str:
    (home / "wandb.py").write_text("raise ImportError")
    environment = {"PYTHONPATH": f"{home}:{os.environ['PYTHONPATH']}"}
    ended = train(home / "run", "--observe.wandb_project=p", environment=environment)
    assert ended.code == 2 and "pip install wandb" in ended.errors[0], ended.err
    assert "loss" not in ended.out and not is_saved(home / "run", 4)
    return ended.errors[0][:60]


def ascii_output(home: Path) -> str:
    ended = train(home / "run", environment={"PYTHONIOENCODING": "ascii"})
    assert ended.code == 0 and ended.err == "", ended.err
    assert "all is" in ended.out or "report.html" in ended.out.splitlines()[-1], ended.out
    return "every line"


_UNREAD = """\
import fcntl, os, subprocess, sys
_, w = os.pipe()
fcntl.fcntl(w, fcntl.F_SETPIPE_SZ, 4096)
os.write(w, b"x" * int(sys.argv[2]))
sys.exit(subprocess.call(sys.argv[3:], stdout=w, stderr=w if sys.argv[1] == "both" else None))
"""
"""The words behind the first two, into a pipe of one page that nobody reads and that holds so many bytes already."""


def unread(streams: str, home: Path) -> str:
    run_dir = home / "run"
    prefix = (sys.executable, "-c", _UNREAD, streams, "0")
    ended = train(run_dir, "--train.log_every=1", "--train.steps=60", prefix=prefix)
    assert ended.code == 0 and is_saved(run_dir, 60) and (run_dir / "report.html").exists(), (ended.code, ended.err)
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 60
    return f"saved, exit 0 after {ended.seconds:.0f} s"


def unread_error(home: Path) -> str:
    ended = train(home / "run", "--train.steps=-1", prefix=(sys.executable, "-c", _UNREAD, "both", "4096"))
    assert ended.code == 2, (ended.code, ended.err)
    return f"exit 2 after {ended.seconds:.0f} s"


def damaged_rows(home: Path) -> str:
    run_dir = finished(home)
    metrics = run_dir / "metrics.jsonl"
    metrics.write_text("nonsense\n" + metrics.read_text())
    ended = train(run_dir, "--train.steps=9")
    assert ended.code == 0 and is_saved(run_dir, 9), ended.err
    assert ended.out.count("metrics.jsonl.damaged") == 1, ended.out
    assert (run_dir / "metrics.jsonl.damaged").read_text().startswith("nonsense")
    return "set aside"


def before_the_first_step(overrides: tuple[str, ...], words: str, home: Path) -> str:
    ended = train(home / "run", *overrides)
    assert ended.code == 2 and len(ended.errors) == 1 and words in ended.errors[0], ended.err
    assert "compiling" not in ended.out, ended.out
    return ended.errors[0][:80]


TOO_LATE = {
    "a sample longer than the model": (("--observe.sample_tokens=64",), "observe.sample_tokens <= 59"),
    "a prompt that is no text": (("--observe.sample_prompt=\udcff",), "observe.sample_prompt = "),
    "a profile after the last step": (("--train.profile_steps=6:9",), "train.profile_steps = 6:9"),
}


def nothing_held_out(home: Path) -> str:
    (home / "text.txt").write_text("all of it is trained on. " * 200)
    words = ("prepare", str(home / "text.txt"), "--out", str(home / "data"), "--tokenizer=bytes")
    assert command("maxlm.data", *words, "--validation_fraction=0").code == 0
    data = ("--data.datasets.0.path", str(home / "data"), "--data.datasets.0.prepare=None")
    return before_the_first_step(data, "train.eval_batches = 0", home)


def cases() -> Iterator[Case]:
    on = "told once, switched off, named in run.json and report; trained, saved, exit 0"
    for place in PLACES:
        yield Case(
            name=f"writers: {place.name}, {place.spoil.__name__}",
            expected=on,
            check=lambda home, place=place: spoiled(place, home),
        )
    yield Case(name="writers: tensorboard on a full disk", expected=on, check=full_tensorboard)
    for where in ("init", "log", "finish"):
        for how in _BAD:
            check = lambda home, where=where, how=how: wandb(where, how, home)
            yield Case(name=f"writers: wandb {how} at {where}", expected=on, check=check)
    yield Case(name="writers: wandb is absent", expected="exit 2 before the first step", check=no_wandb)
    yield Case(name="writers: an output of ASCII alone", expected="every line, exit 0", check=ascii_output)
    for streams in ("output", "both"):
        name = f"writers: nobody reads standard output{' and error' if streams == 'both' else ''}"
        check = lambda home, streams=streams: unread(streams, home)
        yield Case(name=name, expected="trained, saved, exit 0", check=check)
    yield Case(name="writers: nobody reads an error", expected="exit 2", check=unread_error)
    yield Case(name="writers: damaged rows of an earlier life", expected="set aside; goes on", check=damaged_rows)
    for name, (overrides, words) in TOO_LATE.items():
        check = lambda home, overrides=overrides, words=words: before_the_first_step(overrides, words, home)
        yield Case(name=f"writers: {name}", expected="exit 2 before the first step", check=check)
    name = "writers: a validation split of nothing"
    yield Case(name=name, expected="exit 2 before the first step", check=nothing_held_out)
