"""Arrays and JSON in the folder of one step. The only file that speaks to Orbax.

A step holds two items of arrays, `params` and `optimizer`, and one of JSON. Trees are stored flat, as
`{"layers/q_proj": array}`: names do not depend on the classes of the tree (optax's NamedTuples, nnx states), and the
arrays can be read without them.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import math
import re
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from jax.tree_util import keystr, tree_flatten_with_path, tree_structure, tree_unflatten

from maxlm.config.errors import UserError

logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax reports every stage of every save at INFO


def _quiet_failures() -> None:
    """Drop the copies of a failed save: `wait` raises it, once.

    Each thread that it passes through would print it with a traceback, and so would asyncio for each array that shared
    its fate: hundreds of lines. Other warnings and errors are left alone.
    """

    def is_original(record: logging.LogRecord) -> bool:
        if not (record.exc_info and record.exc_info[1]):
            return True
        frames = [frame.f_code.co_filename for frame, _ in traceback.walk_tb(record.exc_info[1].__traceback__)]
        return not any("orbax" in text for text in (*frames, record.getMessage()))

    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(is_original)

    warnings.filterwarnings("ignore", "coroutine 'async_serialize_from_host", RuntimeWarning)  # not yet begun

    before = sys.unraisablehook

    def hook(unraisable: sys.UnraisableHookArgs) -> None:
        # The remaining writes of the failed save report to an event loop that is gone.
        if str(unraisable.exc_value) != "Event loop is closed":
            before(unraisable)

    sys.unraisablehook = hook


_quiet_failures()

Tree = Any
"""Any pytree whose leaves are jax arrays, `Deferred` ones, or jax.ShapeDtypeStructs with a sharding."""
Leaf = tuple[str, tuple[int, ...]]
"""dtype and shape."""

_FORMAT = 1

_PLAIN = re.compile(r"[\w./ +=,@:-]{1,2000}", re.ASCII)
"""Paths that go through Orbax as they are. It looks for files with glob, and TensorStore wants UTF-8 and reads `\\` as
`/`: other folders are spoken of through a link."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """The JSON of a step."""

    items: dict[str, dict[str, Leaf]]
    """dtype and shape of every array, by item and name."""
    meta: dict[str, Any]
    """What the caller gave to `begin`."""


@dataclass(frozen=True, kw_only=True)
class Deferred:
    """An array that is made when it is needed, so that not all of a tree, or of a stack, is in memory at a time."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    by_layer: bool
    """Whether a layer, a place of its first dim, is made without the others."""
    read: Callable[[int | None], np.ndarray]
    """Makes the layer of this number; None: all of it."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def astype(self, dtype: Any) -> Deferred:
        """The same in another format."""
        read, wanted = self.read, np.dtype(dtype)
        return replace(self, dtype=wanted, read=lambda number: read(number).astype(wanted, copy=False))

    @property
    def numbers(self) -> Iterable[int | None]:
        """What to give to `read`, one after the other, for all of it."""
        return range(self.shape[0]) if self.by_layer else (None,)


_CHUNK_BYTES, _FILE_BYTES = 1 << 25, 1 << 26
"""What is compressed at a time; and what a file holds of deferred arrays, which waits in memory until it is full."""
_LAYER_BYTES = 1 << 20
"""Of a stack whose layers are smaller, they share chunks: each chunk costs time, and all of the stack little memory."""


class _DeferredHandler(ocp.type_handlers.NumpyHandler):
    """Writes one array after the other, and of each one layer after the other, each to its end."""

    async def serialize(self, values: Any, infos: Any, args: Any = None) -> list[Any]:
        for value, info, how in zip(values, infos, args, strict=True):
            for written in await super().serialize([value], [info], [how]):
                await asyncio.to_thread(written.result)
        return []

    async def _open_and_write(self, value: Deferred, tspec: dict[str, Any], ts_context: tensorstore.Context) -> None:
        """Takes the place of the method that hands a whole array to TensorStore."""
        array = await tensorstore.open(tensorstore.Spec(tspec), create=True, open=True, context=ts_context)
        for number in value.numbers:
            place = array[... if number is None else number]
            await place.write(value.read(number), can_reference_source_data_indefinitely=True)


class Store:
    """Asynchronous writing and reading of steps; every process of a run must make the same calls."""

    def __init__(self) -> None:
        self._orbax = ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler())
        self._links: dict[Path, Path] = {}
        self._stack = contextlib.ExitStack()

    def begin(
        self, path: Path, items: Mapping[str, Tree], meta: dict[str, Any], *, stacks: Collection[str] = ()
    ) -> None:
        """Start to write the step `path`; returns when the arrays have been copied and may be donated or changed.

        Where leaves are `Deferred`, all of them are, and it returns when they are written. `stacks` names the arrays of
        any item whose first dim is that of layers: each large layer gets chunks of its own, to be read alone.
        """
        named = {item: named_leaves(tree) for item, tree in items.items()}
        for item, leaves in named.items():
            for name, leaf in leaves.items():
                if not isinstance(leaf, jax.Array | Deferred):
                    raise TypeError(f"{item} leaf {name} is a {type(leaf).__name__}; only jax arrays can be saved")
        described = {item: {n: describe_leaf(leaf) for n, leaf in leaves.items()} for item, leaves in named.items()}
        body = {"format": _FORMAT, "items": described, "meta": meta}
        named = {item: leaves for item, leaves in named.items() if leaves}  # Orbax refuses {}
        if any(isinstance(leaf, Deferred) for leaves in named.values() for leaf in leaves.values()):
            self._write_deferred(path, named, body)
            return
        arrays = {
            item: ocp.args.PyTreeSave(leaves, {name: _chunks(leaf, name in stacks) for name, leaf in leaves.items()})
            for item, leaves in named.items()
        }
        self._orbax.save(self._address(path), args=ocp.args.Composite(meta=ocp.args.JsonSave(body), **arrays))

    def _write_deferred(self, path: Path, items: Mapping[str, Mapping[str, Deferred]], body: dict[str, Any]) -> None:
        kinds = ocp.type_handlers.create_type_handler_registry(
            (Deferred, _DeferredHandler(deepcopy_host_arrays=False)),
            (jax.Array, ocp.type_handlers.ArrayHandler()),  # Orbax warns where it has none
        )
        handlers = {item: ocp.PyTreeCheckpointHandler(type_handler_registry=kinds) for item in items}
        arrays = {
            item: ocp.args.PyTreeSave(
                leaves,
                save_args={
                    name: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if leaf.by_layer else ())
                    for name, leaf in leaves.items()
                },
                ocdbt_target_data_file_size=_FILE_BYTES,
            )
            for item, leaves in items.items()
        }
        with contextlib.closing(
            ocp.AsyncCheckpointer(ocp.CompositeCheckpointHandler(meta=ocp.JsonCheckpointHandler(), **handlers))
        ) as writer:
            writer.save(self._address(path), args=ocp.args.Composite(meta=ocp.args.JsonSave(body), **arrays))
            writer.wait_until_finished()

    def wait(self) -> None:
        """Block until the step that was begun has its final name. Raises what went wrong in the background."""
        self._orbax.wait_until_finished()

    def close(self) -> None:
        with self._stack:
            self._orbax.close()

    def check(self, path: Path) -> None:
        """Open every array of a finished step as `arrays` would, without reading it; needs no other process.

        Raises:
            OSError, ValueError: an array is not found, or has another shape or dtype than `begin` was given.
            UserError: as of `record`.
        """
        record, path = self.record(path), self._address(path)
        for item, leaves in record.items.items():
            if not leaves:
                continue
            found = ocp.PyTreeCheckpointHandler().metadata(path / item).tree
            opened = {name: (str(jnp.dtype(leaf.dtype)), tuple(leaf.shape)) for name, leaf in found.items()}
            if difference := first_difference(item, opened, leaves):
                raise ValueError(f"written, but not found again: {difference}")

    def record(self, path: Path) -> Record:
        """The JSON of a step.

        Raises:
            UserError: another version of maxlm wrote it in a format that this one does not read.
        """
        body = json.loads((path / "meta" / "metadata").read_text("utf-8"))
        if body.get("format") != _FORMAT:
            raise UserError(f"{path}: has format {body.get('format')!r}, this version of maxlm reads {_FORMAT}")
        items = {
            item: {name: (dtype, tuple(shape)) for name, (dtype, shape) in leaves.items()}
            for item, leaves in body["items"].items()
        }
        return Record(items=items, meta=body["meta"])

    def arrays(self, path: Path, items: Mapping[str, Tree]) -> dict[str, Tree]:
        """Read whole items in the shardings of the given trees of ShapeDtypeStructs."""
        args, structures = {}, {}
        for item, tree in items.items():
            leaves, structures[item] = named_leaves(tree), tree_structure(tree)
            for name, leaf in leaves.items():
                if leaf.sharding is None:  # Orbax would put it where the run that wrote it had it
                    raise TypeError(f"{item} leaf {name} has no sharding; say where to restore it")
            if leaves:
                shardings = ocp.checkpoint_utils.construct_restore_args(leaves)
                args[item] = ocp.args.PyTreeRestore(leaves, restore_args=shardings)
        found = self._orbax.restore(self._address(path), args=ocp.args.Composite(**args)) if args else {}
        trees = {}
        for item, tree in items.items():
            trees[item] = tree_unflatten(structures[item], [found[item][name] for name in named_leaves(tree)])
        return trees

    def some(self, path: Path, item: str, leaves: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
        """Read some arrays of an item, by name, in the shardings of these."""
        how = ocp.checkpoint_utils.construct_restore_args(dict(leaves))
        args = ocp.args.PyTreeRestore(dict(leaves), restore_args=how, partial_restore=True)
        return self._orbax.restore(self._address(path), args=ocp.args.Composite(**{item: args}))[item]

    def numpy(self, path: Path, item: str, names: Iterable[str]) -> dict[str, np.ndarray]:
        """Read some arrays of an item into host memory, without devices or shardings."""
        wanted = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(dict.fromkeys(wanted, 0), restore_args=wanted, partial_restore=True)
        return self._orbax.restore(self._address(path), args=ocp.args.Composite(**{item: args}))[item]

    def deferred(self, path: Path, item: str, names: Iterable[str]) -> dict[str, Deferred]:
        """Some arrays of an item, to be read into host memory, also after `close`.

        An array is read by layer where the files have no chunk with numbers of two layers.
        """

        def one(name: str) -> Deferred:
            def read(number: int | None) -> np.ndarray:
                with contextlib.closing(Store()) as store:
                    return store._open(path, item, name)[... if number is None else number].read().result()

            array = self._open(path, item, name)
            by_layer = array.chunk_layout.read_chunk_template.shape[:1] == (1,)
            return Deferred(shape=array.shape, dtype=array.dtype.numpy_dtype, by_layer=by_layer, read=read)

        return {name: one(name) for name in names}

    def _open(self, path: Path, item: str, name: str) -> tensorstore.TensorStore:
        """An array as Orbax writes it: Zarr in an OCDBT database."""
        base = {"driver": "file", "path": f"{self._address(path) / item}/"}
        kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
        return tensorstore.open({"driver": "zarr", "kvstore": kvstore}, open=True).result()

    def _address(self, path: Path) -> Path:
        """`path`, or where its folder is a name that Orbax does not take, the same place under a plain one."""
        if _PLAIN.fullmatch(str(path)):
            return path
        if path.parent not in self._links:
            place = tempfile.gettempdir()
            inside = place if _PLAIN.fullmatch(place) else "/tmp"
            link = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="maxlm-", dir=inside)), "steps")
            link.symlink_to(path.parent, target_is_directory=True)
            self._links[path.parent] = link
        return self._links[path.parent] / path.name


def _chunks(leaf: jax.Array, is_stack: bool) -> ocp.SaveArgs:
    """How a device's part of an array is cut: large layers from each other, and what is large still further."""
    apart = is_stack and leaf.nbytes // leaf.shape[0] >= _LAYER_BYTES
    return ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES, shard_axes=(0,) if apart else ())


