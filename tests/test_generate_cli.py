"""`python -m maxlm.generate` on a run folder: what it prints, and its one-line complaints."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from run_folder import make_run

from maxlm import generate
from maxlm.config import BeamConfig, ContrastiveConfig, EngineConfig, SamplingConfig, ShardingConfig, UserError
from maxlm.data.tokenizers import Bytes
from maxlm.inference.generator import Generator
from maxlm.inference.load import load_run

ONE = EngineConfig(slots=1)


@pytest.fixture(scope="module", autouse=True)
def private_cache(programs_kept: None) -> Iterator[None]:
    patch = pytest.MonkeyPatch()
    patch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    yield
    patch.undo()


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(make_run(tmp_path_factory.mktemp("run")).run_dir)


def test_json_is_one_object_and_plain_text_is_the_same_text(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    argv = ["--run", str(run_dir), "--prompt", "the ", "--max_new_tokens", "12", "--top_k", "20", "--seed", "7"]
    generate.main([*argv, "--json"])
    found = json.loads(capsys.readouterr().out)
    assert list(found) == ["text", "tokens", "tokens_per_s"]
    assert Bytes().decode(found["tokens"]) == found["text"]
    generate.main(argv)
    out, err = capsys.readouterr()
    assert out == found["text"] + "\n"
    assert f"{len(found['tokens'])} tokens" in err
    generate.main([*argv, "--speculation", "lookup:drafts=3"])
    out, err = capsys.readouterr()
    assert out == found["text"] + "\n" and re.search(r"\[\d+ of \d+ drafts came true, \d\.\d\d tokens a step\]", err)
    [same] = Generator(load_run(run_dir), engine=ONE).generate(
        ["the "], max_new_tokens=12, sampling=SamplingConfig(top_k=20), seed=7
    )
    assert same.tokens == found["tokens"]


def test_several_texts_are_a_list_and_stand_one_after_the_other(
    run_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask = ["--run", str(run_dir), "--prompt", "the ", "--max_new_tokens", "6"]
    generate.main([*ask, "--n", "2", "--seed", "7", "--json"])
    found = json.loads(capsys.readouterr().out)
    assert [list(one) for one in found] == [["text", "tokens", "tokens_per_s"]] * 2
    assert found[0]["tokens"] != found[1]["tokens"]
    generate.main([*ask, "--beams", "2", "--n_best", "2"])
    out, err = capsys.readouterr()
    beams = BeamConfig(beams=2, n_best=2)
    [best] = Generator(load_run(run_dir), engine=ONE).search(["the "], max_new_tokens=6, beams=beams)
    assert out == "".join(one.text + "\n" for one in best)
    assert err == "".join(f"[{len(one.tokens)} tokens, score {one.score:.4f}]\n" for one in best)


def test_forced_words_contrast_and_guidance(
    run_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ask, new = ["--run", str(run_dir), "--prompt", "the ", "--max_new_tokens", "6"], 6
    generator = Generator(load_run(run_dir), engine=EngineConfig(slots=2))
    monkeypatch.setattr("maxlm.inference.generator.Generator", lambda *_, **__: generator)  # one is enough
    generate.main([*ask, "--beams", "2", "--force", "ab", "c"])
    found = capsys.readouterr().out
    assert "ab" in found and "c" in found
    generate.main([*ask, "--contrastive_k", "3", "--contrastive_alpha", "0.5"])
    contrastive = ContrastiveConfig(contrastive_k=3, contrastive_alpha=0.5)
    [text] = generator.contrast(["the "], max_new_tokens=new, contrastive=contrastive)
    assert capsys.readouterr().out == text.text + "\n"
    generate.main([*ask, "--guidance_scale", "0", "--negative_prompt", "a", "--temperature", "0"])
    [text] = generator.generate(["a"], max_new_tokens=new, sampling=SamplingConfig(temperature=0))
    assert capsys.readouterr().out == text.text + "\n"


def test_steps_and_layouts(run_dir: Path) -> None:
    ask = {"max_new_tokens": 12, "sampling": SamplingConfig(temperature=0)}
    assert load_run(run_dir).step == 2
    newest = Generator(load_run(run_dir), engine=ONE).generate(["the "], **ask)[0].tokens
    first = load_run(run_dir, step=1)
    assert first.step == 1 and Generator(first, engine=ONE).generate(["the "], **ask)[0].tokens != newest
    cut = load_run(run_dir, sharding=ShardingConfig(data=1, tensor=2, fsdp=2))
    assert cut.layout.mesh.size == 4
    assert Generator(cut, engine=EngineConfig(slots=1, tokens_per_step=2)).generate(["the "], **ask)[0].tokens == newest


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["--step", "9"], r"no finished checkpoint of step 9; there are \[1, 2\]"),
        (["--max_new_tokens", "100"], "more than model.max_seq_len = 64"),
        (["--top_p", "0"], r"top_p = 0.0 must be in \(0, 1\]"),
        (["--beams", "20"], r"beams = 20 must be in \[0, 19\]"),
        (["--beams", "4", "--temperature", "0.7"], "temperature = 0.7 with beams: nothing is drawn"),
        (["--beams", "4", "--n", "2"], "--n 2 with --beams: nothing is drawn; ask for the best ones by --n_best"),
        (["--n_best", "2"], "n_best = 2 is of a search, and beams = 0; set beams, or leave n_best out"),
        (["--force", "a"], r"force = \('a',\) is of a search, and beams = 0"),
        (["--beams", "2", "--contrastive_k", "4"], "--beams and --contrastive_k are two searches; use one of them"),
        (["--contrastive_k", "4", "--n", "2"], "--n 2 with --contrastive_k: nothing is drawn"),
        (["--contrastive_k", "4", "--guidance_scale", "2"], "--guidance_scale with --contrastive_k: a search is not"),
        (["--beams", "4", "--guidance_scale", "2"], "--guidance_scale with --beams: a search is not guided"),
        (["--negative_prompt", "x"], "negative_prompt is of guidance, and guidance_scale = 1"),
        (["--sharding.tensor", "3"], "sharding.tensor = 3 does not divide .* = 4"),
        (["--sharding.tensor", "16"], "16 devices asked for, there are 8"),
        (["--temprature", "1"], "unknown key --temprature"),
        (["--prompt", "-x"], "Missing value for argument '--prompt'.* One that begins with - is given as --prompt=-"),
        (["--prompt", "ab\udcff"], "prompt = .*: character 2 is not UTF-8"),
    ],
)
def test_mistakes_are_one_line(run_dir: Path, option: list[str], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them are seen before anything is compiled."""
    monkeypatch.setattr("maxlm.inference.generator.Generator", None)
    with pytest.raises(UserError, match=message):
        generate.main(["--run", str(run_dir), *option])


