"""Mistakes inside config files: one line each, `file:line: what is wrong`, whatever was raised."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from maxlm.config import UserError
from maxlm.config.cli import load_config
from maxlm.shapes import parameter_count

ROOT = Path(__file__).parent.parent

WHOLE = """\
from dataclasses import replace

from maxlm.config import AdamW, DataConfig, Dataset, RunConfig, TrainConfig, llama


def get_config() -> RunConfig:
    model = llama(vocab_size=256, d_model=64, n_layers=2, n_heads=4, d_ff=96, max_seq_len=64)
    run = RunConfig(
        model=model,
        data=DataConfig(datasets=(Dataset(path="data/x"),)),
        train=TrainConfig(steps=10, batch_size=2, seq_len=64),
        optimizer=AdamW(learning_rate=1e-3),
    )
    return run
"""
"""A right one, of which each mistake changes a word."""


def complaint(folder: Path, text: str) -> str:
    """What the user reads of a file with this text, without the folder's name."""
    (folder / "mine.py").write_text(text)
    with pytest.raises(UserError) as caught:
        load_config(str(folder / "mine.py"))
    message = str(caught.value)
    assert "\n" not in message and len(message) < 500
    assert caught.value.exit_code == 2
    return message.replace(f"{folder}/", "")


def changed(old: str, new: str) -> str:
    assert WHOLE.count(old) == 1
    return WHOLE.replace(old, new)


def test_the_file_is_right_without_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(WHOLE)
    assert load_config(str(tmp_path / "mine.py")).train.steps == 10


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("from dataclasses import replace", "import numpyy", "mine.py:1: ModuleNotFoundError: no module numpyy"),
        (
            "from dataclasses import replace",
            "from maxlm.config import Adamw",
            "mine.py:1: ImportError: maxlm.config has no Adamw; did you mean AdamW?",
        ),
        (
            "d_model=64",
            "dmodel=64",
            "mine.py:7: TypeError: llama() got an unexpected keyword argument 'dmodel'; did you mean d_model?",
        ),
        (
            "steps=10",
            "stpes=10",
            "mine.py:11: TypeError: TrainConfig() got an unexpected keyword argument 'stpes'; did you mean steps",
        ),
        (
            "return run",
            "return replace(run, train=replace(run.train, bathc_size=4))",
            "mine.py:14: TypeError: TrainConfig() got an unexpected keyword argument 'bathc_size'; did you mean batch",
        ),
        (
            "(path=",
            "(xyz=",
            "TypeError: Dataset() got an unexpected keyword argument 'xyz'; it takes path, weight",
        ),
        ("path=", "", "mine.py:10: TypeError: Dataset"),
        (
            ", batch_size=2",
            "",
            "mine.py:11: TypeError: TrainConfig.__init__() missing 1 required",
        ),
        ("model=model", "model=modell", "mine.py:9: NameError: modell is not defined; did you mean model?"),
        (
            "return run",
            "return run.optimiser",
            "mine.py:14: AttributeError: RunConfig has no optimiser; did you mean",
        ),
        ("return run", "return 1 / 0", "mine.py:14: ZeroDivisionError: division by zero"),
        ("return run", "raise ValueError('a\\n  b')", "mine.py:14: ValueError: a b"),
        ("return run", "return run)", "mine.py:14: not valid Python (unmatched ')')"),
        ("return run", "return '", "mine.py:14: not valid Python (unterminated string literal"),
        ("steps=10", "steps=0", "mine.py:11: train.steps = 0 must be positive"),
        ("steps=10", "steps=1e3", "mine.py:11: train.steps = 1000.0 must be a whole number; use 1000"),
        ("d_model=64", "d_model=100", "mine.py:7: llama(): d_model = 100 is not n_heads = 4 times an even head_dim"),
        (
            "return run",
            "return replace(run, optimizer=AdamW)",
            "mine.py:14: optimizer = AdamW must be AdamW(...), Adafactor(...)",
        ),
        (
            "return run",
            "pass",
            "mine.py:6: get_config() must return a RunConfig, it returns None; is its last line",
        ),
        ("return run", "return model", "mine.py:6: get_config() must return a RunConfig, it returns ModelConfig"),
        (
            "get_config()",
            "get_config(steps, size=1)",
            "mine.py:6: get_config(steps) must take no arguments; give",
        ),
        ("get_config", "getconfig", "--config mine.py: has no function get_config(); did you mean getconfig?"),
        (
            "def get_config()",
            "get_config = 3\ndef f()",
            "--config mine.py: get_config must be a function, it is int",
        ),
    ],
)
def test_a_mistake_names_its_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert message in complaint(tmp_path, changed(old, new))


