"""The diffs of docs/extending.md are those of this tree: each applies, and what they add trains."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parent.parent
SECTIONS = re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", (ROOT / "docs/extending.md").read_text(), re.M | re.S)

_TRAIN = """
import dataclasses
from maxlm import train
from maxlm.config import *
from maxlm.config import Activation
from maxlm.config.norm import ScaleNorm
from maxlm.config.position import FastPairs
from maxlm.config.optimizer import Signum
from maxlm.config.schedule import ExponentialSchedule
from maxlm.config.task import Continue
from maxlm.config.data import Sqlite

model = llama(vocab_size=260, d_model=16, n_layers=1, n_heads=2, d_ff=24, max_seq_len=16)
attention = dataclasses.replace(model.blocks[0].attention, position=Rope(scaling=FastPairs(share=0.5)))
block = dataclasses.replace(model.blocks[0], attention=attention, mlp=Mlp(d_ff=24, activation=Activation.TANH))
documents = Sqlite(path="texts.db", query="select text from texts order by text")
config = RunConfig(
    model=dataclasses.replace(model, norm=ScaleNorm(), blocks=(block,)),
    data=DataConfig(datasets=(Dataset(path="data", prepare=PrepareConfig(
        documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.0)),)),
    train=TrainConfig(steps=2, batch_size=2, seq_len=16, log_every=1, eval_batches=0),
    optimizer=Signum(schedule=ExponentialSchedule()),
    execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
    observe=ObserveConfig(sample_tokens=0),
    task=Continue(),
    run_dir="run",
)
assert train.main(config).step == 2
import json
rows = [json.loads(line) for line in open("run/metrics.jsonl")]
assert all(row["hidden_norm"] > 0 and 0 < row["loss"] < 10 for row in rows), rows
assert "ScaleNorm" in open("run/config.json").read()
"""


class Change(NamedTuple):
    """Lines of a file before and after."""

    file: str
    old: str
    new: str


def changes(section: str) -> list[Change]:
    """What the diffs of a section change; a hunk begins with @@, and context lines are those that must be there."""
    found = []
    for diff in re.findall(r"```diff\n(.*?)```", section, re.S):
        for part in re.split(r"^--- .*\n\+\+\+ b/", diff, flags=re.M)[1:]:
            file, _, body = part.partition("\n")
            for hunk in re.split(r"^@@.*\n", body, flags=re.M):
                lines = hunk.splitlines()
                old = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "-"))
                new = "".join(f"{line[1:]}\n" for line in lines if line[:1] in ("", " ", "+"))
                if lines:
                    found.append(Change(file, old, new))
    return found


def apply(root: Path, change: Change) -> None:
    path = root / change.file
    if not path.exists():
        assert not change.old, f"{change.file} is no file of this tree"
        path.write_text(change.new)
        return
    text = path.read_text()
    assert text.count(change.old) == 1, f"{change.file} does not have once:\n{change.old}"
    path.write_text(text.replace(change.old, change.new))


@pytest.mark.parametrize(("title", "section"), SECTIONS, ids=[title for title, _ in SECTIONS])
def test_a_section_touches_few_files(title: str, section: str) -> None:
    files = {change.file for change in changes(section)}
    assert 1 <= len(files) <= (3 if title == "A task" else 2)


def test_all_of_them_together_train_two_steps(tmp_path: Path) -> None:
    for folder in ("maxlm", "kernels_pallas"):
        shutil.copytree(ROOT / folder, tmp_path / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for _, section in SECTIONS:
        for change in changes(section):
            apply(tmp_path, change)
    texts = "import sqlite3; d = sqlite3.connect('texts.db'); d.execute('create table texts (text)'); "
    texts += "d.executemany('insert into texts values (?)', [(f'text number {i}',) for i in range(40)]); d.commit()"
    for code in (texts, _TRAIN):
        done = subprocess.run(
            [sys.executable, "-c", code],
            cwd=tmp_path,
            env=os.environ | {"XLA_FLAGS": "", "PYTHONPATH": str(tmp_path)},
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, done.stderr
