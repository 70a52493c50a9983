"""Tiny published models with weights that every machine makes alike, and what transformers says of them.

`python tests/published.py` asks transformers (extra `parity`), and stores its logits in published_logits.npz, what else
it says (`Depth`) in published_depth.npz. Its loader is told to name every tensor that is missing or left over, so
that names are its own and not only ours.
"""

from __future__ import annotations

import hashlib
import inspect
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import safetensors.numpy

from maxlm.hub.families import FAMILIES
from maxlm.hub.names import tensors
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import SINGLE, Spec, write_tensors

LOGITS = Path(__file__).with_name("published_logits.npz")
DEPTH = Path(__file__).with_name("published_depth.npz")
V, T = 64, 12
SHORT, NEW = 8, 8
"""Tokens of the second row where rows are padded, and of each continuation."""

_SIZES: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_EXPERTS: dict[str, Any] = {"num_experts_per_tok": 2, "router_aux_loss_coef": 0.02}
_GPT: dict[str, Any] = {
    "vocab_size": V,
    "n_embd": 32,
    "n_layer": 3,
    "n_head": 4,
    "n_positions": 32,
    "layer_norm_epsilon": 1e-5,
}
_GEMMA: dict[str, Any] = {
    **_SIZES,
    "head_dim": 16,
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "pad_token_id": 0,
}
_FALCON: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_hidden_size": 48,
    "max_position_embeddings": 32,
    "layer_norm_epsilon": 1e-5,
    "alibi": False,
}
_OPT: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "ffn_dim": 48,
    "max_position_embeddings": 32,
    "word_embed_proj_dim": 32,
    "activation_function": "relu",
}

_DEEPSEEK: dict[str, Any] = {
    **_SIZES,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "kv_lora_rank": 12,
    "qk_nope_head_dim": 10,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "first_k_dense_replace": 1,
    "n_routed_experts": 8,
    "moe_intermediate_size": 24,
    "num_experts_per_tok": 2,
}

_GPT_OSS: dict[str, Any] = {
    **{key: value for key, value in _SIZES.items() if key != "hidden_act"},
    "model_type": "gpt_oss",
    "intermediate_size": 64,
    "head_dim": 16,
    "num_hidden_layers": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "swiglu_limit": 0.7,
    "rope_theta": 1.5e5,
    "rope_scaling": {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 8,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "truncate": False,
    },
}

MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_SIZES},
    "llama 3.1": {
        "model_type": "llama",
        **_SIZES,
        "rope_theta": 5e5,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 16,
        },
    },
    "llama, biases, tied": {
        "model_type": "llama",
        **_SIZES,
        "attention_bias": True,
        "mlp_bias": True,
        "tie_word_embeddings": True,
    },
    "mistral": {"model_type": "mistral", **_SIZES, "sliding_window": 5, "head_dim": 16},
    "mixtral": {"model_type": "mixtral", **_SIZES, **_EXPERTS, "num_local_experts": 4},
    "qwen2": {"model_type": "qwen2", **_SIZES, "tie_word_embeddings": True},
    "qwen2, window": {
        "model_type": "qwen2",
        **_SIZES,
        "use_sliding_window": True,
        "sliding_window": 4,
        "max_window_layers": 1,
    },
    "qwen3": {"model_type": "qwen3", **_SIZES, "head_dim": 16},
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        **_SIZES,
        **_EXPERTS,
        "head_dim": 16,
        "moe_intermediate_size": 24,
        "num_experts": 4,
        "norm_topk_prob": False,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [1],
    },
    "phi3": {
        "model_type": "phi3",
        **_SIZES,
        "original_max_position_embeddings": 8,
        "partial_rotary_factor": 0.5,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0, 1.1], "long_factor": [1.5, 3.0]},
        "pad_token_id": 0,
    },
    "llama, yarn": {
        "model_type": "llama",
        **_SIZES,
        "rope_scaling": {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8},
    },
    "llama, linear": {"model_type": "llama", **_SIZES, "rope_scaling": {"type": "linear", "factor": 2.0}},
    "olmo": {"model_type": "olmo", **_SIZES, "pad_token_id": 0},
    "olmo2": {"model_type": "olmo2", **_SIZES, "pad_token_id": 0},
    "cohere": {"model_type": "cohere", **_SIZES, "layer_norm_eps": 1e-5, "logit_scale": 0.25, "pad_token_id": 0},
    "glm": {"model_type": "glm", **_SIZES, "head_dim": 8, "attention_bias": True, "pad_token_id": 0},
    "glm4": {"model_type": "glm4", **_SIZES, "head_dim": 8, "attention_bias": False, "pad_token_id": 0},
    "gemma": {"model_type": "gemma", **_GEMMA, "hidden_act": "gelu"},
    "gemma2": {
        "model_type": "gemma2",
        **_GEMMA,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "attn_logit_softcapping": 5.0,
        "final_logit_softcapping": 4.0,
    },
    "gemma3_text": {
        "model_type": "gemma3_text",
        **_GEMMA,
        "num_hidden_layers": 4,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "sliding_window": 5,
        "query_pre_attn_scalar": 12,
        "rope_theta": 1e5,
        "rope_local_base_freq": 1e3,
        "rope_scaling": {"rope_type": "linear", "factor": 4.0},
    },
    "gpt2": {"model_type": "gpt2", **_GPT, "activation_function": "gelu_new"},
    "openai-gpt": {"model_type": "openai-gpt", **_GPT, "afn": "gelu"},
    "gptj": {"model_type": "gptj", **_GPT, "activation_function": "gelu_new", "rotary_dim": 4},
    "gpt_neox": {"model_type": "gpt_neox", **_SIZES, "layer_norm_eps": 1e-5, "rotary_pct": 0.5, "hidden_act": "gelu"},
    "gpt_neox, in sequence": {
        "model_type": "gpt_neox",
        **_SIZES,
        "layer_norm_eps": 1e-5,
        "use_parallel_residual": False,
        "rotary_emb_base": 500,
        "hidden_act": "gelu",
    },
    "phi": {"model_type": "phi", **_SIZES, "layer_norm_eps": 1e-5, "hidden_act": "gelu_new"},
    "falcon": {"model_type": "falcon", **_FALCON, "multi_query": True},
    "falcon, new": {"model_type": "falcon", **_FALCON, "new_decoder_architecture": True, "num_kv_heads": 2},
    "falcon, in sequence": {
        "model_type": "falcon",
        **_FALCON,
        "multi_query": False,
        "parallel_attn": False,
        "bias": True,
    },
    "starcoder2": {
        "model_type": "starcoder2",
        **_SIZES,
        "norm_epsilon": 1e-5,
        "hidden_act": "gelu_pytorch_tanh",
        "sliding_window": 6,
        "tie_word_embeddings": True,
    },
    "opt": {"model_type": "opt", **_OPT},
    "opt, norms after": {"model_type": "opt", **_OPT, "do_layer_norm_before": False},
    "bloom": {
        "model_type": "bloom",
        "vocab_size": V,
        "hidden_size": 32,
        "n_layer": 3,
        "n_head": 4,
        "seq_length": 32,
        "layer_norm_epsilon": 1e-5,
    },
    "deepseek_v2": {
        "model_type": "deepseek_v2",
        **_DEEPSEEK,
        "q_lora_rank": None,
        "n_shared_experts": 2,
        "topk_method": "group_limited_greedy",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 1.5,
        "aux_loss_alpha": 0.003,
        "norm_topk_prob": False,
    },
    "deepseek_v3": {
        "model_type": "deepseek_v3",
        **_DEEPSEEK,
        "q_lora_rank": 20,
        "n_shared_experts": 1,
        "scoring_func": "sigmoid",
        "topk_method": "noaux_tc",
        "n_group": 4,
        "topk_group": 2,
        "routed_scaling_factor": 2.5,
        "norm_topk_prob": True,
        "rope_scaling": {
            "type": "yarn",
            "factor": 4.0,
            "original_max_position_embeddings": 8,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
        },
    },
    "gpt_oss": _GPT_OSS,
}
"""config.json of each."""
MXFP4 = {"gpt_oss, mxfp4": {**_GPT_OSS, "quantization_config": {"quant_method": "mxfp4"}}}
"""The same of models with packed experts, which are written unpacked."""


