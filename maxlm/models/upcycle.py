"""Start a model from the parameters of another: arrays of the same shape as they are, a dense MLP as every expert of a
mixture (sparse upcycling, Komatsuzaki et al. 2022, arXiv:2212.05055), its head as every Medusa head; a head of another
kind is new, and so are modules for further tokens that it has not."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import Experts, GatedMlp, ModelConfig, UserError

_EXPERTS = tuple(f"mlp/{name}_{kind}" for kind in ("proj", "bias") for name in ("gate", "up", "down"))
_ROUTER = ("mlp/router", "mlp/router_noise", "mlp/router_bias", "mlp/score_bias")

Named = dict[str, jax.Array]
"""Arrays by their path in a nested dict."""


def upcycle(
    source: ModelConfig, target: ModelConfig, parameters: dict[str, Any], new: dict[str, Any]
) -> dict[str, Any]:
    """The parameters of `target` that continue a model of `source`, layer by layer, however each stacks its layers.

    With gates that sum to 1, `routed_scaling` 1 and no shared experts, a model with experts computes what the dense one
    does, as all its experts are equal.

    Args:
        source, target: the models; both have the same number of layers.
        parameters: of the source, as of `init_parameters`.
        new: initial ones of the target, from which come the routers of layers that were dense, the first matrices of
            Medusa heads that the source has not, a head of another kind, and modules for further tokens.

    Raises:
        UserError: another array differs in shape, or is in one model alone.
    """
    if source.n_layers != target.n_layers:
        raise UserError(f"it has model.n_layers = {source.n_layers}, this model {target.n_layers}; use the same number")
    outside = lambda tree: _named({name: tree[name] for name in tree if name not in ("first_blocks", "blocks")})
    there = outside({**parameters, shapes.MTP: _further(parameters, new)})
    if source.medusa is None and target.medusa is not None:
        there |= _as_medusa_heads(target, there, new["medusa"])
    if type(source.head) is not type(target.head):
        there = _with_head(source, target, there, outside(new))
    layers = []
    for i, (old, fresh) in enumerate(zip(_layers(source, parameters), _layers(target, new), strict=True)):
        if isinstance(source.layers[i].mlp, GatedMlp) and isinstance(target.layers[i].mlp, Experts):
            old |= _as_experts(old, fresh)
        layers.append(_same(f"layer {i} ", old, fresh))
    return _nested(_same("", there, outside(new)) | _stacked(target, layers))


def _as_experts(old: Named, new: Named) -> Named:
    """A dense layer's MLP as that of every expert as wide, and the routers that it has not."""
    there = [name for name in _EXPERTS if name in old and name in new]
    fits = [name for name in there if old[name].shape == new[name].shape[1:]]
    experts = {name: jnp.broadcast_to(old[name], new[name].shape) for name in fits}
    return experts | {name: new[name] for name in _ROUTER if name in new}


def _further(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
    """Of the modules that predict further tokens those of both models as they are, and the others of the target."""
    there, wanted = old.get(shapes.MTP, {}), new.get(shapes.MTP, {})
    return {k: there.get(k, module) for k, module in wanted.items()}


def _with_head(source: ModelConfig, target: ModelConfig, old: Named, new: Named) -> Named:
    """What another head has not is new, what it does not need is left."""
    wanted, there = ({array.name for array in shapes.head(model)} for model in (target, source))
    kept = {name: x for name, x in old.items() if name not in there - wanted}
    return kept | {name: new[name] for name in wanted - there}


def _as_medusa_heads(target: ModelConfig, old: Named, new: dict[str, Any]) -> Named:
    """Heads that all say what the model's own head says, from which they learn to say something else."""
    table = old["embed" if target.tied else "unembed"]
    tables = {f"medusa/{k}/unembed": table for k in new}
    return tables | {f"medusa/{k}/proj": head["proj"] for k, head in new.items()}


def _same(where: str, old: Named, new: Named) -> Named:
    """`old`, if it has the names and shapes of `new`."""
    for name in sorted(old.keys() | new.keys()):
        shapes = [list(tree[name].shape) if name in tree else "no such array" for tree in (old, new)]
        if shapes[0] != shapes[1]:
            raise UserError(
                f"{where}{name}: it has {shapes[0]}, this model {shapes[1]}; use sizes that are the same, which for "
                "experts means the dense model's d_ff"
            )
    return old


def _layers(model: ModelConfig, parameters: dict[str, Any]) -> list[Named]:
    """Each layer's arrays, in the order of the layers."""
    first = [_named(parameters["first_blocks"][str(i)]) for i in range(len(model.first_blocks))]
    pattern = [_named(parameters["blocks"][str(i)]) for i in range(len(model.blocks))]
    return first + [{name: x[r] for name, x in entry.items()} for r in range(model.repeats) for entry in pattern]


def _stacked(model: ModelConfig, layers: list[Named]) -> Named:
    """The inverse of `_layers`."""
    first, entries = len(model.first_blocks), len(model.blocks)
    named = {f"first_blocks/{i}/{name}": x for i in range(first) for name, x in layers[i].items()}
    for i in range(entries):
        of_entry = layers[first + i :: entries]
        named |= {f"blocks/{i}/{name}": jnp.stack([layer[name] for layer in of_entry]) for name in of_entry[0]}
    return named


def _named(tree: Any, prefix: str = "") -> Named:
    if not isinstance(tree, dict):
        return {prefix.removesuffix("/"): tree}
    return {name: leaf for key in tree for name, leaf in _named(tree[key], f"{prefix}{key}/").items()}


def _nested(named: Named) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, leaf in named.items():
        *path, last = name.split("/")
        place = tree
        for key in path:
            place = place.setdefault(key, {})
        place[last] = leaf
    return tree
