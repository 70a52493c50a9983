"""Decoding: milliseconds a token and temporary bytes over cache lengths and batch sizes; memory of patterns of blocks.

    python -m benchmarks.decode [--json FILE]

A decoder of 8 layers, d_model 64, float32. A token stands at position 64 of a cache with room for more and more, so
that what grows with the room is what the cache costs and not attention; a second row has it at the cache's end.
Temporaries are those of the compiled program beyond its arguments, of which the cache is donated.

The second table has the temporaries of a gradient of 12 equal layers with remat = full, written as a pattern of 1 block
and as one of 6: they should not differ by more than the work of one block.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from maxlm.inference.steps import Choice, DecodeState, decode_chunk, row_keys

from benchmarks.steps import cpu_name
from maxlm.config import (
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    llama,
)
from maxlm.config.sharding import ShardingConfig
from maxlm.models import Execution, bind, init_parameters
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer

FLOAT32 = ExecutionConfig(dtype=Dtype.FLOAT32)
LENGTHS, BATCHES, TOKENS = (256, 1024, 4096), (1, 8), 16


def model(n_layers: int, max_seq_len: int) -> ModelConfig:
    return llama(
        vocab_size=256, d_model=64, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_ff=176, max_seq_len=max_seq_len
    )


def decoding(layout: Layout, batch: int, length: int, at: int) -> dict[str, Any]:
    """Median milliseconds a token, tokens at positions `at` and on."""
    config = model(8, length)
    parameters, how = init_parameters(config, jax.random.key(0)), Execution(layout, FLOAT32)
    empty = jax.jit(lambda: bind(config, parameters).empty_cache(batch, length, how))

    def run(parameters: Any, state: DecodeState, keys: jax.Array, limit: jax.Array) -> tuple:
        choose = Choice(SamplingConfig(temperature=0.0), 256, (-1,))
        return decode_chunk(bind(config, parameters), how, state, keys, limit, chunk=TOKENS, choose=choose)

    def state() -> DecodeState:
        zeros = jnp.zeros(batch, jnp.int32)
        return DecodeState(empty(), zeros, zeros + at, zeros.astype(bool))

    keys, limit = jax.jit(functools.partial(row_keys, rows=batch))(jnp.uint32(0)), jnp.int32(TOKENS)
    program = jax.jit(run, donate_argnums=1).lower(parameters, state(), keys, limit).compile()
    times = []
    for _ in range(6):
        start = jax.block_until_ready(state())
        began = time.perf_counter()
        jax.block_until_ready(program(parameters, start, keys, limit))
        times.append((time.perf_counter() - began) / TOKENS * 1e3)
    cache_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(empty)))
    return {
        "batch": batch,
        "cache_length": length,
        "position": at,
        "ms_per_token": round(statistics.median(times[1:]), 3),
        "temporary_bytes": temporary_bytes(program),
        "cache_bytes": cache_bytes,
    }


def pattern_bytes(layout: Layout, entries: int) -> int:
    """Temporaries of a train step of 12 equal layers, written as a pattern of `entries` blocks."""
    one = dataclasses.replace(model(12, 512), d_model=256)
    config = RunConfig(
        model=dataclasses.replace(one, blocks=one.blocks * entries),
        execution=FLOAT32,
        data=DataConfig(datasets=(Dataset(path="unused"),)),
        train=TrainConfig(steps=1, batch_size=8, seq_len=512),
    )
    trainer = make_trainer(config, layout)
    return temporary_bytes(trainer.step.lower(trainer.state, trainer.batch).compile())


def temporary_bytes(program: jax.stages.Compiled) -> int:
    memory = program.memory_analysis()
    assert memory is not None  # XLA for CPUs gives it
    return memory.temp_size_in_bytes


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    layout = make_layout(ShardingConfig(), jax.devices()[:1])
    rows = [
        decoding(layout, batch, length, at)
        for batch in BATCHES
        for length in LENGTHS
        for at in (64, length - 2 * TOKENS)
    ]
    for row in rows:
        print(
            f"batch {row['batch']}  cache {row['cache_length']:5}  position {row['position']:5}  "
            f"{row['ms_per_token']:8.3f} ms/token  temporaries {row['temporary_bytes'] / 2**20:8.2f} MiB  "
            f"cache {row['cache_bytes'] / 2**20:7.2f} MiB",
            flush=True,
        )
    patterns = {entries: pattern_bytes(layout, entries) for entries in (1, 6)}
    for entries, n_bytes in patterns.items():
        print(f"12 layers as a pattern of {entries}: temporaries of a step {n_bytes / 2**20:.1f} MiB")
    if options.json:
        facts = {"cpu": cpu_name(), "jax": jax.__version__, "decoding": rows, "pattern_temporary_bytes": patterns}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
