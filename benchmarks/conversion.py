"""Seconds and memory of `maxlm.convert` with a model of 1.1 B parameters, beside transformers where it is installed.

    python -m benchmarks.conversion [PYTHON]

Prints one line of JSON. The model is of TinyLlama's sizes, random, in bfloat16 (2.2 GB), in a temporary folder,
which needs 12 GB. PYTHON is an interpreter with torch and transformers (extra `parity`), for its own load and save.
Memory is the most that a process had resident, of a process of its own for each.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from tokenizers import Tokenizer, models

from benchmarks.steps import cpu_name
from maxlm.hub.families import FAMILIES
from maxlm.hub.names import tensors
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import Spec, write_tensors

_CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 22,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "hidden_act": "silu",
}
_THEIRS = """
import sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
model.save_pretrained(sys.argv[2])
"""
# ru_maxrss of children is that of the largest so far: each command has a parent of its own.
_MEASURE = """
import resource, subprocess, sys, time
began = time.perf_counter()
subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL)
print(time.perf_counter() - began, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def write_model(folder: Path) -> int:
    """The folder; and how many parameters it has."""
    family = FAMILIES["llama"]
    model = family.read(Published(_CONFIG, "config.json"))
    dtype, draw = np.dtype(ml_dtypes.bfloat16), np.random.default_rng(0)
    listed = tensors(model, family.names_of(model))
    folder.mkdir()
    numbers = ((draw.standard_normal(one.shape, np.float32) * np.float32(0.02)).astype(dtype) for one in listed)
    write_tensors(folder, {one.name: Spec(one.shape, dtype) for one in listed}, numbers)
    (folder / "config.json").write_text(json.dumps(_CONFIG))
    vocabulary = {f"t{i}": i for i in range(_CONFIG["vocab_size"] - 1)} | {"</s>": _CONFIG["vocab_size"] - 1}
    Tokenizer(models.BPE(vocab=vocabulary, merges=[])).save(str(folder / "tokenizer.json"))
    return sum(int(np.prod(one.shape)) for one in listed)


def measured(*command: str) -> dict[str, float]:
    """Seconds and MiB of one command."""
    done = subprocess.run([sys.executable, "-c", _MEASURE, *command], check=True, capture_output=True, text=True)
    seconds, kib = map(float, done.stdout.split())
    return {"seconds": round(seconds, 1), "peak_mib": round(kib / 1024)}


def main(argv: list[str]) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        place = Path(scratch)
        convert = (sys.executable, "-m", "maxlm.convert")
        parameters = write_model(place / "hf")
        result: dict[str, Any] = {
            "benchmark": "conversion",
            "parameters": parameters,
            "folder_to_folder": measured(*convert, "--from", f"hf:{place}/hf", "--to", f"hf:{place}/copy"),
            "folder_to_run": measured(*convert, "--from", f"hf:{place}/hf", "--to", f"run:{place}/run"),
            "run_to_folder": measured(
                *convert, "--from", f"run:{place}/run", "--to", f"hf:{place}/back", "--dtype", "bfloat16"
            ),
        }
        if argv:
            result["transformers"] = measured(argv[0], "-c", _THEIRS, f"{place}/hf", f"{place}/theirs")
        result |= {"python": platform.python_version(), "cpu": cpu_name(), "cores": os.cpu_count()}
    print(json.dumps(result))


if __name__ == "__main__":
    main(sys.argv[1:])
