"""Answers of the compilers, kept between commands: compiling a large step takes minutes, and the answer never changes.

An answer is found by a hash of everything that it depends on. What may or may not matter is hashed: a superfluous miss
costs one compilation, a false hit would be a wrong answer.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cattrs
from cattrs.strategies import configure_tagged_union

from maxlm import surroundings
from maxlm.config import RunConfig
from maxlm.config.serialize import to_dict
from maxlm.plan.compiled import CompiledStep, compile_step
from maxlm.plan.machines import Machine, installed
from maxlm.plan.out_of_memory import DoesNotFit

_converter = cattrs.Converter(forbid_extra_keys=True)
configure_tagged_union(CompiledStep | DoesNotFit, _converter, tag_name="kind")
_WITHOUT = ("run_dir", "target", "data", "checkpoint", "observe")
"""Parts of the config that the step does not see."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "libtpu", "jax-cuda13-plugin", "jax-cuda13-pjrt", "nvidia-cuda-nvcc",
             "nvidia-nvvm")  # fmt: skip
_VARIABLES = ("JAX_", "XLA_", "LIBTPU_", "TPU_", "MEGASCALE_", "CUDA_", "NVIDIA_", "MOSAIC_")
"""How the names of variables begin that jax and its compilers read."""
_ROOT = Path(__file__).parents[2]
_SOURCES = ("maxlm", "kernels_pallas")


def cached_compile(config: RunConfig, target: Machine) -> tuple[CompiledStep | DoesNotFit, bool]:
    """What `compile_step` answers, and whether it is from the cache, because it has answered before.

    The cache is the folder `$MAXLM_PLAN_CACHE`, else `$XDG_CACHE_HOME/maxlm/plan`, else ~/.cache/maxlm/plan. A file
    that cannot be read counts as missing; a folder that cannot be written keeps nothing.

    Raises:
        UserError: as `compile_step`; mistakes are not kept.
    """
    if (folder := cache_folder()) is None:
        return compile_step(config, target), False
    file = folder / f"{cache_key(ingredients(config, target))}.json"
    if (known := _load(file)) is not None:
        return known, True
    found = compile_step(config, target)
    with contextlib.suppress(OSError):
        _store(file, found)
    return found, False


def cache_folder() -> Path | None:
    """Where answers are kept; None: nowhere, as this user has no home."""
    if chosen := os.environ.get("MAXLM_PLAN_CACHE"):
        return Path(chosen)
    return surroundings.cache_folder("plan")


def ingredients(config: RunConfig, target: Machine) -> dict[str, Any]:
    """Everything that the answer depends on, as JSON values."""
    return {
        "config": {key: value for key, value in to_dict(config).items() if key not in _WITHOUT},
        "target": str(target),
        "packages": {name: version for name, version in installed().items() if name in _PACKAGES},
        "variables": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_VARIABLES)},
        "sources": sources_hash(_ROOT),
    }


def cache_key(values: Mapping[str, Any]) -> str:
    """The hash of JSON values, whatever the order of their keys: 64 letters."""
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def sources_hash(root: Path) -> str:
    """Of names and contents of all files of this project's two packages under a folder."""
    digest = hashlib.sha256()
    files = (path for name in _SOURCES for path in (root / name).rglob("*") if "__pycache__" not in path.parts)
    for path in sorted(filter(Path.is_file, files)):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(root)} {len(content)}\n".encode() + content)
    return digest.hexdigest()


def _load(file: Path) -> CompiledStep | DoesNotFit | None:
    try:
        stored = json.loads(file.read_text())
        if stored.pop("sha256") != _checksum(stored):
            return None
        return _converter.structure(stored, CompiledStep | DoesNotFit)  # type: ignore[arg-type]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, cattrs.BaseValidationError):
        return None


def _checksum(answer: Any) -> str:
    return hashlib.sha256(json.dumps(answer, sort_keys=True).encode()).hexdigest()


def _store(file: Path, result: CompiledStep | DoesNotFit) -> None:
    """Write beside, then rename: another command never sees half a file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    answer = _converter.unstructure(result, CompiledStep | DoesNotFit)
    stored = json.dumps({**answer, "sha256": _checksum(json.loads(json.dumps(answer)))})
    with tempfile.TemporaryDirectory(dir=file.parent) as folder:
        beside = Path(folder, file.name)
        beside.write_text(stored)
        beside.replace(file)
