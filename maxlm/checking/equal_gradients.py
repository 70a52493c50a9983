"""The gradient of a batch, the same however the batch is cut and wherever it lies."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import numpy as np
import numpy.typing as npt

from maxlm.checking.shrinking import without_balancing
from maxlm.checking.small_batches import in_haste, small_batch
from maxlm.checking.verdicts import CheckRow, rounding
from maxlm.checkpoint.store import named_leaves
from maxlm.config import Dtype, RunConfig
from maxlm.sharding import Layout
from maxlm.training.objective import NextToken
from maxlm.training.step import gradient_function

Gradients = Mapping[str, npt.NDArray[np.float32]]
"""By the parameters' names, and the loss under `loss`."""

_FORMAT = 0.3
"""How far a gradient in bfloat16 may lie from that in float32, as a part of its length: most where a token that stands
between two experts goes to the other."""
_LEAST = 1e-3
"""Arrays whose gradient is shorter than this part of the whole are compared with that."""


class _Way(NamedTuple):
    """To compute the gradient."""

    layout: Layout
    micro_batches: int
    dtype: Dtype


def equal_gradients(config: RunConfig, layout: Layout, mesh: Layout | None, parameters: Any) -> Iterator[CheckRow]:
    """Micro-batches against the whole batch, and a mesh against one device.

    Two ways to round lie apart by what rounding does: where the config is not of float32, each array may differ from
    the plain way by twice what that one differs from float32.

    Args:
        config: small.
        layout: one device.
        mesh: several; None: there are no others.
        parameters: of the model, on one device.
    """
    config = replace(config, model=without_balancing(config.model))
    dtype, parts = config.execution.dtype, config.train.micro_batches
    plain, in_parts, exact = _Way(layout, 1, dtype), _Way(layout, parts, dtype), _Way(layout, 1, Dtype.FLOAT32)
    ways = {plain, in_parts, exact}
    if mesh is not None:
        on_mesh = _Way(mesh, parts if mesh.mesh.shape["stage"] > 1 else 1, dtype)
        ways.add(on_mesh)
    with ThreadPoolExecutor() as pool:  # compilers leave Python's lock
        found = dict(zip(ways, pool.map(lambda way: gradients(config, way, parameters), ways), strict=True))
    own = distances(found[plain], found[exact])
    if dtype is not Dtype.FLOAT32:
        name = max(own, key=lambda name: own[name])
        yield CheckRow.at_most(f"{dtype.value} against float32", own[name], _FORMAT, f"gradient, most in {name}")
    least = rounding(dtype, jax.default_backend())
    bounds = {name: least + 2 * distance for name, distance in own.items()}
    yield _compared(f"{parts} micro-batches = 1", distances(found[in_parts], found[plain]), bounds)
    if mesh is None:
        yield CheckRow.not_here("mesh = one device", "one device")
        return
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.mesh.shape.items() if size > 1)
    yield _compared(f"mesh {axes} = one device", distances(found[on_mesh], found[plain]), bounds)


def gradients(config: RunConfig, way: _Way, parameters: Any) -> Gradients:
    """Of the first small batch, with the mean loss."""
    layout = way.layout
    config = replace(
        config,
        train=replace(config.train, micro_batches=way.micro_batches),
        execution=replace(config.execution, dtype=way.dtype),
    )
    objective = NextToken(config, layout)
    gradient = gradient_function(config, layout, objective)
    parameters = jax.device_put(parameters, layout.shardings(objective.dims))
    batch = {
        name: jax.device_put(x, layout.sharding(layout.activation(*objective.arrays[name].dims)))
        for name, x in small_batch(config, 0).items()
    }
    draw = lambda batch: objective.draw(batch, jax.random.key(3))
    compute = lambda parameters, batch: gradient(parameters, None, draw(batch))
    sums, found = jax.jit(compute, compiler_options=in_haste(layout))(parameters, batch)
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
