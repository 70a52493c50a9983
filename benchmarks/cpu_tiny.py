"""Speed, memory and start-up of a training step on a CPU, as one JSON line.

    python -m benchmarks.cpu_tiny [--cores 1] [--steps 10]

Shape: 4 layers, d_model 256, 8 heads, d_ff 688, vocabulary 4096 untied, 8 sequences of 512 tokens, float32, AdamW. The
step is the one that `maxlm.train` runs; the tokens are random, one document a row.

tokens_per_cpu_s   tokens for each second that any core was busy: hardly changes with the load of the machine
tokens_per_s       tokens for each second of the clock
first_step_s       from the start of the process to the end of the first step, imports and compilation included
compile_s          of that, tracing and compiling the step, while the initial state is made
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cores", type=int, default=0, help="cores to run on; 0: all (default)")
    parser.add_argument("--steps", type=int, default=10, help="steps measured, after 3 that are not")
    parser.add_argument("--cache", action="store_true", help="use the persistent compilation cache, as training does")
    options = parser.parse_args()
    if options.cores:  # before jax starts its threads
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: options.cores])
    measure(options.steps, options.cache)


def measure(steps: int, cache: bool) -> None:
    import json
    import resource

    import jax

    from benchmarks.steps import Running, cpu_name, random_batch
    from maxlm.compile_cache import enable_compilation_cache, release_compiler_memory
    from maxlm.config import AdamW, DataConfig, Dataset, Dtype, ExecutionConfig, Remat, RunConfig, TrainConfig, llama
    from maxlm.sharding import make_layout
    from maxlm.training import make_trainer

    model = llama(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, d_ff=688, max_seq_len=512)
    config = RunConfig(
        model=model,
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NAMES),
        data=DataConfig(datasets=(Dataset(path="none: the tokens are random"),)),
        train=TrainConfig(steps=1000, batch_size=8, seq_len=512, loss_chunk=512),
        optimizer=AdamW(),
    )
    if cache:
        enable_compilation_cache()
    trainer = make_trainer(config, make_layout(config.sharding, jax.devices()[:1]))
    batch = random_batch(trainer, model.vocab_size)

    began = time.perf_counter()
    step, state = trainer.start()
    release_compiler_memory()
    compile_s = time.perf_counter() - began
    state, metrics = step(state, batch)
    jax.block_until_ready(state)
    first_step_s = time.time() - process_start()
    run = Running(step, state, batch)
    run.go(3)
    wall, cpu = run.go(steps)
    n_tokens = steps * config.train.batch_size * config.train.seq_len
    result = {
        "tokens_per_s": round(n_tokens / wall),
        "tokens_per_cpu_s": round(n_tokens / cpu),
        "compile_s": round(compile_s, 2),
        "first_step_s": round(first_step_s, 2),
        "peak_rss_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
        "n_params": sum(leaf.size for leaf in jax.tree.leaves(run.state.parameters)),
        "loss": round(float(metrics.figures["loss"]), 4),
        "cores": len(os.sched_getaffinity(0)),
        "jax": jax.__version__,
        "cpu": cpu_name(),
    }
    print(json.dumps(result))


def process_start() -> float:
    """When this process began, in seconds since the epoch (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
