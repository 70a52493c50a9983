"""Which weight becomes what, where its arrays lie, and what they are called in a checkpoint."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, assert_never

import jax

from maxlm import shapes
from maxlm.config import ModelConfig, WeightFormat
from maxlm.models.parameters import declared
from maxlm.models.weights.by_channel import Float8, Int8, Int8Activations, Int8Outliers
from maxlm.models.weights.by_group import ByGroup, group_of
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.models.weights.normal_float import BLOCK, NormalFloat4
from maxlm.sharding import Layout

GROUP = 128
"""Numbers of 4 bits that share a scale, where nobody says else."""

TABLE_GROUP = 32
"""Numbers of a table's row that share a scale: rows have outliers, and all that a text is goes through them."""

QUANTISED = "weights"
"""Where a checkpoint's `meta` says of which kinds its arrays are, as `kinds_of` gives them; nothing where all are
plain."""

KINDS: dict[str, type[Quantised]] = {
    "int8": Int8,
    "w8a8": Int8Activations,
    "llm_int8": Int8Outliers,
    "fp8": Float8,
    "grouped": ByGroup,
    "nf4": NormalFloat4,
}
"""By the names that files have for them."""


def format_of(array: shapes.Array, wanted: WeightFormat) -> WeightFormat:
    """What an array of the model is held in. Only what multiplies activations is quantised. A table has 8 bits at
    least, and its product activations as they are: its rows are looked up too, and its product ends in logits."""
    if not array.inputs:
        return WeightFormat.DTYPE
    if "vocab" in array.dims and wanted not in (WeightFormat.DTYPE, WeightFormat.FP8):
        return WeightFormat.INT8
    return wanted


def quantised(w: jax.Array, array: shapes.Array, wanted: WeightFormat, group: int = GROUP) -> Weight:
    """A weight in this format: `array` says which of its dims a product sums over. Groups of 4-bit numbers are as
    large as the innermost of those allows, at most `group`; where that allows none, the weight has 8 bits. Tables have
    8 bits with a scale for every 32 numbers, where that divides a row, in all formats of integers and in NF4."""
    axes = tuple(array.dims.index(dim) for dim in array.inputs)
    match format_of(array, wanted):
        case WeightFormat.DTYPE:
            return w
        case WeightFormat.INT8:
            of_table = group_of(array.shape[axes[-1]], TABLE_GROUP) if "vocab" in array.dims else None
            return Int8.of(w, axes) if of_table is None else ByGroup.of_bytes(w, axis_of(array), of_table)
        case WeightFormat.W8A8:
            return Int8Activations.of(w, axes)
        case WeightFormat.LLM_INT8:
            return Int8Outliers.of(w, axes)
        case WeightFormat.FP8:
            return Float8.of(w, axes)
        case WeightFormat.INT4 | WeightFormat.INT4_AFFINE as by_group:
            found = group_of(array.shape[axes[-1]], group)
            if found is None:
                return Int8.of(w, axes)
            return ByGroup.of(w, axis_of(array), found, symmetric=by_group is WeightFormat.INT4)
        case WeightFormat.NF4:
            if array.shape[axes[-1]] % BLOCK:
                return Int8.of(w, axes)
            return NormalFloat4.of(w, *counts_of(array))
        case other:
            assert_never(other)


def axis_of(array: shapes.Array) -> int:
    """The innermost dim that its product sums over, from the end."""
    return array.dims.index(array.inputs[-1]) - len(array.dims)


def counts_of(array: shapes.Array) -> tuple[int, int]:
    """How many dims its product sums over, and how many its result has of it; these are the last ones."""
    return len(array.inputs), -axis_of(array) - 1


def shardings(layout: Layout, config: ModelConfig, parameters: Any) -> Any:
    """As of `places`, for the parameters of a model."""
    return places(layout, declared(config), parameters)


def places(layout: Layout, found: Any, parameters: Any) -> Any:
    """Of parameters with these `shapes.Array`s: where each array lies, plain or quantised: along each dim as the weight
    itself would, but whole where that does not divide it, as the number of groups."""

    def fitting(leaf: Any, names: tuple[str | None, ...]) -> jax.NamedSharding:
        parts = layout.local_shape([layout.mesh.size] * len(names), layout.parameter(names))
        whole = [size * part % layout.mesh.size for size, part in zip(leaf.shape, parts, strict=True)]
        return layout.sharding(layout.parameter([None if no else n for no, n in zip(whole, names, strict=True)]))

    def place(array: shapes.Array, weight: Weight) -> Any:
        if isinstance(weight, Quantised):
            return jax.tree.map(fitting, weight, weight.dims(array.dims, array.inputs))
        return layout.sharding(layout.parameter(array.dims))

    return jax.tree.map(place, found, parameters)


def kinds_of(config: ModelConfig, parameters: Any) -> dict[str, str]:
    """The name in KINDS of each array that is quantised."""
    names = {kind: name for name, kind in KINDS.items()}
    found: dict[str, str] = {}

    def look(array: shapes.Array, weight: Weight) -> None:
        if isinstance(weight, Quantised):
            found[array.name] = names[type(weight)]

    jax.tree.map(look, declared(config), parameters)
    return found


def with_kinds(config: ModelConfig, kinds: Mapping[str, str], stored: Mapping[str, Any], parameters: Any) -> Any:
    """The tree of parameters with quantised ones in place of those that `kinds` names.

    Args:
        config: the model.
        kinds: as of `kinds_of`, all of them in KINDS.
        stored: the arrays that those consist of, or what is known of them, as `blocks/0/mlp/up_proj/values`.
        parameters: the others are taken from it.
    """

    def place(array: shapes.Array, leaf: Any) -> Any:
        if array.name not in kinds:
            return leaf
        kind: Any = KINDS[kinds[array.name]]
        names = [field.name for field in dataclasses.fields(kind)]
        arrays: dict[str, Any] = {name: stored.get(f"{array.name}/{name}") for name in names}
        if kind is ByGroup:
            arrays["axis"] = axis_of(array)
        if kind is NormalFloat4:
            arrays["n_inputs"], arrays["n_outputs"] = counts_of(array)
        return kind(**arrays)

    return jax.tree.map(place, declared(config), parameters)
