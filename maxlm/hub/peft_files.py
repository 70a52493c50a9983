"""The two files of an adapter as peft writes them, read with no tensor missing and none unexpected."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import Adapter, UserError
from maxlm.hub.folder import appearing
from maxlm.hub.peft_settings import CONFIG
from maxlm.hub.tensor_files import Spec, TensorFolder, write_tensors

Values = npt.NDArray[np.float32]
FILE = "adapter_model.safetensors"
BASE_MODEL = "base_model.model."
"""What stands before the names of the base's modules."""
_SHOWN = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class PeftAdapter:
    """An adapter that was read."""

    adapter: Adapter
    arrays: dict[str, Values]
    """By their names in a model with the adapter: those that it adds, and those of the base that it has trained."""
    norms: dict[str, float]
    """Of each module, |scale B A| (Frobenius), |l - 1| of IA3, or the length of learned vectors, times their gate."""


@contextlib.contextmanager
def exactly(folder: Path, wanted: Collection[str], allowed: Collection[str] = ()) -> Iterator[TensorFolder]:
    """The tensors of an adapter, to be read.

    Args:
        folder: with FILE.
        wanted: names that must be there.
        allowed: names that may be there. No other may.

    Raises:
        UserError: the file is missing or damaged, lacks a tensor, or has another one.
    """
    if (folder / "adapter_model.bin").exists() and not (folder / FILE).exists():
        raise UserError(
            f"{folder / 'adapter_model.bin'}: is a pickle, which may run code and is not read; save it again with peft "
            "as safetensors (model.save_pretrained(DIR))"
        )
    with TensorFolder(folder, FILE) as files:
        there = files.entries.keys()
        problems = [f"{name} is missing" for name in sorted(set(wanted) - there)]
        problems += [f"{name} is not expected" for name in sorted(there - set(wanted) - set(allowed))]
        if problems or not wanted:
            more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            what = problems[:_SHOWN] + more or ["there is nothing in it"]
            raise UserError(
                f"{folder / FILE}: the tensors are not those that {CONFIG} says of this base; use the model that the "
                f"adapter was trained on, and both files from one place: {'; '.join(what)}"
            )
        yield files


def require_shape(folder: Path, name: str, values: Values, shape: tuple[int, ...]) -> None:
    """
    Raises:
        UserError: a tensor has another one.
    """
    if values.shape != shape:
        raise UserError(
            f"{folder / FILE}: {name} has the shape {list(values.shape)}, for this base it must be {list(shape)}; use "
            "the model that the adapter was trained on"
        )


def write_files(folder: Path, base: str | None, said: Mapping[str, Any], tensors: Mapping[str, Values]) -> None:
    """A new folder with both files.

    Args:
        folder: new.
        base: where the base is, for other programs; None: they are told.
        said: what CONFIG has of this adapter alone.
        tensors: by their whole names.

    Raises:
        UserError: something is at `folder`.
    """
    values = {"base_model_name_or_path": base, "inference_mode": True, "task_type": "CAUSAL_LM", **said}
    with appearing(folder) as place:
        (place / CONFIG).write_text(json.dumps(dict(sorted(values.items())), indent=2) + "\n")
        specs = {name: Spec(one.shape, one.dtype) for name, one in tensors.items()}
        write_tensors(place, specs, iter(tensors.values()), single=FILE)
