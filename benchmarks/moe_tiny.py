"""A mixture of experts against the dense model of equal active parameters, on a CPU, as one JSON line.

    python -m benchmarks.moe_tiny [--rounds 5] [--steps 5]

Both have the shape of `benchmarks.compare_torch`: 4 layers, d_model 256, 8 x 512 tokens, float32, AdamW, one core. The
dense model has d_ff 688; the mixtures 8 experts of d_ff 344, of which each token uses two. The models take turns in one
process, so that the machine's load meets all of them. tokens_per_cpu_s: medians; of_dense: medians of the ratio in each
round.
"""

from __future__ import annotations

import argparse
import os


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=5, help="steps of each model in a round")
    options = parser.parse_args()
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:1])  # before jax starts its threads
    measure(options.rounds, options.steps)


def measure(rounds: int, steps: int) -> None:
    import dataclasses
    import json
    import statistics

    import jax

    from benchmarks.steps import Running, cpu_name, random_batch
    from maxlm.config import (
        Capacity,
        DataConfig,
        Dataset,
        Dropless,
        Dtype,
        ExecutionConfig,
        Experts,
        Remat,
        RunConfig,
        TopKRouter,
        TrainConfig,
        llama,
    )
    from maxlm.sharding import make_layout
    from maxlm.training import make_trainer

    dense = llama(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, d_ff=688, max_seq_len=512)
    dropless = Experts(n_experts=8, d_ff=344, router=TopKRouter(top_k=2), dispatch=Dropless())
    mlps = {
        "dense": dense.blocks[0].mlp,
        "dropless": dropless,
        "capacity 1.25": dataclasses.replace(dropless, dispatch=Capacity(factor=1.25)),
    }

    runs: dict[str, Running] = {}
    for name, mlp in mlps.items():
        config = RunConfig(
            model=dataclasses.replace(dense, blocks=(dataclasses.replace(dense.blocks[0], mlp=mlp),)),
            execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NAMES),
            data=DataConfig(datasets=(Dataset(path="none: the tokens are random"),)),
            train=TrainConfig(steps=1000, batch_size=8, seq_len=512, loss_chunk=512),
        )
        trainer = make_trainer(config, make_layout(config.sharding, jax.devices()[:1]))
        step, state = trainer.start()
        batch = random_batch(trainer, dense.vocab_size)
        runs[name] = Running(step, state, batch)
        runs[name].go(2)

    speeds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            _, cpu = run.go(steps)
            speeds[name].append(steps * 8 * 512 / cpu)
    ratios = {
        name: statistics.median(a / b for a, b in zip(values, speeds["dense"], strict=True))
        for name, values in speeds.items()
    }
    result = {
        "tokens_per_cpu_s": {name: round(statistics.median(values)) for name, values in speeds.items()},
        "of_dense": {name: round(ratio, 3) for name, ratio in ratios.items()},
        "n_params": {name: sum(x.size for x in jax.tree.leaves(run.state.parameters)) for name, run in runs.items()},
        "jax": jax.__version__,
        "cpu": cpu_name(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
