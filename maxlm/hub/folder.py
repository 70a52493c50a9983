"""A Hugging Face folder as a model and back: config.json, safetensors, the tokenizer's files."""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import fnmatch
import itertools
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import ModelConfig, UserError
from maxlm.config.changes import changes
from maxlm.config.fields import Changes
from maxlm.hub.families import FAMILIES
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Piece, Tensor, tensors
from maxlm.hub.published import Published
from maxlm.hub.quantized import Dequantised
from maxlm.hub.tensor_files import DTYPES, Spec, write_tensors

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "qwen.tiktoken",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "generation_config.json",
    "chat_template.jinja",
)
"""What goes along with a model as it is; the chat template stands in tokenizer_config.json or in a file of its own."""
_SHOWN = 5


class ModelFolder:
    """The weights of a folder under the names of this project, each read when it is asked for."""

    def __init__(self, folder: Path) -> None:
        """Looks at config.json and at the names and shapes of all tensors.

        Raises:
            UserError: the family is not known, or has not been told all that config.json says; a tensor is missing, of
                another shape, or not expected: all are listed.
        """
        self.folder = folder
        published = Published.read(folder)
        self.family = _family(published)
        self.model = self.family.read(published)
        self._names = self.family.names_of(self.model)
        self._tensors = tensors(self.model, self._names)
        self._files = Dequantised(folder, published)
        self._compare()
        self._homes: dict[str, dict[tuple[int, ...], tuple[Tensor, int]]] = {}
        for tensor in self._tensors:
            for number, part in enumerate(tensor.parts):
                self._homes.setdefault(part.array.name, {})[part.at] = tensor, number

    def parameters(self, wanted: Any) -> Any:
        """All arrays, float32, in the shardings of `wanted` (as `maxlm.models.abstract_parameters` makes it).

        The host has one array at a time, or the part of it that a device gets, and one tensor.
        """

        def read(path: tuple[jax.tree_util.DictKey, ...], leaf: jax.ShapeDtypeStruct) -> jax.Array:
            name = "/".join(str(key.key) for key in path)
            return jax.make_array_from_callback(leaf.shape, leaf.sharding, lambda index: self.array(name, index or ()))

        return jax.tree_util.tree_map_with_path(read, wanted)

    def array(self, name: str, index: tuple[slice, ...] = ()) -> npt.NDArray[np.float32]:
        """One array of the model, or the part of it that `index` says."""
        homes = self._homes[name]
        part = next(tensor.parts[number] for tensor, number in homes.values())
        index = index or (slice(None),) * len(part.array.shape)
        n_places = len(part.at)
        ranges = [range(*one.indices(size)) for one, size in zip(index, part.array.shape[:n_places], strict=False)]
        inner = index[n_places:]
        shape = [len(one) for one in ranges]
        shape += [len(range(*one.indices(size))) for one, size in zip(inner, part.dims.values(), strict=True)]
        found = np.empty(shape, np.float32)
        for to, at in zip(np.ndindex(*shape[:n_places]), itertools.product(*ranges), strict=True):
            found[to] = self.piece(homes[at][0].parts[homes[at][1]])[inner]
        return found

    def piece(self, part: Piece) -> npt.NDArray[Any]:
        """What one tensor has of an array, in the number format of the file."""
        tensor, number = self._homes[part.array.name][part.at]
        return tensor.split(self._files.read(tensor.name))[number]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The number format of most of the numbers."""
        sizes: dict[str, int] = {}
        for entry in self._files.entries.values():
            sizes[entry.dtype] = sizes.get(entry.dtype, 0) + int(np.prod(entry.shape))
        return DTYPES.get(max(sizes, key=lambda name: sizes[name]), np.dtype(np.float32))

    @property
    def ignored(self) -> list[str]:
        """Names of tensors that the model does not use."""
        return sorted(filter(self._is_ignored, self._files.entries))

    def _compare(self) -> None:
        there = {name: entry.shape for name, entry in self._files.entries.items() if not self._is_ignored(name)}
        wanted = {tensor.name: tensor.shape for tensor in self._tensors}
        problems = [f"{name} is missing" for name in wanted if name not in there]
        problems += [
            f"{name} has the shape {list(there[name])}, config.json says {list(shape)}"
            for name, shape in wanted.items()
            if name in there and there[name] != shape
        ]
        problems += [f"{name} is not expected" for name in there if name not in wanted and not self._is_tied(name)]
        if problems:
            more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise UserError(
                "\n".join(
                    [
                        f"{self.folder}: the tensors are not those of the {self.family.model_type} that config.json "
                        "describes; take both from one place:",
                        *problems[:_SHOWN],
                        *more,
                    ]
                )
            )

    def _is_ignored(self, name: str) -> bool:
        return any(fnmatch.fnmatchcase(name, one) for one in self._names.ignored)

    def _is_tied(self, name: str) -> bool:
        """Whether it is an output table that is there although it is the embedding table."""
        top = self._names.top
        if not self.model.tied or top.get(name) != "unembed":
            return False
        embed = next(theirs for theirs, ours in top.items() if ours == "embed")
        return np.array_equal(self._files.read(name), self._files.read(embed))


def _family(published: Published) -> ModelFamily:
    name = published.get("model_type", str)
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, 1, 0.0)[0]
        raise UserError(
            f"{published.place}: model_type = {name!r} is not supported; the nearest that is: {near!r} (all: "
            f"{', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[name]


def _layer_by_layer(model: ModelConfig) -> ModelConfig:
    """The same model without the pattern in which its layers are stacked."""
    return dataclasses.replace(model, blocks=model.layers, first_blocks=())


def family_of(model: ModelConfig, prefer: ModelFamily | None = None) -> tuple[ModelFamily, dict[str, Any]]:
    """The first family that can say all of a model, `prefer` before all, and its config.json.

    Raises:
        UserError: there is none.
    """
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
    piece: Callable[[Piece], npt.NDArray[Any]],
    folder: Path,
    *,
    dtype: np.dtype[Any],
    tokenizer: Path | None = None,
    prefer: ModelFamily | None = None,
) -> ModelFamily:
    """Write a model for `transformers` and other programs; the folder appears when all is in it.

    Args:
        model: what it is.
        piece: the part of an array that a tensor holds.
        folder: new.
        dtype: number format of the files.
        tokenizer: a folder whose tokenizer files go along.
        prefer: the family that it came from.

    Raises:
        UserError: there is something at `folder`; no family can say all of the model; or it cannot be written.
    """
    family, values = family_of(model, prefer)
    listed = tensors(model, family.names_of(model))
    specs = {tensor.name: Spec(tensor.shape, dtype) for tensor in listed}

    with appearing(folder) as partial:
        joined = (tensor.join([piece(part) for part in tensor.parts]).astype(dtype) for tensor in listed)
        write_tensors(partial, specs, joined)
        values |= {"dtype": dtype.name, "torch_dtype": dtype.name}
        (partial / "config.json").write_text(json.dumps(values, indent=2) + "\n")
        if tokenizer is not None:
            copy_tokenizer(tokenizer, partial)
    return family


def copy_tokenizer(source: Path, target: Path) -> None:
    """The files of a tokenizer, as far as there are any."""
    for name in TOKENIZER_FILES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)


def require_new(folder: Path) -> None:
    """Raises UserError where there is something already."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there already; name a new folder")


@contextlib.contextmanager
def appearing(folder: Path) -> Iterator[Path]:
    """A folder beside `folder` that takes its place when all is written, and is gone when that fails.

    Raises:
        UserError: there is something at `folder`, or no room for it.
    """
    require_new(folder)
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        yield partial
        if folder.exists():
            folder.rmdir()
        partial.rename(folder)
    except OSError as error:
        raise UserError(
            f"{error.filename or folder}: cannot be written ({error.strerror}); make room or name another folder"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
