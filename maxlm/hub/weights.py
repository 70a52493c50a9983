"""The weights of a published model under the names of this project, from whatever kind of file."""

from __future__ import annotations

import difflib
import fnmatch
import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import numpy.typing as npt

from maxlm.config import ModelConfig, UserError
from maxlm.hub.families import FAMILIES
from maxlm.hub.family import ModelFamily
from maxlm.hub.names import Names, Piece, Tensor, tensors
from maxlm.hub.published import Published
from maxlm.hub.tensor_files import DTYPES, TensorSource
from maxlm.shapes import Array

_SHOWN = 5


class PublishedWeights:
    """The arrays of a published model, each read when it is asked for."""

    def __init__(
        self,
        place: Path,
        published: Published,
        files: TensorSource,
        *,
        rename: Callable[[Names], Names] = lambda names: names,
        said_by: str = "config.json",
    ) -> None:
        """Looks at the config and at the names and shapes of all tensors.

        Args:
            place: of the model, for messages.
            published: its config.json, or what says the same.
            files: its tensors.
            rename: what the files call the tensors of a family.
            said_by: what the config is, for messages.

        Raises:
            UserError: the family is not known, or has not been told all that the config says; a tensor is missing, of
                another shape, or not expected: all are listed.
        """
        self.place = place
        self.family = _family(published)
        self.model = _model(self.family, published)
        self._names = rename(self.family.names_of(self.model))
        self._tensors = tensors(self.model, self._names)
        self._files = files
        self._said_by = said_by
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
            return self.placed("/".join(str(key.key) for key in path), leaf)

        return jax.tree_util.tree_map_with_path(read, wanted)

    def placed(self, name: str, wanted: jax.ShapeDtypeStruct) -> jax.Array:
        """One array, float32, in the sharding of `wanted`."""
        read = lambda index: self.array(name, index or ())
        return jax.make_array_from_callback(wanted.shape, wanted.sharding, read)

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

    def layer(self, array: Array, number: int | None) -> npt.NDArray[np.float32]:
        """One layer of an array that is a stack; or an array that is none, whole."""
        if number is None:
            return self.array(array.name)
        (found,) = self.array(array.name, (slice(number, number + 1), *[slice(None)] * (len(array.shape) - 1)))
        return found

    def piece(self, part: Piece) -> npt.NDArray[Any]:
        """What one tensor has of an array, in the number format of the file."""
        tensor, number = self._homes[part.array.name][part.at]
        return tensor.split(self._files.read(tensor.name))[number]

    @property
    def dtype(self) -> np.dtype[Any]:
        """The number format of most of the numbers; float32 where some are quantised."""
        sizes: dict[str, int] = {}
        for tensor in self._tensors:
            dtype = self._files.entries[tensor.name].dtype
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(tensor.shape)
        if sizes.keys() - DTYPES.keys():
            return np.dtype(np.float32)
        return DTYPES[max(sizes, key=lambda name: sizes[name])]

    @property
    def ignored(self) -> list[str]:
        """Names of tensors that the model does not use."""
        return sorted(filter(self._is_ignored, self._files.entries))

    def _compare(self) -> None:
        there = {name: entry.shape for name, entry in self._files.entries.items() if not self._is_ignored(name)}
        wanted = {tensor.name: tensor.shape for tensor in self._tensors}
        problems = [f"{name} is missing{self._hint(name)}" for name in wanted if name not in there]
        problems += [
            f"{name} has the shape {list(there[name])}, {self._said_by} says {list(shape)}"
            for name, shape in wanted.items()
            if name in there and there[name] != shape
        ]
        problems += [
            f"{name} is not expected{self._hint(name)}"
            for name in there
            if name not in wanted and not self._is_tied(name)
        ]
        if problems:
            more = [f"... and {len(problems) - _SHOWN} more"] if len(problems) > _SHOWN else []
            raise UserError(
                "\n".join(
                    [
                        f"{self.place}: the tensors are not those of the {self.family.model_type} that {self._said_by} "
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
        embed = next((theirs for theirs, ours in self._names.top.items() if ours == "embed"), None)
        if not self.model.tied or self._names.top.get(name) != "unembed" or embed not in self._files.entries:
            return False
        return np.array_equal(self._files.read(name), self._files.read(embed))

    def _hint(self, name: str) -> str:
        """What to do about an output table that is missing, or that is not the embedding table."""
        if self._names.top.get(name) != "unembed":
            return ""
        if self.model.tied:
            return (
                f", as {self._said_by} ties it to the embedding table, which it differs from; if it is right, set "
                "tie_word_embeddings = false"
            )
        return f"; if it is the embedding table, set tie_word_embeddings = true in {self._said_by}"


def _model(family: ModelFamily, published: Published) -> ModelConfig:
    """Raises UserError, which names the place of the config."""
    try:
        return family.read(published)
    except UserError as error:
        if str(error).startswith(published.place):
            raise
        raise UserError(f"{published.place}: {error}") from error


def _family(published: Published) -> ModelFamily:
    name = published.get("model_type", str)
    if name not in FAMILIES:
        near = difflib.get_close_matches(name, FAMILIES, 1, 0.0)[0]
        raise UserError(
            f"{published.place}: model_type = {name!r} is not supported; the nearest that is: {near!r} (all: "
            f"{', '.join(sorted(FAMILIES))})"
        )
    return FAMILIES[name]
