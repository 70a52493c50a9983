"""Looking into a step: the size of what flows through each layer, and the first thing in it that is not finite."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.checkpoint.store import named_leaves
from maxlm.config import ModelConfig


class Size(NamedTuple):
    """Of an array, float32; of a stack over layers one for each, [L]."""

    norm: Any
    """L2; of activations the root of the mean square."""
    largest: Any
    """Of the magnitudes. Not finite where a number of the array is not."""


class Seen(NamedTuple):
    """Of one step, on one batch."""

    loss: jax.Array
    activations: dict[str, Size]
    """As `Decoder.look` names them, of the first micro-batch; empty, where the objective shows none."""
    gradients: dict[str, Size]
    """Of the mean loss, by the parameter's name; here and below of what is trained."""
    parameters: dict[str, Size]
    """Before the step."""
    updates: dict[str, Size]
    """What the step adds to them, unless it is skipped."""


def activation_size(x: jax.Array) -> Size:
    """Of activations of any shape."""
    wide = x.astype(jnp.float32)
    return Size(jnp.sqrt(jnp.mean(jnp.square(wide))), jnp.abs(wide).max())


def sizes_of(declared: Any, tree: Any) -> dict[str, Size]:
    """Of each array of a tree like the parameters', by name; `declared` says which are stacks."""

    def one(array: Any, x: jax.Array) -> Size:
        dims = tuple(range(1 if array.dims[0] == "layers" else 0, x.ndim))
        wide = x.astype(jnp.float32)
        return Size(jnp.sqrt(jnp.square(wide).sum(dims)), jnp.abs(wide).max(dims))

    arrays, leaves = named_leaves(declared), named_leaves(tree)
    return {name: one(arrays[name], x) for name, x in leaves.items()}


def watch_row(model: ModelConfig, seen: Seen) -> dict[str, float | list[float]]:
    """A row of watch.jsonl: figures by layer, in lists of `model.n_layers`, and of the arrays outside of them."""
    seen = jax.device_get(seen)
    row: dict[str, float | list[float]] = {"loss": float(seen.loss)}
    norms = {
        name: _by_layer(model, sizes)
        for name, sizes in (("gradient", seen.gradients), ("parameter", seen.parameters), ("update", seen.updates))
    }
    for what, key in (("gradient", "gradient_norm"), ("parameter", "parameter_norm")):
        layers, others = norms[what]
        row |= {key: layers.tolist()} | {f"{key}/{name}": norm for name, norm in others.items()}
    (old, old_others), (new, new_others) = norms["parameter"], norms["update"]
    with np.errstate(divide="ignore", invalid="ignore"):
        row["update_ratio"] = (new / old).tolist()
        row |= {f"update_ratio/{name}": float(np.divide(new_others[name], old_others[name])) for name in old_others}
    for name, size in seen.activations.items():
        row |= {f"{name}_rms": size.norm.tolist(), f"{name}_max": size.largest.tolist()}
    return row


def _by_layer(model: ModelConfig, sizes: Mapping[str, Size]) -> tuple[np.ndarray, dict[str, float]]:
    """Norms of all arrays of each layer together [L], and of those of each part of the model beside the layers."""
    layers, others = np.zeros(model.n_layers), dict[str, float]()
    for part in _parts(model, sizes):
        norm = float(part.size.norm)
        if part.layer is None:
            group = part.name.split("/")[0]
            others[group] = math.hypot(others.get(group, 0.0), norm)
        else:
            layers[part.layer] = math.hypot(layers[part.layer], norm)
    return layers, others


class _Part(NamedTuple):
    """An array of one layer, or one outside of the layers."""

    layer: int | None
    name: str
    """In its layer."""
    size: Size

    def __str__(self) -> str:
        return self.name if self.layer is None else f"{self.name} of block {self.layer}"


def _parts(model: ModelConfig, sizes: Mapping[str, Size]) -> Iterator[_Part]:
    first, entries = len(model.first_blocks), len(model.blocks)
    for name, size in sizes.items():
        match name.removeprefix("adapter/").split("/", 2):
            case ["first_blocks", i, rest]:
                yield _Part(int(i), rest, size)
            case ["blocks", i, rest] if size.norm.ndim:
                for repeat, one in enumerate(zip(size.norm, size.largest, strict=True)):
                    yield _Part(first + repeat * entries + int(i), rest, Size(*one))
            case _:  # of a critic's layers, all together
                yield _Part(None, name, Size(np.linalg.norm(size.norm), np.max(size.largest)))


def first_not_finite(model: ModelConfig, seen: Seen) -> str | None:
    """What in a step is the first that is not finite, in a few words, layers counted from 0; None: all of it is finite.

    In the order of the computation: activations from the embeddings on, the loss, gradients from the last layer back,
    updates. A parameter that is not finite is named beside.
    """
    seen = jax.device_get(seen)
    broken = [str(part) for part in _parts(model, seen.parameters) if not np.isfinite(part.size.largest)]
    more = f"; the parameter {broken[0]} is not finite" if broken else ""
    if (found := _first_activation(model, seen.activations)) is not None:
        return f"{found} (forward){more}"
    if not np.isfinite(seen.loss):
        return f"the loss{more}"
    backwards = sorted(_parts(model, seen.gradients), key=_place_from_the_end, reverse=True)
    for what, parts in (("gradient", backwards), ("update", list(_parts(model, seen.updates)))):
        for part in parts:
            if not np.isfinite(part.size.largest):
                return f"{what} of {part}{more}"
            if not np.isfinite(part.size.norm):
                return f"norm of the {what} of {part}{more}"
    return more.removeprefix("; ") or None


def _first_activation(model: ModelConfig, activations: Mapping[str, Size]) -> str | None:
    if not activations:
        return None
    finite = {name: np.isfinite(size.largest) for name, size in activations.items()}
    if not finite["embeddings"]:
        return "the embeddings"
    for layer in range(model.n_layers):
        for name, words in (("attention", "'s attention"), ("mlp", "'s mlp"), ("block", "")):
            if not finite[name][layer]:
                return f"output of block {layer}{words}"
    return None if finite["hidden"] else "output of the final norm"


def _place_from_the_end(part: _Part) -> tuple[int, int]:
    """Larger is nearer to the loss, and so earlier in the backward pass."""
    if part.layer is None:
        return (-1 if part.name.startswith("embed") else 2**31, 0)
    return part.layer, int(part.name.startswith("mlp"))
