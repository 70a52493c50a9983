"""What the TPU compiler says of the kernels and of the plain forms they replace; no TPU is needed, no time is measured.

    make compilers
    PYTHONPATH=.venv/compilers .venv/bin/python -m benchmarks.kernels_compiled --chip v5p:2x2x1 --json FILE

One device's part of a LLaMA 7B layer at 4096 tokens, forward and backward, in bfloat16. `temporary` is what the program
allocates beyond its arguments and results. `traffic` is the compiler's estimate of bytes moved, which says less than it
seems: for a kernel of ours it is the estimate that the kernel declares, and XLA's attention is a loop whose body counts
once, so that the two compare for the gated units only.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh, PartitionSpec

from kernels_pallas import flash_attention, fused_glu, fused_glu_mlp

T, N, K, H, D, F = 4096, 32, 8, 128, 4096, 11008


def programs() -> dict[str, tuple[Callable[..., Any], list[tuple[int, ...]]]]:
    """Operation -> the function of a backend, and the shapes of its arrays."""
    weights = [(D, F), (D, F)]
    return {
        "flash_attention": (flash_attention, [(1, T, N, H), (1, T, K, H), (1, T, K, H)]),
        "fused_glu": (fused_glu, [(T, D), *weights]),
        "fused_glu_mlp": (fused_glu_mlp, [(T, D), *weights, (F, D)]),
    }


def compiled(function: Callable[..., Any], shapes: list[tuple[int, ...]], backend: str, mesh: Mesh) -> dict[str, float]:
    """Figures of the program that computes the function and its gradients on one device of the mesh."""

    def both(d_out: jax.Array, *arrays: jax.Array) -> Any:
        out, pull = jax.vjp(lambda *arrays: function(*arrays, backend=backend), *arrays)
        return out, pull(d_out)

    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]
    d_out = jax.eval_shape(lambda *arrays: function(*arrays, backend="xla"), *arrays)
    on_mesh = jax.shard_map(both, mesh=mesh, in_specs=PartitionSpec(), out_specs=PartitionSpec(), check_vma=False)
    program = jax.jit(on_mesh).lower(d_out, *arrays).compile()
    memory, cost = program.memory_analysis(), program.cost_analysis()
    assert memory is not None and cost is not None  # the TPU compiler gives both
    return {
        "temporary_mib": round(memory.temp_size_in_bytes / 2**20, 1),
        "traffic_mib": round(cost["bytes accessed"] / 2**20, 1),
    }


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--chip", default="v5p:2x2x1", help="a topology: v5e:2x2, v5p:2x2x1, v6e:2x2, tpu7x:2x2x1")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    devices = topologies.get_topology_desc(platform="tpu", topology_name=options.chip).devices
    mesh = Mesh(np.array(devices), ("device",))
    report: dict[str, Any] = {"chip": options.chip, "jax": jax.__version__}
    for name, (function, shapes) in programs().items():
        for backend in ("tpu", "xla"):
            report[f"{name} {backend}"] = figures = compiled(function, shapes, backend, mesh)
            print(f"{name:<16} {backend:<4}", "  ".join(f"{key} {value:,}" for key, value in figures.items()))
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
