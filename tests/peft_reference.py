"""Adapters with weights that every machine makes alike, and what `peft` says of them.

`python tests/peft_reference.py` asks peft (with transformers and torch), stores its logits and its adapter_config.json
in peft_logits.npz, and has it read what is written here.
"""

from __future__ import annotations

import dataclasses
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import jax
import numpy as np
import safetensors.numpy
from published import MODELS, ids, logits_of_transformers, open_in_transformers, values, write_model

from maxlm import load_model
from maxlm.config import (
    AdaLora,
    Adapter,
    AdapterKind,
    Dtype,
    ExecutionConfig,
    Ia3,
    LlamaAdapter,
    Lora,
    MlpEncoder,
    PrefixTuning,
    PromptTuning,
)
from maxlm.hub.families import FAMILIES
from maxlm.hub.models import pieces_of
from maxlm.hub.peft import write_peft
from maxlm.hub.peft_files import FILE
from maxlm.hub.peft_settings import CONFIG
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.load import ONE_DEVICE, layout_for
from maxlm.models import declared
from maxlm.models.adapters import begin, learned

LOGITS = Path(__file__).with_name("peft_logits.npz")

_ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "lora": ("llama", "LoraConfig", {"r": 3, "lora_alpha": 5, "target_modules": _ALL, "lora_dropout": 0.1}),
    "rslora": ("qwen2", "LoraConfig", {"r": 4, "use_rslora": True, "target_modules": ["k_proj", "down_proj"]}),
    "dora": ("llama", "LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "o_proj", "up_proj"]}),
    "fused": ("gpt2", "LoraConfig", {"r": 2, "target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True}),
    "patterns": (
        "llama",
        "LoraConfig",
        {
            "r": 2,
            "target_modules": ["q_proj", "v_proj"],
            "rank_pattern": {"v_proj": 3},
            "alpha_pattern": {"q_proj": 7},
            "layers_to_transform": [0, 2],
            "modules_to_save": ["lm_head"],
        },
    ),
    "adalora": (
        "llama",
        "AdaLoraConfig",
        {"init_r": 3, "target_r": 2, "total_step": 10, "target_modules": ["q_proj", "v_proj"]},
    ),
    "adalora_pattern": (
        "llama",
        "AdaLoraConfig",
        {
            "init_r": 3,
            "target_r": 2,
            "total_step": 10,
            "target_modules": ["v_proj"],
            "rank_pattern": {
                f"model.layers.{i}.self_attn.v_proj.lora_E": kept
                for i, kept in enumerate([[True, False, True], [True] * 3, [False, False, True]])
            },
        },
    ),
    "ia3": (
        "llama",
        "IA3Config",
        {"target_modules": ["k_proj", "v_proj", "down_proj"], "feedforward_modules": ["down_proj"]},
    ),
    "ia3_biases": ("qwen2", "IA3Config", {"target_modules": ["k_proj", "v_proj"], "feedforward_modules": []}),
    "prompt": ("gpt2", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "prompt_scaled": ("gemma2", "PromptTuningConfig", {"num_virtual_tokens": 3}),
    "p_tuning": ("llama", "PromptEncoderConfig", {"num_virtual_tokens": 3, "encoder_hidden_size": 8}),
    "prefix": ("mistral", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "prefix_projected": (
        "qwen3",
        "PrefixTuningConfig",
        {"num_virtual_tokens": 3, "prefix_projection": True, "encoder_hidden_size": 8},
    ),
    "prefix_places": ("gpt2", "PrefixTuningConfig", {"num_virtual_tokens": 3}),
    "llama_adapter": ("llama", "AdaptionPromptConfig", {"adapter_len": 3, "adapter_layers": 2}),
}
"""The base, the class of peft, and what it is told."""


def tensor(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """Of an adapter, decided by its name; vectors that multiply are around 1."""
    around = 1.0 if name.endswith(("ia3_l", "magnitude_vector")) else 0.0
    return np.abs(values(name, shape) + np.float32(around)) if around else values(name, shape)


def write_adapter(name: str, folder: Path) -> None:
    """The files of an adapter, as peft has written them."""
    with np.load(LOGITS, allow_pickle=False) as file:
        said, names = json.loads(str(file[f"{name}/config"])), json.loads(str(file[f"{name}/shapes"]))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(json.dumps(said))
    tensors = {key: tensor(key, tuple(shape)) for key, shape in names.items()}
    safetensors.numpy.save_file(tensors, folder / FILE, {"format": "pt"})


def reference(name: str) -> np.ndarray:
    """What peft's logits are."""
    with np.load(LOGITS, allow_pickle=False) as file:
        found: np.ndarray = file[f"{name}/logits"]
        return found


def main() -> None:
    import peft

    found: dict[str, Any] = {}
    for name, (base, kind, options) in ADAPTERS.items():
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            write_model(MODELS[base], folder / "base")
            model = peft.get_peft_model(
                open_in_transformers(folder / "base"), getattr(peft, kind)(task_type="CAUSAL_LM", **options)
            )
            model.save_pretrained(folder / "adapter")
            saved = safetensors.numpy.load_file(folder / "adapter" / FILE)
            drawn = {key: tensor(key, one.shape) for key, one in saved.items()}
            safetensors.numpy.save_file(drawn, folder / "adapter" / FILE, {"format": "pt"})
            model = peft.PeftModel.from_pretrained(open_in_transformers(folder / "base"), folder / "adapter").eval()
            said = json.loads((folder / "adapter" / CONFIG).read_text())
            said["base_model_name_or_path"] = None
            found[f"{name}/logits"] = of_text(logits_of_transformers(model, ids()))
            found[f"{name}/config"] = json.dumps(said, sort_keys=True)
            found[f"{name}/shapes"] = json.dumps({key: one.shape for key, one in saved.items()})
    np.savez_compressed(LOGITS, **found)
    read_by_peft()


KINDS: dict[str, AdapterKind] = {
    "lora": Lora(rank=2, alpha=3.0, targets=("all-linear",)),
    "some": Lora(rank=2, targets=("v_proj", "down_proj"), rank_stabilized=True),
    "dora": Lora(rank=2, dora=True, targets=("attention/*",)),
    "adalora": AdaLora(rank=3, target_rank=2),
    "ia3": Ia3(),
}
"""What is written here and read by peft: changes of matrices."""
VECTORS: dict[str, tuple[AdapterKind, tuple[str, ...]]] = {
    "prompt": (
        PromptTuning(length=3, encoder=MlpEncoder(hidden=8)),
        ("llama", "gpt2", "gemma2", "gemma3_text", "opt", "bloom"),
    ),
    "prefix": (PrefixTuning(length=3, hidden=8), ("llama", "gpt2", "mistral", "qwen3", "bloom", "phi3")),
    "llama_adapter": (LlamaAdapter(length=3, one_gate=True), ("llama", "llama 3.1")),
}
"""Learned vectors, with bases."""


def written(base: str, kind: AdapterKind, folder: Path, full: tuple[str, ...] = ()) -> np.ndarray:
    """A model and an adapter with random numbers, as folders `base` and `adapter`; logits of both as they are here."""
    write_model(MODELS[base], folder / "base")
    plain, model = load_model(folder / "base")
    made = dataclasses.replace(model, adapter=Adapter(kind=kind, full=full))
    rng = np.random.default_rng(1)
    vary = lambda array, x: x + 0.1 * rng.standard_normal(x.shape, np.float32) if array.trained else x
    parameters = begin(made, plain.parameters, jax.random.key(0))
    made, parameters = learned(made, jax.tree.map(vary, declared(made), parameters))
    family = FAMILIES[MODELS[base]["model_type"]]
    write_peft(folder / "adapter", made, pieces_of(parameters), family.names_of(model), base=None)
    adapted = LanguageModel(made, ExecutionConfig(dtype=Dtype.FLOAT32), layout_for(made, ONE_DEVICE), parameters)
    return np.asarray(adapted(ids()))


def read_by_peft() -> None:
    """What is written here, with matrices that differ in what the base has as one, in peft."""
    for base, full in (("llama", ("unembed", "*norm/scale")), ("qwen2", ("embed",)), ("gpt2", ()), ("gpt_neox", ())):
        for name, kind in KINDS.items():
            compare(base, name, kind, full)
    for name, (kind, bases) in VECTORS.items():
        for base in bases:
            compare(base, name, kind)


def compare(base: str, name: str, kind: AdapterKind, full: tuple[str, ...] = ()) -> None:
    """Logits of what is written here, here and in peft."""
    import peft

    with tempfile.TemporaryDirectory() as scratch:
        ours = written(base, kind, Path(scratch), full)
        model = open_in_transformers(Path(scratch) / "base")
        adapted = peft.PeftModel.from_pretrained(model, Path(scratch) / "adapter")
        theirs = of_text(logits_of_transformers(adapted.eval(), ids()))
        difference = np.abs(ours - theirs).max()
        print(f"{base} {name}: at most {difference:.1e} from peft's, which go up to {np.abs(theirs).max():.1f}")
        assert difference < 2e-4


def of_text(logits: np.ndarray) -> np.ndarray:
    """Without those of virtual tokens."""
    return logits[:, -ids().shape[1] :]


if __name__ == "__main__":
    sys.exit(main())