def test_the_line_is_the_innermost_of_the_file(tmp_path: Path) -> None:
    """Not of the library that it calls, nor of the caller in the file."""
    text = "import json\n\n\ndef deep():\n    return json.loads('{')\n\n\ndef get_config():\n    return deep()\n"
    assert complaint(tmp_path, text).startswith("mine.py:5: JSONDecodeError: ")


def test_a_mistake_in_a_neighbour_names_the_neighbour(tmp_path: Path) -> None:
    folder = tmp_path / "own_configs"
    folder.mkdir()
    (folder / "base.py").write_text(changed("steps=10", "steps=0"))
    (folder / "torn.py").write_text("def get_config(:\n")
    message = complaint(folder, "from own_configs.base import get_config\n")
    assert message == "base.py:11: train.steps = 0 must be positive"
    assert complaint(folder, "\nfrom own_configs.torn import get_config\n").startswith("torn.py:1: not valid Python")
    message = complaint(folder, "\nimport own_configs.bsae\n")
    assert message == "mine.py:2: ModuleNotFoundError: no module own_configs.bsae; did you mean base?"


def test_an_empty_file_has_no_function(tmp_path: Path) -> None:
    assert complaint(tmp_path, "") == "--config mine.py: has no function get_config()"


@pytest.mark.parametrize("debug", [False, True])
def test_the_command_prints_one_line_or_with_debug_the_traceback(debug: bool, tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(changed("model=model", "model=modell"))
    line = [sys.executable, "-m", "maxlm.train", "--config", str(file), *(["--debug"] if debug else [])]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (2, "")
    if debug:
        assert "Traceback" in done.stderr and "model=modell" in done.stderr and "NameError" in done.stderr
    else:
        assert done.stderr == f"error: {file}:9: NameError: modell is not defined; did you mean model?\n"


def test_the_documents_config_is_one(tmp_path: Path) -> None:
    before = (ROOT / "docs/configs.md").read_text().partition("## What is checked")[0]
    (text,) = re.findall(r"^```python\n(.*?)^```$", before, re.M | re.S)
    (tmp_path / "mine.py").write_text(text)
    config = load_config(tmp_path / "mine.py")
    config.validate(1)
    assert parameter_count(config.model).total == 50_304 * 128 + 128 * 128 + 2 * (12 * 128**2 + 13 * 128) + 2 * 128


def test_a_config_takes_its_siblings_and_nobody_elses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not those of another file's folder, nor of the folder one stands in, nor what they were before an edit."""
    for place, steps in (("a", 11), ("b", 22)):
        (tmp_path / place / "configs").mkdir(parents=True)
        (tmp_path / place / "configs/tiny.py").write_text(WHOLE.replace("steps=10", f"steps={steps}"))
        (tmp_path / place / "configs/x.py").write_text("from configs.tiny import get_config\n")
    monkeypatch.chdir(ROOT)
    before, path = set(sys.modules), list(sys.path)
    found = [load_config(tmp_path / place / "configs/x.py").train.steps for place in ("a", "b", "a")]
    assert found == [11, 22, 11]
    (tmp_path / "a/configs/tiny.py").write_text(WHOLE.replace("steps=10", "steps=333"))
    assert load_config(tmp_path / "a/configs/x.py").train.steps == 333
    assert sys.path == path and not {name for name in set(sys.modules) - before if name.startswith("configs")}


def test_a_config_that_exits_is_a_mistake(tmp_path: Path) -> None:
    (tmp_path / "x.py").write_text("import sys\nsys.exit(3)\n")
    with pytest.raises(UserError, match=r"x\.py:2: SystemExit: 3"):
        load_config(tmp_path / "x.py")
