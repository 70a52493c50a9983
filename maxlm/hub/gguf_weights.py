"""What a GGUF file says of a model, as the config.json and the names of a family that is here.

llama.cpp's words for a model's sizes are the same for all; `ARCHITECTURES` has what differs. Names of tensors are
translated by the table of the package gguf. Three things lie otherwise in its files than in published ones: rows of
queries and keys (`permuted`), scales of norms (`norm_offset`), and experts, which are one tensor.
Facts: its convert_hf_to_gguf.py (what it writes) and src/llama-model.cpp (what it reads).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.config.fields import NotNegative, Positive
from maxlm.hub.gguf_file import BETTER, GgufFile, as_written, import_gguf
from maxlm.hub.names import Arrangement, Names, Transposed
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import TensorEntry
from maxlm.hub.weights import PublishedWeights

_KEYS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    "attention.layer_norm_epsilon": "norm_epsilon",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "rope.freq_base": "rope_theta",
    "rope.freq_base_swa": "rope_local_base_freq",
    "rope.scaling.original_context_length": "original_max_position_embeddings",
    "expert_count": "num_experts",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "expert_weights_norm": "norm_topk_prob",
}
"""Metadata, without the architecture that stands before it, and the key of config.json."""
_REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "attention.clamp_kqv": ((0.0,), "queries, keys and values are not clipped"),
    "attention.causal": ((True,), "attention is causal"),
    "attention.output_scale": ((1.0,), "what attention gives is not scaled"),
    "logit_scale": ((1.0, 0.0), "logits are not scaled"),
    "residual_scale": ((1.0, 0.0), "what a block adds is not scaled"),
    "embedding_scale": ((1.0, 0.0), "embeddings are scaled as the family says"),
    "expert_shared_count": ((0,), "no expert is shared"),
    "expert_weights_scale": ((1.0, 0.0), "experts' outputs are not scaled"),
    "expert_gating_func": ((1, 0), "experts are weighed by a softmax"),
    "rope.scale_linear": ((1.0, 0.0), "write rope.scaling instead"),
    "rope.scaling.yarn_ext_factor": ((1.0,), "it is 1 in published models"),
    "rope.scaling.yarn_attn_factor": ((1.0,), "it is 1 in published models"),
    "tensor_data_layout": (("reference",), "convert the model again"),
}
"""What would make another model of it: the values that are allowed, and why no others."""
_IGNORED = ("rope_freqs.weight", "rope_factors_*.weight", "blk.*.attn_rot_embd.weight")
"""Factors of RoPE's frequencies are part of the config."""
_MAX_EXPERTS = 4096
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
"""Of every model that Llama 3.1's scaling was published with; a file has its effect alone."""


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """How `general.architecture` says what a family's config.json says."""

    model_type: str
    """The family."""
    variants: Mapping[str, str] = field(default_factory=dict)
    """Other families, where this metadata is above 0; the first counts."""
    keys: Mapping[str, str] = field(default_factory=dict)
    """Where this family's config.json has other keys than most."""
    always: Mapping[str, Any] = field(default_factory=dict)
    """Values of config.json that no metadata says, unless it does."""
    flags: Mapping[str, str] = field(default_factory=dict)
    """Keys of config.json that are true where the first layer has this tensor."""
    permuted: bool = False
    """Whether rows of queries and keys lie in pairs that RoPE turns, [D/2, 2] of each head; elsewhere [2, D/2]."""
    norm_offset: float = 0.0
    """What was added to scales of norms."""
    scale_by_width_at: int | None = None
    """A number of layers at which queries are scaled by the width over heads; elsewhere by the size of a head."""


ARCHITECTURES = {
    "llama": Architecture(
        model_type="llama",
        variants={"expert_count": "mixtral", "attention.sliding_window": "mistral"},
        flags={"attention_bias": "attn_output.bias", "mlp_bias": "ffn_down.bias"},
        permuted=True,
    ),
    "qwen2": Architecture(model_type="qwen2"),
    "qwen3": Architecture(model_type="qwen3"),
    "qwen3moe": Architecture(model_type="qwen3_moe", always={"norm_topk_prob": True}),
    "phi3": Architecture(model_type="phi3"),
    "olmo2": Architecture(model_type="olmo2"),
    "gemma": Architecture(model_type="gemma", norm_offset=1.0),
    "gemma2": Architecture(model_type="gemma2", norm_offset=1.0, scale_by_width_at=46),
    "gemma3": Architecture(model_type="gemma3_text", norm_offset=1.0, scale_by_width_at=62),
    "starcoder2": Architecture(model_type="starcoder2", flags={"use_bias": "attn_output.bias"}),
    "gpt2": Architecture(
        model_type="gpt2",
        keys={
            "context_length": "n_positions",
            "embedding_length": "n_embd",
            "block_count": "n_layer",
            "feed_forward_length": "n_inner",
            "attention.head_count": "n_head",
            "attention.layer_norm_epsilon": "layer_norm_epsilon",
        },
    ),
}
"""By `general.architecture`."""


