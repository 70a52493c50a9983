"""GGUF files: the same models as of their published folders; refused where they are not right."""

from __future__ import annotations

import json
import os
import struct
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import published
import pytest
import safetensors.numpy

from maxlm import convert, generate, shapes
from maxlm.config import GroupedQuery, Llama3RopeScaling, LongRopeScaling, Rope, UserError
from maxlm.data.tokenizers import load_tokenizer
from maxlm.hub import gguf_tokenizer
from maxlm.hub.folder import open_folder
from maxlm.hub.gguf_file import GgufFile
from maxlm.hub.gguf_weights import ARCHITECTURES, open_weights
from maxlm.hub.models import KINDS, load_model
from maxlm.hub.tensor_files import SINGLE
from maxlm.hub.weights import PublishedWeights
from maxlm.inference.load import load_run
from maxlm.recipes.starting import open_source

MODELS = {
    name: {key: value for key, value in published.MODELS[name].items() if key != "router_aux_loss_coef"}  # is not said
    for name in (
        "llama", "llama 3.1", "llama, biases, tied", "llama, yarn", "llama, linear", "mistral", "mixtral", "qwen2",
        "qwen3", "phi3", "olmo2", "gemma", "gemma2", "gemma3_text", "gpt2", "starcoder2", "qwen3_moe",
    )
}  # fmt: skip
MODELS["qwen3_moe"]["mlp_only_layers"] = []  # llama.cpp knows no others
LOUD = ("llama 3.1", "mixtral", "phi3", "gemma2", "gpt2")
"""Whose logits are asked for too; where config and arrays are the same, so are they."""


def both(name: str, tmp_path: Path, kind: str = "F32", **more: Any) -> tuple[Path, Path]:
    """A folder and a file of one model."""
    published.write_model(MODELS[name], tmp_path / "hf")
    llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", kind, **more)
    return tmp_path / "hf", tmp_path / "model.gguf"


def opened(path: Path) -> PublishedWeights:
    return KINDS["gguf"](path).weights


# --- What they are ---


@pytest.mark.parametrize("name", MODELS)
def test_a_file_is_the_model_of_its_folder(name: str, tmp_path: Path) -> None:
    folder, path = both(name, tmp_path)
    theirs, ours = open_folder(folder), opened(path)
    assert ours.model == theirs.model and ours.family is theirs.family and ours.dtype == np.float32
    for array in shapes.arrays(ours.model):
        wanted, found = theirs.array(array.name), ours.array(array.name)
        if name.startswith("gemma"):  # 1 was added to its norms, and is taken away again
            np.testing.assert_allclose(found, wanted, atol=3e-7)
        else:
            np.testing.assert_array_equal(found, wanted)
    if name in LOUD:
        model, config = load_model(path)
        assert config == ours.model
        np.testing.assert_allclose(model(published.ids()), published.logits(name), atol=1e-4)


def test_every_architecture_is_tried() -> None:
    tried = {llama_cpp.ARCHITECTURES.get(kind, kind) for kind in (one["model_type"] for one in MODELS.values())}
    assert tried == set(ARCHITECTURES)


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"])
def test_numbers_in_few_bits(kind: str, tmp_path: Path) -> None:
    published.write_model(MODELS["llama"], tmp_path / "hf")
    tensors = llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", kind)
    file, form = GgufFile(tmp_path / "model.gguf"), gguf.GGMLQuantizationType[kind]
    read = {entry.dtype for entry in file.entries.values()}
    assert read == {"F32", kind}  # rows of 48 are not whole blocks of 32
    for name, entry in file.entries.items():
        wanted = tensors[name]
        if entry.dtype != "F32":
            wanted = gguf.quants.dequantize(gguf.quants.quantize(wanted, form), form)
        np.testing.assert_array_equal(file.read(name), wanted)
    wanted_dtype = {"F16": "float16", "BF16": "bfloat16"}.get(kind, "float32")
    assert open_weights(file).dtype.name == wanted_dtype


