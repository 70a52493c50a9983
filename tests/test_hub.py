"""Published models: read as transformers reads them, written without loss, refused where they are not right."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import published
import pytest
import safetensors.numpy
from helpers import plainly

from maxlm import shapes
from maxlm.config import Experts, Rope, ScalarHead, ShardingConfig, TopKRouter, UserError, YarnScaling
from maxlm.hub.families import FAMILIES
from maxlm.hub.folder import family_of
from maxlm.hub.models import load_model, save_model
from maxlm.hub.names import Heads, Piece, Rows, Tensor, Transposed
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import INDEX, SINGLE, Spec, write_tensors
from maxlm.inference.steps import decode_logits, prefill_logits
from maxlm.models import bind


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    published.write_model(published.MODELS["llama"], tmp_path / "llama")
    return tmp_path / "llama"


def change(folder: Path, **values: Any) -> None:
    """Keys of config.json; ...: taken away."""
    file = folder / "config.json"
    config = json.loads(file.read_text()) | values
    file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))


def change_tensors(folder: Path, **values: Any) -> None:
    """As above, of the tensors."""
    found = safetensors.numpy.load_file(folder / SINGLE) | values
    safetensors.numpy.save_file({key: value for key, value in found.items() if value is not ...}, folder / SINGLE)


# --- What they compute ---


@pytest.mark.parametrize("name", published.MODELS)
def test_logits_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    published.write_model(published.MODELS[name], tmp_path)
    model, config = load_model(tmp_path)
    assert config == model.config
    np.testing.assert_allclose(model(published.ids()), published.logits(name), atol=2e-5)


def test_a_mesh_reads_its_parts_alone_and_computes_the_same(tmp_path: Path) -> None:
    published.write_model(published.MODELS["qwen3_moe"], tmp_path)
    model, _ = load_model(tmp_path, sharding=ShardingConfig(data=1, fsdp=2, tensor=2))
    shard = model.parameters["blocks"]["0"]["attention"]["q_proj"].addressable_shards[0].data
    assert shard.size < model.parameters["blocks"]["0"]["attention"]["q_proj"].size
    np.testing.assert_allclose(model(published.ids()), published.logits("qwen3_moe"), atol=2e-5)


def test_both_spellings_of_a_config_are_one_model() -> None:
    old = published.MODELS["llama 3.1"]
    new = {key: value for key, value in old.items() if key not in ("rope_theta", "rope_scaling")}
    new["rope_parameters"] = old["rope_scaling"] | {"rope_theta": old["rope_theta"]}
    assert FAMILIES["llama"].read(Published(old, "")) == FAMILIES["llama"].read(Published(new, ""))


def test_the_balancing_loss_keeps_its_meaning() -> None:
    """transformers: all layers pooled, times top_k; its loss is top_k where experts are used evenly, ours the sum over
    layers of losses of 1."""
    model = FAMILIES["mixtral"].read(Published(published.MODELS["mixtral"], ""))
    mlp = model.blocks[0].mlp
    assert isinstance(mlp, Experts) and isinstance(mlp.router, TopKRouter)
    coefficient, top_k = 0.02, 2
    assert mlp.router.load_balance * model.n_layers == pytest.approx(coefficient * top_k)


# --- What is written ---


@pytest.mark.parametrize("name", published.MODELS)
def test_there_and_back_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    published.write_model(published.MODELS[name], tmp_path / "in")
    model, config = load_model(tmp_path / "in")
    save_model(model, tmp_path / "out")
    again, config_again = load_model(tmp_path / "out")
    assert config_again == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.parameters, again.parameters))
    before, after = (safetensors.numpy.load_file(tmp_path / place / SINGLE) for place in ("in", "out"))
    written = json.loads((tmp_path / "out/config.json").read_text())["model_type"]
    if written == published.MODELS[name]["model_type"]:
        assert before.keys() == after.keys() and all((before[key] == after[key]).all() for key in before)
    else:  # another family can say all of it too
        assert name in ("falcon, in sequence", "glm")


def test_sixteen_bits_survive(folder: Path, tmp_path: Path) -> None:
    there = safetensors.numpy.load_file(folder / SINGLE)
    halves = {key: value.astype(ml_dtypes.bfloat16) for key, value in there.items()}
    write_tensors(folder, {key: Spec(value.shape, value.dtype) for key, value in halves.items()}, halves.values())
    save_model(load_model(folder)[0], tmp_path / "out", "bfloat16")
    with safetensors.safe_open(tmp_path / "out" / SINGLE, "np") as file:
        for key, value in halves.items():
            assert file.get_tensor(key).tobytes() == value.tobytes()


def test_several_files_have_an_index_that_is_read(tmp_path: Path) -> None:
    values = {f"t{i}": np.full((2, 3), i, np.float32) for i in range(5)}
    specs = {key: Spec(value.shape, value.dtype) for key, value in values.items()}
    write_tensors(tmp_path, specs, values.values(), shard_bytes=40)
    index = json.loads((tmp_path / INDEX).read_text())
    assert len(set(index["weight_map"].values())) == 3 and index["metadata"]["total_size"] == 5 * 24
    for key, name in index["weight_map"].items():
        np.testing.assert_array_equal(safetensors.numpy.load_file(tmp_path / name)[key], values[key])


def test_what_no_family_can_say_is_not_written(folder: Path, tmp_path: Path) -> None:
    model, config = load_model(folder)
    with pytest.raises(UserError, match=r"none of the families llama, .* can say all of it"):
        family_of(dataclasses.replace(config, head=ScalarHead()))
    several_kinds = FAMILIES["gemma2"].read(Published(published.MODELS["gemma2"], ""))
    with pytest.raises(UserError, match=r"none of the families"):
        family_of(dataclasses.replace(several_kinds, embedding_norm=True))
    with pytest.raises(UserError, match="is there already; name a new folder"):
        save_model(model, folder)
    assert not list(tmp_path.glob("*.partial"))


# --- How arrays lie in tensors ---


def test_heads_by_group_and_inputs_first() -> None:
    """As GPT-NeoX and GPT-2 have them, by loops."""
    model = FAMILIES["llama"].read(Published(published.MODELS["llama"], ""))
    ours = {array.name: array for array in shapes.arrays(model)}
    q, k, v = (f"blocks/0/attention/{name}_proj" for name in "qkv")
    layouts = {"grouped": Heads(q, k, v), "rows": Rows(q, k, v), "turned": Transposed("blocks/0/mlp/up_proj")}
    found = {
        name: Tensor(name, layout, tuple(Piece(ours[part], (1,)) for part in layout.parts))
        for name, layout in layouts.items()
    }
    rng = np.random.default_rng(0)
    D, N, K, H = 32, 4, 2, 8
    pieces = [rng.standard_normal((D, heads, H)) for heads in (N, K, K)]
    by_loops = []
    for group in range(K):
        for heads, per_group in zip(pieces, (N // K, 1, 1), strict=True):
            for head in range(group * per_group, (group + 1) * per_group):
                by_loops += [heads[:, head, i] for i in range(H)]
    joined = found["grouped"].join(pieces)
    np.testing.assert_array_equal(joined, by_loops)
    assert joined.shape == found["grouped"].shape
    rows = found["rows"].join(pieces)
    np.testing.assert_array_equal(rows, np.concatenate([piece.reshape(D, -1).T for piece in pieces]))
    for tensor, values in (("grouped", joined), ("rows", rows)):
        for piece, back in zip(pieces, found[tensor].split(values), strict=True):
            np.testing.assert_array_equal(piece, back)
    up = rng.standard_normal((D, 48))
    np.testing.assert_array_equal(found["turned"].join([up]), up)
    assert found["turned"].shape == (D, 48)


def test_experts_one_after_another_and_their_gates_in_turn(tmp_path: Path) -> None:
    """As modeling_gpt_oss.py reads them: gate_up[..., ::2] and gate_up[..., 1::2], inputs first."""
    published.write_model(published.MODELS["gpt_oss"], tmp_path)
    files = safetensors.numpy.load_file(tmp_path / SINGLE)
    model, config = load_model(tmp_path)
    (D, F), E = (32, 64), 4
    assert len(config.blocks) == 2 and config.blocks[0].attention.window == 5 and not config.blocks[1].attention.window
    for number in range(config.n_layers):
        mlp = model.parameters["blocks"][str(number % 2)]["mlp"]
        theirs = {key: files[f"model.layers.{number}.mlp.experts.{key}"] for key in ("gate_up_proj", "down_proj")}
        biases = {key: files[f"model.layers.{number}.mlp.experts.{key}_bias"] for key in theirs}
        ours = {key: np.asarray(value[number // 2]) for key, value in mlp.items()}
        assert theirs["gate_up_proj"].shape == (E, D, 2 * F)
        for e, f in np.ndindex(E, F):
            np.testing.assert_array_equal(ours["gate_proj"][e, :, f], theirs["gate_up_proj"][e, :, 2 * f])
            np.testing.assert_array_equal(ours["up_proj"][e, :, f], theirs["gate_up_proj"][e, :, 2 * f + 1])
            assert ours["gate_bias"][e, f] == biases["gate_up_proj"][e, 2 * f]
            assert ours["up_bias"][e, f] == biases["gate_up_proj"][e, 2 * f + 1]
        np.testing.assert_array_equal(ours["down_proj"], theirs["down_proj"])
        np.testing.assert_array_equal(ours["down_bias"], biases["down_proj"])


def test_gpt_oss_decodes_as_it_reads(tmp_path: Path) -> None:
    """Over the edge of the window, with sinks."""
    published.write_model(published.MODELS["gpt_oss"], tmp_path)
    loaded, config = load_model(tmp_path)
    model, how, ids = bind(config, loaded.parameters), plainly(), published.ids()
    read = jax.jit(lambda model: prefill_logits(model, how, ids[:, :4], np.array([4, 4]), published.T))
    step = jax.jit(lambda model, *arguments: decode_logits(model, how, *arguments))
    logits, cache = read(model)
    for t in range(4, published.T + 1):
        np.testing.assert_allclose(logits, published.logits("gpt_oss")[:, t - 1], atol=2e-5)
        if t < published.T:
            logits, cache = step(model, ids[:, t], np.full(2, t, np.int32), cache)


def test_what_gpt_oss_means_where_nothing_is_said() -> None:
    """The defaults of configuration_gpt_oss.py."""
    bare = {key: value for key, value in published.MODELS["gpt_oss"].items() if not key.startswith("rope_")}
    model = FAMILIES["gpt_oss"].read(Published(bare | {"sliding_window": None}, "config.json"))
    assert [block.attention.window for block in model.layers] == [128, None] * 2
    rope = model.blocks[0].attention.position
    assert isinstance(rope, Rope) and rope.theta == 150_000.0
    assert rope.scaling == YarnScaling(factor=32.0, original_max_len=4096, truncate=False)
    with pytest.raises(UserError, match=r"config.json: layer_types must have .* for each of the 4 layers"):
        FAMILIES["gpt_oss"].read(Published(bare | {"layer_types": ["full_attention"] * 3}, "config.json"))


# --- What is refused ---


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"model_type": "lama"}, r"model_type = 'lama' is not supported; the nearest that is: 'llama'"),
        ({"model_type": ...}, r"config.json: has no model_type"),
        ({"hidden_size": "32"}, r"config.json: hidden_size = '32' must be a whole number"),
        ({"num_hidden_layers": 10**400}, r"num_hidden_layers is an integer of 401 digits"),
        ({"hidden_act": "sine"}, r"hidden_act = 'sine' is not supported; it may be gelu, .*silu"),
        ({"rope_scaling": {"rope_type": "spiral"}}, r"rope_type = 'spiral' is not supported; it may be "),
        ({"rms_norm_eps": -1}, r"rms_norm_eps = -1 must"),
        ({"num_hidden_layers": 2}, r"model.layers.2.input_layernorm.weight is not expected"),
        ({"num_hidden_layers": 4}, r"model.layers.3.input_layernorm.weight is missing\n(.*\n){4}\.\.\. and 4 more"),
        ({"intermediate_size": 40}, r"mlp.gate_proj.weight has the shape \[48, 32\], config.json says \[40, 32\]"),
    ],
)  # fmt: skip
def test_a_config_that_is_not_right(values: dict[str, Any], match: str, folder: Path) -> None:
    change(folder, **values)
    with pytest.raises(UserError, match=match):
        load_model(folder)


def test_tensors_that_are_not_right(folder: Path, tmp_path: Path) -> None:
    spoiled = np.ones(32, np.float32)
    spoiled[3] = np.nan
    change_tensors(folder, **{"model.norm.weight": spoiled})
    with pytest.raises(UserError, match=r"model.safetensors: model.norm.weight holds numbers that are not finite"):
        load_model(folder)
    change_tensors(folder, **{"model.norm.weight": np.ones(32, np.int32)})
    with pytest.raises(UserError, match=r"model.norm.weight is in I32; must be one of F32, F16, BF16, F64"):
        load_model(folder)
    change_tensors(folder, **{"model.norm.weight": ...})
    with pytest.raises(UserError, match=r"model.norm.weight is missing"):
        load_model(folder)


def test_files_that_are_not_right(folder: Path) -> None:
    whole = (folder / SINGLE).read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    header["model.norm.weight"]["data_offsets"] = header["lm_head.weight"]["data_offsets"]
    overlapping = json.dumps(header).encode()
    overlapping = len(overlapping).to_bytes(8, "little") + overlapping + whole[8 + length :]
    for content in (whole[:-100], whole[:5], b"", (2**60).to_bytes(8, "little") + whole[8:], overlapping):
        (folder / SINGLE).write_bytes(content)
        with pytest.raises(UserError, match=r"model.safetensors: no safetensors file \(.*\); download it again"):
            load_model(folder)
    (folder / SINGLE).unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04")
    with pytest.raises(UserError, match=r"pytorch_model.bin: pickled weights .* are refused; take"):
        load_model(folder)
    shutil.rmtree(folder)
    with pytest.raises(UserError, match="no such folder; name that of a downloaded model"):
        load_model(folder)


@pytest.mark.parametrize("name", ["../llama/model.safetensors", "/etc/passwd", "a/b.safetensors", "", 5, ".hidden"])
def test_an_index_leads_nowhere_else(name: Any, folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": name}}))
    with pytest.raises(UserError, match=r"weight_map.lm_head.weight = .* must be the name of a file in this folder"):
        load_model(folder)


def test_an_index_of_files_that_lack_something(folder: Path) -> None:
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": SINGLE, "more": SINGLE}}))
    with pytest.raises(UserError, match=f"lacks more, which {INDEX} says it has"):
        load_model(folder)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"lm_head.weight": "gone.safetensors"}}))
    with pytest.raises(UserError, match=r"gone\.safetensors: no safetensors file"):
        load_model(folder)


def test_an_output_table_beside_a_tied_one(tmp_path: Path) -> None:
    """Old exports have it twice; another one is another model."""
    published.write_model(published.MODELS["llama, biases, tied"], tmp_path)
    table = safetensors.numpy.load_file(tmp_path / SINGLE)["model.embed_tokens.weight"]
    change_tensors(tmp_path, **{"lm_head.weight": table})
    load_model(tmp_path)
    change_tensors(tmp_path, **{"lm_head.weight": table + np.float32(1)})
    with pytest.raises(UserError, match=r"lm_head\.weight is not expected"):
        load_model(tmp_path)
