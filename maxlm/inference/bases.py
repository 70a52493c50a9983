"""The model that a run's adapter is laid on: where it is, that it is the one, and its arrays, read one at a time."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import shapes
from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.checkpoint.reference import keep_published, run_and_step
from maxlm.checkpoint.state_hash import state_hash
from maxlm.checkpoint.store import Deferred, Record, describe_leaf, named_leaves
from maxlm.config import BaseFormat, ModelConfig, RunConfig, ShardingConfig, UserError, serialize
from maxlm.models import abstract_parameters, declared
from maxlm.models.adapters import held
from maxlm.models.base import base_names
from maxlm.models.weights.holding import KINDS, QUANTISED, shardings, with_kinds
from maxlm.models.weights.kinds import Quantised, Weight
from maxlm.shapes import Array
from maxlm.sharding import Layout, all_devices, make_layout


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseReference:
    """What a checkpoint of an adapter says of its base."""

    place: str
    """RUN_DIR/checkpoints/STEP, or hf:DIR or gguf:FILE; absolute."""
    fingerprint: str
    """`state_hash` of a run's parameters, SHA-256 of a published model's files."""

    def to_json(self) -> dict[str, str]:
        return dataclasses.asdict(self)


class Base(Protocol):
    """A model that is there."""

    place: str
    """As of `BaseReference`."""
    model: ModelConfig
    step: int
    """Optimizer steps that it has seen here."""
    tokenizer: str | None
    """Fingerprint of the tokenizer that it was trained with; None: not known."""

    def fingerprint(self) -> str:
        """Reads all of it."""
        ...

    def read(self, names: set[str], layout: Layout, made: Callable[[Array, Weight], Weight]) -> dict[str, Weight]:
        """What `made` makes of each of these arrays of the model; one is made before the next is read."""
        ...

    def deferred(self, names: set[str]) -> dict[str, Any]:
        """The same arrays as `Deferred` ones, plain or of `Quantised` weights."""
        ...

    def keep(self, run_dir: Path) -> None:
        """Write what a published model came with into the folder of a new run, as `PUBLISHED` says."""
        ...


OpenBase = Callable[[str], Base]
"""Finds the base at a place.

Raises:
    UserError: there is none, or it is damaged.
