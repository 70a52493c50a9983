"""What each layout costs beyond one device, on eight simulated CPU devices, as one JSON line.

    python -m benchmarks.layouts [--moe] [--rounds 3] [--steps 3]

A step of the same model and batch on one device and on every layout, in turns in one process: a layout's
tokens per CPU-second against that of one device. Simulated devices share the cores, so this shows the work that a
layout adds (copies, collectives, a pipeline's bubble), and nothing of how fast chips or their networks are.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe", action="store_true", help="a mixture of 8 experts in place of the dense MLP")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="steps of each layout in a round")
    options = parser.parse_args()
    os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    measure(options.moe, options.rounds, options.steps)


def measure(moe: bool, rounds: int, steps: int) -> None:
    import dataclasses
    import json
    import statistics

    import jax

    from benchmarks.steps import Running, cpu_name, random_batch
    from maxlm.config import (
        Context,
        DataConfig,
        Dataset,
        Dtype,
        ExecutionConfig,
        Experts,
        Remat,
        RunConfig,
        ShardingConfig,
        TopKRouter,
        TrainConfig,
        llama,
        pipeline_bubble,
    )
    from maxlm.sharding import make_layout
    from maxlm.training import make_trainer

    layouts = {
        "data 8": (ShardingConfig(data=8), 1),
        "fsdp 8": (ShardingConfig(data=1, fsdp=8), 1),
        "tensor 8": (ShardingConfig(data=1, tensor=8), 1),
        "tensor 8, sequence parallel": (ShardingConfig(data=1, tensor=8, sequence_parallel=True), 1),
        "seq 8, all-gather": (ShardingConfig(data=1, seq=8), 1),
        "seq 8, ring": (ShardingConfig(data=1, seq=8, context=Context.RING), 1),
        "seq 8, Ulysses": (ShardingConfig(data=1, seq=8, context=Context.ULYSSES), 1),
        "stage 4 x data 2, GPipe of 8": (ShardingConfig(data=2, stage=4), 8),
        "stage 2 x data 4, circular 2, of 4": (ShardingConfig(data=4, stage=2, virtual_stages=2), 4),
        "fsdp 2 x tensor 2 x data 2": (ShardingConfig(data=2, fsdp=2, tensor=2), 1),
    }
    if moe:
        layouts["expert 8"] = (ShardingConfig(data=1, expert=8), 1)
        layouts["fsdp 2 x expert 4"] = (ShardingConfig(data=1, fsdp=2, expert=4), 1)
    model = llama(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, d_ff=688, max_seq_len=512)
    if moe:
        mlp = Experts(n_experts=8, d_ff=344, router=TopKRouter(top_k=2))
        model = dataclasses.replace(model, blocks=(dataclasses.replace(model.blocks[0], mlp=mlp),))

    runs: dict[str, Running] = {}
    for name, (sharding, micro_batches) in {"one device": (ShardingConfig(), 1), **layouts}.items():
        config = RunConfig(
            model=model,
            execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NAMES),
            data=DataConfig(datasets=(Dataset(path="none: the tokens are random"),)),
            train=TrainConfig(steps=1000, batch_size=16, seq_len=512, loss_chunk=512, micro_batches=micro_batches),
            sharding=sharding,
        )
        devices = jax.devices()[:1] if name == "one device" else jax.devices()
        config.validate(len(devices))
        trainer = make_trainer(config, make_layout(sharding, devices))
        step, state = trainer.start()
        batch = random_batch(trainer, model.vocab_size)
        runs[name] = Running(step, state, batch)
        runs[name].go(2)

    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _, cpu = run.go(steps)
            seconds[name].append(cpu / steps)
    tokens = 16 * 512
    result = {
        "tokens_per_cpu_s": {name: round(tokens / statistics.median(values)) for name, values in seconds.items()},
        "of_one_device": {
            name: round(statistics.median(a / b for a, b in zip(seconds["one device"], values, strict=True)), 3)
            for name, values in seconds.items()
        },
        "pipeline_bubble": {
            name: round(pipeline_bubble(sharding.stage, sharding.virtual_stages, micro_batches), 3)
            for name, (sharding, micro_batches) in layouts.items()
            if sharding.stage > 1
        },
        "model": "8 experts of d_ff 344, top-2" if moe else "d_ff 688",
        "jax": jax.__version__,
        "cpu": cpu_name(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
