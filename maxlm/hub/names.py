"""How the arrays of a model lie in the tensors of a published checkpoint: by name, order of dims, and what is joined.

A family's table maps each of their names to what it holds of ours:

    "self_attn.q_proj.weight": "attention/q_proj"          one array
    "qkv_proj.weight": Rows("attention/q_proj", ...)       several, one below another
    "query_key_value.weight": Heads(q, k, v)               several, group of heads by group
    "c_fc.weight": Transposed("mlp/up_proj")               the same, with inputs first
    "experts.down_proj": Stacked(Transposed("mlp/down_proj"))   of all experts, one after another

Theirs are matrices [outputs, inputs] (PyTorch's Linear), ours have a dim for each thing that is counted; which dims are
inputs stands in the declaration (`Array.inputs`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from maxlm import shapes
from maxlm.config import ModelConfig, UserError
from maxlm.shapes import Array, Role


@dataclass(frozen=True, init=False)
class Rows:
    """Arrays one below another, along the outputs."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True, init=False)
class Heads:
    """Arrays by group of heads: queries that share a key, then the key, then the value (GPT-NeoX, BLOOM, Falcon)."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True, init=False)
class Interleaved:
    """Arrays output by output: the first of each, then the second of each (gpt-oss)."""

    parts: tuple[str, ...]

    def __init__(self, *parts: str) -> None:
        object.__setattr__(self, "parts", parts)


@dataclass(frozen=True)
class Transposed:
    """Inputs first: the Conv1D of GPT-2."""

    inner: str | Rows | Interleaved

    @property
    def parts(self) -> tuple[str, ...]:
        return _parts(self.inner)


@dataclass(frozen=True)
class Stacked:
    """All experts, in a first dim of their own; each as `inner` (gpt-oss)."""

    inner: str | Rows | Interleaved | Transposed

    @property
    def parts(self) -> tuple[str, ...]:
        return _parts(self.inner)


Arrangement = str | Rows | Heads | Interleaved | Transposed | Stacked


@dataclass(frozen=True, kw_only=True)
class Names:
    """The table of a family. An entry whose arrays a model does not have is passed over."""

    top: Mapping[str, Arrangement]
    """Outside of the layers."""
    block: Mapping[str, Arrangement]
    """Of one layer, below `layers`; a `{}` in a name counts the experts."""
    layers: str = "model.layers.{}."
    """What stands before them, with the layer's number."""
    after: Mapping[str, Arrangement] = field(default_factory=dict)
    """Of one layer too, but called as if of the layer after it."""
    last: Mapping[str, Arrangement] = field(default_factory=dict)
    """The same of the last layer, outside of the layers."""
    ignored: tuple[str, ...] = ()
    """Patterns (as of file names) of tensors that hold nothing learned, or nothing that is used."""


class Piece(NamedTuple):
    """Where a piece of a tensor lies in our arrays."""

    array: Array
    at: tuple[int, ...]
    """Layer in the stack, and expert, where it is of one."""

    @property
    def dims(self) -> dict[str, int]:
        """Of the piece: name and size."""
        return dict(list(zip(self.array.dims, self.array.shape, strict=True))[len(self.at) :])

    @property
    def inputs(self) -> tuple[str, ...]:
        return ("embed",) if self.array.role is Role.ROUTER else self.array.inputs

    @property
    def outputs(self) -> tuple[str, ...]:
        return tuple(dim for dim in self.dims if dim not in self.inputs)

    def size(self, dims: Sequence[str]) -> int:
        return math.prod(self.dims[dim] for dim in dims)

    @property
    def is_matrix(self) -> bool:
        return bool(self.inputs)

    @property
    def rows(self) -> int:
        return self.size(self.outputs)


