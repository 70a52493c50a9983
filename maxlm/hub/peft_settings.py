"""adapter_config.json of `peft`: which of its keys are understood, and which modules it names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import AdaLora, DyLora, Lora, UserError

CONFIG = "adapter_config.json"
_KNOWN = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "fan_in_fan_out", "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "init_ia3_weights", "loftq_config", "init_r"),
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "qalora_group_size"),
    *("megatron_core", "ephemeral_gpu_offload", "ensure_weight_tying", "num_virtual_tokens", "token_dim"),
    *("num_transformer_submodules", "num_attention_heads", "num_layers", "prompt_tuning_init", "init_weights"),
    *("prompt_tuning_init_text", "tokenizer_name_or_path", "tokenizer_kwargs", "encoder_reparameterization_type"),
    *("encoder_hidden_size", "encoder_num_layers", "encoder_dropout", "prefix_projection"),
    *("adapter_len", "adapter_layers"),
)
"""Keys of adapter_config.json that are understood, or say nothing of what the adapter computes."""
ADDED_TO_RANK = 1e-5
"""What peft adds to the rank of ADALORA in the denominator of its scale."""
_NOTHING: tuple[Any, ...] = (None, False, "none", [], {})
"""Values with which any other key says nothing either."""
_BEGUN = (True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights with which the base stayed as it was."""


def require_known(folder: Path, said: Mapping[str, Any]) -> None:
    """
    Raises:
        UserError: something that it says is not understood, or not as peft writes it.
    """
    for key, value in said.items():
        if key not in _KNOWN and value not in _NOTHING:
            raise UserError(
                f"{folder / CONFIG}: {key} = {json.dumps(value)[:60]} is not understood; merge it with peft"
            )
    begun = said.get("init_lora_weights", True)
    if not any(begun is known or begun == known for known in _BEGUN):
        raise UserError(
            f"{folder / CONFIG}: init_lora_weights = {begun!r} has changed the base too; convert it with peft "
            "(path_initial_model_for_weight_conversion)"
        )
    adalora = said.get("peft_type") == "ADALORA"
    names = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    each = lambda fits: lambda value: isinstance(value, dict) and all(map(fits, value.values()))
    rules: dict[str, Callable[[Any], bool]] = {
        "r": _is_rank,
        "rank_pattern": each(_is_choice if adalora else _is_rank),
        "init_r": _is_rank,
        "target_r": _is_rank,
        "tinit": _is_count,
        "tfinal": _is_count,
        "deltaT": _is_rank,
        "beta1": lambda value: _is_number(value) and 0 <= value < 1,
        "beta2": lambda value: _is_number(value) and 0 <= value < 1,
        "orth_reg_weight": lambda value: _is_number(value) and value >= 0,
        "lora_alpha": _is_number,
        "alpha_pattern": each(_is_number),
        "lora_dropout": lambda value: _is_number(value) and 0 <= value < 1,
        "modules_to_save": names,
        "feedforward_modules": names,
    }
    for key, fits in rules.items():
        if said.get(key) is not None and not fits(said[key]):
            raise UserError(f"{folder / CONFIG}: {key} = {json.dumps(said[key])[:60]} is not as peft writes it")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_rank(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _is_choice(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(one, bool) for one in value)


def rank_of(said: Mapping[str, Any], module: str) -> int:
    """What it says that the rank of a module is; of LORA."""
    patterns = said.get("rank_pattern") or {}
    found: int = next((rank for key, rank in patterns.items() if ends(module, [key])), said.get("r", 8))
    return found


def is_target(folder: Path, said: Mapping[str, Any], module: str) -> bool:
    """Whether peft puts the adapter at a module, as its `check_target_module_exists` says."""
    wanted, but = said.get("target_modules"), said.get("exclude_modules") or []
    if not isinstance(wanted, list) or not isinstance(but, list):
        raise UserError(
            f"{folder / CONFIG}: target_modules and exclude_modules must be lists of names; write the names out"
        )
    if module in but or ends(module, but) or not ends(module, wanted):
        return False
    layers = said.get("layers_to_transform")
    if layers is None:
        return True
    number = re.search(r"\.(\d+)\.", module)
    return number is not None and int(number[1]) in (layers if isinstance(layers, list) else [layers])


def ends(module: str, endings: Sequence[str]) -> bool:
    """Whether a module's name is one of these, or ends so after a dot."""
    return any(module == ending or module.endswith(f".{ending}") for ending in endings)


def short(modules: Sequence[str], everything: Sequence[str]) -> list[str]:
    """Their last words, where those name no other module."""
    last = lambda name: name.rpartition(".")[2]
    words = {last(name) for name in modules}
    others = {last(name) for name in set(everything) - set(modules)}
    return sorted(words) if not words & others else sorted(modules)


def kept_triplets(folder: Path, said: Mapping[str, Any], module: str, rank: int) -> list[int]:
    """Which triplets of a module, counted from 0, are in its tensors; of ADALORA.

    Raises:
        UserError: it does not say so of each.
    """
    choice = (said.get("rank_pattern") or {}).get(f"{module}.lora_E", [True] * rank)
    if len(choice) != rank:
        raise UserError(
            f"{folder / CONFIG}: rank_pattern has {len(choice)} choices for {module}, but init_r = {rank}; use both "
            "files from one place"
        )
    return [number for number, there in enumerate(choice) if there]


def adalora_of(said: Mapping[str, Any], targets: Sequence[str]) -> AdaLora:
    """What it says of ADALORA, whose dropout is not kept: ours has none in training."""
    rank, alpha = said.get("init_r", 12), said.get("lora_alpha", 8)
    return AdaLora(
        rank=rank,
        target_rank=min(said.get("target_r", 8), rank),
        alpha=float(alpha if alpha > 0 else rank),
        warmup=said.get("tinit", 0),
        final=said.get("tfinal", 0),
        every=said.get("deltaT", 1),
        beta1=said.get("beta1", 0.85),
        beta2=said.get("beta2", 0.85),
        orthogonality=said.get("orth_reg_weight", 0.5),
        targets=tuple(targets),
    )


def said_of_lora(kind: Lora | DyLora, grown: Mapping[str, int]) -> dict[str, Any]:
    """What adapter_config.json has of LoRA alone.

    Args:
        kind: of the adapter.
        grown: ranks of modules that have another one.
    """
    lora = kind if isinstance(kind, Lora) else Lora(rank=kind.rank, alpha=kind.alpha)
    root = 0.5 if lora.rank_stabilized else 1.0
    return {
        "peft_type": "LORA",
        "r": lora.rank,
        "lora_alpha": _plain(lora.alpha),
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "use_dora": lora.dora,
        "rank_pattern": dict(grown),
        "alpha_pattern": {name: lora.alpha * (rank / kind.rank) ** root for name, rank in grown.items()},
    }


def said_of_adalora(kind: AdaLora, rank: int) -> dict[str, Any]:
    """What it has of AdaLoRA alone, of modules that all have a rank."""
    return {
        "peft_type": "ADALORA",
        "init_r": rank,
        "target_r": kind.target_rank * rank // kind.rank,
        "lora_alpha": _plain(kind.alpha * rank / kind.rank),
        "tinit": kind.warmup,
        "tfinal": kind.final,
        "deltaT": kind.every,
        "beta1": kind.beta1,
        "beta2": kind.beta2,
        "orth_reg_weight": kind.orthogonality,
        "total_step": kind.warmup + kind.final + 1,  # the fewest that peft takes: an adapter does not say its run's
    }


def _plain(alpha: float) -> float:
    return int(alpha) if float(alpha).is_integer() else alpha
