"""A Hugging Face folder as a model and back: config.json, safetensors, the tokenizer's files."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.checkpoint.reference import PUBLISHED
from maxlm.config import ModelConfig, UserError
from maxlm.config.changes import changes
from maxlm.config.fields import Changes
from maxlm.config.json_file import read_object
from maxlm.hub.bitsandbytes import BitsAndBytes, has_nf4
from maxlm.hub.compressed import CompressedTensors
from maxlm.hub.families import FAMILIES
from maxlm.hub.family import ModelFamily
from maxlm.hub.held_weights import WrittenTensor
from maxlm.hub.names import Piece, Tensor, tensors
from maxlm.hub.published import Published
from maxlm.hub.quantized import Dequantised
from maxlm.hub.tensor_files import Spec, as_format, write_tensors
from maxlm.hub.weights import PublishedWeights

Pieces = Callable[[Sequence[Piece]], list[npt.NDArray[Any]]]
"""Gives the parts of arrays that a tensor holds."""
GENERATION = "generation_config.json"
_TOKENIZER_CONFIG = "tokenizer_config.json"
VOCABULARIES = ("tokenizer.json", "tokenizer.model", "qwen.tiktoken")
"""Each of them is a tokenizer."""
TOKENIZER_FILES = (
    *VOCABULARIES,
    _TOKENIZER_CONFIG,
    "special_tokens_map.json",
    "added_tokens.json",
    GENERATION,
    "chat_template.jinja",
)
"""What goes along with a model as it is; the chat template stands in tokenizer_config.json or in a file of its own."""


def open_folder(folder: Path) -> PublishedWeights:
    """The weights of a Hugging Face folder.

    Raises:
        UserError: as `PublishedWeights`; or a file is missing or damaged.
    """
    published = Published.read(folder)
    return PublishedWeights(folder, published, Dequantised(folder, published))


def _layer_by_layer(model: ModelConfig) -> ModelConfig:
    """The same model without the pattern in which its layers are stacked."""
    return dataclasses.replace(model, blocks=model.layers, first_blocks=())


def family_of(model: ModelConfig, prefer: ModelFamily | None = None) -> tuple[ModelFamily, dict[str, Any]]:
    """The first family that can say all of a model, `prefer` before all, and its config.json.

    Raises:
        UserError: there is none.
    """
    if model.medusa is not None:
        raise UserError(
            "model.medusa: other programs have no heads that guess at later tokens; convert the run whose model these "
            "were trained on"
        )
    for family in [*([] if prefer is None else [prefer]), *FAMILIES.values()]:
        try:
            values = {"architectures": [family.architecture], "model_type": family.model_type} | family.write(model)
            values["pad_token_id"] = None  # of some families it would be an id that the model may not have
            said = family.read(Published(values, "config.json"))
            if not any(
                one.change is Changes.IDENTITY for one in changes(_layer_by_layer(model), _layer_by_layer(said))
            ):
                tensors(model, family.names_of(model))
                return family, values
        except (UserError, AssertionError, AttributeError):  # it has no words for a part of the model
            continue
    raise UserError(
        f"model: none of the families {', '.join(FAMILIES)} can say all of it, so that other programs cannot read it; "
        "docs/hub.md says what each can"
    )


def write_folder(
    model: ModelConfig,
    pieces: Pieces,
    folder: Path,
    *,
    dtype: np.dtype[Any],
    tokenizer: Callable[[Path], None] | None = None,
    prefer: ModelFamily | None = None,
    quantised: Any = None,
) -> ModelFamily:
    """Write a model for `transformers` and other programs; the folder appears when all is in it.

    Args:
        model: what it is.
        pieces: the parts of arrays that a tensor holds, asked for array by array, so that one may stay in memory for
            all its layers.
        folder: new.
        dtype: number format of the files.
        tokenizer: what writes the tokenizer's files into the folder, as `copy_tokenizer`.
        prefer: the family that it came from.
        quantised: its parameters, where some are `Quantised` weights: those are written in the layout of
            bitsandbytes, where some are NF4, or of compressed-tensors, as far as that has one for them.

    Raises:
        UserError: there is something at `folder`; no family can say all of the model; a number is too large for
            `dtype`; or it cannot be written.
    """
    family, values = family_of(model, prefer)
    by_array = lambda tensor: [part.array.name for part in tensor.parts]
    listed = sorted(tensors(model, family.names_of(model)), key=by_array)

    def plain(tensor: Tensor) -> WrittenTensor:
        make = lambda: as_format(f"{folder}: {tensor.name}", tensor.join(pieces(tensor.parts)), dtype)
        return WrittenTensor(tensor.name, Spec(tensor.shape, dtype), make)

    few_bits = (BitsAndBytes if has_nf4(quantised) else CompressedTensors)(quantised, dtype)
    of = lambda tensor: None if quantised is None else few_bits.entries(tensor)
    entries = [entry for tensor in listed for entry in of(tensor) or [plain(tensor)]]

    with appearing(folder) as partial:
        write_tensors(partial, {entry.name: entry.spec for entry in entries}, (entry.make() for entry in entries))
        values |= few_bits.config()
        if tokenizer is not None:
            tokenizer(partial)
        values |= {"dtype": dtype.name, "torch_dtype": dtype.name} | _ids_of_ends(partial / GENERATION)
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
    return family


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer, as far as there are any.

    What a generation_config.json does not say of the ends of a text, and the config.json does, is added to it.

    Raises:
        UserError: a file is a link to nothing, or damaged.
    """
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
        elif (source / name).is_symlink():
            raise UserError(f"{source / name}: is a link to nothing; download it again")
    write_ends(target, _ids_of_ends(source / "config.json") | _ids_of_ends(target / GENERATION))


