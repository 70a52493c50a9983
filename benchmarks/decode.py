"""Decoding: milliseconds a token and temporary bytes over cache lengths and batch sizes; memory of patterns of blocks.

    python -m benchmarks.decode [--json FILE]

A decoder of 8 layers, d_model 64, float32. First the engine's step alone: 16 tokens of each text, one after the other,
from position 64 of a cache with room for more and more, so that what grows with the room is what the cache costs and
not attention; a second row has them at the cache's end. Temporaries are those of the compiled program beyond its
arguments, of which the cache is donated. Then the whole engine, with what it does for each text between steps.

The last table has the temporaries of a gradient of 12 equal layers with remat = full, written as a pattern of 1 block
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
import numpy as np

from benchmarks.steps import cpu_name
from maxlm.config import (
    DataConfig,
    Dataset,
    Dtype,
    EngineConfig,
    ExecutionConfig,
    ModelConfig,
    RunConfig,
    SamplingConfig,
    TrainConfig,
    llama,
)
from maxlm.config.sharding import ShardingConfig
from maxlm.data.tokenizers import Bytes
from maxlm.inference.engine import Engine
from maxlm.inference.held import by_layer
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request
from maxlm.inference.settings import settings_row
from maxlm.inference.step import StepRows, Texts, step
from maxlm.models import Execution, init_parameters
from maxlm.models.kv_cache import empty_cache
from maxlm.sharding import Layout, make_layout
from maxlm.training import make_trainer

FLOAT32 = ExecutionConfig(dtype=Dtype.FLOAT32)
LENGTHS, BATCHES, TOKENS = (256, 1024, 4096), (1, 8), 16
VOCAB, BLOCK = 264, 16
GREEDY = SamplingConfig(temperature=0.0)


def model(n_layers: int, max_seq_len: int) -> ModelConfig:
    return llama(
        vocab_size=VOCAB, d_model=64, n_layers=n_layers, n_heads=4, n_kv_heads=2, d_ff=176, max_seq_len=max_seq_len
    )


def decoding(layout: Layout, batch: int, length: int, at: int) -> dict[str, Any]:
    """Median milliseconds of a token of each text, tokens at positions `at` and on."""
    config, how = model(8, length), Execution(layout, FLOAT32)
    parameters = by_layer(config, jax.jit(lambda: init_parameters(config, jax.random.key(0)))())
    width = length // BLOCK
    empty = jax.jit(lambda: empty_cache(config, {0: batch * width + 1}, BLOCK, how))
    tables = {0: jax.device_put(1 + np.arange(batch * width, dtype=np.int32).reshape(batch, width))}
    settings = settings_row(GREEDY, vocab=VOCAB)
    text = Texts(
        np.zeros(length + 1, np.int32), np.int32(at + 1), np.int32(length), np.bool_(False), np.int32(0), settings
    )
    texts = jax.tree.map(lambda x: np.broadcast_to(x, (batch, *np.shape(x))), text)
    every = np.arange(batch, dtype=np.int32)
    rows = StepRows(every, np.full_like(every, at), every, np.ones(batch, bool), np.full_like(every, -1))
    run = jax.jit(functools.partial(step, config=config, how=how, most_steps=TOKENS), donate_argnums=(1, 2))
    program = run.lower(parameters, empty(), jax.device_put(texts), tables, rows, np.int32(TOKENS)).compile()
    times = []
    for _ in range(6):
        start = jax.block_until_ready((empty(), jax.device_put(texts)))
        began = time.perf_counter()
        jax.block_until_ready(program(parameters, *start, tables, rows, np.int32(TOKENS)))
        times.append((time.perf_counter() - began) / TOKENS * 1e3)
    return {
        "batch": batch,
        "cache_length": length,
        "position": at,
        "ms_per_token": round(statistics.median(times[1:]), 3),
        "temporary_bytes": temporary_bytes(program),
        "cache_bytes": sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(empty))),
    }


def whole_engine(layout: Layout, batch: int) -> dict[str, Any]:
    """Median milliseconds of a token of each text, from requests to their last tokens; prompts of one token."""
    run = RunConfig(
        model=model(8, LENGTHS[0]),
        execution=FLOAT32,
        data=DataConfig(datasets=(Dataset(path="unused"),)),
        train=TrainConfig(steps=1, batch_size=8, seq_len=LENGTHS[0]),
    )
    parameters = jax.jit(lambda: init_parameters(run.model, jax.random.key(0)))()
    loaded = LoadedRun(config=run, layout=layout, parameters=parameters, tokenizer=Bytes(), step=0)
    engine, new, times = Engine(loaded, EngineConfig(slots=batch, tokens_per_step=batch)), 8 * TOKENS, []
    for _ in range(6):
        began = time.perf_counter()
        for text in range(batch):
            engine.submit(Request(prompt=(text,), max_new_tokens=new, sampling=GREEDY))
        while not engine.idle:
            engine.step()
        times.append((time.perf_counter() - began) / new * 1e3)
    return {"batch": batch, "new_tokens": new, "ms_per_token": round(statistics.median(times[1:]), 3)}


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
    engines = [whole_engine(layout, batch) for batch in BATCHES]
    for row in engines:
        print(
            f"batch {row['batch']}  the whole engine, {row['new_tokens']} tokens  {row['ms_per_token']:8.3f} ms/token"
        )
    patterns = {entries: pattern_bytes(layout, entries) for entries in (1, 6)}
    for entries, n_bytes in patterns.items():
        print(f"12 layers as a pattern of {entries}: temporaries of a step {n_bytes / 2**20:.1f} MiB")
    if options.json:
        facts: dict[str, Any] = {"cpu": cpu_name(), "jax": jax.__version__, "decoding": rows, "engine": engines}
        facts["pattern_temporary_bytes"] = patterns
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
