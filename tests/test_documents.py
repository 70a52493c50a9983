"""Every command block of the README and the docs, as somebody pastes it into a new clone.

The word after a block's language says what it needs: `fast` (tried here), `slow` (tried in the nightly tests, with an
environment of its own), `needs-hardware` and `needs-download` (not tried). `exit=N`: it ends so. A command must not
stand anywhere else.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from xla_flags import xla_flags

from maxlm import launch
from maxlm.chat import ChatOptions
from maxlm.config.cli import parse, parse_run
from maxlm.convert import ConvertOptions
from maxlm.generate import GenerateOptions
from maxlm.serve import ServeOptions

ROOT = Path(__file__).parent.parent
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
NEEDS = ("fast", "slow", "needs-hardware", "needs-download")
COMMAND = re.compile(r"^\s*(\$ |(\.venv/bin/)?python3? -m |pip install |make [a-z])")


class Block(NamedTuple):
    document: str
    line: int
    language: str
    marks: list[str]
    text: str

    @property
    def name(self) -> str:
        return f"{self.document}:{self.line}"


def blocks(document: Path) -> Iterator[Block]:
    inside: list[str] | None = None
    for number, line in enumerate(document.read_text().splitlines(), 1):
        if line.startswith("```"):
            if inside is None:
                first, info, inside = number, line[3:].split(), []
            else:
                language, *marks = info or [""]
                yield Block(str(document.relative_to(ROOT)), first, language, marks, "\n".join(inside))
                inside = None
        elif inside is not None:
            inside.append(line)
    assert inside is None, f"{document}: a block without an end"


BLOCKS = [block for document in DOCUMENTS for block in blocks(document)]
COMMANDS = [block for block in BLOCKS if block.language == "bash"]


def test_every_command_says_what_it_needs() -> None:
    for block in COMMANDS:
        needs = [mark for mark in block.marks if not mark.startswith("exit=")]
        assert len(needs) == 1 and needs[0] in NEEDS, f"{block.name}: {block.marks}, use one of {NEEDS}"
    for block in BLOCKS:
        if block.language in ("", "console", "sh", "shell"):
            assert not any(COMMAND.match(line) for line in block.text.splitlines()), f"{block.name}: use ```bash NEEDS"
    for document in DOCUMENTS:
        outside = re.sub(r"^```.*?^```$", "", document.read_text(), flags=re.MULTILINE | re.DOTALL)
        for line in outside.splitlines():
            assert not (line.startswith("    ") and COMMAND.match(line)), f"{document.name}: {line.strip()}"


def words_of(block: Block) -> Iterator[list[str]]:
    """The commands of a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        yield shlex.split(line.rpartition("&& ")[2], comments=True)


def test_commands_that_are_not_tried_have_options_that_there_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    parsed, targets = set(), list[str]()
    for block in COMMANDS:
        if not {"needs-hardware", "needs-download"} & set(block.marks):
            continue
        for words in words_of(block):
            match words:
                case [_, "-m", "maxlm.launch", *rest]:
                    launch.check(launch.parse_launch(rest)[0])
                case [_, "-m", "maxlm.train", "--config", config, *_] if not Path(config).is_file():
                    assert config.startswith("runs/"), f"{block.name}: there is no {config}"
                    continue  # it is a run that the commands before make
                case [_, "-m", "maxlm.train", *rest]:
                    parse_run(rest, prog="", description="")
                case [_, "-m", "maxlm.generate", *rest]:
                    parse(GenerateOptions, rest, prog="", description="", flags=True)
                case [_, "-m", "maxlm.serve", *rest]:
                    parse(ServeOptions, rest, prog="", description="", flags=True)
                case [_, "-m", "maxlm.chat", *rest]:
                    parse(ChatOptions, rest, prog="", description="", flags=True)
                case [_, "-m", "maxlm.convert", *rest]:
                    targets.append(parse(ConvertOptions, rest, prog="", description="", flags=True).target)
                case _:
                    continue
            parsed.add(words[2])
    assert parsed == {f"maxlm.{name}" for name in ("launch", "train", "generate", "serve", "chat", "convert")}
    assert len(set(targets)) == len(targets), f"a folder that is there is refused: {targets}"


def clone(folder: Path) -> Path:
    """The tracked files and new ones, without what lies about in this folder."""
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def paste(block: Block, here: Path, home: Path, **variables: str) -> str:
    """The output of a block in a shell that knows the environment, these variables, and nothing else.

    `python` is that of the environment, as the README says of the docs.
    """
    path = f"{here / '.venv/bin'}:/usr/local/bin:/usr/bin:/bin:{Path(sys.base_prefix) / 'bin'}"
    began = time.monotonic()
    done = subprocess.run(
        ["bash", "-e", "-c", block.text], cwd=here, env={"PATH": path, "HOME": str(home)} | variables,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    print(f"{block.name}: {time.monotonic() - began:.1f} s, exit code {done.returncode}")
    wanted = next((int(mark[5:]) for mark in block.marks if mark.startswith("exit=")), 0)
    assert done.returncode == wanted, f"{block.name}:\n{block.text}\n{done.stdout}"
    assert "Traceback" not in done.stdout, f"{block.name}:\n{done.stdout}"
    return done.stdout


@pytest.mark.slow
def test_fast_blocks_work_as_pasted(tmp_path: Path) -> None:
    """In an environment that borrows its packages from this one, so that nothing is installed; compiled as other tests
    are, in half the time: what is said is looked at, not how fast it comes."""
    here, home = clone(tmp_path / "maxlm"), tmp_path / "home"
    home.mkdir()
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", here / ".venv"], check=True)
    (site,) = (here / ".venv/lib").glob("python*/site-packages")
    (site / "borrowed.pth").write_text(f"{here}\n{sysconfig.get_path('purelib')}\n")
    # What the slow `make train` leaves, in little; the README's own run draws a sample.
    few = "--train.steps 2 --train.eval_batches 1 --observe.sample_tokens 0"
    train = Block("make train", 0, "bash", ["fast"], f"python -m maxlm.train --config configs/tiny.py {few}")
    for block in (train, *COMMANDS):
        if "fast" in block.marks:
            paste(block, here, home, XLA_FLAGS=xla_flags(1))


@pytest.mark.nightly
def test_all_blocks_work_as_pasted(tmp_path: Path) -> None:
    """In the environment that the first block makes. `make test` is left out: it is what runs this."""
    here, home = clone(tmp_path / "maxlm"), tmp_path / "home"
    home.mkdir()
    for block in COMMANDS:
        if not {"needs-hardware", "needs-download"} & set(block.marks) and "make test" not in block.text:
            paste(block, here, home)
