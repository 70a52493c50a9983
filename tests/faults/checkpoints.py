"""Checkpoints and the folder they lie in: names, manifests, locks, disks."""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from faults.case import Case
from faults.runs import bench
from faults.tools import Ended, command, flip_bit, once, small_disk


def train(run_dir: Path, steps: int = 4, *more: str, **how: object) -> Ended:
    """A run of so many steps that saves every second one."""
    words = bench().arguments(run_dir, f"--train.steps={steps}", "--checkpoint.every=2", *more)
    cache = {"JAX_COMPILATION_CACHE_DIR": str(bench().folder / "compiled")}
    environment = {**cache, **how.pop("environment", {})}  # type: ignore[dict-item]
    return command("maxlm.train", *words, environment=environment, **how)  # type: ignore[arg-type]


def went(ended: Ended) -> Ended:
    assert ended.code == 0, ended.err[-2000:]
    return ended


def refused(ended: Ended, *texts: str) -> str:
    """The one line of a mistake."""
    assert ended.code == 2 and len(ended.errors) == 1, (ended.code, ended.err[-2000:])
    for text in texts:
        assert text in ended.errors[0], ended.errors[0]
    return ended.errors[0][:80]


def steps(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


# ---- Any name --------------------------------------------------------------------------------------------------------

NAMES = {
    "brackets": "exp[1]",
    "stars": "a*b?",
    "a space": "two words",
    "a hash": "#1",
    "a percent sign": "%41%",
    "braces": "{x}",
    "a line break": "new\nline",
    "Unicode": "ünï",
    "bytes that are not UTF-8": "\udcff\udcfe",
    "a backslash": "a\\b",
    "a leading dash": "-dash",
    "200 letters": "x" * 200,
}


def any_name(folder: Path, name: str) -> str:
    """Train, go on, and read the run in each way there is, under such a name, data folder included."""
    place = folder / name
    place.mkdir()
    data = shutil.copytree(bench().data, place / "data")
    run_dir, here = place / "run", f"--data.datasets.0.path={data}"
    went(train(run_dir, 2, here))
    went(train(run_dir, 4, here))
    went(command("maxlm.inspect", str(run_dir), "--verify", "--hash"))
    prompt = ("--prompt", "the", "--max_new_tokens", "2")
    went(command("maxlm.generate", "--run", str(run_dir), *prompt))
    went(command("maxlm.evaluate", "--run", str(run_dir), "--batches", "1"))
    went(train(place / "second", 2, here, f"--checkpoint.init_from={run_dir}"))
    assert steps(run_dir) == ["2", "4"]
    return "all seven commands work"


# ---- Manifests -------------------------------------------------------------------------------------------------------


@once
def trained() -> Path:
    """A run of steps 2, 4 and 6; copy it."""
    run_dir = bench().folder / "faults"
    went(train(run_dir, 6, "--checkpoint.keep_last=3"))
    return run_dir


def copy(folder: Path) -> Path:
    return Path(shutil.copytree(trained(), folder / "run"))


def _folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def _dangling(file: Path) -> None:
    file.unlink()
    file.symlink_to("nothing")


def _linked(file: Path) -> None:
    file.rename(file.with_name("moved"))
    file.symlink_to("moved")


def _pipe(file: Path) -> None:
    file.unlink()
    os.mkfifo(file)


SPOILED: dict[str, Callable[[Path], None]] = {
    "with a flipped bit": flip_bit,
    "emptied": lambda file: file.write_bytes(b""),
    "a folder": _folder,
    "a link to nothing": _dangling,
    "moved, with a link in its place": _linked,
    "a pipe": _pipe,
    "deeply nested JSON": lambda file: file.write_text("[" * 200_000),
    "unreadable": lambda file: file.chmod(0),
}
FILES = ("manifest.json", "meta/metadata", "params/_METADATA", "params/manifest.ocdbt")


def spoiled(folder: Path, file: str, spoil: Callable[[Path], None]) -> str:
    """The step is refused by name, the one before is used, and the refused one is kept."""
    run_dir = copy(folder)
    spoil(run_dir / "checkpoints" / "6" / file)
    subprocess.run(["chown", "-R", "12345", str(folder)], check=True)
    as_user = ("setpriv", "--reuid", "12345", "--clear-groups")
    ended = went(train(run_dir, 6, prefix=as_user if spoil is SPOILED["unreadable"] else ()))
    assert "checkpoints/6: checkpoint refused" in ended.out and "continuing after step 4" in ended.out, ended.out
    assert "6.set-aside" in steps(run_dir) and "6" in steps(run_dir), steps(run_dir)
    return "step 4 is used, 6 is set aside"


def no_manifests(folder: Path) -> str:
    run_dir = copy(folder)
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    said = refused(train(run_dir, 8), "have no manifest.json", "--seal 6")
    assert steps(run_dir) == ["2", "4", "6"]
    went(command("maxlm.inspect", str(run_dir), "--seal", "6"))
    assert "continuing after step 6" in went(train(run_dir, 8)).out
    return said


def set_aside_twice(folder: Path) -> str:
    run_dir = copy(folder)
    for _ in range(2):
        flip_bit(run_dir / "checkpoints" / "6" / "meta" / "metadata")
        went(train(run_dir, 6))
    assert {"6", "6.set-aside", "6.set-aside-2"} < set(steps(run_dir)), steps(run_dir)
    return "6.set-aside and 6.set-aside-2"


# ---- Folders and disks -----------------------------------------------------------------------------------------------


def _file(checkpoints: Path) -> None:
    checkpoints.write_text("")


def _dangling_folder(checkpoints: Path) -> None:
    checkpoints.symlink_to("nothing/there")


WRONG_FOLDERS: dict[str, Callable[[Path], None]] = {
    "a file": _file,
    "a link to nothing": _dangling_folder,
    "not writable": lambda checkpoints: checkpoints.mkdir(mode=0o500),
}


def wrong_folder(folder: Path, make: Callable[[Path], None]) -> str:
    run_dir = folder / "run"
    run_dir.mkdir()
    run_dir.chmod(0o777)
    make(run_dir / "checkpoints")
    as_user: tuple[str, ...] = ()
    if (run_dir / "checkpoints").is_dir():  # root may write everywhere
        subprocess.run(["chown", "-R", "12345", str(folder)], check=True)
        as_user = ("setpriv", "--reuid", "12345", "--clear-groups")
    ended = train(run_dir, prefix=as_user)
    assert "compiled the train step" not in ended.out
    return refused(ended, "checkpoints cannot be written there")


def full_disk(folder: Path) -> str:
    with small_disk(folder / "disk", 1 << 20) as disk:
        (disk / "run").mkdir()
        (disk / "filler").write_bytes(bytes((1 << 20) - (32 << 10)))
        return refused(train(disk / "run"), "No space left on device")


def lock_removed(folder: Path) -> str:
    run_dir = folder / "run"
    with bench().start(run_dir, "--train.steps=100000") as running:
        running.read_steps(1)
        (run_dir / "lock").unlink()
        return refused(train(run_dir), "run folder in use")


def cases() -> Iterator[Case]:
    """Checkpoints."""
    for what, name in NAMES.items():
        yield Case(
            name=f"checkpoints: a folder's name with {what}",
            expected="every command works",
            check=functools.partial(any_name, name=name),
        )
    for file in FILES:
        for what, spoil in SPOILED.items():
            yield Case(
                name=f"checkpoints: {file} {what}",
                expected="refused by name, the step before is used, nothing is deleted",
                check=functools.partial(spoiled, file=file, spoil=spoil),
            )
    yield Case(name="checkpoints: all manifests deleted", expected="refused, with the remedy", check=no_manifests)
    yield Case(name="checkpoints: set aside twice", expected="both are kept", check=set_aside_twice)
    for what, make in WRONG_FOLDERS.items():
        yield Case(
            name=f"checkpoints: the folder of checkpoints is {what}",
            expected="refused before the first step",
            check=functools.partial(wrong_folder, make=make),
            short=make is _file,
        )
    yield Case(name="checkpoints: no space at all", expected="refused before the first step", check=full_disk)
    yield Case(name="checkpoints: lock removed by hand", expected="a second run is refused", check=lock_removed)