class Depth(NamedTuple):
    """Of a batch of all of the first row of `ids`, and the first SHORT tokens of the second, which is padded."""

    padded: np.ndarray
    """float32 [SHORT, V]: logits of the short row, padded on the left."""
    continuations: np.ndarray
    """int8 [2, NEW]: the likeliest token, again and again."""
    loss: np.ndarray
    """[]: mean cross-entropy of all next tokens."""
    gradients: np.ndarray
    """float32 [tensors, 3]: `sketch` of the loss's gradient in each tensor, in the order of their names."""


def logits(name: str) -> np.ndarray:
    """What transformers says of a model and `ids`: [2, T, V]."""
    with np.load(LOGITS, allow_pickle=False) as file:
        return file[name]


def depth(name: str) -> Depth:
    """What else it says of a model."""
    with np.load(DEPTH, allow_pickle=False) as file:
        return Depth(*(file[f"{name}/{field}"] for field in Depth._fields))


def ids() -> np.ndarray:
    """[2, T]."""
    return np.random.default_rng(7).integers(0, V, (2, T))


def sketch(name: str, values: np.ndarray) -> np.ndarray:
    """[3]: two random sums of all numbers of a tensor, which no error in any of them leaves as they are, and its
    length, which is about what such a sum is."""
    wide = values.astype(np.float64).ravel()
    return np.append(np.random.default_rng(_seed(name)).standard_normal((2, wide.size)) @ wide, np.linalg.norm(wide))


def write_model(config: dict[str, Any], folder: Path) -> None:
    """Random weights around the values that a norm has, under the names of the family."""
    family = FAMILIES[config["model_type"]]
    model = family.read(Published(config, "config.json"))
    listed = tensors(model, family.names_of(model))
    folder.mkdir(parents=True, exist_ok=True)
    specs = {one.name: Spec(one.shape, np.dtype(np.float32)) for one in listed}
    write_tensors(folder, specs, (values(one.name, one.shape) for one in listed))
    (folder / "config.json").write_text(json.dumps(config))
    if "quantization_config" in config:
        pack_experts(folder)