@pytest.mark.parametrize("kind", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_XS", "IQ2_S", "MXFP4"])
def test_formats_that_can_only_be_read(kind: str, tmp_path: Path) -> None:
    """Of bytes drawn so that no float16 among them is large."""
    form = gguf.GGMLQuantizationType[kind]
    block, n_bytes = gguf.GGML_QUANT_SIZES[form]
    raw = np.random.default_rng(0).integers(0, 0x40, (3, 512 // block * n_bytes), np.uint8)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "llama")
    writer.add_tensor("token_embd.weight", raw, raw_dtype=form)
    llama_cpp.finish(writer)
    file = GgufFile(tmp_path / "model.gguf")
    assert file.entries["token_embd.weight"].shape == (3, 512)
    np.testing.assert_array_equal(file.read("token_embd.weight"), gguf.dequantize(raw, form))


def test_eight_bits_by_hand(tmp_path: Path) -> None:
    """Q8_0: blocks of a float16 factor and 32 signed bytes."""
    published.write_model(MODELS["llama"], tmp_path / "hf")
    tensors = llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", "Q8_0")
    file = GgufFile(tmp_path / "model.gguf")
    raw = file.bytes_of("token_embd.weight").reshape(-1, 34)
    factors = raw[:, :2].copy().view(np.float16).astype(np.float32)
    values = (factors * raw[:, 2:].view(np.int8)).reshape(published.V, 32)
    np.testing.assert_array_equal(file.read("token_embd.weight"), values)
    np.testing.assert_allclose(values, tensors["token_embd.weight"], atol=0.01)


def test_the_package_reads_the_same(tmp_path: Path) -> None:
    """Its own reader, which holds no length against the file."""
    _, path = both("mixtral", tmp_path, "Q8_0")
    file, reader = GgufFile(path), gguf.GGUFReader(path)
    assert [one.name for one in reader.tensors] == list(file.entries)
    for one in reader.tensors:
        np.testing.assert_array_equal(file.bytes_of(one.name), one.data.view(np.uint8).ravel())
    for key, value in file.metadata.items():
        assert reader.fields[key].contents() == (pytest.approx(value, rel=1e-6) if type(value) is float else value)


def rope_of(path: Path) -> Rope:
    attention = opened(path).model.blocks[0].attention
    assert isinstance(attention, GroupedQuery) and isinstance(attention.position, Rope)
    return attention.position


@pytest.mark.parametrize(
    ("factor", "original", "theta"), [(8.0, 8192, 5e5), (32.0, 8192, 5e5), (4.0, 2000, 1e4)]
)  # fmt: skip
def test_scaling_of_llama_3_is_found_in_its_factors(factor: float, original: int, theta: float, tmp_path: Path) -> None:
    said = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "factor": factor}
    said["original_max_position_embeddings"] = original
    config = MODELS["llama"] | {"head_dim": 64, "rope_theta": theta}
    published.write_model(config, tmp_path / "hf")
    factors = llama_cpp.llama3_factors(said, theta, 64)

    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["rope_freqs.weight"] = factors

    llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", change=change)
    scaling = Llama3RopeScaling(factor=factor, low_freq_factor=1.0, high_freq_factor=4.0, original_max_len=original)
    assert rope_of(tmp_path / "model.gguf").scaling == scaling
    factors = np.linspace(1, 3, 32, dtype=np.float32) ** 2
    llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", change=change)
    other = rope_of(tmp_path / "model.gguf").scaling
    assert isinstance(other, LongRopeScaling) and other.attention_factor == 1.0
    np.testing.assert_array_equal(np.float32(other.long_factors), factors)


def test_an_output_table_that_is_the_embedding_table(tmp_path: Path) -> None:
    """The converter of GPT-2 wrote it twice."""

    def twice(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"].copy()

    def another(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["output.weight"] = tensors["token_embd.weight"] + np.float32(1)

    assert opened(both("gpt2", tmp_path, change=twice)[1]).model.tied
    assert not opened(both("gpt2", tmp_path, change=another)[1]).model.tied


def test_gemma_scales_by_the_size_of_a_head(tmp_path: Path) -> None:
    published.write_model(MODELS["gemma2"], tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    del config["query_pre_attn_scalar"]
    (tmp_path / "hf/config.json").write_text(json.dumps(config))
    llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf")
    attention = opened(tmp_path / "model.gguf").model.blocks[0].attention
    assert isinstance(attention, GroupedQuery) and attention.scale == 16**-0.5


@pytest.mark.parametrize("pattern", [2, [1, 0, 1, 0]])
def test_windows_every_so_many_layers(pattern: int | list[int], tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        del writer.kv_data[0]["gemma3.attention.sliding_window_pattern"]
        writer.add_sliding_window_pattern(pattern)

    folder, path = both("gemma3_text", tmp_path, change=change)
    assert opened(path).model == open_folder(folder).model


# --- The commands ---


@pytest.fixture
def talking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A file with a tokenizer."""
    monkeypatch.setattr("maxlm.compile_cache.enable_compilation_cache", lambda: None)
    tokens = [*(chr(33 + i) for i in range(published.V - 3)), '!"', "<s>", "</s>"]

    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre("gpt-2")
        writer.add_token_list(tokens)
        writer.add_token_types([1] * (published.V - 2) + [3, 3])
        writer.add_token_merges(['! "'])
        writer.add_bos_token_id(published.V - 2)
        writer.add_eos_token_id(published.V - 1)
        writer.add_add_bos_token(True)
        writer.add_chat_template("{{ messages }}")

    return both("llama", tmp_path, change=change)[1]


def run(*words: str) -> None:
    convert.main([word for pair in zip(("--from", "--to"), words[:2], strict=True) for word in pair] + list(words[2:]))


def test_to_a_folder_and_to_a_run(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = talking.parent
    run(f"gguf:{talking}", f"hf:{place}/copy")
    run(f"gguf:{talking}", f"run:{place}/run")
    run(f"run:{place}/run", f"hf:{place}/back")
    said = [line for line in capsys.readouterr().out.splitlines() if "parameters, SHA-256" in line]
    assert len(said) == 3 and len(set(said)) == 1
    there, back = (safetensors.numpy.load_file(place / name / SINGLE) for name in ("hf", "back"))
    assert there.keys() == back.keys() and all((there[key] == back[key]).all() for key in there)
    model, _ = load_model(place / "copy")
    np.testing.assert_allclose(model(published.ids()), published.logits("llama"), atol=1e-4)
    ids = gguf_tokenizer.find_tokenizer(GgufFile(talking))
    assert ids is not None and ids.prompt_ids('A!"') == [published.V - 2, 32, published.V - 3]
    assert load_run(place / "run").tokenizer.fingerprint == ids.fingerprint
    assert load_tokenizer(place / "run/tokenizer").eos_id == published.V - 1
    chat, of_run = gguf_tokenizer.find_chat(GgufFile(talking)), load_run(place / "run").chat
    assert chat is not None and of_run is not None
    assert chat.sources == of_run.sources == {"default": "{{ messages }}"}
    assert chat.tokens == of_run.tokens == {"bos_token": "<s>", "eos_token": "</s>"}
    for name in ("copy", "back", "run/published"):
        assert (place / name / "chat_template.jinja").read_text() == "{{ messages }}"
        assert json.loads((place / name / "tokenizer_config.json").read_text())["eos_token"] == "</s>"
    assert not list(place.glob("*.partial"))


def test_text_of_a_file(talking: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--prompt", "ABC", "--max_new_tokens", "1", "--temperature", "0", "--json"]
    generate.main(["--gguf", str(talking), *words])
    model, _ = load_model(talking.parent / "hf")
    likeliest = int(np.asarray(model([[published.V - 2, 32, 33, 34]]))[0, -1].argmax())
    assert json.loads(capsys.readouterr().out)["tokens"] == [likeliest]
    with pytest.raises(UserError, match="--step 1 is of a training run"):
        generate.main(["--gguf", str(talking), "--step", "1"])


def test_training_may_begin_from_a_file(talking: Path) -> None:
    source = open_source(f"gguf:{talking}")
    assert source.model == opened(talking).model


# --- What is refused ---


def refuse(path: Path, match: str) -> None:
    """By a line that names the file, before anything is written."""
    with pytest.raises(UserError, match=match) as caught:
        run(f"gguf:{path}", f"hf:{path.parent}/out")
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)
    assert not list(path.parent.glob("out*"))


def header(*parts: bytes, tensors: int = 0, values: int = 0) -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, values) + b"".join(parts) + bytes(64)


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value)) + value.encode()


HUGE = 1 << 60
KEY = text("a.key")


@pytest.mark.parametrize(
    ("content", "match"),
    [
        (b"", r"no GGUF file \(it is empty\)"),
        (b"GG", r"no GGUF file \(it begins with b'GG', not b'GGUF'\); name one"),
        (b"GGML" + header()[4:], r"it begins with b'GGML'"),
        (b"GGUF\1\0\0\0" + header()[8:], r"GGUF version 1 is not supported; must be 2 or 3"),
        (b"GGUF\0\0\0\3" + header()[8:], r"GGUF version \d+, or big-endian, is not supported"),
        (header()[:12], r"the number of tensors has 8 bytes, 4 are left\); download it again"),
        (header(tensors=HUGE), r"it says that it has 1,152,921,504,606,846,976 tensors, in 64 bytes"),
        (header(values=HUGE), r"it says that it has 1,152,921,504,606,846,976 values, in 64 bytes"),
        (header(struct.pack("<Q", HUGE), values=1), r"a key has 1,152,.* bytes"),
        (header(struct.pack("<Q", 2), b"\xff\xfe", values=1), "a key is not UTF-8"),
        (header(KEY, struct.pack("<IIQ", 9, 0, HUGE), values=1), r"a\.key has 1,152,.* bytes, 64 are left"),
        (header(KEY, struct.pack("<IIQ", 9, 8, HUGE), values=1), r"a\.key has 1,152,.* strings, 64 bytes are left"),
        (header(KEY, struct.pack("<IIQ", 9, 9, 1), values=1), r"a\.key is a list of the kind 9"),
        (header(KEY, struct.pack("<I", 77), values=1), r"a\.key is of the kind 77"),
        (header(*[KEY, struct.pack("<IB", 0, 1)] * 2, values=2), r"the key 'a\.key' stands twice"),
        (header(KEY, struct.pack("<I", 77), tensors=1), r"a\.key has 77 dims, may have 1 to 4"),
        (header(KEY, struct.pack("<IQ", 1, 0), tensors=1), r"a\.key has the dims \[0\]"),
        (header(KEY, struct.pack("<IQIQ", 1, HUGE, 0, 0), tensors=1), r"a\.key ends at byte 4,611,.*, the file at "),
        (header(KEY, struct.pack("<IQIQ", 1, 8, 0, HUGE), tensors=1), r"a\.key ends at byte 1,152,.*, the file at "),
        (header(KEY, struct.pack("<IQIQ", 1, 8, 0, 8), tensors=1), r"a\.key lies at \d+, no multiple of 32"),
        (header(KEY, struct.pack("<IQIQ", 1, 8, 8, 0), tensors=1), r"a\.key has rows of 8, Q8_0 has blocks of 32"),
        (header(KEY, struct.pack("<IQIQ", 1, 8, 999, 0), tensors=1), r"a\.key is in the format 999, which"),
        (header(KEY, struct.pack("<IQIQ", 1, 8, 24, 0), tensors=1), r"a\.key is in I8, which the package gguf cannot"),
        (header(*[KEY, struct.pack("<IQIQ", 1, 4, 0, 0)] * 2, tensors=2), r"the tensor 'a\.key' stands twice"),
        (header(text("split.count"), struct.pack("<IH", 2, 3), values=1), r"is one of 3 parts of a model; join them"),
        (header(text("general.alignment"), struct.pack("<II", 4, 0), values=1), "alignment = 0 must be a power of 2"),
        (header(), r"general\.architecture = None is not supported; it may be llama, "),
    ],
)  # fmt: skip
def test_files_that_are_not_right(content: bytes, match: str, tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(content)
    refuse(tmp_path / "model.gguf", match)


def test_files_that_are_cut_short_or_none(tmp_path: Path) -> None:
    _, path = both("llama", tmp_path)
    whole = path.read_bytes()
    for length in (*range(0, 2000, 90), len(whole) // 2, len(whole) - 100):
        path.write_bytes(whole[:length])
        refuse(path, "no whole GGUF file|it is empty")
    refuse(tmp_path, "is a folder, must be a GGUF file; name the file in it")
    refuse(tmp_path / "none.gguf", r"cannot be read \(No such file or directory\); name a GGUF file")
    os.mkfifo(tmp_path / "pipe")
    refuse(tmp_path / "pipe", "is a named pipe, must be a GGUF file")


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"llama.block_count": 10**9}, r"llama\.block_count = 1,000,000,000 must be at most 30, for the tensors"),
        ({"llama.expert_count": 2**31 - 1}, r"llama\.expert_count = 2,147,483,647 must be at most 4,096"),
        ({"llama.attention.head_count": 0}, r"attention\.head_count = 0 must be "),
        ({"llama.attention.head_count": "many"}, r"attention\.head_count = 'many' must be a whole number"),
        ({"llama.attention.head_count": [4, 4, 4]}, r"attention\.head_count = \[4, 4, 4\] must be a whole number"),
        ({"llama.attention.value_length": 4}, r"attention\.value_length = 4 is not supported"),
        ({"llama.context_length": ...}, r"llama: has no context_length; take another GGUF file"),
        ({"llama.rope.scaling.type": "spiral", "llama.rope.scaling.factor": 2.0}, "rope_type = 'spiral' is not"),
        ({"llama.logit_scale": 2.0}, r"logit_scale = 2\.0 is not supported \(logits are not scaled\); must be 1\.0"),
        ({"general.architecture": "lama"}, r"architecture = 'lama' is not supported; it may be llama, qwen2, "),
    ],
)
def test_metadata_that_is_not_right(values: dict[str, Any], match: str, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        for key, value in values.items():
            writer.kv_data[0].pop(key, None)
            if isinstance(value, list):
                writer.add_array(key, value)
            elif value is not ...:
                {int: writer.add_uint32, float: writer.add_float32, str: writer.add_string}[type(value)](key, value)

    refuse(both("llama", tmp_path, change=change)[1], match)


def test_tensors_that_are_not_right(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        del tensors["blk.1.attn_q.weight"]
        tensors["blk.0.more.weight"] = np.ones(4, np.float32)
        tensors["blk.2.ffn_up.weight"] = np.ones((40, 32), np.float32)

    with pytest.raises(UserError) as caught:
        opened(both("llama", tmp_path, change=change)[1])
    assert str(caught.value).splitlines()[1:] == [
        "blk.1.attn_q.weight is missing",
        "blk.2.ffn_up.weight has the shape [40, 32], its metadata says [48, 32]",
        "blk.0.more.weight is not expected",
    ]


@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_numbers_that_are_not_finite(kind: str, tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        tensors["blk.1.attn_v.weight"][3, 5] = np.nan

    refuse(both("llama", tmp_path, kind, change=change)[1], r"attn_v\.weight holds numbers that are not finite")
