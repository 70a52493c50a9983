"""One number for the whole state of a run, to show that two runs are equal bit for bit."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from maxlm.checkpoint import retention
from maxlm.checkpoint.store import Leaf, Store
from maxlm.config.errors import UserError

_READ_BYTES = 1 << 30


def state_hash(folder: Path, step: int, items: Sequence[str] | None = None) -> str:
    """SHA-256 of the step, every parameter, all optimizer state and `meta["data"]`, in hexadecimal.

    Frozen arrays, and the base under an adapter, count with their fingerprints. With `items`, of the arrays of these
    items alone.

    Each array counts with its name, dtype, shape and bytes (row-major), sorted by name. The mesh that wrote the step,
    paths, times and the rest of `meta` do not count. Reads at most 1 GiB, or one array if that is larger, at a time.

    Raises:
        UserError: the step is not there or not finished.
    """
    if step not in (there := retention.finished(folder)):
        raise UserError(f"{folder}: no finished checkpoint of step {step}; there are {there or 'none'}")
    path, store = folder.absolute() / str(step), Store()
    record = store.record(path)
    digest = hashlib.sha256()
    if items is None:
        _add(digest, ["step", step, "data", record.meta.get("data")])
        for kind in ("frozen", "base"):
            if (read := record.meta.get(kind)) is not None:
                _add(digest, [kind, read["fingerprint"]])
    for item in sorted(record.items if items is None else items):
        for names in _groups(record.items[item]):
            arrays = store.numpy(path, item, names)
            for name in names:
                dtype, shape = record.items[item][name]
                _add(digest, [item, name, dtype, shape])
                digest.update(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
    store.close()
    return digest.hexdigest()


def _add(digest: hashlib._Hash, header: list[object]) -> None:
    digest.update(json.dumps(header, sort_keys=True).encode() + b"\n")


def _groups(leaves: dict[str, Leaf]) -> Iterator[list[str]]:
    """Names in order, in groups that fit the memory bound: one read for many small arrays."""
    group: list[str] = []
    size = 0
    for name in sorted(leaves):
        dtype, shape = leaves[name]
        nbytes = math.prod(shape) * jnp.dtype(dtype).itemsize
        if group and size + nbytes > _READ_BYTES:
            yield group
            group, size = [], 0
        group.append(name)
        size += nbytes
    if group:
        yield group
