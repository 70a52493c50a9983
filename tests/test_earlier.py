"""What earlier versions wrote and understood: run folders, config files and keys that go on working."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import small_run

from maxlm.config import RunConfig, UserError, earlier, serialize
from maxlm.config.cli import load_config, parse_run
from maxlm.inference.load import load_run
from maxlm.observe.metrics import read_rows

FORMATS = Path(__file__).parent / "formats"
"""A run folder of each format: two steps of a pattern of two blocks, whose data stands beside it."""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the oldest format's, in which commands run."""
    shutil.copytree(FORMATS / "1", tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_run_of_the_first_format_goes_on(folder: Path) -> None:
    """From its own config file, with the losses that the version which began it goes on with."""
    words = [sys.executable, "-m", "maxlm.train", "--config", "config.py", "--train.steps", "4"]
    done = subprocess.run(words, env=os.environ | {"XLA_FLAGS": ""}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    losses = [row["loss"] for row in read_rows(folder / "run/metrics.jsonl")]
    assert losses == pytest.approx([5.514277458190918, 5.339592933654785], abs=1e-5)
    assert json.loads((folder / "run/config.json").read_text())["format"] == earlier.FORMAT
    assert load_run(folder / "run").step == 4


def test_its_saved_config_is_the_files(folder: Path) -> None:
    assert serialize.load(RunConfig, folder / "run/config.json") == load_config("config.py")


def test_each_old_name_is_told_once(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier, "_told", set())
    argv = ["--config", "config.py", "--model.remat=full", "--model.kernels.glu=xla", "--model.norm_eps", "0.5"]
    argv += [
        "--model.blocks.0.ffn.d_ff=24",
        "--model.blocks.0.attention.rope.theta=7.0",
        "--model.tie_embeddings=False",
    ]
    config = parse_run(argv, prog="", description="").config
    assert config.execution.remat.value == "full" and config.execution.kernels.glu.value == "xla"
    assert config.execution.dtype.value == "float32"  # of the file, whose old keyword moved
    block = config.model.blocks[0]
    assert (config.model.norm.eps, config.model.tied, block.mlp.d_ff, block.attention.position.theta) == (
        0.5,
        False,
        24,
        7,
    )
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == len(set(notes))
    for note in (
        "note: --model.remat is now --execution.remat",
        "note: --model.blocks.0.ffn.d_ff is now --model.blocks.0.mlp.d_ff",
        "note: maxlm.config.GluConfig is now GatedMlp",
        "note: BlockConfig(ffn=...) is now BlockConfig(mlp=...)",
        "note: ModelConfig(compute_dtype=...) is now execution.dtype",
    ):
        assert note in notes


def test_every_key_of_the_first_format_has_a_name_today() -> None:
    """Those that a command line could set."""
    saved = json.loads((FORMATS / "1/run/config.json").read_text())
    today = serialize.flatten(serialize.from_dict(RunConfig, saved))

    def keys(value: object, prefix: str) -> list[str]:
        items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
        inner = [key for name, item in items if name != "kind" for key in keys(item, f"{prefix}.{name}")]
        return inner or [prefix]

    old = [key for section, value in saved.items() for key in keys(value, section)]
    assert len(old) > 80
    assert [
        key for key in old if earlier.new_key(key) not in today and not key.endswith(("user_symbols", ".prepare"))
    ] == []


@pytest.mark.parametrize("number", [0, 4, "2", None, 1.5])
def test_a_format_that_is_not_known_is_refused(number: object) -> None:
    saved = serialize.to_dict(small_run()) | {"format": number}
    with pytest.raises(UserError, match=r"format = .* is not one that this version of maxlm reads"):
        serialize.from_dict(RunConfig, saved)


def test_a_damaged_file_of_an_old_format_is_refused() -> None:
    saved = json.loads((FORMATS / "1/run/config.json").read_text())
    del saved["model"]["norm_eps"]
    with pytest.raises(UserError, match="format 1 lacks or misuses 'norm_eps'"):
        serialize.from_dict(RunConfig, saved)
    for damaged in ({"model": []}, {"model": None}, {}):
        with pytest.raises(UserError, match="format 1 lacks or misuses"):
            serialize.from_dict(RunConfig, damaged)
