"""Where arrays live: one mesh, and one table from the names of dims to mesh axes.

Every parameter and every activation names its dims ("batch", "embed", ...). This file alone says which mesh axis cuts
which named dim; to change a layout, change the table. Two words are kept apart everywhere: an *axis* belongs to the
mesh, a *dim* to an array.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from maxlm.config import MESH_AXES, ShardingConfig, UserError, Zero

Axes = tuple[str, ...]

PARAMETER_DIMS: dict[str, Axes] = {
    "layers": (),  # stacked layers; the loop over them runs on every device
    "vocab": ("tensor",),
    "embed": ("fsdp",),  # d_model of a weight matrix: the dim that every matrix has
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vector": (),  # norm scales and biases of the residual stream: small, so everywhere
}
"""Dim of a parameter -> the mesh axes that cut it. The fsdp axis counts only as far as `ShardingConfig.zero` says."""

ACTIVATION_DIMS: dict[str, Axes] = {
    "batch": ("data", "fsdp"),
    "seq": ("seq",),
    "residual_seq": ("seq",),  # of the residual stream between blocks; also tensor with sequence_parallel
    "embed": (),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
}
"""Dim of an activation -> the mesh axes that cut it."""


class StatePart(enum.Enum):
    """The three kinds of arrays that have a parameter's shape."""

    PARAMETERS = enum.auto()
    GRADIENTS = enum.auto()
    OPTIMIZER = enum.auto()


_CUT_BY_FSDP = {
    Zero.OPTIMIZER: {StatePart.OPTIMIZER},
    Zero.GRADIENTS: {StatePart.OPTIMIZER, StatePart.GRADIENTS},
    Zero.PARAMETERS: {StatePart.OPTIMIZER, StatePart.GRADIENTS, StatePart.PARAMETERS},
}


@dataclass(frozen=True)
class Layout:
    """A mesh with the rules of one ShardingConfig. Hashable, so that modules can hold it as static data."""

    mesh: Mesh
    config: ShardingConfig

    def activation(self, *dims: str | None) -> PartitionSpec:
        """Spec of an activation whose dims have these names; None is not cut."""
        return _spec([() if dim is None else self._activation_axes(dim) for dim in dims], dims)

    def parameter(self, dims: Sequence[str], part: StatePart = StatePart.PARAMETERS) -> PartitionSpec:
        """Spec of a parameter whose dims have these names, or of its gradient or optimizer moment."""
        hidden = () if part in _CUT_BY_FSDP[self.config.zero] else ("fsdp",)
        return _spec([tuple(axis for axis in PARAMETER_DIMS[dim] if axis not in hidden) for dim in dims], dims)

    def sharding(self, spec: PartitionSpec = PartitionSpec()) -> NamedSharding:
        """The spec on this mesh; without one, a copy on every device."""
        return NamedSharding(self.mesh, spec)

    def shardings(self, dims: Any, part: StatePart = StatePart.PARAMETERS) -> Any:
        """The sharding of every parameter (or gradient, or moment) from a tree of the names of their dims."""
        is_names = lambda leaf: isinstance(leaf, tuple)
        return jax.tree.map(lambda names: self.sharding(self.parameter(names, part)), dims, is_leaf=is_names)

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """Tell the compiler how to lay out an activation, inside jit."""
        return jax.lax.with_sharding_constraint(x, self.sharding(self.activation(*dims)))

    def _activation_axes(self, dim: str) -> Axes:
        if dim == "residual_seq" and self.config.sequence_parallel:
            return ("seq", "tensor")
        return ACTIVATION_DIMS[dim]


def make_layout(config: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh that the config describes over `devices` (default: all of them).

    Neighbours on the fast axes are neighbours in the hardware. With `slices` > 1 the data axis is the one that crosses
    the slow network between TPU slices or GPU hosts.

    Raises:
        UserError: the axes' product is not the number of devices, or `slices` not the number of slices or hosts.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = config.sizes(len(devices))
    shape = [sizes[axis] for axis in MESH_AXES]
    if config.slices > 1:
        within = [size // config.slices if axis == "data" else size for axis, size in sizes.items()]
        across = [config.slices if axis == "data" else 1 for axis in MESH_AXES]
        by_process = devices[0].platform != "tpu"  # other devices may have a slice_index, too, that is 0 on every host
        found = len({device.process_index if by_process else device.slice_index for device in devices})
        if found != config.slices:
            kind = "host" if by_process else "slice"
            raise UserError(
                f"sharding.slices = {config.slices}, but the devices come in {found} {kind}(s); use {found}"
            )
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    else:
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    # Auto: the compiler places what we do not constrain. jax's own default has become Explicit.
    return Layout(Mesh(np.asarray(grid), MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES)), config)


def _spec(axes_of_dims: Sequence[Axes], dims: Sequence[str | None]) -> PartitionSpec:
    used = [axis for axes in axes_of_dims for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"dims {tuple(dims)} would cut two dims by the same mesh axis: {axes_of_dims}")
    return PartitionSpec(*(axes[0] if len(axes) == 1 else (axes or None) for axes in axes_of_dims))
