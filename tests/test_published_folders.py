"""Folders of published models as users have them: with ends of their own, in the way of others, or damaged."""

from __future__ import annotations

import json
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import published
import pytest
import safetensors.numpy
from run_folder import make_run
from tokenizers import AddedToken, Tokenizer, models, processors

from maxlm import convert, generate
from maxlm.config import SamplingConfig, UserError
from maxlm.data.chat import find_chat_template, save_chat_template
from maxlm.data.chat_templates import choose_template
from maxlm.data.text_ends import TextEnds, published_ends
from maxlm.data.tokenizers import load_tokenizer
from maxlm.hub.folder import appearing
from maxlm.hub.models import find_tokenizer, load_model, save_model
from maxlm.hub.tensor_files import SINGLE
from maxlm.hub.token_sets import TokenSet
from maxlm.inference.load import load_run
from maxlm.recipes.starting import open_source

V = published.V
UP = "model.layers.1.mlp.up_proj.weight"


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A LLaMA whose last tokens are `<s>`, `<|im_end|>`, `</s>`: the last is the end of a document."""
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    published.write_model(published.MODELS["llama"], tmp_path / "hf")
    special = ["<s>", "<|im_end|>", "</s>"]
    vocabulary = {chr(33 + i): i for i in range(V - 3)} | {name: V - 3 + i for i, name in enumerate(special)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.add_special_tokens(special)
    tokenizer.save(str(tmp_path / "hf/tokenizer.json"))
    return tmp_path / "hf"


def run(source: str | Path, target: str | Path, *more: str) -> None:
    convert.main(["--from", str(source), "--to", str(target), *more])


def say(folder: Path, name: str, **values: Any) -> None:
    """More values in a JSON file."""
    known = json.loads((folder / name).read_text()) if (folder / name).is_file() else {}
    (folder / name).write_text(json.dumps(known | values))


def said(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name).read_text())
    return found


def change(folder: Path, **tensors: np.ndarray) -> None:
    found = safetensors.numpy.load_file(folder / SINGLE) | tensors
    safetensors.numpy.save_file(found, folder / SINGLE, {"format": "pt"})


GENERATION, CONFIG, TOKENS = "generation_config.json", "config.json", "tokenizer_config.json"


@pytest.mark.parametrize(
    ("files", "first", "last"),
    [
        ({}, [], [V - 1]),
        ({GENERATION: {"eos_token_id": [7, V - 2]}}, [], [7, V - 2]),
        ({GENERATION: {"eos_token_id": 7}, CONFIG: {"eos_token_id": 8}}, [], [7]),
        ({CONFIG: {"eos_token_id": 8}, GENERATION: {"top_p": 0.8}}, [], [8]),
        ({TOKENS: {"eos_token": "<|im_end|>"}}, [], [V - 2]),
        ({GENERATION: {"eos_token_id": 7}, TOKENS: {"eos_token": {"content": "<|im_end|>"}}}, [], [7, V - 2]),
        ({TOKENS: {"add_bos_token": True, "bos_token": "<s>"}}, [V - 3], [V - 1]),
        ({TOKENS: {"add_bos_token": False, "bos_token": "<s>"}}, [], [V - 1]),
        ({TOKENS: {"bos_token": "<s>"}}, [], [V - 1]),
    ],
)
def test_ends_are_those_of_the_folder(files: dict[str, Any], first: list[int], last: list[int], folder: Path) -> None:
    """Of data, and of a fingerprint, they are not."""
    before = find_tokenizer(folder)
    assert before is not None and (before.bos_id, before.eos_id) == (V - 3, V - 1)
    for name, values in files.items():
        say(folder, name, **values)
    tokenizer = find_tokenizer(folder)
    assert tokenizer is not None and tokenizer.fingerprint == before.fingerprint
    assert published_ends(folder, tokenizer) == TextEnds(tuple(first), tuple(last))


def test_the_only_word_on_an_end_is_an_id(folder: Path) -> None:
    Tokenizer(models.BPE(vocab={chr(33 + i): i for i in range(V)}, merges=[])).save(str(folder / "tokenizer.json"))
    with pytest.raises(
        UserError, match=r"none of its tokens is known as the end .* or with eos_token in a tokenizer_c"
    ):
        find_tokenizer(folder)
    say(folder, CONFIG, eos_token_id=[7, 8])
    tokenizer = find_tokenizer(folder)
    assert tokenizer is not None and tokenizer.eos_id == 7
    tokenizer.save(folder.parent / "saved")
    assert load_tokenizer(folder.parent / "saved").eos_id == 7


def test_what_the_tokenizer_puts_before_a_text(folder: Path) -> None:
    place = str(folder / "tokenizer.json")
    model = Tokenizer.from_file(place)
    model.post_processor = processors.TemplateProcessing(
        single="<s> <|im_end|> $A </s>", special_tokens=[("<s>", V - 3), ("<|im_end|>", V - 2), ("</s>", V - 1)]
    )
    model.save(place)
    tokenizer = find_tokenizer(folder)
    assert tokenizer is not None
    ends = published_ends(folder, tokenizer)
    assert ends.prompt_ids(tokenizer, "#") == [V - 3, V - 2, 2]
    say(folder, TOKENS, add_bos_token=False)
    assert published_ends(folder, tokenizer).prompt_ids(tokenizer, "") == [V - 1]
    say(folder, GENERATION, eos_token_id=["x"])
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id = \['x'\] must be a whole number or"):
        published_ends(folder, tokenizer)


def test_a_text_stops_at_any_of_its_ends(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tokens(*words: str) -> list[int]:
        generate.main([*words, "--prompt", "abc", "--max_new_tokens", "6", "--temperature", "0", "--json"])
        found: list[int] = json.loads(capsys.readouterr().out)["tokens"]
        return found

    say(folder, TOKENS, add_bos_token=False)
    whole = tokens("--hf", str(folder))
    end = next(i for i in range(1, 6) if whole[i] not in whole[:i])
    say(folder, CONFIG, eos_token_id=[V - 1, whole[end]])
    say(folder, GENERATION, top_p=0.8)
    assert tokens("--hf", str(folder)) == whole[: end + 1]
    run(f"hf:{folder}", f"run:{folder.parent}/run")
    run(f"run:{folder.parent}/run", f"hf:{folder.parent}/back")
    for name in (CONFIG, GENERATION):
        assert said(folder.parent / "back", name)["eos_token_id"] == [V - 1, whole[end]]
    assert said(folder.parent / "back", GENERATION)["top_p"] == 0.8
    loaded = load_run(folder.parent / "run")
    assert loaded.ends == TextEnds((), (V - 1, whole[end]))
    first, second = loaded.generate(["abc", "AB"], max_new_tokens=6, sampling=SamplingConfig(temperature=0))
    assert first.tokens == whole[: end + 1] and whole[end] not in second.tokens[:-1]


def test_a_run_says_its_own_ends(folder: Path) -> None:
    run(f"hf:{folder}", f"run:{folder.parent}/run")
    for file in (folder.parent / "run/published").iterdir():
        file.unlink()
    (folder.parent / "run/published").rmdir()  # as of a run that was trained here
    run(f"run:{folder.parent}/run", f"hf:{folder.parent}/out")
    assert said(folder.parent / "out", GENERATION) == {"bos_token_id": V - 3, "eos_token_id": V - 1}
    assert open_source(f"run:{folder.parent}/run").model == open_source(f"hf:{folder}").model


def test_special_tokens_after_the_last_row(folder: Path) -> None:
    """As `<image_soft_token>` of a Gemma 3 for text."""
    place = str(folder / "tokenizer.json")
    for token in (AddedToken("<image>", special=True), AddedToken("<word>", special=False)):
        model = Tokenizer.from_file(place)
        model.add_tokens([token])
        model.save(place)
        words = ["--hf", str(folder), "--prompt", "a", "--max_new_tokens", "1", "--temperature", "0"]
        if token.special:
            generate.main(words)
            continue
        with pytest.raises(UserError, match=f"vocab_size = {V} is less than the tokenizer's {V + 2}"):
            generate.main(words)


@pytest.mark.parametrize(
    ("dtype", "value", "words", "match"),
    [
        (
            np.float32,
            65536.0,
            ("--dtype", "float16"),
            r"out: \S+up_proj\.weight holds 65536, more than float16 has room",
        ),
        (
            ml_dtypes.bfloat16,
            1e30,
            ("--dtype", "float16"),
            r"up_proj\.weight holds 1\S*e\+30, more than float16 has room",
        ),
        (np.float64, -1e300, (), r"up_proj\.weight holds 1e\+300, more than float32 has room for"),
    ],
)
def test_numbers_too_large_for_a_format(
    dtype: Any, value: float, words: tuple[str, ...], match: str, folder: Path
) -> None:
    table = safetensors.numpy.load_file(folder / SINGLE)[UP].astype(dtype)
    change(folder, **{UP: np.where(np.arange(table.size).reshape(table.shape) == 3, dtype(value), table)})
    with pytest.raises(UserError, match=match):
        run(f"hf:{folder}", f"hf:{folder.parent}/out", *words)
    assert [one.name for one in folder.parent.iterdir()] == ["hf"]


def test_nothing_of_others_is_removed(folder: Path) -> None:
    (folder.parent / "out.partial").mkdir()
    (folder.parent / "out.partial/mine").write_text("")
    with pytest.raises(
        UserError, match=r"out\.partial: is there already; remove it, if it is of a conversion that did"
    ):
        run(f"hf:{folder}", f"hf:{folder.parent}/out")
    assert (folder.parent / "out.partial/mine").exists()
    (folder.parent / "link").symlink_to(folder.parent / "nothing")
    (folder.parent / "file").write_text("")
    for name, match in (("link", "is there already"), ("file", "is there already"), ("file/x", "file is no folder")):
        with pytest.raises(UserError, match=match):
            run(f"hf:{folder}", f"hf:{folder.parent / name}")


def test_what_is_written_after_a_failure_is_removed(tmp_path: Path) -> None:
    """As tensorstore tries again after a full disk."""

    def later() -> None:
        time.sleep(0.1)
        (tmp_path / "out.partial/again").mkdir(parents=True)

    thread = threading.Thread(target=later)
    with pytest.raises(UserError, match="cannot be written"), appearing(tmp_path / "out", settle_s=0.5):
        thread.start()
        raise OSError(28, "No space left on device")
    thread.join()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"num_hidden_layers": 2_000_000_000}, r"config\.json: num_hidden_layers = 2000000000 must be at most 10,000"),
        ({"num_local_experts": 10**9}, r"config\.json: num_local_experts = 1000000000 must be at most 10,000"),
        ({"num_attention_heads": 64}, r"config\.json: model.*head_dim = 0 must be positive"),
        ({"rope_scaling": {"factor": 8.0}}, r"config\.json: rope_parameters: has a factor and no rope_type"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e6}}},
            r"rope_parameters\.full_attention = .* one RoPE",
        ),
        (
            {"tie_word_embeddings": True},
            r"lm_head\.weight is not expected, as config\.json ties it .* which it differs",
        ),
    ],
)
def test_configs_that_say_too_much(values: dict[str, Any], match: str, folder: Path) -> None:
    say(folder, CONFIG, **values)
    with pytest.raises(UserError, match=match):
        load_model(folder)


def test_a_missing_output_table(folder: Path) -> None:
    found = safetensors.numpy.load_file(folder / SINGLE)
    del found["lm_head.weight"]
    safetensors.numpy.save_file(found, folder / SINGLE)
    with pytest.raises(
        UserError, match=r"lm_head\.weight is missing; if it is .*, set tie_word_embeddings = true in c"
    ):
        load_model(folder)
    say(folder, CONFIG, tie_word_embeddings=True)
    load_model(folder)


@pytest.mark.parametrize("content", ["{", "[]", '{"model": null}', '{"model": {"type": "BPE", "vocab": {}}}'])
def test_definitions_that_are_none(content: str, tmp_path: Path) -> None:
    (tmp_path / "bad.json").write_text(content)
    with pytest.raises(UserError, match=r"bad\.json: no tokenizer\.json that the tokenizers library can read"):
        TokenSet.read(tmp_path / "bad.json")


def test_a_token_that_nothing_spells(folder: Path) -> None:
    """Its row is the mean of all."""
    more = folder.parent / "more.json"
    Tokenizer(models.BPE(vocab={"ä": 0, "</s>": 1}, merges=[])).save(str(more))
    run(f"hf:{folder}", f"hf:{folder.parent}/out", "--add_tokens_of", str(more))
    old, new = (
        safetensors.numpy.load_file(place / SINGLE)["lm_head.weight"] for place in (folder, more.with_name("out"))
    )
    np.testing.assert_array_equal(new[:V], old)
    np.testing.assert_array_equal(new[V], old.astype(np.float64).mean(0).astype(np.float32))


@pytest.mark.parametrize("values", [{"added_tokens_decoder": ["x"]}, {"added_tokens_decoder": {"x": {}}}])
def test_ids_that_are_none_while_they_move(values: dict[str, Any], folder: Path) -> None:
    say(folder, TOKENS, **values)
    (folder.parent / "texts").write_text("abc")
    with pytest.raises(UserError, match=r"hf/tokenizer_config\.json: its ids must be whole numbers"):
        run(f"hf:{folder}", f"hf:{folder.parent}/out", "--keep_tokens_of", f"{folder.parent}/texts")


def test_files_that_are_not_there(folder: Path) -> None:
    (folder / "chat_template.jinja").symlink_to(folder.parent / "blobs/gone")
    with pytest.raises(UserError, match=r"chat_template\.jinja: is a link to nothing; download it again"):
        run(f"hf:{folder}", f"hf:{folder.parent}/out")
    model, _ = load_model(folder)
    with pytest.raises(UserError, match=r"tokenizer = '\S+nowhere': has none of tokenizer\.json"):
        save_model(model, folder.parent / "out", tokenizer=folder.parent / "nowhere")
    assert [one.name for one in folder.parent.iterdir()] == ["hf"]


def test_texts_of_an_exported_run_begin_as_its_documents(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a run that was trained here: nothing else in the folder says so."""
    run(f"hf:{folder}", f"run:{tmp_path}/run")
    shutil.rmtree(tmp_path / "run/published")
    run(f"run:{tmp_path}/run", f"hf:{tmp_path}/back")
    assert said(tmp_path / "back", "tokenizer_config.json") == {
        "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>",
    }  # fmt: skip
    capsys.readouterr()
    for words in (("--run", f"{tmp_path}/run"), ("--hf", f"{tmp_path}/back")):
        generate.main([*words, "--prompt", "abc", "--temperature", "0", "--max_new_tokens", "8", "--json"])
    ours, exported = (json.loads(line)["tokens"] for line in capsys.readouterr().out.splitlines())
    assert exported == ours
    tokenizer = find_tokenizer(tmp_path / "back")
    assert published_ends(tmp_path / "back", tokenizer) == TextEnds.of_documents(tokenizer) == ((V - 3,), (V - 1,))
    assert tokenizer.fingerprint == load_tokenizer(tmp_path / "run/tokenizer").fingerprint


