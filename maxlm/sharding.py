"""Where arrays live: one mesh, and the table of `maxlm/config/dims.py` from the names of dims to mesh axes.

Every parameter and every activation names its dims ("batch", "embed", ...), and nothing else about its layout. Two
words are kept apart everywhere: an *axis* belongs to the mesh, a *dim* to an array.
"""

from __future__ import annotations

import importlib.util
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from maxlm.config import (
    ACTIVATION_DIMS,
    CUT_BY_FSDP,
    MESH_AXES,
    PARAMETER_DIMS,
    Axes,
    ShardingConfig,
    StatePart,
    UserError,
)
from maxlm.config.errors import pip_install


@dataclass(frozen=True)
class Layout:
    """A mesh with the rules of one ShardingConfig. Hashable, so that modules can hold it as static data."""

    mesh: Mesh
    config: ShardingConfig

    def activation(self, *dims: str | None) -> PartitionSpec:
        """Spec of an activation whose dims have these names; None is not cut."""
        return _spec([() if dim is None else self._activation_axes(dim) for dim in dims], dims)

    def parameter(self, dims: Sequence[str | None], part: StatePart = StatePart.PARAMETERS) -> PartitionSpec:
        """Spec of a parameter whose dims have these names, or of its gradient or optimizer moment; None is not cut."""
        hidden = () if part in CUT_BY_FSDP[self.config.zero] else ("fsdp",)
        axes = [() if dim is None else PARAMETER_DIMS[dim] for dim in dims]
        return _spec([tuple(axis for axis in cut if axis not in hidden) for cut in axes], dims)

    def sharding(self, spec: PartitionSpec = PartitionSpec()) -> NamedSharding:
        """The spec on this mesh; without one, a copy on every device."""
        return NamedSharding(self.mesh, spec)

    def shardings(self, dims: Any, part: StatePart = StatePart.PARAMETERS) -> Any:
        """The sharding of every parameter (or gradient, or moment) from a tree of the names of their dims."""
        is_names = lambda leaf: isinstance(leaf, tuple)
        return jax.tree.map(lambda names: self.sharding(self.parameter(names, part)), dims, is_leaf=is_names)

    def constrain(self, x: jax.Array, *dims: str | None) -> jax.Array:
        """Tell the compiler how to lay out an activation, inside jit."""
        mesh, manual = self._context()
        return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, _without(self.activation(*dims), manual)))

    def shard_map(
        self, f: Callable[..., Any], *, in_specs: Any, out_specs: Any, check_vma: bool = True
    ) -> Callable[..., Any]:
        """`jax.shard_map` over the mesh, or, inside a pipeline stage, over the axes that the stage has not cut yet."""
        mesh, manual = self._context()
        strip = lambda specs: jax.tree.map(lambda spec: _without(spec, manual), specs, is_leaf=_is_spec)
        return jax.shard_map(
            f,
            mesh=mesh,
            in_specs=strip(in_specs),
            out_specs=strip(out_specs),
            axis_names=set(MESH_AXES) - manual,
            check_vma=check_vma,
        )

    def local_shape(self, shape: Sequence[int], spec: PartitionSpec) -> tuple[int, ...]:
        """What a function in `shard_map` sees of an array of this shape; rounded down where a size does not divide."""
        mesh, manual = self._context()
        cuts = _axes_of_dims(_without(spec, manual))
        return tuple(n // math.prod(mesh.shape[axis] for axis in cut) for n, cut in zip(shape, cuts, strict=True))

    def divided(self, shape: Sequence[int], spec: PartitionSpec) -> PartitionSpec:
        """The spec for an array of this shape, whose dims stay whole where their size does not divide."""
        parts = [math.prod(self.mesh.shape[axis] for axis in axes) for axes in _axes_of_dims(spec)]
        return PartitionSpec(
            *(axes if n % part == 0 else None for n, axes, part in zip(shape, spec, parts, strict=True))
        )

    @property
    def on_cpu(self) -> bool:
        """Whether its devices are the host's processor."""
        return self.mesh.devices.flat[0].platform == "cpu"

    @property
    def batch_shards(self) -> int:
        """Parts that the batch is cut into; a batch has a multiple of this many rows."""
        return math.prod(self.mesh.shape[axis] for axis in ACTIVATION_DIMS["batch"])

    def _context(self) -> tuple[Mesh | AbstractMesh, frozenset[str]]:
        """The mesh to name here, and its axes that an enclosing shard_map has cut already."""
        context = jax.sharding.get_abstract_mesh()
        manual = frozenset(context.manual_axes)
        return (context if manual else self.mesh), manual

    def _activation_axes(self, dim: str) -> Axes:
        if dim == "residual_seq" and self.config.sequence_parallel:
            return ("seq", "tensor")
        return ACTIVATION_DIMS[dim]


def all_devices() -> list[jax.Device]:
    """`jax.devices()`.

    Raises:
        UserError: there are none of the platform that was asked for; or jax is set to compute something else than this
            code says, or to refuse it.
    """
    for setting, refused in _REFUSED_SETTINGS.items():
        if jax.config.values.get(setting) in refused:
            raise UserError(
                f"{setting.upper()} = {jax.config.values[setting]}: this code does not run with that setting of jax; "
                "unset the variable"
            )
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:
        asked = str(jax.config.values["jax_platforms"])
        extra, packages = _PLATFORMS.get(asked, ("", ()))
        missing = bool(packages) and not any(importlib.util.find_spec(package) for package in packages)
        remedy = f"on a machine that has some: {pip_install(f'maxlm[{extra}]')}; here: " if missing else ""
        reason = " ".join(str(error).split()).partition(" (set JAX_PLATFORMS")[0]
        here = ["cpu", *(name for name, (_, known) in _PLATFORMS.items() if any(map(importlib.util.find_spec, known)))]
        raise UserError(
            f"JAX_PLATFORMS = {asked}: jax {jax.__version__} finds no such devices{f' ({reason})' if reason else ''}; "
            f"{remedy}unset JAX_PLATFORMS, or use one that jax is installed for: {', '.join(here)}"
        ) from error


_STRICT = ("disallow", "disallow_explicit")
_REFUSED_SETTINGS: dict[str, tuple[bool | str, ...]] = {
    "jax_enable_x64": (True,),  # numbers of 64 bits, which no other checkpoint has
    "jax_disable_jit": (True,),  # programs are compiled before they are called
    "jax_check_tracer_leaks": (True,),  # jax finds one of its own in shard_map
    "jax_numpy_rank_promotion": ("raise",),
    "jax_numpy_dtype_promotion": ("strict",),
    "jax_transfer_guard": _STRICT,
    "jax_transfer_guard_host_to_device": _STRICT,
    "jax_transfer_guard_device_to_host": _STRICT,
    "jax_transfer_guard_device_to_device": _STRICT,
}
_CUDA = "gpu", ("jax_cuda13_plugin", "jax_cuda12_plugin")
_PLATFORMS = {"tpu": ("tpu", ("libtpu",)), "cuda": _CUDA, "gpu": _CUDA}
"""Platforms of jax beside the CPU: our extra, and the modules of which one is installed with it."""


def only_cpus() -> bool:
    """Whether jax will find no device but CPUs, as far as can be known before it looks."""
    asked = jax.config.values["jax_platforms"]
    return asked == "cpu" if asked else not any(map(importlib.util.find_spec, _CUDA[1] + _PLATFORMS["tpu"][1]))


def make_layout(config: ShardingConfig, devices: Sequence[jax.Device] | None = None) -> Layout:
    """The mesh that the config describes over `devices` (default: all of them).

    Neighbours on the fast axes are neighbours in the hardware. With `slices` > 1 one axis, `slices_axis`, crosses the
    slow network between TPU slices or hosts, and every other axis stays within one of them.

    Raises:
        UserError: the axes' product is not the number of devices, or `slices` not the number of slices or hosts.
    """
    devices = all_devices() if devices is None else list(devices)
    sizes = config.sizes(len(devices))
    # Hosts of GPUs count as slices if the config says so; other devices than TPUs may have a slice_index that is 0, and
    # TPUs that are only compiled for have none.
    by_process = devices[0].platform != "tpu"
    groups = Counter(device.process_index if by_process else getattr(device, "slice_index", 0) for device in devices)
    if config.slices != len(groups) and (config.slices > 1 or not by_process):
        kind = "host" if by_process else "slice"
        raise UserError(
            f"sharding.slices = {config.slices}, but the devices come in {len(groups)} {kind}(s); use {len(groups)}"
        )
    if config.slices > 1:
        if len(set(groups.values())) > 1:
            raise UserError(
                f"sharding.slices = {config.slices}, but the slices have {sorted(groups.values())} devices; all must "
                "have as many, or use sharding.slices = 1"
            )
        spanning = config.slices_axis.value
        within = [size // config.slices if axis == spanning else size for axis, size in sizes.items()]
        across = [config.slices if axis == spanning else 1 for axis in MESH_AXES]
        grid = mesh_utils.create_hybrid_device_mesh(
            within, across, devices, process_is_granule=by_process, allow_split_physical_axes=True
        )
    else:
        shape = [sizes[axis] for axis in MESH_AXES]
        grid = mesh_utils.create_device_mesh(shape, devices, allow_split_physical_axes=True)
    return Layout(_mesh(np.asarray(grid)), config)


def decoding_layout(layout: Layout, d_model: int) -> Layout:
    """The same devices for decoding: one token at a time can be cut neither along the sequence nor into micro-batches.

    The devices of the seq axis join the data axis: no parameter moves, as none is cut by either. Those of the stage
    axis join fsdp, which then cuts the parameters even where training cut the optimizer's state alone, so that a device
    has as small a part of them as before; where the two do not divide d_model, they join data, with the parameters of
    all stages on each.
    """
    mesh = layout.mesh
    config = layout.config.for_decoding(mesh.size, d_model)
    home = "fsdp" if config.fsdp > mesh.shape["fsdp"] else "data"
    return Layout(_joined(_joined(mesh, "seq", "data"), "stage", home), config)


def _joined(mesh: Mesh, axis: str, home: str) -> Mesh:
    """The mesh with all devices of one axis on another one."""
    sizes = dict(mesh.shape)
    sizes[home], sizes[axis] = sizes[home] * sizes[axis], 1
    # Beside its new axis, as its faster part.
    order = [name for name in MESH_AXES if name != axis]
    order.insert(order.index(home) + 1, axis)
    devices = mesh.devices.transpose([MESH_AXES.index(name) for name in order])
    return _mesh(devices.reshape(list(sizes.values())))


def _mesh(grid: np.ndarray) -> Mesh:
    """Auto: the compiler places what we do not constrain. jax's own default has become Explicit."""
    return Mesh(grid, MESH_AXES, axis_types=(AxisType.Auto,) * len(MESH_AXES))


def _is_spec(leaf: Any) -> bool:
    return isinstance(leaf, PartitionSpec)


def _without(spec: PartitionSpec, axes: frozenset[str]) -> PartitionSpec:
    """The spec less some axes."""
    if not axes:
        return spec
    cuts = _axes_of_dims(spec)
    return _spec([tuple(axis for axis in cut if axis not in axes) for cut in cuts], [None] * len(cuts))


def _axes_of_dims(spec: PartitionSpec) -> list[Axes]:
    return [() if cut is None else (cut,) if isinstance(cut, str) else cut for cut in spec]


def _spec(axes_of_dims: Sequence[Axes], dims: Sequence[str | None]) -> PartitionSpec:
    used = [axis for axes in axes_of_dims for axis in axes]
    if len(used) != len(set(used)):
        raise ValueError(f"dims {tuple(dims)} would cut two dims by the same mesh axis: {axes_of_dims}")
    return PartitionSpec(*(axes[0] if len(axes) == 1 else (axes or None) for axes in axes_of_dims))
