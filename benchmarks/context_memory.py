"""Memory of each device as a sequence and the seq axis grow together; no TPU is needed, no time is measured.

    make compilers
    PYTHONPATH=.venv/compilers .venv/bin/python -m benchmarks.context_memory --json FILE

Two layers of LLaMA 7B, forward and backward with `remat = names` in bfloat16, through the TPU compiler: one sequence of
4096 tokens for each device of the seq axis. `temporary` is what the program allocates on a device beyond its arguments
and results, which are the parameters and their gradients, the same for every length.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
from jax.experimental import topologies

from configs import llama7b
from maxlm.config import Context, Remat, RunConfig, ShardingConfig
from maxlm.sharding import make_layout
from maxlm.training import NextToken, make_trainer
from maxlm.training.step import gradient_function

TOKENS = 4096
"""Of every device, whatever the length of the sequence."""
MACHINES = {2: "v5p:2x2x1", 4: "v5p:2x2x1", 8: "v5p:2x2x2", 16: "v5p:2x2x4"}
"""Size of the seq axis -> the machine; the data axis takes the chips that remain."""


def run_config(context: Context, seq: int, chips: int) -> RunConfig:
    config = llama7b.get_config()
    length = seq * TOKENS
    return dataclasses.replace(
        config,
        # A small vocabulary, so that the layers are what is measured.
        model=dataclasses.replace(config.model, n_layers=2, vocab_size=256, max_seq_len=length),
        execution=dataclasses.replace(config.execution, remat=Remat.NAMES),
        sharding=ShardingConfig(data=chips // seq, seq=seq, context=context),
        train=dataclasses.replace(config.train, batch_size=chips // seq, seq_len=length),
    )


def temporary_bytes(context: Context, seq: int) -> int:
    """Of one device, for the gradient of the two layers."""
    devices = topologies.get_topology_desc(platform="tpu", topology_name=MACHINES[seq]).devices
    config = run_config(context, seq, len(devices))
    config.validate(len(devices))
    layout = make_layout(config.sharding, devices)
    trainer = make_trainer(config, layout)
    gradient = jax.jit(gradient_function(config, layout, NextToken(config, layout)))
    memory = gradient.lower(trainer.state.parameters, None, trainer.batch).compile().memory_analysis()
    assert memory is not None  # the TPU compiler gives it
    return memory.temp_size_in_bytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    report: dict[str, Any] = {
        "command": "python -m benchmarks.context_memory",
        "python": sys.version.split()[0],
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "layers": 2,
        "tokens_per_device": TOKENS,
        "temporary_mib": {},
    }
    for context in Context:
        figures = report["temporary_mib"][context.value] = {}
        for seq, machine in MACHINES.items():
            figures[seq * TOKENS] = mib = round(temporary_bytes(context, seq) / 2**20, 1)
            print(
                f"{context.value:<11}{seq * TOKENS:>6} tokens, seq = {seq:<3}{mib:>9,.1f} MiB ({machine})", flush=True
            )
    if options.json:
        options.json.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