def test_an_exported_run_has_the_template_that_it_was_taught_with(folder: Path, tmp_path: Path) -> None:
    """And not the one that the first model came with."""
    say(folder, "tokenizer_config.json", chat_template="{{ messages[0].content }}", bos_token="<s>", eos_token="</s>")
    run(f"hf:{folder}", f"run:{tmp_path}/run")
    tokenizer = load_tokenizer(tmp_path / "run/tokenizer")
    template = choose_template("plain", tokenizer)
    save_chat_template(template, tmp_path / "run/chat", ends=[7, tokenizer.eos_id])
    run(f"run:{tmp_path}/run", f"run:{tmp_path}/again")
    run(f"run:{tmp_path}/again", f"hf:{tmp_path}/back")
    for place in ("again/published", "back"):
        found = find_chat_template(tmp_path / place)
        assert found is not None and found.sources == template.sources
        assert found.tokens["eos_token"] == template.tokens["eos_token"]
        assert "chat_template" not in said(tmp_path / place, "tokenizer_config.json")
        assert set(published_ends(tmp_path / place, tokenizer).last) == {7, tokenizer.eos_id}


def test_a_folder_without_a_tokenizer_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    make_run(tmp_path)
    run(f"run:{tmp_path}/run", f"hf:{tmp_path}/hf")
    assert "it has no tokenizer" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "hf").iterdir()} == {SINGLE, "config.json", "generation_config.json"}
