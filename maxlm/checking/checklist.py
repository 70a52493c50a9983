"""All checks of a config, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import jax

from maxlm.checking.against_oracle import kernels
from maxlm.checking.dealt_twice import data_order
from maxlm.checking.equal_gradients import equal_gradients
from maxlm.checking.going_on import going_on
from maxlm.checking.shrinking import fit_mesh
from maxlm.checking.sight import sight
from maxlm.checking.verdicts import CheckRow
from maxlm.config import MESH_AXES, DataConfig, RunConfig, ShardingConfig
from maxlm.models import init_parameters
from maxlm.sharding import Layout, all_devices, make_layout


def check(config: RunConfig, data: DataConfig) -> Iterator[CheckRow]:
    """Rows as they come. What raises is a row that failed, and the other checks go on.

    Args:
        config: small, from `shrink`.
        data: what the config reads, which need not be there.
    """
    devices = all_devices()
    one, mesh = make_layout(ShardingConfig(), devices[:1]), _mesh(config.sharding, len(devices))
    with jax.default_device(devices[0]):
        parameters = jax.jit(lambda: init_parameters(config.model, jax.random.key(0)))()
    checks: dict[str, Callable[[], Iterator[CheckRow]]] = {
        "what a token sees": lambda: sight(config, one, parameters),
        "gradients": lambda: equal_gradients(config, one, mesh, parameters),
        "run": lambda: going_on(config, one),
        "data": lambda: data_order(config, data, one),
        "kernels": lambda: kernels(config),
    }
    for name, rows in checks.items():
        try:
            yield from rows()
        except Exception as error:
            yield CheckRow.broken(name, error)


def this_machine() -> str:
    """Its devices and jax, in words."""
    devices = all_devices()
    return f"{len(devices)} x {devices[0].device_kind}, jax {jax.__version__}"


def _mesh(sharding: ShardingConfig, n_devices: int) -> Layout | None:
    fitted = fit_mesh(sharding, n_devices)
    if fitted is None:
        return None
    return make_layout(fitted, all_devices()[: math.prod(getattr(fitted, axis) for axis in MESH_AXES)])