def open_weights(file: GgufFile) -> PublishedWeights:
    """The arrays of a GGUF file.

    Raises:
        UserError: as `PublishedWeights`; or the architecture, or something that the metadata says, is not supported.
    """
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise UserError(
            f"{file.path}: general.architecture = {name!r} is not supported; it may be {', '.join(ARCHITECTURES)}"
        )
    architecture = ARCHITECTURES[name]
    said = Published(
        {key.removeprefix(f"{name}."): value for key, value in file.metadata.items() if key.startswith(f"{name}.")},
        f"{file.path}: {name}",
        BETTER,
    )
    values = _config(file, said, architecture)
    return PublishedWeights(
        file.path,
        Published(values, str(file.path), BETTER),
        _Tensors(file, architecture, values["head_dim"], values.get("num_experts", 0)),
        rename=partial(_rename, file=file, architecture=name),
        said_by="its metadata",
    )


def _rename(names: Names, *, file: GgufFile, architecture: str) -> Names:
    """A family's table with the names that llama.cpp gives; what it has no name for is left out."""
    gguf = import_gguf(file.path)
    number = next(number for number, name in gguf.MODEL_ARCH_NAMES.items() if name == architecture)
    table = gguf.get_tensor_name_map(number, 1)

    def renamed(part: Mapping[str, Arrangement], before: str) -> dict[str, Arrangement]:
        found: dict[str, Arrangement] = {}
        for name, layout in part.items():
            base, _, ending = (before + name).replace(".{}", "").rpartition(".")
            if (called := table.get_name(base)) is not None:
                each = ".{}" if "{}" in name else ""
                # Its matrices have outputs first, always.
                plain = layout.inner if isinstance(layout, Transposed) else layout
                found[f"{called.removeprefix('blk.0.')}{each}.{ending}"] = plain
        return found

    return Names(
        top=renamed(names.top, ""),
        block=renamed(names.block, names.layers.format(0)),
        layers="blk.{}.",
        ignored=_IGNORED,
    )


