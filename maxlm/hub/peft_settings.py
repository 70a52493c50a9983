"""An adapter as the settings file of peft says it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, assert_never

from maxlm.config import AdaLora, Adapter, Bottleneck, DyLora, Ia3, Lora, PrefixTuning, PromptTuning


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
        case Bottleneck() | PromptTuning() | PrefixTuning():
            raise AssertionError("refused before")
        case _:
            assert_never(kind)