def copy_template(taught: Path, target: Path) -> None:
    """The chat template that a run was taught with, and the tokens that it writes, in place of any that is there."""
    said = _said(target / _TOKENIZER_CONFIG)
    said.pop("chat_template", None)
    for file in taught.rglob("*.jinja"):
        place = target / file.relative_to(taught)
        place.parent.mkdir(exist_ok=True)
        shutil.copyfile(file, place)
    text = json.dumps(said | _said(taught / _TOKENIZER_CONFIG), indent=2, ensure_ascii=False) + "\n"
    (target / _TOKENIZER_CONFIG).write_text(text, encoding="utf-8")


def write_ends(folder: Path, ids: Mapping[str, int | list[int] | None]) -> None:
    """`bos_token_id` and `eos_token_id`, as far as there are any, in the generation_config.json."""
    said = _said(folder / GENERATION)
    whole = said | {key: value for key, value in ids.items() if value is not None}
    if whole != said:
        (folder / GENERATION).write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _ids_of_ends(file: Path) -> dict[str, Any]:
    """`bos_token_id` and `eos_token_id`, as far as a file is there and says them."""
    return {
        key: value
        for key, value in _said(file).items()
        if key in ("bos_token_id", "eos_token_id") and value is not None
    }


def _said(file: Path) -> dict[str, Any]:
    return read_object(file, "an object, as the model came with it") if file.is_file() else {}


def require_new(folder: Path) -> None:
    """Raises UserError where there is something already (an empty folder is nothing, a link leads to none), or where no
    folder can be made, which is known only after long work otherwise."""
    try:
        there = os.path.lexists(folder)
        if there and (folder.is_symlink() or not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is there already; name a new folder")
    except OSError as error:
        raise UserError(f"{folder}: cannot be looked at ({error.strerror}); name another folder") from error
    parent = next(one for one in folder.absolute().parents if os.path.lexists(one))
    if not (parent.is_dir() and os.access(parent, os.W_OK | os.X_OK)):
        why = "may not be written in" if parent.is_dir() else "is no folder"
        raise UserError(f"{folder}: cannot be made, as {parent} {why}; name another folder")


@contextlib.contextmanager
def appearing(folder: Path, *, settle_s: float = 0.0) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when all is written, and is gone when that fails.

    Args:
        folder: new.
        settle_s: how long after a failure threads may still write there.

    Raises:
        UserError: there is something at `folder`, or at the place beside it, or no room for it.
    """
    require_new(folder)
    folder = folder.resolve()
    partial = folder.with_name(f"{folder.name}.partial")
    if os.path.lexists(partial):
        raise UserError(
            f"{partial}: is there already; remove it, if it is of a conversion that did not end, or name another folder"
        )
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise _unwritable(error, folder) from error
    try:
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise _unwritable(error, folder) from error
    finally:
        if partial.exists():
            until = time.monotonic() + settle_s
            shutil.rmtree(partial, ignore_errors=True)
            while time.monotonic() < until:
                time.sleep(0.05)
                shutil.rmtree(partial, ignore_errors=True)


def _unwritable(error: OSError, folder: Path) -> UserError:
    return UserError(
        f"{error.filename or folder}: cannot be written ({error.strerror}); make room or name another folder"
    )


def write_origin(run_dir: Path, family: ModelFamily | None, copy_tokenizer: Callable[[Path], None]) -> None:
    """The folder PUBLISHED of a run: the tokenizer's files, the chat template, and which family the model is of."""
    folder = run_dir / PUBLISHED
    folder.mkdir(exist_ok=True)
    copy_tokenizer(folder)
    if family is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": family.model_type}) + "\n")
