"""adapter_config.json of `peft`: which of its keys are understood, and which modules it names."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, assert_never

from maxlm.config import (
    AdaLora,
    Adapter,
    Bottleneck,
    DyLora,
    Ia3,
    LlamaAdapter,
    Lora,
    PrefixTuning,
    PromptTuning,
    UserError,
)

CONFIG = "adapter_config.json"
_KNOWN = (
    *("peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision"),
    *("inference_mode", "runtime_config", "r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora", "rank_pattern"),
    *("alpha_pattern", "fan_in_fan_out", "target_modules", "exclude_modules", "feedforward_modules", "modules_to_save"),
    *("layers_to_transform", "layers_pattern", "init_lora_weights", "init_ia3_weights", "loftq_config", "init_r"),
    *("target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step", "qalora_group_size"),
    *("megatron_core", "ephemeral_gpu_offload", "ensure_weight_tying"),
)
"""Keys of adapter_config.json that are understood, or say nothing of what the adapter computes."""
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
    if said.get("peft_type") == "ADALORA" and said.get("rank_pattern"):
        raise UserError(f"{folder / CONFIG}: rank_pattern of ADALORA is not read; merge the adapter with peft")
    names = lambda value: isinstance(value, list) and all(isinstance(name, str) for name in value)
    each = lambda fits: lambda value: isinstance(value, dict) and all(map(fits, value.values()))
    rules: dict[str, Callable[[Any], bool]] = {
        "r": _is_rank,
        "rank_pattern": each(_is_rank),
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


def said_of(adapter: Adapter, ranks: Mapping[str, int], inputs_of: Sequence[str]) -> dict[str, Any]:
    """What adapter_config.json has of a kind alone."""
    match kind := adapter.kind:
        case Lora() | DyLora() | AdaLora():
            lora = kind if isinstance(kind, Lora) else Lora(rank=kind.rank, alpha=kind.alpha)
            grown = {name: rank / kind.rank for name, rank in ranks.items()}
            root = 0.5 if lora.rank_stabilized else 1.0
            return {
                "peft_type": "LORA",
                "r": lora.rank,
                "lora_alpha": int(lora.alpha) if float(lora.alpha).is_integer() else lora.alpha,
                "lora_dropout": lora.dropout,
                "use_rslora": lora.rank_stabilized,
                "use_dora": lora.dora,
                "rank_pattern": dict(ranks),
                "alpha_pattern": {name: lora.alpha * times**root for name, times in grown.items()},
            }
        case Ia3():
            return {"peft_type": "IA3", "feedforward_modules": list(inputs_of)}
        case Bottleneck() | PromptTuning() | PrefixTuning() | LlamaAdapter():
            raise AssertionError("refused before")
        case _:
            assert_never(kind)
