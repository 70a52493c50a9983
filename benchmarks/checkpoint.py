"""Seconds to save and restore a state of random float32 arrays, stacks of layers, as one JSON line.

    python -m benchmarks.checkpoint [--megabytes 512] [--folder DIR]

save_blocks_s        until `save` returns and training goes on
save_s               until the step is finished, manifest included
restore_s            with every checksum compared (the files lie in the page cache)
restore_unverified_s without
files                of the step, manifest included
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import jax
import numpy as np

from maxlm.checkpoint.checkpointer import Checkpointer
from maxlm.config import CheckpointConfig

_ARRAYS, _LAYERS, _ROWS = 16, 8, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--megabytes", type=int, default=512)
    parser.add_argument("--folder", default=None, help="where to write; default: the system's temporary folder")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    shape = (_LAYERS, _ROWS, options.megabytes * 2**20 // 4 // _ARRAYS // _LAYERS // _ROWS)
    params = {f"w{i}": jax.device_put(rng.standard_normal(shape, np.float32)) for i in range(_ARRAYS)}
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params)
    with tempfile.TemporaryDirectory(dir=options.folder) as folder:
        with Checkpointer(Path(folder), CheckpointConfig()) as saved:
            began = time.perf_counter()
            saved.save(1, params=params, optimizer={}, meta={"data": {}}, stacks=params.keys())
            blocks = time.perf_counter() - began
            saved.wait()
            save = time.perf_counter() - began
        files = sum(path.is_file() for path in Path(folder).rglob("*"))
        restore = {verify: seconds_to_restore(Path(folder), shapes, verify) for verify in (False, True)}
    result = {
        "megabytes": options.megabytes,
        "save_blocks_s": round(blocks, 3),
        "save_s": round(save, 2),
        "restore_s": round(restore[True], 2),
        "restore_unverified_s": round(restore[False], 2),
        "files": files,
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    print(json.dumps(result))


def seconds_to_restore(folder: Path, shapes: dict[str, jax.ShapeDtypeStruct], verify: bool) -> float:
    """The second of two restores, so that both kinds read files that the system has cached."""
    with Checkpointer(folder, CheckpointConfig(verify=verify)) as saved:
        for _ in range(2):
            began = time.perf_counter()
            jax.block_until_ready(saved.restore_latest(params=shapes, optimizer={}))
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
