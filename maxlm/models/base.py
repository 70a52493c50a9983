"""The model under an adapter: which arrays are its own, and which are the adapter's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

from maxlm import shapes
from maxlm.config import ModelConfig, UserError
from maxlm.models.adapters import base_of, begin
from maxlm.models.parameters import declared, initial


def base_names(model: ModelConfig, there: Mapping[str, tuple[int, ...]]) -> set[str]:
    """Names of the arrays of a base of these shapes that a model with an adapter takes.

    Raises:
        UserError: it has not all that the run does not train as a whole, or another shape.
    """
    wanted, found = {array.name for array in shapes.arrays(base_of(model))}, set[str]()
    for array in shapes.arrays(model):
        if array.name not in wanted or (array.trained and array.name not in there):
            continue
        shape = there.get(array.name)
        if shape is None:
            raise UserError(
                f"{array.name}: it has no such array; use the sizes of that model, or train it anew: "
                f"model.adapter.full = ({array.name!r},)"
            )
        if shape != array.shape:
            raise UserError(f"{array.name}: it has {list(shape)}, this model {list(array.shape)}; use its sizes")
        found.add(array.name)
    return found


def own(model: ModelConfig, parameters: Any) -> Any:
    """What a checkpoint of a run of the model has of its parameters, or of a tree like them: of a model with an adapter
    what is trained, with None for the rest; else everything."""
    if model.adapter is None:
        return parameters
    return jax.tree.map(lambda array, leaf: leaf if array.trained else None, declared(model), parameters)


def laid(model: ModelConfig, base: Any, trained: Any) -> Any:
    """The parameters: what is trained, and where that has None the base's; trees as `declared` has them."""
    pick = lambda array, under, over: under if over is None else over
    return jax.tree.map(pick, declared(model), base, trained)


def begun(model: ModelConfig, base: Any, key: jax.Array) -> Any:
    """What is trained, as it begins on a base: a tree as `declared` has it, with None for the rest.

    Args:
        model: with an adapter.
        base: its arrays as they are held; None for the adapter's, and for what is trained and the base has not.
        key: for what begins by chance.
    """
    missing = jax.tree.map(lambda array, w: array if w is None else None, declared(model), base)
    missing.pop(shapes.PREFIX)
    new = {array.name: initial(array, jax.random.fold_in(key, i)) for i, array in enumerate(jax.tree.leaves(missing))}
    under = {name: tree for name, tree in base.items() if name != shapes.PREFIX}
    lead = {name: tree for name, tree in declared(model).items() if name != shapes.PREFIX}
    under = jax.tree.map(lambda array, w: new[array.name] if w is None else w, lead, under)
    return own(model, begin(model, under, jax.random.fold_in(key, len(new))))