def named_leaves(tree: Tree) -> dict[str, Any]:
    """The leaves by path, in tree order: `{"layers/q_proj": leaf}`; a tree that is one leaf has the name `value`."""
    pairs = tree_flatten_with_path(tree)[0]
    named = {keystr(path, simple=True, separator="/") or "value": leaf for path, leaf in pairs}
    if len(named) != len(pairs):
        raise ValueError("two leaves of the tree have the same path; rename one")
    return named


def describe_leaf(leaf: Any) -> Leaf:
    """dtype and shape of an array or ShapeDtypeStruct."""
    return str(leaf.dtype), tuple(leaf.shape)


def first_difference(item: str, stored: Mapping[str, Leaf], wanted: Mapping[str, Leaf]) -> str | None:
    """The first leaf, in the order of `wanted`, that the two disagree about, as half a sentence; None if they agree."""
    for name, leaf in wanted.items():
        if name not in stored:
            return f"{item} leaf {name} {_show(leaf)} is missing in the checkpoint"
        if stored[name] != leaf:
            return f"{item} leaf {name} is {_show(stored[name])} in the checkpoint and {_show(leaf)} in this run"
    for name, leaf in stored.items():
        if name not in wanted:
            return f"{item} leaf {name} {_show(leaf)} of the checkpoint is unknown to this run"
    return None


def _show(leaf: Leaf) -> str:
    dtype, shape = leaf
    return f"{dtype}[{', '.join(map(str, shape))}]"
