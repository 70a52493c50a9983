"""The state of training, and where each of its arrays lives."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import keystr, tree_map_with_path

from maxlm.checkpoint.store import named_leaves
from maxlm.config import StatePart
from maxlm.models.weights.holding import places
from maxlm.sharding import Layout
from maxlm.training.stability import Stability

CRITIC = "critic"
"""Parameters under this key are of a critic, beside those of the model. A checkpoint has them with the optimizer's
state: inference reads neither."""


def of_model(parameters: Any) -> Any:
    """Those of the model, of a tree like `TrainState.parameters`."""
    return {name: tree for name, tree in parameters.items() if name != CRITIC}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainState:
    """Everything that a step changes, and what it reads beside the batch."""

    step: jax.Array
    """int32: batches consumed."""
    parameters: Any
    """Nested dicts of float32 arrays, of matrices as `optimizer.parameter_format` says; and of `Weight`s where those
    that are not trained are held in fewer bits."""
    optimizer: Any
    """optax state."""
    skipped: jax.Array
    """int32: steps skipped since the start because something was not finite, the objective did not accept them, or they
    were spikes."""
    skipped_in_row: jax.Array
    """int32: of those that were not finite, the ones without a good step since, and without a loss scale to lower."""
    stability: Stability = Stability()
    """What steadies the steps to come; each part None where the config does not ask for it."""
    frozen: Any = None
    """What the loss reads and no step changes. A checkpoint says where it came from (`checkpoint/reference.py`)."""


def init_state(parameters: Any, optimizer: Any, stability: Stability = Stability()) -> TrainState:
    """A new state; run it under jit with `state_shardings` so that no device ever holds all of it."""
    zero = lambda: jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero(),
        parameters=parameters,
        optimizer=optimizer,
        skipped=zero(),
        skipped_in_row=zero(),
        stability=stability,
    )


def state_shardings(
    abstract: TrainState,
    declared: Any,
    layout: Layout,
    trained: Callable[[Any], Any],
) -> TrainState:
    """A TrainState of shardings for a TrainState of shapes.

    Without them the compiler would put a whole copy of the optimizer's moments, which start as zeros and so depend on
    no parameter, on every device.

    Args:
        abstract: from `jax.eval_shape` of `init_state`.
        declared: the `shapes.Array` of every parameter, in the parameters' tree.
        layout: the mesh and its rules.
        trained: what it sees of a tree like the parameters'.
    """
    everywhere = layout.sharding()
    parameters = named_leaves(trained(declared))

    def of_optimizer(path: Any, leaf: Any) -> Any:
        # An array for a parameter has the parameter's path in the end of its own. One with fewer dims is a factor of
        # Adafactor's: a row or a column, small enough to be everywhere.
        words = keystr(path, simple=True, separator="/").split("/")
        ends = ("/".join(words[i:]) for i in range(len(words)))
        array = next((parameters[end] for end in ends if end in parameters), None)
        if array is None or leaf.ndim != len(array.dims):
            return everywhere
        return layout.sharding(layout.divided(leaf.shape, layout.parameter(array.dims, StatePart.OPTIMIZER)))

    return dataclasses.replace(
        jax.tree.map(lambda _: everywhere, abstract),
        parameters=places(layout, declared, abstract.parameters),
        optimizer=tree_map_with_path(of_optimizer, abstract.optimizer),
    )
