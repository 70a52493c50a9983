"""Several adapters on one model in memory, each request with its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm import shapes
from maxlm.config import Bottleneck, LatentAttention, LlamaAdapter, ModelConfig, PrefixTuning, PromptTuning, UserError
from maxlm.models import Execution, declared
from maxlm.models.adapters import at, changed, targets
from maxlm.models.weights.around import Rescaled
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
    if isinstance(kind := adapter.model.adapter.kind, Bottleneck | PromptTuning | PrefixTuning | LlamaAdapter):
        raise UserError(
            f"adapter {name}: it is a {type(kind).__name__}, and LoRA kinds and IA3 alone stand beside others; serve "
            "that run by itself, with --run"
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
    layers = array.dims[:1] if array.dims[0] == "layers" else ()
    outputs = tuple(dim for dim in array.dims if dim not in (*layers, *array.inputs))
    sizes, axis, n = dict(zip(array.dims, array.shape, strict=True)), len(layers), len(adapters) + 1
    shape = lambda names: tuple(sizes[name] for name in names)
    a, b = jnp.zeros((*shape(layers), *shape(array.inputs), 0)), jnp.zeros((*shape(layers), 0, *shape(outputs)))
    owner, scales = list[int](), np.zeros(n, np.float32)
    factors: dict[str, dict[int, jax.Array | None]] = {"inputs": {}, "outputs": {}, "after": {}}
    for number, adapter in enumerate(adapters, start=1):
        match _changed(array, weight, adapter):
            case LowRank() as low:
                a, b = jnp.concatenate([a, low.a], -1), jnp.concatenate([b, low.b], axis)
                owner += [number] * low.a.shape[-1]
                scales[number] = low.scale
                factors["outputs"][number] = jax.vmap(LowRank.factors)(low) if layers else low.factors()
            case Rescaled(inputs=of_inputs, outputs=of_outputs):
                factors["inputs"][number], factors["after"][number] = of_inputs, of_outputs
            case None:
                pass
            case other:
                raise AssertionError(f"check_adapter lets {type(other).__name__} in")

    def place(x: jax.Array, names: tuple[str | None, ...]) -> jax.Array:
        return jax.device_put(x, how.layout.sharding(how.layout.parameter(names)))

    def of_all(name: str, dims: tuple[str, ...]) -> jax.Array | None:
        """[N + 1, ...]; None where no adapter has any."""
        there = {number: x for number, x in factors[name].items() if x is not None}
        if not there:
            return None
        nothing = jnp.ones(shape((*layers, *dims)))
        return place(jnp.stack([there.get(number, nothing) for number in range(n)], axis), (*layers, None, *dims))

    every = lambda x: jnp.broadcast_to(jnp.asarray(x), (*shape(layers), len(x)))
    return ByRow(
        base=weight,
        a=place(a.astype(how.dtype), (*layers, *array.inputs, None)),
        b=place(b.astype(how.dtype), (*layers, None, *outputs)),
        owner=place(every(np.array(owner, np.int32)), (*layers, None)),
        scales=place(every(scales), (*layers, None)),
        inputs=of_all("inputs", array.inputs),
        outputs=of_all("outputs", outputs),
        after=of_all("after", outputs),
    )


def _changed(array: Array, weight: Weight, one: LoadedAdapter) -> Weight | None:
    """The weight with this adapter alone; None: it does not change it."""
    assert one.model.adapter is not None
    if array.name not in {target.name for target in targets(one.model)}:
        return None
    return changed(one.model.adapter, weight, at(one.parameters, array.name))


def _is_latent(model: ModelConfig, name: str) -> bool:
    """Whether it makes keys or values of latents."""
    *_, entry, _, last = name.split("/")
    blocks = model.first_blocks if name.startswith("first_blocks") else model.blocks
    return isinstance(blocks[int(entry)].attention, LatentAttention) and last in ("k_proj", "v_proj")
