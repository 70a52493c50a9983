"""Families that come with code of their own, and PaLM: against forward passes in float64, written from what their
papers and their code say, on the tensors by their published names."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import published
import pytest
import safetensors.numpy
from helpers import FLOAT32, initial_parameters, one_device

from maxlm.config import DynamicNtkScaling, GroupedQuery, Rope, UserError, palm
from maxlm.hub import converting
from maxlm.hub.families import FAMILIES
from maxlm.hub.models import KINDS, load_model, save_model
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import SINGLE
from maxlm.inference.language_model import LanguageModel
from maxlm.models.positions import rope_angles
from maxlm.models.tokens import Tokens

V, D, N, H, F = 64, 48, 6, 8, 40
_QWEN: dict[str, Any] = {
    "model_type": "qwen",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "kv_channels": H,
    "intermediate_size": 2 * F,
    "layer_norm_epsilon": 1e-6,
    "seq_length": 16,
    "max_position_embeddings": 32,
    "use_dynamic_ntk": True,
    "use_logn_attn": True,
    "no_bias": True,
    "scale_attn_weights": True,
    "auto_map": {"AutoModelForCausalLM": "modeling.Nothing"},
}
_BAICHUAN: dict[str, Any] = {
    "model_type": "baichuan",
    "vocab_size": V,
    "hidden_size": D,
    "num_hidden_layers": 2,
    "num_attention_heads": N,
    "intermediate_size": F,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
}
_CHATGLM: dict[str, Any] = {
    "model_type": "chatglm",
    "padded_vocab_size": V,
    "hidden_size": D,
    "num_layers": 2,
    "num_attention_heads": N,
    "kv_channels": H,
    "multi_query_attention": True,
    "multi_query_group_num": 2,
    "ffn_hidden_size": F,
    "seq_length": 32,
    "layernorm_epsilon": 1e-5,
    "add_qkv_bias": True,
    "add_bias_linear": False,
    "rmsnorm": True,
    "post_layer_norm": True,
    "quantization_bit": 0,
    "pre_seq_len": None,
}
CONFIGS: dict[str, dict[str, Any]] = {
    "qwen": _QWEN,
    "qwen, 72B": _QWEN | {"use_dynamic_ntk": False, "use_logn_attn": False, "rotary_emb_base": 1e6},
    "qwen, biases": _QWEN | {"no_bias": False, "rotary_pct": 0.5, "use_dynamic_ntk": False, "seq_length": 4},
    "baichuan, 7B": _BAICHUAN | {"max_position_embeddings": 32},
    "baichuan, 13B": _BAICHUAN | {"model_max_length": 32},
    "baichuan 2, 7B": _BAICHUAN | {"max_position_embeddings": 32, "model_max_length": 32, "z_loss_weight": 0},
    "baichuan 2, 13B": _BAICHUAN | {"model_max_length": 32, "z_loss_weight": 0},
    "chatglm-6b": {
        "model_type": "chatglm",
        "vocab_size": V,
        "hidden_size": D,
        "num_layers": 3,
        "num_attention_heads": N,
        "inner_hidden_size": F,
        "max_sequence_length": 32,
        "layernorm_epsilon": 1e-5,
        "position_encoding_2d": True,
        "quantization_bit": 0,
        "pre_seq_len": None,
    },
    "chatglm2": _CHATGLM,
    "chatglm3, 32k": _CHATGLM | {"rope_ratio": 50},
    "chatglm, otherwise": _CHATGLM | {"rmsnorm": False, "add_bias_linear": True, "post_layer_norm": False},
}


# --- What their code computes, of one row ---

Tensors = Mapping[str, np.ndarray]


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + eps) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, eps: float) -> np.ndarray:
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * weight + bias


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def rotary(
    x: np.ndarray, base: float, dims: int, *, neighbours: bool, positions: Sequence[int] | None = None
) -> np.ndarray:
    """Complex numbers of two dims each, neighbours or half of `dims` apart, turn with the position: [T, heads, H]."""
    y = x.copy()
    for row, t in enumerate(range(len(x)) if positions is None else positions):
        for i in range(dims // 2):
            a, b = (2 * i, 2 * i + 1) if neighbours else (i, i + dims // 2)
            turned = (x[row, :, a] + 1j * x[row, :, b]) * np.exp(1j * t / base ** (2 * i / dims))
            y[row, :, a], y[row, :, b] = turned.real, turned.imag
    return y


def attend(
    q: np.ndarray,
    k: np.ndarray,
    v: np.ndarray,
    slopes: np.ndarray | None = None,
    seen: np.ndarray | None = None,
) -> np.ndarray:
    """q: [T, N, H], k and v: [T, K, H] -> [T, N H]. The slopes multiply the number of the key, as in BLOOM's code."""
    T, heads, size = q.shape
    k, v = (np.repeat(one, heads // k.shape[1], axis=1) for one in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / math.sqrt(size)
    if slopes is not None:
        scores = scores + slopes[:, None, None] * np.arange(T)
    seen = np.tril(np.ones((T, T))) if seen is None else seen
    weights = np.exp(scores - scores.max(-1, keepdims=True)) * seen
    return np.einsum("nts,snh->tnh", weights / weights.sum(-1, keepdims=True), v).reshape(T, -1)


def linear(p: Tensors, name: str, x: np.ndarray) -> np.ndarray:
    return x @ p[f"{name}.weight"].T + p.get(f"{name}.bias", 0)


def qwen(config: Mapping[str, Any], p: Tensors, ids: np.ndarray) -> np.ndarray:
    T, eps, length = len(ids), config["layer_norm_epsilon"], config["seq_length"]
    dims = int(H * config.get("rotary_pct", 1.0))
    alpha = 1.0
    if config["use_dynamic_ntk"]:
        alpha = max(1, 2 ** math.ceil(math.log(T / length, 2) + 1) - 1)
    base = config.get("rotary_emb_base", 10_000) * alpha ** (dims / (dims - 2))
    x = p["transformer.wte.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"transformer.h.{layer}."
        fused = linear(p, f"{at}attn.c_attn", rms_norm(x, p[f"{at}ln_1.weight"], eps))
        q, k, v = (one.reshape(T, N, H) for one in np.split(fused, 3, axis=-1))
        q, k = (rotary(one, base, dims, neighbours=False) for one in (q, k))
        if config["use_logn_attn"]:
            q = q * np.array([math.log(i, length) if i > length else 1 for i in range(1, T + 1)])[:, None, None]
        x = x + linear(p, f"{at}attn.c_proj", attend(q, k, v))
        h = rms_norm(x, p[f"{at}ln_2.weight"], eps)
        x = x + linear(p, f"{at}mlp.c_proj", linear(p, f"{at}mlp.w1", h) * silu(linear(p, f"{at}mlp.w2", h)))
    return linear(p, "lm_head", rms_norm(x, p["transformer.ln_f.weight"], eps))


def baichuan(config: Mapping[str, Any], p: Tensors, ids: np.ndarray) -> np.ndarray:
    T, eps = len(ids), config["rms_norm_eps"]
    with_rope = "max_position_embeddings" in config
    # Six heads: those of four, 2^-2, 2^-4, ..., and the first and third of eight, 2^-1, 2^-2, ...
    slopes = None if with_rope else 2.0 ** -np.array([2, 4, 6, 8, 1, 3])
    x = p["model.embed_tokens.weight"][ids]
    for layer in range(config["num_hidden_layers"]):
        at = f"model.layers.{layer}."
        fused = linear(p, f"{at}self_attn.W_pack", rms_norm(x, p[f"{at}input_layernorm.weight"], eps))
        q, k, v = fused.reshape(T, 3, N, H).swapaxes(0, 1)
        if with_rope:
            q, k = (rotary(one, 10_000, H, neighbours=False) for one in (q, k))
        x = x + linear(p, f"{at}self_attn.o_proj", attend(q, k, v, slopes))
        h = rms_norm(x, p[f"{at}post_attention_layernorm.weight"], eps)
        gated = silu(linear(p, f"{at}mlp.gate_proj", h)) * linear(p, f"{at}mlp.up_proj", h)
        x = x + linear(p, f"{at}mlp.down_proj", gated)
    head = p["lm_head.weight"]
    if "z_loss_weight" in config:
        head = head / np.sqrt((head**2).sum(-1, keepdims=True))
    return rms_norm(x, p["model.norm.weight"], eps) @ head.T


def chatglm(config: Mapping[str, Any], p: Tensors, ids: np.ndarray) -> np.ndarray:
    T, groups, eps = len(ids), config["multi_query_group_num"], config["layernorm_epsilon"]

    def norm(name: str, x: np.ndarray) -> np.ndarray:
        weight = p[f"{name}.weight"]
        return rms_norm(x, weight, eps) if config["rmsnorm"] else layer_norm(x, weight, p[f"{name}.bias"], eps)

    x = p["transformer.embedding.word_embeddings.weight"][ids]
    for layer in range(config["num_layers"]):
        at = f"transformer.encoder.layers.{layer}."
        fused = linear(p, f"{at}self_attention.query_key_value", norm(f"{at}input_layernorm", x))
        q = fused[:, : N * H].reshape(T, N, H)
        k, v = (one.reshape(T, groups, H) for one in np.split(fused[:, N * H :], 2, axis=-1))
        q, k = (rotary(one, 10_000 * config.get("rope_ratio", 1), H // 2, neighbours=True) for one in (q, k))
        x = x + linear(p, f"{at}self_attention.dense", attend(q, k, v))
        both = linear(p, f"{at}mlp.dense_h_to_4h", norm(f"{at}post_attention_layernorm", x))
        x = x + linear(p, f"{at}mlp.dense_4h_to_h", silu(both[:, :F]) * both[:, F:])
    if config["post_layer_norm"]:
        x = norm("transformer.encoder.final_layernorm", x)
    return linear(p, "transformer.output_layer", x)


def chatglm_6b(config: Mapping[str, Any], p: Tensors, ids: np.ndarray, places: np.ndarray | None = None) -> np.ndarray:
    """`places`: [T, 2], position ids and block position ids as its code makes them."""
    T, L, eps = len(ids), config["num_layers"], config["layernorm_epsilon"]
    places = np.array([(0, t + 1) for t in range(T)]) if places is None else places
    context = places[:, 1] == 0
    seen = np.tril(np.ones((T, T))) + context[:, None] * context[None] > 0
    norm = lambda name, x: layer_norm(x, p[f"{name}.weight"], p[f"{name}.bias"], eps)
    gelu = lambda x: 0.5 * x * (1 + np.tanh(0.7978845608028654 * x * (1 + 0.044715 * x * x)))

    def turned(x: np.ndarray) -> np.ndarray:
        halves = zip(np.split(x, 2, axis=-1), places.T, strict=True)
        return np.concatenate([rotary(y, 1e4, H // 2, neighbours=False, positions=t) for y, t in halves], axis=-1)

    x = p["transformer.word_embeddings.weight"][ids]
    for layer in range(L):
        at = f"transformer.layers.{layer}."
        normed = norm(f"{at}input_layernorm", x)
        fused = linear(p, f"{at}attention.query_key_value", normed).reshape(T, N, 3 * H)
        q, k, v = np.split(fused, 3, axis=-1)
        attended = linear(p, f"{at}attention.dense", attend(turned(q), turned(k), v, seen=seen))
        normed = norm(f"{at}post_attention_layernorm", normed * math.sqrt(2 * L) + attended)
        x = linear(p, f"{at}mlp.dense_4h_to_h", gelu(linear(p, f"{at}mlp.dense_h_to_4h", normed)))
        x = x + normed * math.sqrt(2 * L)
    return linear(p, "lm_head", norm("transformer.final_layernorm", x))


def expected(config: Mapping[str, Any], folder: Path, ids: np.ndarray) -> np.ndarray:
    """Logits of rows of ids, in float64."""
    code = {"qwen": qwen, "baichuan": baichuan, "chatglm": chatglm}[config["model_type"]]
    if config.get("position_encoding_2d"):
        code = chatglm_6b
    tensors = {name: value.astype(np.float64) for name, value in safetensors.numpy.load_file(folder / SINGLE).items()}
    return np.stack([code(config, tensors, row) for row in ids])


# --- Ours ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One for each config."""
    root = tmp_path_factory.mktemp("published")
    for number, config in enumerate(CONFIGS.values()):
        published.write_model(config, root / str(number))
    return {name: root / str(number) for number, name in enumerate(CONFIGS)}


@pytest.mark.parametrize("name", CONFIGS)
def test_logits_are_those_of_the_formulas_and_survive_a_round_trip(
    name: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    model, config = load_model(folders[name])
    wanted = expected(CONFIGS[name], folders[name], published.ids())
    assert np.abs(wanted).max() > 0.5
    np.testing.assert_allclose(model(published.ids()), wanted, atol=1e-4)
    save_model(model, tmp_path / "out")
    again, config_again = load_model(tmp_path / "out")
    assert config_again == config
    assert jax.tree.all(jax.tree.map(lambda a, b: bool((a == b).all()), model.parameters, again.parameters))
    others = {"qwen, 72B": "qwen2", "baichuan, 7B": "llama", "chatglm2": "glm", "chatglm3, 32k": "glm"}
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written["model_type"] == others.get(name, CONFIGS[name]["model_type"])


@pytest.mark.parametrize(
    ("name", "architecture"),
    [
        ("qwen", "QWenLMHeadModel"),
        ("baichuan, 7B", "BaiChuanForCausalLM"),
        ("baichuan 2, 7B", "BaichuanForCausalLM"),
        ("baichuan, 13B", "BaichuanForCausalLM"),
        ("chatglm3, 32k", "ChatGLMModel"),
    ],
)
def test_converting_keeps_the_family_and_every_bit_and_no_code(
    name: str, architecture: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    """transformers is not asked, as it would want to run the code."""
    source = folders[name]
    (source / "modeling.py").write_text("raise SystemExit('this has run')")
    opened = converting.open_published(KINDS["hf"](source))
    converting.write_published(opened, tmp_path / "out", None)
    before, after = (safetensors.numpy.load_file(place / SINGLE) for place in (source, tmp_path / "out"))
    assert before.keys() == after.keys() and all(before[key].tobytes() == after[key].tobytes() for key in before)
    values = json.loads((tmp_path / "out/config.json").read_text())
    family = FAMILIES[CONFIGS[name]["model_type"]]
    assert (values["model_type"], values["architectures"]) == (family.model_type, [architecture])
    assert "auto_map" not in values and not list((tmp_path / "out").glob("*.py"))
    assert family.read(Published(values, "")) == opened.model
    *_, line = converting.report(opened, source)
    assert line.startswith(f"logits: not compared, as transformers reads {family.model_type} only with code that comes")


LAYERS: dict[str, dict[str, tuple[int, ...]]] = {
    "qwen": {
        "transformer.h.1.ln_1.weight": (D,),
        "transformer.h.1.attn.c_attn.weight": (3 * D, D),
        "transformer.h.1.attn.c_attn.bias": (3 * D,),
        "transformer.h.1.attn.c_proj.weight": (D, D),
        "transformer.h.1.ln_2.weight": (D,),
        "transformer.h.1.mlp.w1.weight": (F, D),
        "transformer.h.1.mlp.w2.weight": (F, D),
        "transformer.h.1.mlp.c_proj.weight": (D, F),
        "transformer.wte.weight": (V, D),
        "transformer.ln_f.weight": (D,),
        "lm_head.weight": (V, D),
    },
    "baichuan 2, 13B": {
        "model.layers.1.input_layernorm.weight": (D,),
        "model.layers.1.self_attn.W_pack.weight": (3 * D, D),
        "model.layers.1.self_attn.o_proj.weight": (D, D),
        "model.layers.1.post_attention_layernorm.weight": (D,),
        "model.layers.1.mlp.gate_proj.weight": (F, D),
        "model.layers.1.mlp.up_proj.weight": (F, D),
        "model.layers.1.mlp.down_proj.weight": (D, F),
        "model.embed_tokens.weight": (V, D),
        "model.norm.weight": (D,),
        "lm_head.weight": (V, D),
    },
    "chatglm-6b": {
        **{
            f"transformer.layers.{layer}.{name}": shape
            for layer in (1, 2)
            for name, shape in {
                "input_layernorm.weight": (D,),
                "input_layernorm.bias": (D,),
                "attention.query_key_value.weight": (3 * D, D),
                "attention.query_key_value.bias": (3 * D,),
                "attention.dense.weight": (D, D),
                "attention.dense.bias": (D,),
                "post_attention_layernorm.weight": (D,),
                "post_attention_layernorm.bias": (D,),
                "mlp.dense_h_to_4h.weight": (F, D),
                "mlp.dense_h_to_4h.bias": (F,),
                "mlp.dense_4h_to_h.weight": (D, F),
                "mlp.dense_4h_to_h.bias": (D,),
            }.items()
        },
        "transformer.word_embeddings.weight": (V, D),
        "transformer.final_layernorm.weight": (D,),
        "transformer.final_layernorm.bias": (D,),
        "lm_head.weight": (V, D),
    },
    "chatglm2": {
        "transformer.encoder.layers.1.input_layernorm.weight": (D,),
        "transformer.encoder.layers.1.self_attention.query_key_value.weight": ((N + 2 * 2) * H, D),
        "transformer.encoder.layers.1.self_attention.query_key_value.bias": ((N + 2 * 2) * H,),
        "transformer.encoder.layers.1.self_attention.dense.weight": (D, D),
        "transformer.encoder.layers.1.post_attention_layernorm.weight": (D,),
        "transformer.encoder.layers.1.mlp.dense_h_to_4h.weight": (2 * F, D),
        "transformer.encoder.layers.1.mlp.dense_4h_to_h.weight": (D, F),
        "transformer.embedding.word_embeddings.weight": (V, D),
        "transformer.encoder.final_layernorm.weight": (D,),
        "transformer.output_layer.weight": (V, D),
    },
}


@pytest.mark.parametrize("name", LAYERS)
def test_tensors_are_called_and_shaped_as_published(name: str, folders: dict[str, Path]) -> None:
    found = safetensors.numpy.load_file(folders[name] / SINGLE)
    of_others = {key for key in found if ".0." in key}
    assert {key: found[key].shape for key in found.keys() - of_others} == LAYERS[name]


def test_contexts_see_themselves_whole_and_blocks_count_apart(folders: dict[str, Path]) -> None:
    """As ChatGLM-6B reads a prompt: position and block ids of its code, two prompts in one row, and each alone."""
    config, folder = CONFIGS["chatglm-6b"], folders["chatglm-6b"]
    tensors = {name: value.astype(np.float64) for name, value in safetensors.numpy.load_file(folder / SINGLE).items()}
    model, _ = load_model(folder)

    def prompt(context: int, written: int) -> np.ndarray:
        """The block goes to the mask, the token before the last of the context."""
        return np.array([(t, 0) for t in range(context)] + [(context - 2, 1 + i) for i in range(written)])

    places = [prompt(6, 5), prompt(4, 3)]
    ids = np.random.default_rng(3).integers(0, V, 18)
    want = [chatglm_6b(config, tensors, ids[:11], places[0]), chatglm_6b(config, tensors, ids[11:], places[1])]
    np.testing.assert_allclose(model(ids[:11], positions=places[0]), want[0], atol=1e-4)
    packed = model(ids[None], np.repeat([0, 1], [11, 7])[None], np.concatenate(places)[None])
    np.testing.assert_allclose(packed[0], np.concatenate(want), atol=1e-4)
    causal = chatglm_6b(config, tensors, ids[:11])
    assert np.abs(causal - want[0]).max() > 0.1


def test_old_files_may_have_the_frequencies_of_rope(folders: dict[str, Path], tmp_path: Path) -> None:
    extra = {
        "baichuan, 7B": "model.layers.0.self_attn.rotary_emb.inv_freq",
        "chatglm2": "transformer.rotary_pos_emb.inv_freq",
    }
    for name, tensor in extra.items():
        place = tmp_path / name
        place.mkdir()
        (place / "config.json").write_text(json.dumps(CONFIGS[name]))
        tensors = safetensors.numpy.load_file(folders[name] / SINGLE)
        safetensors.numpy.save_file(tensors | {tensor: np.ones(4, np.float32)}, place / SINGLE)
        converting.open_published(KINDS["hf"](place))


@pytest.mark.parametrize("T", [17, 32])
def test_qwen_beyond_its_training_length(T: int, folders: dict[str, Path]) -> None:
    """17 and 32 tokens stretch alike, as twice the 16 of training; decoding goes to 16 alone."""
    loaded, config = load_model(folders["qwen"])
    assert config.max_seq_len == 16 and config.decodes
    longer = dataclasses.replace(config, max_seq_len=32)
    assert longer.looks_ahead is not None
    model = LanguageModel(longer, FLOAT32, one_device(), loaded.parameters)
    ids = np.random.default_rng(T).integers(0, V, (1, T))
    np.testing.assert_allclose(model(ids), expected(CONFIGS["qwen"], folders["qwen"], ids), atol=1e-4)


def test_the_stretching_doubles_as_in_qwens_code() -> None:
    """alpha = 2^ceil(log2(T / seq_length) + 1) - 1, at least 1, of each document; exact at powers of two."""
    rope = Rope(scaling=DynamicNtkScaling(factor=2.0, original_max_len=24, doubling=True))
    lengths = [1, 12, 23, 24, 25, 48, 49, 96, 97, 192, 193, 3072, 3073]
    positions = np.concatenate([np.arange(length) for length in lengths])[None].astype(np.int32)
    frequencies = 10_000.0 ** (-np.arange(4) / 4)
    for length in lengths:
        angles = rope_angles(rope, frequencies.astype(np.float32), Tokens(np.arange(length, dtype=np.int32)[None]))
        alpha = max(1, 2 ** math.ceil(math.log2(length / 24) + 1) - 1)
        base = 10_000.0 * alpha ** (8 / 6)
        np.testing.assert_allclose(angles[0, -1], (length - 1) * base ** (-np.arange(4) / 4), rtol=1e-6)
    few = positions[:, : sum(lengths[:7])]
    documents = np.repeat(np.arange(7), lengths[:7])[None].astype(np.int32)
    packed = rope_angles(rope, frequencies.astype(np.float32), Tokens(few, documents))
    alone = rope_angles(rope, frequencies.astype(np.float32), Tokens(few[:, -49:]))
    np.testing.assert_array_equal(packed[:, -49:], alone)


# --- What is refused ---


@pytest.mark.parametrize(
    ("name", "values", "match"),
    [
        ("chatglm-6b", {"quantization_bit": 4}, r"quantization_bit = 4 is not supported .*; must be 0"),
        ("chatglm2", {"multi_query_attention": False}, r"multi_query_attention = False is not supported"),
        ("chatglm2", {"quantization_bit": 4}, r"quantization_bit = 4 is not supported .*; must be 0"),
        ("chatglm2", {"vision_config": {}}, r"vision_config = \{\} is not supported .*; must be absent"),
        (
            "chatglm2",
            {"rope_ratio": 50, "_name_or_path": "THUDM/chatglm2-6b-32k"},
            r"rope_ratio = 50.0 of THUDM/chatglm2-6b-32k is not supported, as the code of ChatGLM2 divides positions",
        ),
        ("qwen", {"scale_attn_weights": False}, r"scale_attn_weights = False is not supported"),
        ("qwen", {"seq_length": None}, r"has no seq_length"),
        ("baichuan, 7B", {"hidden_act": "gelu"}, r"hidden_act = 'gelu' is not supported; it may be silu"),
    ],
)
def test_what_is_refused(name: str, values: dict[str, Any], match: str) -> None:
    config = CONFIGS[name] | values
    with pytest.raises(UserError, match=match):
        FAMILIES[config["model_type"]].read(Published(config, "config.json"))


# --- PaLM, of which nothing is published ---


def test_palm() -> None:
    """arXiv:2204.02311, section 2: y = x + MLP(LayerNorm(x)) + Attention(LayerNorm(x)), one LayerNorm, no biases."""
    d, heads, size = 32, 4, 16
    model = palm(vocab_size=V, d_model=d, n_layers=2, n_heads=heads, head_dim=size, max_seq_len=16)
    rng, begun = np.random.default_rng(0), initial_parameters(model)
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64) + 0.2 * rng.standard_normal(leaf.shape), begun)
    ids = rng.integers(0, V, 12)
    x = p["embed"][ids]
    blocks = p["blocks"]["0"]
    for layer in range(2):
        a, m = ({key: value[layer] for key, value in blocks[kind].items()} for kind in ("attention", "mlp"))
        h = layer_norm(x, blocks["attention_norm"]["scale"][layer], 0.0, 1e-5)
        q, k = (np.tensordot(h, a[f"{name}_proj"], 1) for name in "qk")
        q, k = (rotary(one, 10_000, size, neighbours=False) for one in (q, k))
        mixed = attend(q, k, np.tensordot(h, a["v_proj"], 1))
        x = x + mixed @ a["o_proj"].reshape(-1, d) + (silu(h @ m["gate_proj"]) * (h @ m["up_proj"])) @ m["down_proj"]
    wanted = layer_norm(x, p["final_norm"]["scale"], 0.0, 1e-5) @ p["embed"].T / math.sqrt(d)
    parameters = jax.tree.map(lambda leaf: leaf.astype(np.float32), p)
    got = LanguageModel(model, FLOAT32, one_device(), parameters)(ids[None])[0]
    np.testing.assert_allclose(got, wanted, atol=1e-4)
    attention = model.blocks[0].attention
    assert isinstance(attention, GroupedQuery) and attention.n_kv_heads == 1
    assert sum(leaf.size for leaf in jax.tree.leaves(begun)) == V * d + d + 2 * (
        d + 2 * d * heads * size + 2 * d * size + 3 * d * 4 * d
    )
    with pytest.raises(UserError, match=r"palm\(\): d_model = 0 must be positive"):
        palm(vocab_size=V, d_model=0, n_layers=2, n_heads=heads, head_dim=size, max_seq_len=16)
