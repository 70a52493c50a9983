"""Several adapters on one model in memory, each request with its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import AdaLora, DyLora, LatentAttention, Lora, ModelConfig, UserError
from maxlm.models import Execution, declared
from maxlm.models.adapters import changed, targets
from maxlm.models.weights.by_row import ByRow
from maxlm.models.weights.kinds import Weight
from maxlm.models.weights.low_rank import LowRank
from maxlm.shapes import Array


class LoadedAdapter(NamedTuple):
    """What a run with an adapter has trained."""

    model: ModelConfig
    """With the adapter."""
    parameters: Any
    """Of the tree of the model's parameters what lies under `shapes.PREFIX`."""


def check_adapter(name: str, adapter: LoadedAdapter, model: ModelConfig) -> None:
    """
    Raises:
        UserError: it does not fit the model, or cannot stand beside others.
    """
    assert adapter.model.adapter is not None
    if adapter.model.adapter.full:
        raise UserError(
            f"adapter {name}: it has trained {', '.join(adapter.model.adapter.full)} as a whole, which requests of "
            "other adapters cannot share; serve that run by itself, with --run"
        )
    if not isinstance(kind := adapter.model.adapter.kind, Lora | DyLora | AdaLora):
        raise UserError(
            f"adapter {name}: requests of other adapters cannot stand beside one of the kind {type(kind).__name__}; "
            "serve it by itself, with --run, or merge it with its base (maxlm.convert)"
        )
    ours = {array.name: array for array in shapes.arrays(model)}
    for array in targets(adapter.model):
        there = ours.get(array.name)
        if there is None or there.shape != array.shape:
            found = "no such array" if there is None else list(there.shape)
            raise UserError(
                f"adapter {name}: it changes {array.name} {list(array.shape)}, of which this model has {found}; "
                "name an adapter of this model"
            )
        if _is_latent(model, array.name):
            raise UserError(
                f"adapter {name}: it changes {array.name}, which decoding with latents multiplies queries by; serve "
                "that run by itself, with --run"
            )


def with_adapters(model: ModelConfig, parameters: Any, adapters: Sequence[LoadedAdapter], how: Execution) -> Any:
    """The parameters as decoding holds them, with what the adapters change as `ByRow`s; a request's adapter is the
    number of one of these, counted from 1.

    Args:
        model: without an adapter.
        parameters: of it, as of `held`.
        adapters: of the same model.
        how: it runs.
    """
    names = {array.name for one in adapters for array in targets(one.model)}

    def one(array: Array, weight: Weight) -> Weight:
        return _joined(array, weight, adapters, how) if array.name in names else weight

    return jax.tree.map(one, declared(model), parameters)


def _joined(array: Array, weight: Weight, adapters: Sequence[LoadedAdapter], how: Execution) -> ByRow:
    """One weight with what all adapters make of it."""
    stacks, dims = array.dims[:1] == ("layers",), dict(zip(array.dims, array.shape, strict=True))
    layers = ("layers",) if stacks else ()
    outputs = tuple(dim for dim in array.dims if dim not in (*layers, *array.inputs))
    shape = lambda names: tuple(dims[name] for name in names)
    nothing = jnp.ones(shape((*layers, *outputs)))
    a, b, owner, scales, factors = [], [], [], [jnp.zeros(shape(layers))], [nothing]
    for number, adapter in enumerate(adapters, start=1):
        low, of_outputs = _changed(array, weight, adapter), None
        match low:
            case LowRank():
                a.append(low.a)
                b.append(low.b)
                owner += [number] * low.a.shape[-1]
                of_outputs = jax.vmap(LowRank.factors)(low) if stacks else low.factors()
            case None:
                pass
        scales.append(jnp.full(shape(layers), 0.0 if low is None else low.scale))
        factors.append(nothing if of_outputs is None else of_outputs)
    place = lambda x, names: jax.device_put(x, how.layout.sharding(how.layout.parameter(names)))
    axis, rank = len(layers), ("rank",)
    return ByRow(
        base=weight,
        a=place(jnp.concatenate(a, -1).astype(how.dtype), (*layers, *array.inputs, *rank)),
        b=place(jnp.concatenate(b, axis).astype(how.dtype), (*layers, *rank, *outputs)),
        owner=place(jnp.broadcast_to(jnp.array(owner, jnp.int32), (*shape(layers), len(owner))), (*layers, *rank)),
        scales=place(jnp.stack(scales, axis), (*layers, None)),
        outputs=None
        if all(one is nothing for one in factors)
        else place(jnp.stack(factors, axis), (*layers, None, *outputs)),
    )


def _changed(array: Array, weight: Weight, one: LoadedAdapter) -> LowRank | None:
    """The weight with this adapter alone; None: it does not change it."""
    assert one.model.adapter is not None
    if array.name not in {target.name for target in targets(one.model)}:
        return None
    found = changed(one.model.adapter, weight, _at(one.parameters, array.name))
    assert isinstance(found, LowRank), "check_adapter has refused other kinds"
    return found


def _at(tree: Any, name: str) -> Any:
    return functools.reduce(lambda place, word: place[word], name.split("/"), tree)


def _is_latent(model: ModelConfig, name: str) -> bool:
    """Whether it makes keys or values of latents."""
    *_, entry, _, last = name.split("/")
    blocks = model.first_blocks if name.startswith("first_blocks") else model.blocks
    return isinstance(blocks[int(entry)].attention, LatentAttention) and last in ("k_proj", "v_proj")