def test_folders_that_are_no_run(run_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"not a run folder \(no such folder\)"):
        load_run(tmp_path / "nothing")
    with pytest.raises(UserError, match=r"checkpoints/2: not a run folder .*; name .*/run and --step 2"):
        load_run(run_dir / "checkpoints/2")
    shutil.copytree(run_dir, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    with pytest.raises(UserError, match="no finished checkpoint"):
        load_run(tmp_path / "run")


def test_another_tokenizer_is_refused(run_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run_dir, tmp_path / "run")

    class Other(Bytes):
        def __init__(self) -> None:
            super().__init__()
            self.fingerprint = "0" * 64

    monkeypatch.setattr("maxlm.inference.load.load_tokenizer", lambda folder: Other())
    with pytest.raises(UserError, match=r"fingerprint 0{12}\.\.\., but checkpoint 2 was trained with"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("command", ["generate", "evaluate"])
def test_help_needs_no_jax(command: str) -> None:
    code = (
        f"import sys\nfrom maxlm import {command}\n"
        f"try: {command}.main(['--help'])\nexcept SystemExit: pass\nassert 'jax' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "RUN_DIR" in done.stdout


def test_the_process_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "maxlm.generate", "--run", str(tmp_path), "--prompt", "x"]
    done = subprocess.run(argv, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and "not a run folder" in done.stderr