"""


class RunBase:
    """A run folder, or one of its checkpoints, RUN_DIR/checkpoints/STEP; the weights may be quantised already."""

    def __init__(self, place: str) -> None:
        folder, step = run_and_step(place)
        self._config = serialize.load(RunConfig, folder / "config.json")
        self.folder = folder.absolute()
        with self._open() as checkpointer:
            self.step = checkpointer.choose(step)
            self._record = checkpointer.record(self.step)
        meta = self._record.meta
        trained = meta.get("config")  # of this very step
        self.model = serialize.from_dict(RunConfig, trained).model if trained else self._config.model
        self.place = str(self.folder / "checkpoints" / str(self.step))
        self.tokenizer: str | None = meta.get("tokenizer")
        if self.model.adapter is not None:
            raise UserError(
                f"{folder}: has an adapter; merge it (python -m maxlm.convert --from run:{folder} --to hf:DIR) and "
                "name what that writes"
            )

    def fingerprint(self) -> str:
        return state_hash(self.folder / "checkpoints", self.step, items=("params",))

    def read(self, names: set[str], layout: Layout, made: Callable[[Array, Weight], Weight]) -> dict[str, Weight]:
        found = dict[str, Weight]()
        with self._open() as checkpointer:
            for array, leaf, wanted in self._wanted(names, layout):
                arrays = checkpointer.some_parameters(self.step, wanted)
                weight = jax.tree.unflatten(jax.tree.structure(leaf), [arrays[name] for name in wanted])
                found[array.name] = jax.block_until_ready(made(array, weight))
        return found

    def deferred(self, names: set[str]) -> dict[str, Any]:
        found = dict[str, Any]()
        with self._open() as checkpointer:
            for array, leaf, wanted in self._wanted(names, make_layout(ShardingConfig(data=1), all_devices()[:1])):
                arrays = checkpointer.deferred_parameters(self.step, wanted)
                found[array.name] = jax.tree.unflatten(
                    jax.tree.structure(leaf), [arrays[name].astype(one.dtype) for name, one in wanted.items()]
                )
        return found

    def keep(self, run_dir: Path) -> None:
        keep_published(self.folder, run_dir)

    def _wanted(self, names: set[str], layout: Layout) -> Iterator[tuple[Array, Any, dict[str, Any]]]:
        """Each array, what is known of its weight, and of the arrays that this has in the checkpoint."""
        stored = stored_shapes(self.model, layout, self._record)
        for array, leaf in named_weights(self.model, stored):
            if array.name in names:
                inner = named_leaves(leaf) if isinstance(leaf, Quantised) else {"": leaf}
                yield array, leaf, {f"{array.name}/{name}".removesuffix("/"): one for name, one in inner.items()}

    def _open(self) -> Checkpointer:
        return Checkpointer(self.folder / "checkpoints", self._config.checkpoint)


def named_weights(model: ModelConfig, parameters: Any) -> list[tuple[Array, Any]]:
    """Each array of a model with its weight."""
    found = list[tuple[Array, Any]]()
    jax.tree.map(lambda array, weight: found.append((array, weight)), declared(model), parameters)
    return found


def stored_shapes(model: ModelConfig, layout: Layout, record: Record) -> Any:
    """Shape, format and sharding of every array of a step, plain or quantised as it says.

    Raises:
        UserError: it is quantised in a way that is not known here, or is none of this model.
    """
    plain, kinds = abstract_parameters(model, layout), record.meta.get(QUANTISED, {})
    if unknown := [kind for kind in kinds.values() if kind not in KINDS]:
        raise UserError(
            f"the checkpoint has weights of the kind {unknown[0]!r}, this version of maxlm knows {', '.join(KINDS)}; "
            "use the version that wrote it"
        )
    stored = {name: jax.ShapeDtypeStruct(shape, dtype) for name, (dtype, shape) in record.items["params"].items()}
    tree = with_kinds(model, kinds, stored, plain)

    def check(array: Array, weight: Weight) -> None:
        if weight.shape != array.shape:
            raise UserError(
                f"the checkpoint has {array.name} as {list(weight.shape)}, config.model says {list(array.shape)}; use "
                "the config that it was written with"
            )

    jax.tree.map(check, declared(model), tree)
    place = lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
    return jax.tree.map(place, tree, shardings(layout, model, tree))


def read_base(base: Base, model: ModelConfig, layout: Layout) -> Any:
    """The base's arrays as a run of `model` holds them, each read straight into its format and its shardings: a tree
    like the parameters, with None for the adapter's arrays, and for what is trained and the base has not.

    Args:
        base: of the adapter.
        model: with an adapter.
        layout: of the run; that of the base does not matter.

    Raises:
        UserError: it does not fit the model.
    """
    wanted = {array.name: (array, leaf) for array, leaf in named_weights(model, abstract_parameters(model, layout))}

    def made(array: Array, weight: Weight) -> Weight:
        array, place = wanted[array.name]
        if array.trained and isinstance(weight, Quantised):
            raise UserError(f"{array.name}: it is quantised there, and model.adapter.full would train it; leave it out")
        if isinstance(weight, Quantised) and jax.tree.map(describe_leaf, weight) != jax.tree.map(describe_leaf, place):
            raise UserError(
                f"{array.name}: it is held as {type(weight).__name__} there, and not as model.adapter.base = "
                f"{_base_format(model).name} has it; quantise that run anew by that method, or name the run that "
                "it was made of"
            )
        return _held(model, array, weight, jax.tree.map(lambda leaf: leaf.sharding, place))

    found = base.read(_names(base, model), layout, made)
    return jax.tree.map(lambda array: found.get(array.name), declared(model))


def deferred_base(base: Base, model: ModelConfig) -> dict[str, Any]:
    """The base's arrays by name, as `Deferred` ones in float32 that hold the very numbers that a run of `model`
    computes with; what is quantised already as it is.

    Raises:
        UserError: it does not fit the model.
    """

    def one(array: Array, weight: Any) -> Any:
        if not isinstance(weight, Deferred):
            return weight

        def read(number: int | None) -> np.ndarray:
            of = array if number is None else dataclasses.replace(array, shape=array.shape[1:], dims=array.dims[1:])
            found = held(of, jnp.asarray(weight.read(number)), _base_format(model))
            return np.asarray(found.astype(jnp.float32) if isinstance(found, jax.Array) else found.dense(jnp.float32))

        return dataclasses.replace(weight, read=read)

    arrays = {array.name: array for array in shapes.arrays(model)}
    return {name: one(arrays[name], weight) for name, weight in base.deferred(_names(base, model)).items()}


def open_again(saved: Mapping[str, str], open_base: OpenBase, *, instead: str | None = None) -> Base:
    """The base that a checkpoint names.

    Args:
        saved: what it has of `BaseReference.to_json`.
        open_base: finds it.
        instead: another place where it is now, for which no step need be named; None: it is where it was.

    Raises:
        UserError: it is no longer there, or no longer the same.
    """
    there = saved["place"]
    place = there if instead is None else _with_step(instead, there)
    named = "name in checkpoint.init_from" if instead is not None else "put a link there to"
    remedy = f"bring it back, or {named} where it is now"
    try:
        base = open_base(place)
        found = base.fingerprint()
    except UserError as error:
        raise UserError(f"the adapter's base {place} cannot be read ({error}); {remedy}") from error
    if found != saved["fingerprint"]:
        raise UserError(
            f"the adapter's base {place} is not the one that it was trained on: it has fingerprint {found[:12]}..., "
            f"that of {there} was {saved['fingerprint'][:12]}...; bring that back"
        )
    return base


def _with_step(place: str, there: str) -> str:
    """A run without a step as that of the same step as `there`."""
    _, step = run_and_step(there)
    if step is None or run_and_step(place)[1] is not None or ":" in place:
        return place
    return str(Path(place) / "checkpoints" / str(step))


def _names(base: Base, model: ModelConfig) -> set[str]:
    """Of the arrays to be read."""
    there = {array.name: array.shape for array in shapes.arrays(base.model)}
    return base_names(model, there)


def _base_format(model: ModelConfig) -> BaseFormat:
    assert model.adapter is not None
    return model.adapter.base


def _held(model: ModelConfig, array: Array, weight: Weight, places: Any) -> Weight:
    """On the device, unless nothing changes."""
    if isinstance(weight, Quantised) or array.trained or _base_format(model) is BaseFormat.FLOAT32:
        return jax.device_put(weight, places)
    found: Weight = jax.jit(lambda w: held(array, w, _base_format(model)), out_shardings=places)(weight)
    return found