def pack_experts(folder: Path) -> None:
    """Random bytes in the place of the experts' matrices [E, inputs, outputs]: MXFP4, of numbers up to 1.5."""
    found = safetensors.numpy.load_file(folder / SINGLE)
    for name in [name for name in found if name.endswith(("gate_up_proj", "down_proj"))]:
        experts, inputs, outputs = found.pop(name).shape
        rng = np.random.default_rng(len(found))
        found[f"{name}_blocks"] = rng.integers(0, 256, (experts, outputs, inputs // 32, 16), np.uint8)
        found[f"{name}_scales"] = rng.integers(121, 126, (experts, outputs, inputs // 32), np.uint8)
    safetensors.numpy.save_file(found, folder / SINGLE, {"format": "pt"})


def unpack_experts(folder: Path) -> None:
    """What `pack_experts` left, in float32 and as transformers unpacks it."""
    import torch
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    found = safetensors.numpy.load_file(folder / SINGLE)
    for name in [name.removesuffix("_blocks") for name in found if name.endswith("_blocks")]:
        blocks, scales = (torch.from_numpy(found.pop(f"{name}_{part}")) for part in ("blocks", "scales"))
        found[name] = convert_moe_packed_tensors(blocks, scales, dtype=torch.float32).numpy()
    safetensors.numpy.save_file(found, folder / SINGLE, {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]  # with it their loader wants accelerate, and to unpack by itself
    (folder / "config.json").write_text(json.dumps(config))


def values(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of a tensor, decided by its name."""
    drawn = np.random.default_rng(_seed(name)).standard_normal(shape, np.float32) * np.float32(0.2)
    return drawn + np.float32(1) if re.search(r"norm|ln_", name) and name.endswith("weight") else drawn


def _seed(name: str) -> int:
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little")


def open_in_transformers(folder: Path) -> Any:
    """Of a folder, with every tensor of it used and none made up."""
    import torch
    import transformers

    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"], info
    return model


def logits_of_transformers(model: Any, tokens: np.ndarray) -> np.ndarray:
    """[B, T, V]."""
    import torch

    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def depth_of_transformers(model: Any, folder: Path) -> Depth:
    """`folder` is that of the model; the model is spoiled."""
    import torch

    first, second = torch.from_numpy(ids())
    rows, pad = (first, second[:SHORT]), torch.zeros(T - SHORT, dtype=torch.long)

    def batch(left: bool) -> dict[str, Any]:
        whole = lambda row, fill: torch.cat([fill, row] if left else [row, fill])
        tokens = torch.stack([rows[0], whole(rows[1], pad)])
        return {"input_ids": tokens, "attention_mask": torch.stack([pad.new_ones(T), whole(pad.new_ones(SHORT), pad)])}

    def positions(mask: Any) -> dict[str, Any]:
        """As `generate` counts them, which not every model takes."""
        takes = "position_ids" in inspect.signature(model.forward).parameters
        return {"position_ids": (mask.cumsum(-1) - 1).clamp(min=0)} if takes else {}

    with torch.no_grad():
        on_the_left, on_the_right = (
            model(**one, **positions(one["attention_mask"])).logits[1].numpy() for one in (batch(True), batch(False))
        )
        padded = on_the_left[-SHORT:]
        np.testing.assert_allclose(padded, on_the_right[:SHORT], atol=1e-5)
        said = model.generate(
            **batch(True), do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0,
            output_scores=True, return_dict_in_generate=True,
        )  # fmt: skip
    best = torch.stack(said.scores).topk(2).values
    assert (best[..., 0] - best[..., 1]).min() > 1e-3, "two tokens are as likely"

    model.get_input_embeddings().padding_idx = None  # else the row of id 0, where it is that of padding, learns nothing
    short = batch(False)
    loss = model(**short, labels=short["input_ids"].masked_fill(short["attention_mask"] == 0, -100)).loss
    loss.backward()
    with torch.no_grad():
        for one in (*model.parameters(), *model.buffers()):  # as a checkpoint: saving knows the names of the files
            one.data = torch.zeros_like(one) if one.grad is None else one.grad
    model.save_pretrained(folder / "gradients")
    found = safetensors.numpy.load_file(folder / "gradients" / SINGLE)
    assert found.keys() == safetensors.numpy.load_file(folder / SINGLE).keys()
    sketches = np.stack([sketch(name, found[name]) for name in sorted(found)])
    return Depth(padded, said.sequences[:, T:].numpy().astype(np.int8), loss.detach().numpy(), sketches.astype("f4"))


def main() -> None:
    found, deep = {}, {}
    for name, config in (MODELS | MXFP4).items():
        with tempfile.TemporaryDirectory() as folder:
            write_model(config, Path(folder))
            if name in MXFP4:
                unpack_experts(Path(folder))
            model = open_in_transformers(Path(folder))
            found[name] = logits_of_transformers(model, ids())
            if name in MXFP4:
                continue
            of_model = depth_of_transformers(model, Path(folder))
        deep |= {f"{name}/{field}": value for field, value in of_model._asdict().items()}
        print(f"{name}: logits up to {np.abs(found[name]).max():.2f}, loss {of_model.loss:.4f}")
    np.savez_compressed(LOGITS, **found)
    np.savez_compressed(DEPTH, **deep)


if __name__ == "__main__":
    sys.exit(main())
