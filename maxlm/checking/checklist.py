"""All checks of a config, one after the other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import partial

from maxlm.checking.against_oracle import kernels
from maxlm.checking.dealt_twice import data_order
from maxlm.checking.equal_gradients import equal_gradients
from maxlm.checking.going_on import going_on
from maxlm.checking.shrinking import fit_mesh
from maxlm.checking.sight import causality, isolation
from maxlm.checking.verdicts import CheckRow
from maxlm.config import MESH_AXES, DataConfig, RunConfig, ShardingConfig
from maxlm.sharding import Layout, all_devices, make_layout


def check(config: RunConfig, data: DataConfig) -> Iterator[CheckRow]:
    """Rows as they come. What raises is a row that failed, and the other checks go on.

    Args:
        config: small, from `shrink`.
        data: what the config reads, which need not be there.
    """
    devices = all_devices()
    one, mesh = make_layout(ShardingConfig(), devices[:1]), _mesh(config.sharding, len(devices))
    checks: dict[str, Callable[[], Iterator[CheckRow]]] = {
        "causality": partial(causality, config, one),
        "packed documents": partial(isolation, config, one),
        "gradients": partial(equal_gradients, config, one, mesh),
        "run": partial(going_on, config, one),
        "data": partial(data_order, config, data, one),
        "kernels": partial(kernels, config),
    }
    for name, rows in checks.items():
        try:
            yield from rows()
        except Exception as error:
            yield CheckRow.broken(name, error)


def _mesh(sharding: ShardingConfig, n_devices: int) -> Layout | None:
    fitted = fit_mesh(sharding, n_devices)
    if fitted is None:
        return None
    return make_layout(fitted, all_devices()[: math.prod(getattr(fitted, axis) for axis in MESH_AXES)])