class _Tensors:
    """The tensors of a file as a published folder has them, but for their names."""

    def __init__(self, file: GgufFile, architecture: Architecture, head_dim: int, n_experts: int) -> None:
        self._file, self._architecture, self._head_dim = file, architecture, head_dim
        for name, entry in list(file.entries.items()):
            if len(entry.shape) == 3 and entry.shape[0] == n_experts:
                base, _, ending = name.rpartition(".")
                for number in range(n_experts):
                    file.part(name, number, f"{base}.{number}.{ending}")
                del file.entries[name]
        self.entries: dict[str, TensorEntry] = file.entries

    def read(self, name: str) -> npt.NDArray[Any]:
        """Float32. Raises UserError as `GgufFile.read`."""
        values = self._file.read(name)
        if self._architecture.permuted and (".attn_q." in name or ".attn_k." in name):
            paired = values.reshape(-1, self._head_dim // 2, 2, *values.shape[1:])
            values = paired.swapaxes(1, 2).reshape(values.shape)
        if self._architecture.norm_offset and name.endswith("norm.weight"):
            values = values - np.float32(self._architecture.norm_offset)
        return values


def _config(file: GgufFile, said: Published, architecture: Architecture) -> dict[str, Any]:
    """What config.json would say, with head_dim always."""
    for key, (allowed, why) in _REFUSED.items():
        said.refuse(key, *allowed, why=why)
    d_model, n_heads, n_layers, longest = (
        said.get(key, Positive[int])
        for key in ("embedding_length", "attention.head_count", "block_count", "context_length")
    )
    n_experts = said.get("expert_count", NotNegative[int], 0)
    for key, count, most in (
        ("block_count", n_layers, len(file.entries)),
        ("expert_count", n_experts, _MAX_EXPERTS),
    ):
        if count > most:
            raise UserError(f"{said.place}.{key} = {count:,} must be at most {most:,}, for the tensors that there are")
    table = file.entries.get("token_embd.weight")
    if table is None:
        raise UserError(f"{file.path}: token_embd.weight is missing; take a file with a whole model")
    head_dim = said.get("attention.key_length", Positive[int], max(d_model // n_heads, 1))
    said.refuse("attention.value_length", head_dim, why="keys and values of a head have one size")
    chosen = (other for key, other in architecture.variants.items() if said.get(key, NotNegative[int], 0) > 0)
    keys = {**_KEYS, **architecture.keys}
    values = {"rope_theta": 10_000.0, **architecture.always}  # where the metadata is silent
    values |= {keys[key]: said.values[key] for key in keys if key in said.values}
    values |= {
        "model_type": next(chosen, architecture.model_type),
        "vocab_size": table.shape[0],
        "head_dim": head_dim,
        "tie_word_embeddings": _is_tied(file),
        "sliding_window": said.get("attention.sliding_window", NotNegative[int], 0) or None,
    }
    values |= {key: f"blk.0.{tensor}" in file.entries for key, tensor in architecture.flags.items()}
    dims = said.get("rope.dimension_count", Positive[int], head_dim)
    if dims != head_dim:
        values["partial_rotary_factor"] = dims / head_dim
    values |= _windows(said, n_layers)
    if architecture.scale_by_width_at is not None:
        square = d_model / n_heads if n_layers == architecture.scale_by_width_at else head_dim
        scale = said.get("attention.scale", Positive[float], None)
        values["query_pre_attn_scalar"] = square if scale is None else as_written(scale**-2)
    if (scaling := _scaling(file, said, dims, longest)) is not None:
        values["rope_scaling"] = scaling
    return values


def _windows(said: Published, n_layers: int) -> dict[str, Any]:
    """Which layers have the window, where the metadata says; else as the family does."""
    key = "attention.sliding_window_pattern"
    pattern = said.values.get(key)
    if pattern is None:
        return {}
    if not isinstance(pattern, list):  # every so many layers one sees everything
        every = said.get(key, Positive[int])
        pattern = [(number + 1) % every > 0 for number in range(n_layers)]
    if len(pattern) < n_layers:
        raise UserError(f"{said.place}.{key} has {len(pattern)} layers, block_count = {n_layers}; take {BETTER}")
    return {"layer_types": ["sliding_attention" if slides else "full_attention" for slides in pattern[:n_layers]]}


def _is_tied(file: GgufFile) -> bool:
    """Whether there is no output table, or it is the embedding table once more."""
    if "output.weight" not in file.entries:
        return True
    table, output = (file.bytes_of(name) for name in ("token_embd.weight", "output.weight"))
    some = 1 << 16
    return bool(np.array_equal(table[:some], output[:some]) and np.array_equal(table, output))


def _scaling(file: GgufFile, said: Published, dims: int, longest: int) -> dict[str, Any] | None:
    """`rope_scaling` of config.json, for `dims` that are turned and a context of `longest`."""
    factors = {
        name: [as_written(value) for value in file.read(f"{tensor}.weight").ravel().tolist()]
        for name, tensor in (("short", "rope_factors_short"), ("long", "rope_factors_long"), ("all", "rope_freqs"))
        if f"{tensor}.weight" in file.entries
    }
    original = said.get("rope.scaling.original_context_length", Positive[int], longest)
    if "short" in factors and "long" in factors:
        scaling = {"rope_type": "longrope", "short_factor": factors["short"], "long_factor": factors["long"]}
        stretch = longest / original
        usual = math.sqrt(1 + math.log(stretch) / math.log(original)) if stretch > 1 and original > 1 else 1.0
        attention = said.get("rope.scaling.attn_factor", Positive[float], usual)
        return scaling if math.isclose(attention, usual, rel_tol=1e-5) else scaling | {"attention_factor": attention}
    if "all" in factors:
        theta = said.get("rope.freq_base", Positive[float], 10_000.0)
        return _llama3(factors["all"], theta, dims, longest)
    kind = said.get("rope.scaling.type", str, "none")
    if kind == "none":
        return None
    scaling = {"rope_type": kind, "factor": said.get("rope.scaling.factor", Positive[float])}
    if kind == "yarn":
        scaling["original_max_position_embeddings"] = original
        for end in ("beta_fast", "beta_slow"):
            scaling[end] = said.get(f"rope.scaling.yarn_{end}", Positive[float], None)
    return scaling


def _llama3(factors: list[float], theta: float, dims: int, longest: int) -> dict[str, Any]:
    """Llama 3.1's scaling from what it divides each frequency by; any other factors as they are.

    Between the wavelengths that it leaves alone and those that it stretches by `factor`, a frequency is divided by
    1 / ((1 - s) / factor + s) with s = (original / wavelength - low) / (high - low).
    """
    factor, found = max(factors), np.asarray(factors)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    between = (found > 1) & (found < factor)
    if 2 * len(factors) == dims and between.any():
        wavelengths = 2 * math.pi * theta ** (np.arange(0, dims, 2, dtype=np.float64) / dims)
        at = int(between.argmax())
        smooth = (1 / found[at] - 1 / factor) / (1 - 1 / factor)
        original = round(float(wavelengths[at]) * (low + smooth * (high - low)))
        smooths = np.clip((original / wavelengths - low) / (high - low), 0, 1)
        if np.allclose(found, 1 / ((1 - smooths) / factor + smooths), rtol=1e-4):
            return {
                "rope_type": "llama3",
                "factor": factor,
                **_LLAMA3,
                "original_max_position_embeddings": max(original, 1),
            }
    return {
        "rope_type": "longrope",
        "short_factor": factors,
        "long_factor": factors,
        "attention_factor": 1.0,
        "original_max_position_embeddings": longest,
    }
