"""Tiny published models as the converter of llama.cpp writes them (convert_hf_to_gguf.py), by a table of its own."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import safetensors.numpy

from maxlm.hub.tensor_files import SINGLE

ARCHITECTURES = {"mistral": "llama", "mixtral": "llama", "qwen3_moe": "qwen3moe", "gemma3_text": "gemma3"}
"""Where it is not the model_type."""
_TOP = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "transformer.wte": "token_embd",
    "transformer.wpe": "position_embd",
    "transformer.ln_f": "output_norm",
}
_BLOCK = {
    **{f"self_attn.{one}_proj": f"attn_{one}" for one in "qkv"},
    **{f"self_attn.{one}_norm": f"attn_{one}_norm" for one in "qk"},
    **{f"mlp.{one}_proj": f"ffn_{one}" for one in ("gate", "up", "down")},
    **{f"mlp.experts.{one}_proj": f"ffn_{one}_exps" for one in ("gate", "up", "down")},
    "self_attn.o_proj": "attn_output",
    "self_attn.qkv_proj": "attn_qkv",
    "mlp.gate_up_proj": "ffn_up",
    "mlp.c_fc": "ffn_up",
    "mlp.c_proj": "ffn_down",
    "mlp.gate": "ffn_gate_inp",
    "block_sparse_moe.gate": "ffn_gate_inp",
    "block_sparse_moe.experts.w1": "ffn_gate_exps",
    "block_sparse_moe.experts.w2": "ffn_down_exps",
    "block_sparse_moe.experts.w3": "ffn_up_exps",
    "attn.c_attn": "attn_qkv",
    "attn.c_proj": "attn_output",
    "ln_1": "attn_norm",
    "ln_2": "ffn_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}
_AROUND = {
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
}
"""Of models that have norms behind what a block computes."""

Change = Callable[[gguf.GGUFWriter, dict[str, np.ndarray]], None]


def write_gguf(
    folder: Path, path: Path, kind: str = "F32", change: Change = lambda writer, tensors: None
) -> dict[str, np.ndarray]:
    """Write a file.

    Args:
        folder: what `published.write_model` wrote.
        path: the file.
        kind: number format of the matrices whose rows are whole blocks.
        change: what is done to metadata and tensors before they are written.

    Returns:
        The tensors under llama.cpp's names, before they were quantised.
    """
    config = json.loads((folder / "config.json").read_text())
    writer = gguf.GGUFWriter(path, ARCHITECTURES.get(config["model_type"], config["model_type"]))
    tensors = {}
    stacks: dict[str, list[np.ndarray]] = {}
    for name, values in safetensors.numpy.load_file(folder / SINGLE).items():
        if found := re.search(r"experts\.(\d+)\.", name):
            stacks.setdefault(name.replace(found[0], "experts."), []).insert(int(found[1]), values)
        else:
            tensors[_called(name, config)] = _lying(name, values, config)
    tensors |= {_called(name, config): np.stack(values) for name, values in stacks.items()}
    _say(writer, config)
    _factors(writer, config, tensors)
    change(writer, tensors)
    form = gguf.GGMLQuantizationType[kind]
    for name, values in tensors.items():
        whole = values.ndim > 1 and values.shape[-1] % gguf.GGML_QUANT_SIZES[form][0] == 0
        used = form if whole else gguf.GGMLQuantizationType.F32
        with np.errstate(invalid="ignore"):  # where a test asks for what is not a number
            writer.add_tensor(name, gguf.quants.quantize(values, used), raw_dtype=used)
    finish(writer)
    return tensors


def finish(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _called(name: str, config: dict[str, Any]) -> str:
    base, _, ending = name.rpartition(".")
    if base in _TOP:
        return f"{_TOP[base]}.{ending}"
    number, inner = re.fullmatch(r"(?:model\.layers|transformer\.h)\.(\d+)\.(.*)", base).groups()
    around = config["model_type"] in ("gemma2", "gemma3_text", "olmo2")
    return f"blk.{number}.{(_BLOCK | _AROUND if around else _BLOCK)[inner]}.{ending}"


def _lying(name: str, values: np.ndarray, config: dict[str, Any]) -> np.ndarray:
    """How llama.cpp has a tensor."""
    kind = config["model_type"]
    if kind in ("llama", "mistral", "mixtral") and (found := re.search(r"\.([qk])_proj\.", name)):
        heads = config["num_attention_heads" if found[1] == "q" else "num_key_value_heads"]
        halves = values.reshape(heads, 2, len(values) // heads // 2, *values.shape[1:])
        return halves.swapaxes(1, 2).reshape(values.shape)
    if kind.startswith("gemma") and name.endswith("norm.weight"):
        return values + np.float32(1)
    if kind == "gpt2" and re.search(r"\.c_\w+\.weight", name):
        return np.ascontiguousarray(values.T)
    return values


def _say(writer: gguf.GGUFWriter, config: dict[str, Any]) -> None:
    def of(*keys: str, default: Any = None) -> Any:
        return next((config[key] for key in keys if config.get(key) is not None), default)

    heads, width = of("num_attention_heads", "n_head"), of("hidden_size", "n_embd")
    size = of("head_dim", default=width // heads)
    writer.add_context_length(of("max_position_embeddings", "n_positions"))
    writer.add_embedding_length(width)
    writer.add_block_count(of("num_hidden_layers", "n_layer"))
    writer.add_feed_forward_length(of("intermediate_size", default=4 * width))
    writer.add_head_count(heads)
    writer.add_head_count_kv(of("num_key_value_heads", default=heads))
    writer.add_rope_freq_base(of("rope_theta", default=1e6 if config["model_type"] == "mixtral" else 1e4))
    writer.add_rope_dimension_count(int(size * of("partial_rotary_factor", default=1.0)))
    if "head_dim" in config:
        writer.add_key_length(size)
        writer.add_value_length(size)
    if (eps := of("layer_norm_epsilon", "norm_epsilon")) is not None:
        writer.add_layer_norm_eps(eps)
    else:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    for key, say in (
        ("sliding_window", writer.add_sliding_window),
        ("num_experts_per_tok", writer.add_expert_used_count),
        ("moe_intermediate_size", writer.add_expert_feed_forward_length),
        ("attn_logit_softcapping", writer.add_attn_logit_softcapping),
        ("final_logit_softcapping", writer.add_final_logit_softcapping),
        ("rope_local_base_freq", writer.add_rope_freq_base_swa),
    ):
        if of(key) is not None:
            say(config[key])
    if (experts := of("num_local_experts", "num_experts")) is not None:
        writer.add_expert_count(experts)
    if "norm_topk_prob" in config:
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    if "query_pre_attn_scalar" in config:
        writer.add_attention_scale(config["query_pre_attn_scalar"] ** -0.5)
    if "layer_types" in config:
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])


def _factors(writer: gguf.GGUFWriter, config: dict[str, Any], tensors: dict[str, np.ndarray]) -> None:
    """How RoPE is stretched: in metadata, or what each frequency is divided by as a tensor."""
    said = config.get("rope_scaling", {})
    longest = config.get("max_position_embeddings")
    original = said.get("original_max_position_embeddings", config.get("original_max_position_embeddings", longest))
    match said.get("rope_type", said.get("type")):
        case "linear":
            writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
            writer.add_rope_scaling_factor(said["factor"])
        case "yarn":
            writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
            writer.add_rope_scaling_factor(said["factor"])
            writer.add_rope_scaling_orig_ctx_len(original)
        case "longrope":
            writer.add_rope_scaling_orig_ctx_len(original)
            attention = math.sqrt(1 + math.log(longest / original) / math.log(original))
            writer.add_rope_scaling_attn_factors(attention)
            for length in ("long", "short"):
                tensors[f"rope_factors_{length}.weight"] = np.array(said[f"{length}_factor"], np.float32)
        case "llama3":
            size = config["hidden_size"] // config["num_attention_heads"]
            tensors["rope_freqs.weight"] = llama3_factors(said, config["rope_theta"], size)


def llama3_factors(said: dict[str, Any], theta: float, size: int) -> np.ndarray:
    """By a loop over frequencies."""
    factors = []
    low, high, factor = said["low_freq_factor"], said["high_freq_factor"], said["factor"]
    original = said["original_max_position_embeddings"]
    for i in range(0, size, 2):
        wavelength = 2 * math.pi * theta ** (i / size)
        if wavelength < original / high:
            factors.append(1.0)
        elif wavelength > original / low:
            factors.append(factor)
        else:
            smooth = (original / wavelength - low) / (high - low)
            factors.append(1 / ((1 - smooth) / factor + smooth))
    return np.array(factors, np.float32)
