"""`python -m maxlm.convert`, and what begins from a published model: training, text."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import published
import pytest
import safetensors.numpy
from helpers import small_run
from tokenizers import Tokenizer, models

from maxlm import convert, generate
from maxlm.checkpoint.reference import PUBLISHED
from maxlm.config import UserError, serialize
from maxlm.data.chat import find_chat_template
from maxlm.data.text_ends import published_ends
from maxlm.data.tokenizers import load_tokenizer
from maxlm.hub.families import FAMILIES
from maxlm.hub.models import find_tokenizer, load_model
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import SINGLE
from maxlm.inference.load import load_run
from maxlm.recipes.starting import open_source
from maxlm.sharding import make_layout
from maxlm.training import make_trainer
from maxlm.training.warm_start import RunSource, warm_start

NAME = "qwen3_moe"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    published.write_model(published.MODELS[NAME], tmp_path / "hf")
    vocabulary = {chr(33 + i): i for i in range(published.V - 1)} | {"</s>": published.V - 1}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(tmp_path / "hf/tokenizer.json"))
    (tmp_path / "hf/chat_template.jinja").write_text("{{ messages }}")
    return tmp_path / "hf"


def run(*words: str) -> None:
    convert.main([word for pair in zip(("--from", "--to"), words[:2], strict=True) for word in pair] + list(words[2:]))


def test_to_a_run_and_back(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(f"hf:{folder}", f"run:{folder.parent}/run")
    run(f"run:{folder.parent}/run", f"hf:{folder.parent}/back")
    said = capsys.readouterr().out.splitlines()
    hashes = [line for line in said if "parameters, SHA-256" in line]
    assert len(hashes) == 2 and len(set(hashes)) == 1
    there, back = (safetensors.numpy.load_file(place / SINGLE) for place in (folder, folder.parent / "back"))
    assert there.keys() == back.keys() and all((there[key] == back[key]).all() for key in there)
    for name in ("tokenizer.json", "chat_template.jinja"):
        assert (folder.parent / "back" / name).read_bytes() == (folder / name).read_bytes()
    loaded = load_run(folder.parent / "run")
    np.testing.assert_allclose(loaded.model(published.ids()), published.logits(NAME), atol=2e-5)
    assert loaded.step == 0 and not list(folder.parent.glob("*.partial"))


def test_a_family_is_kept_where_another_could_say_it_too(folder: Path) -> None:
    """A Mistral without a window is a LLaMA."""
    config = published.MODELS["mistral"] | {"sliding_window": None}
    published.write_model(config, folder)
    run(f"hf:{folder}", f"run:{folder.parent}/run")
    run(f"run:{folder.parent}/run", f"hf:{folder.parent}/back")
    run(f"hf:{folder}", f"hf:{folder.parent}/half", "--dtype", "bfloat16")
    for name in ("back", "half"):
        assert json.loads((folder.parent / name / "config.json").read_text())["model_type"] == "mistral"
    assert load_model(folder.parent / "half")[1] == load_model(folder)[1]


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (("folder", "run:x"), r"--from folder must be hf:DIR \(a published model\) or run:DIR"),
        (("hf:", "run:x"), "--from hf: must be hf:DIR"),
        (("hf:nowhere", "run:x"), "nowhere: no such folder; name that of a downloaded model"),
        (("hf:{folder}/none", "run:x"), "none: is a link to nothing"),
        (("hf:{folder}/x.gguf", "run:x"), r"x\.gguf: is a file, must be a folder; name it by --gguf or gguf:"),
        (("hf:{folder}/run", "run:x"), "run: is a run folder, must be a published model; name it by --run or run:"),
        (("hf:{folder}/nothing", "run:x"), "nothing: has no config.json"),
        (("run:{folder}", "hf:x"), "config.json: is of a published model, must be of a run; .* --hf or hf:"),
        (("run:nowhere", "hf:x"), "nowhere: not a run folder"),
        (("hf:{folder}", "run:{folder}"), "is there already; name a new folder"),
        (("hf:{folder}", "run:x", "--dtype=bfloat16"), "--dtype is of files of hf:DIR"),
    ],
)
def test_what_cannot_be_converted(words: tuple[str, ...], match: str, folder: Path) -> None:
    (folder / "none").symlink_to("nowhere")
    (folder / "x.gguf").write_bytes(b"GGUF")
    (folder / "nothing").mkdir()
    (folder / "run").mkdir()
    serialize.save(small_run(load_model(folder)[1]), folder / "run/config.json")
    with pytest.raises(UserError, match=match):
        run(*(word.format(folder=folder) for word in words))


def test_a_run_needs_a_tokenizer(folder: Path) -> None:
    (folder / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer\.json and no tokenizer\.model"):
        run(f"hf:{folder}", f"run:{folder.parent}/run")
    assert not (folder.parent / "run").exists()


def test_text_of_a_published_model(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main(["--hf", str(folder), "--prompt", "abc", "--max_new_tokens", "5", "--temperature", "0", "--json"])
    found = json.loads(capsys.readouterr().out)["tokens"]
    model, _ = load_model(folder)
    ids = find_tokenizer(folder).prompt_ids("abc")
    for token in found:  # greedy, without a cache
        assert token == int(np.asarray(model([ids]))[0, -1].argmax())
        ids = [*ids, token]
    for words in ((), ("--hf", str(folder), "--run", "x")):
        with pytest.raises(UserError, match="name one model: --run RUN_DIR"):
            generate.main([*words, "--prompt", "a"])


def _is_kept(keep: Callable[[Path], None], folder: Path) -> None:
    """By the run that starts, and by one that starts from that: its chat template, family and ends."""
    runs = [folder.parent / name for name in ("first", "second")]
    config = small_run(FAMILIES[NAME].read(Published(published.MODELS[NAME], "")))
    for place in runs:
        place.mkdir()
        serialize.save(dataclasses.replace(config, run_dir=str(place)), place / "config.json")
    keep(runs[0])
    RunSource(str(runs[0])).keep(runs[1])
    kept = [find_chat_template(place / PUBLISHED) for place in (*runs, runs[1])]
    assert all(one is not None and one.sources == {"default": "{{ messages }}"} for one in kept)
    tokenizer = find_tokenizer(folder)
    assert published_ends(runs[1] / PUBLISHED, tokenizer) == published_ends(folder, tokenizer)
    assert json.loads((runs[1] / PUBLISHED / "config.json").read_text())["model_type"] == NAME


def test_training_begins_from_it(folder: Path) -> None:
    config = small_run(FAMILIES[NAME].read(Published(published.MODELS[NAME], "")))
    layout = make_layout(config.sharding)
    trainer = make_trainer(config, layout)
    tokenizer = find_tokenizer(folder)
    place = f"hf:{folder}"
    start = warm_start(place, open_source, config.model, layout, trainer, tokenizer.fingerprint)
    model, _ = load_model(folder)
    ours, theirs = start.state.parameters, model.parameters
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert start.step == 0 and start.changes == ()
    _is_kept(start.keep, folder)
    with pytest.raises(UserError, match="was trained with tokenizer"):
        warm_start(place, open_source, config.model, layout, trainer, load_tokenizer.__name__)
