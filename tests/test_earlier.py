"""What earlier versions wrote and understood: run folders, config files and keys that go on working."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import small_model, small_run, with_attention

from maxlm.config import Llama3RopeScaling, QkNorm, Rope, RunConfig, UserError, earlier, serialize
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


def test_norms_of_heads_that_were_a_switch_are_a_choice(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(earlier, "_told", set())
    key = "--model.blocks.0.attention.qk_norm"
    norms = lambda *argv: [
        block.attention.qk_norm
        for block in parse_run(["--config", "config.py", *argv], prog="", description="").config.model.blocks
    ]
    assert norms() == [None, QkNorm.HEADS]  # of the file, which says True
    assert norms(f"{key}=True") == norms(key, "True") == norms(f"{key}=heads") == [QkNorm.HEADS] * 2
    assert norms(key, "whole") == [QkNorm.WHOLE, QkNorm.HEADS]
    assert norms(f"{key}=False") == norms(key, "None") == [None, QkNorm.HEADS]
    notes = capsys.readouterr().err
    assert notes.count(f"note: {key}=True is now {key}=heads\n") == 1
    assert notes.count("note: GroupedQuery(qk_norm=True) is now GroupedQuery(qk_norm=QkNorm.HEADS)\n") == 1


def test_the_second_format_is_read() -> None:
    """Its norms of heads were switched on and off, and the one kind of scaling had no name."""
    scaled = Rope(scaling=Llama3RopeScaling(factor=2.0))
    plain, normed = small_model(), with_attention(small_model(), qk_norm=QkNorm.HEADS, position=scaled)
    config = small_run(dataclasses.replace(plain, n_layers=3, blocks=normed.blocks, first_blocks=plain.blocks))
    saved = serialize.to_dict(config)
    first, block = saved["model"]["first_blocks"][0]["attention"], saved["model"]["blocks"][0]["attention"]
    assert (first["qk_norm"], block["qk_norm"]) == (None, "heads")
    first["qk_norm"], block["qk_norm"] = False, True
    assert block["position"]["scaling"].pop("kind") == "Llama3RopeScaling"
    for attention in (first, block):
        for new in ("scale", "sinks", "log_length"):
            del attention[new]
        for new in ("dims", "interleaved"):
            del attention["position"][new]
    assert serialize.from_dict(RunConfig, saved | {"format": 2}) == config
    with pytest.raises(UserError, match="format 2 lacks or misuses 'qk_norm'"):
        del block["qk_norm"]
        serialize.from_dict(RunConfig, saved | {"format": 2})


def test_the_third_format_is_read() -> None:
    """It had one task, and no name for it."""
    config = small_run()
    saved = serialize.to_dict(config)
    assert saved["task"].pop("kind") == "Pretrain"
    assert serialize.from_dict(RunConfig, saved | {"format": 3}) == config


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


@pytest.mark.parametrize("number", [0, 5, "2", None, 1.5])
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