@dataclass(frozen=True)
class Tensor:
    """One tensor of a checkpoint of this model."""

    name: str
    layout: Arrangement
    parts: tuple[Piece, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        """As the file has it."""
        if isinstance(self.layout, Stacked):
            return (self._experts, *self._of_one.shape)
        first = self.parts[0]
        rows = sum(part.rows for part in self.parts)
        if first.is_matrix:
            shape = rows, first.size(first.inputs)
            return shape[::-1] if isinstance(self.layout, Transposed) else shape
        if first.array.role is Role.TABLE:
            return tuple(first.dims.values())
        return (rows,)

    def split(self, values: npt.NDArray[Any]) -> list[npt.NDArray[Any]]:
        """The pieces, in our dims, of a tensor of `shape`."""
        if isinstance(self.layout, Stacked):
            return [np.stack(of_all) for of_all in zip(*map(self._of_one.split, values), strict=True)]
        if not self.parts[0].is_matrix:
            if self.parts[0].array.role is Role.TABLE:
                return [values]
            values = values[:, None]
        if isinstance(self.layout, Transposed):
            values = values.T
        pieces: list[npt.NDArray[Any]]
        match rows := self._rows:
            case Heads() | Interleaved():
                groups, sizes = self._groups()
                grouped = values.reshape(groups, sum(sizes), -1)
                pieces = np.split(grouped, np.cumsum(sizes)[:-1], axis=1)
            case str() | Rows():
                pieces = np.split(values, np.cumsum([part.rows for part in self.parts])[:-1])
            case _:
                assert_never(rows)
        return [to_ours(piece, part) for piece, part in zip(pieces, self.parts, strict=True)]

    def join(self, pieces: Sequence[npt.NDArray[Any]]) -> npt.NDArray[Any]:
        """The tensor of pieces in our dims."""
        if isinstance(self.layout, Stacked):
            return np.stack([self._of_one.join(of_one) for of_one in zip(*pieces, strict=True)])
        if not self.parts[0].is_matrix and self.parts[0].array.role is Role.TABLE:
            return pieces[0]
        theirs = [to_theirs(piece, part) for piece, part in zip(pieces, self.parts, strict=True)]
        match rows := self._rows:
            case Heads() | Interleaved():
                groups, sizes = self._groups()
                cut = [one.reshape(groups, size, -1) for one, size in zip(theirs, sizes, strict=True)]
                values = np.concatenate(cut, axis=1).reshape(-1, theirs[0].shape[1])
            case str() | Rows():
                values = theirs[0] if len(theirs) == 1 else np.concatenate(theirs)
            case _:
                assert_never(rows)
        if isinstance(self.layout, Transposed):
            values = values.T
        return values if self.parts[0].is_matrix else values[:, 0]

    @property
    def _rows(self) -> str | Rows | Heads | Interleaved:
        """How the parts lie along the outputs."""
        assert not isinstance(self.layout, Stacked)
        return self.layout.inner if isinstance(self.layout, Transposed) else self.layout

    @property
    def _experts(self) -> int:
        return self.parts[0].dims["experts"]

    @property
    def _of_one(self) -> Tensor:
        """As a tensor of the first expert alone would be."""
        assert isinstance(self.layout, Stacked)
        return Tensor(self.name, self.layout.inner, tuple(Piece(part.array, (*part.at, 0)) for part in self.parts))

    def _groups(self) -> tuple[int, list[int]]:
        """How many groups of rows, and rows of each part in one."""
        if isinstance(self._rows, Interleaved):
            return self.parts[0].rows, [1] * len(self.parts)
        groups = min(size for part in self.parts for dim, size in part.dims.items() if dim in ("heads", "kv_heads"))
        return groups, [part.rows // groups for part in self.parts]


def to_ours(rows: npt.NDArray[Any], part: Piece) -> npt.NDArray[Any]:
    """A piece in our dims, of [outputs, inputs]."""
    order = part.outputs + part.inputs
    values = rows.reshape([part.dims[dim] for dim in order])
    return values.transpose([order.index(dim) for dim in part.dims])


def to_theirs(values: npt.NDArray[Any], part: Piece) -> npt.NDArray[Any]:
    """[outputs, inputs], of a piece in our dims."""
    dims = list(part.dims)
    order = part.outputs + part.inputs
    return values.transpose([dims.index(dim) for dim in order]).reshape(part.rows, -1)


def tensors(model: ModelConfig, names: Names) -> tuple[Tensor, ...]:
    """Every tensor of a checkpoint of `model`.

    Raises:
        UserError: an array of the model has no name in the table.
    """
    ours = {array.name: array for array in shapes.arrays(model)}
    found = [
        Tensor(name, layout, tuple(Piece(ours[part], ()) for part in _parts(layout)))
        for name, layout in names.top.items()
        if all(part in ours for part in _parts(layout))
    ]
    for number in range(model.n_layers):
        found += _of_layer(number, model, names, ours)
    places = [(piece.array.name, piece.at) for tensor in found for piece in tensor.parts]
    assert len(set(places)) == len(places), "a table has two names for one array"
    if nameless := sorted(ours.keys() - {name for name, _ in places}):
        raise UserError(f"model: its {nameless[0]} has no name in this family's checkpoints; choose another family")
    return tuple(found)


def _of_layer(number: int, model: ModelConfig, names: Names, ours: Mapping[str, Array]) -> Iterator[Tensor]:
    first = len(model.first_blocks)
    slot: tuple[int, ...]
    if number < first:
        prefix, slot = f"first_blocks/{number}/", ()
    else:
        prefix, slot = f"blocks/{(number - first) % len(model.blocks)}/", ((number - first) // len(model.blocks),)
    this, following = (names.layers.format(n) for n in (number, number + 1))
    listed = {this + name: layout for name, layout in names.block.items()}
    listed |= (
        names.last
        if number + 1 == model.n_layers
        else {following + name: layout for name, layout in names.after.items()}
    )
    for name, layout in listed.items():
        parts = [prefix + part for part in _parts(layout)]
        if not all(part in ours for part in parts):
            continue
        arrays = [ours[part] for part in parts]
        if ("experts" in arrays[0].dims) != (isinstance(layout, Stacked) or "{}" in name):
            continue  # a dense MLP has the names of its experts
        if "{}" not in name:
            yield Tensor(name, layout, tuple(Piece(array, slot) for array in arrays))
            continue
        for expert in range(arrays[0].shape[len(slot)]):
            at = tuple(Piece(array, (*slot, expert)) for array in arrays)
            yield Tensor(name.format(expert), layout, at)


def linear(theirs: str, *ours: str, arrange: type[Heads] | type[Transposed] | None = None) -> dict[str, Arrangement]:
    """Weight and bias of one of their projections: `linear("self_attn.q_proj", "attention/q")`. Several of ours lie in
    it as Rows, unless `arrange` says how."""
    table: dict[str, Arrangement] = {}
    for name, ending in (("weight", "proj"), ("bias", "bias")):
        parts = [f"{one}_{ending}" for one in ours]
        if arrange is Heads:
            table[f"{theirs}.{name}"] = Heads(*parts)
            continue
        joined = parts[0] if len(parts) == 1 else Rows(*parts)
        table[f"{theirs}.{name}"] = Transposed(joined) if arrange is Transposed and name == "weight" else joined
    return table


def norm(theirs: str, ours: str) -> dict[str, Arrangement]:
    """Weight and bias of one of their norms: `norm("input_layernorm", "attention_norm")`."""
    return {f"{theirs}.weight": f"{ours}/scale", f"{theirs}.bias": f"{ours}/bias"}


def _parts(layout: Arrangement) -> tuple[str, ...]:
    return (layout,) if isinstance(layout, str) else layout.parts
