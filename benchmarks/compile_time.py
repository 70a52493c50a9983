"""How the time to compile a training step grows with layers and with chips, in seconds of processor time.

    make compilers
    python -m benchmarks.compile_time --json benchmarks/results/compile_time.json

Each row is one `python -m maxlm.plan ... --compile` in a process of its own. Layers are scanned, so that a deeper model
should take no longer; devices all run the same program, so that more of them should not either. Processor time hardly
changes with the load of the machine; it is the sum over the compiler's threads.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

DENSE, MOE = "configs/llama_5m.py", "configs/tiny_moe.py"

LAYERS = [
    (config, target, ("--model.n_layers", str(layers)))
    for config in (DENSE, MOE)
    for target in ("cpu:8", "gpu:h200:8")
    for layers in (2, 8, 32)
]

CHIPS = [
    (DENSE, target, ("--sharding.fsdp", "8", "--train.batch_size", str(chips)))
    for target, chips in [
        ("gpu:h200:1x8", 8),
        ("gpu:h200:8x8", 64),
        ("gpu:h200:64x8", 512),
        ("gpu:h200:512x8", 4096),
        ("tpu:v5p:2x2x2", 8),
        ("tpu:v5p:4x4x4", 64),
        ("tpu:v5p:8x8x8", 512),
    ]
]


def measure(config: str, target: str, overrides: tuple[str, ...]) -> dict[str, Any]:
    """One row, or the reason why there is none."""
    arguments = ["--config", config, "--target", target, "--compile", "--json", *overrides]
    done = subprocess.run([sys.executable, "-m", "maxlm.plan", *arguments], capture_output=True, text=True, check=False)
    row: dict[str, Any] = {"config": config, "target": target, "overrides": " ".join(overrides)}
    if done.returncode:
        return row | {"error": done.stderr.strip().splitlines()[-1:]}
    report = json.loads(done.stdout)
    return row | {"compile_cpu_seconds": report["compile_cpu_seconds"], "collectives": len(report["collectives"])}


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--note", default="", help="what else the machine did")
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python -m benchmarks.compile_time",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax", "optax")},
        "note": options.note,
    }
    for name, rows in (("layers", LAYERS), ("chips", CHIPS)):
        report[name] = []
        for row in rows:
            report[name].append(measure(*row))
            print(json.dumps(report[name][-1]), flush=True)
            if options.json:
                options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
