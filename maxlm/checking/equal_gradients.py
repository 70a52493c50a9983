"""The gradient of a batch, the same however the batch is cut and wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import jax
import numpy as np
import numpy.typing as npt

from maxlm.checking.shrinking import without_balancing
from maxlm.checking.small_batches import small_batch
from maxlm.checking.verdicts import CheckRow, rounding
from maxlm.checkpoint.store import named_leaves
from maxlm.config import Dtype, RunConfig
from maxlm.models import init_parameters
from maxlm.sharding import Layout
from maxlm.training.objective import NextToken
from maxlm.training.step import gradient_function

Gradients = Mapping[str, npt.NDArray[np.float32]]
"""By the parameters' names, and the loss under `loss`."""

_FORMAT = {Dtype.FLOAT32: 0.0, Dtype.BFLOAT16: 0.3}
"""How far a gradient may lie from that in float32, as a part of its length: most where a token that stands between two
experts goes to the other."""
_LEAST = 1e-3
"""Arrays whose gradient is shorter than this part of the whole are compared with that."""


def equal_gradients(config: RunConfig, layout: Layout, mesh: Layout | None) -> Iterator[CheckRow]:
    """Micro-batches against the whole batch, and a mesh against one device.

    Two ways to round lie apart by what rounding does: where the config is not of float32, each array may differ from
    the plain way by twice what that one differs from float32.

    Args:
        config: small.
        layout: one device.
        mesh: several; None: there are no others.
    """
    config = replace(config, model=without_balancing(config.model))
    dtype = config.execution.dtype
    plain = gradients(config, layout, 1)
    own = dict.fromkeys(plain, 0.0)
    if dtype is not Dtype.FLOAT32:
        wide = replace(config, execution=replace(config.execution, dtype=Dtype.FLOAT32))
        own = distances(plain, gradients(wide, layout, 1))
        name = max(own, key=lambda name: own[name])
        yield CheckRow.at_most(f"{dtype.value} against float32", own[name], _FORMAT[dtype], f"gradient, most in {name}")
    least = rounding(dtype, jax.default_backend())
    bounds = {name: least + 2 * distance for name, distance in own.items()}
    parts = config.train.micro_batches
    yield _compared(f"{parts} micro-batches = 1", distances(gradients(config, layout, parts), plain), bounds)
    if mesh is None:
        yield CheckRow.not_here("mesh = one device", "one device")
        return
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.mesh.shape.items() if size > 1)
    parts = parts if mesh.mesh.shape["stage"] > 1 else 1
    yield _compared(f"mesh {axes} = one device", distances(gradients(config, mesh, parts), plain), bounds)


def gradients(config: RunConfig, layout: Layout, micro_batches: int) -> Gradients:
    """Of the first small batch and the initial parameters, with the mean loss."""
    config = replace(config, train=replace(config.train, micro_batches=micro_batches))
    objective = NextToken(config, layout)
    gradient = gradient_function(config, layout, objective)
    shardings = layout.shardings(objective.dims)
    parameters = jax.jit(lambda: init_parameters(config.model, jax.random.key(0)), out_shardings=shardings)()
    batch = {
        name: jax.device_put(x, layout.sharding(layout.activation(*objective.arrays[name].dims)))
        for name, x in small_batch(config, 0).items()
    }
    draw = lambda batch: objective.draw(batch, jax.random.key(3))
    sums, found = jax.jit(lambda parameters, batch: gradient(parameters, None, draw(batch)))(parameters, batch)
    weight = float(sums.weight)
    leaves = {name: np.asarray(leaf, np.float32) / weight for name, leaf in named_leaves(found).items()}
    return leaves | {"loss": np.asarray(sums.objective) / weight}


def distances(some: Gradients, others: Gradients) -> dict[str, float]:
    """Of each array the length of the difference, as a part of the other's length."""
    whole = np.sqrt(sum(np.square(x, dtype=np.float64).sum() for name, x in others.items() if name != "loss"))
    return {
        name: float(np.linalg.norm(some[name] - x) / max(np.linalg.norm(x), _LEAST * whole))
        for name, x in others.items()
    }


def _compared(name: str, seen: Mapping[str, float], bounds: Mapping[str, float]) -> CheckRow:
    """The array that comes nearest to its bound, or passes it most."""
    worst = max(seen, key=lambda key: np.nan_to_num(seen[key] / bounds[key], nan=np.inf))
    return CheckRow.at_most(name, seen[worst], bounds[worst], f"gradient, nearest to its bound in {worst}")
