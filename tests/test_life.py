"""`launch/life.sh`: each command is one that there is, and finds what those before it have made."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

from maxlm.compare import CompareOptions
from maxlm.config import Conversations, Files, ModelReward, Ppo, RunConfig
from maxlm.config.cli import parse, parse_run
from maxlm.data.build import Problems
from maxlm.quantize import QuantizeOptions

ROOT = Path(__file__).parent.parent
PYTHON = """#!/usr/bin/env bash
printf '%s\\n' "$*" >> calls.txt
while (($#)); do
  if [[ $1 == --out ]]; then mkdir -p "$(dirname "$2")"; touch "$2"; fi
  shift
done
"""
"""Says what it was called with, and makes what it should write."""


def called(folder: Path, *words: str) -> list[list[str]]:
    """What the script calls in `folder`, without `python -m`."""
    log = folder / "calls.txt"
    log.unlink(missing_ok=True)
    environment = os.environ | {"ROOT": str(folder), "PATH": f"{folder}/bin:{os.environ['PATH']}"}
    done = subprocess.run([folder / "launch/life.sh", *words], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split()[1:] for line in log.read_text().splitlines()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("bin", "launch"):
        (tmp_path / name).mkdir()
    shutil.copy(ROOT / "launch/life.sh", tmp_path / "launch")
    (tmp_path / "bin/python").write_text(PYTHON)
    (tmp_path / "bin/python").chmod(0o755)
    return tmp_path


def read_by(config: RunConfig) -> list[str]:
    """Files that its data is prepared of."""
    documents = [one.prepare.documents for one in config.data.datasets if one.prepare is not None]
    return [path for one in documents if isinstance(one, Conversations | Files) for path in one.paths]


def begun_from(config: RunConfig) -> set[str]:
    """Runs that it needs."""
    found = {config.checkpoint.init_from}
    if isinstance(config.task, Ppo):
        found |= {config.task.critic, *(one.run for one in config.task.rewards if isinstance(one, ModelReward))}
    return {one for one in found if one is not None}


@pytest.mark.parametrize("chain", ["life", "rlhf"])
def test_each_command_finds_what_it_needs(folder: Path, chain: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    files, runs, prepared = set[str](), set[str](), set[str]()
    there = lambda path: path in files | runs | prepared or (ROOT / "configs" in (ROOT / path).parents)
    for module, *words in called(folder, *(["rlhf"] if chain == "rlhf" else [])):
        match module, words:
            case "maxlm.data", ["build", "problems", *rest]:
                files.add(parse(Problems, rest, prog="", description="", flags=True).out)
            case "maxlm.train", _:
                config = parse_run(words, prog="", description="").config
                assert all(map(there, read_by(config))) and begun_from(config) <= runs
                runs.add(config.run_dir)
                prepared |= {one.path for one in config.data.datasets}
            case "maxlm.quantize", _:
                quantised = parse(QuantizeOptions, words, prog="", description="", flags=True)
                assert quantised.run in runs
                runs.add(quantised.out)
            case "maxlm.compare", _:
                compared = parse(CompareOptions, words, prog="", description="", flags=True)
                assert set(compared.runs) <= runs and all(map(there, compared.prompts))
                assert compared.judge is None or (compared.judge in runs and compared.judge not in compared.runs)
                assert compared.out == f"runs/{chain}/report.html"
            case _:
                pytest.fail(f"{module} {words}")
    assert len(runs) == 5


def test_what_is_made_is_not_made_again(folder: Path) -> None:
    """Training, which goes on by itself, and the page are; problems and the quantised model are not."""
    first, again = called(folder), called(folder)
    assert {module for module, *_ in first} == {"maxlm.data", "maxlm.train", "maxlm.quantize", "maxlm.compare"}
    assert again == [call for call in first if call[0] in ("maxlm.train", "maxlm.compare")]
