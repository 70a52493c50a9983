"""What a step pays for each thing that steadies it, as a ratio to the plain step (CPU time), as one JSON line.

    python -m benchmarks.stability [--rounds 30]

In each round every variant makes a step, in an order that turns from round to round. A ratio is the median over the
rounds of a variant's time over the plain one's, and `spread` half the distance of the quartiles of those. `again` is
the plain step compiled a second time: how far it is from 1 is the noise of the measurement. `noise_scale` and `all`
(but for float16) are compared with `micro_batches`, which they need; `look_steps` are the plain steps that a row of
`observe.watch` takes. float16 is compared with bfloat16, both of which a CPU emulates.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import time

import jax

from benchmarks.steps import Running, cpu_name, random_batch
from maxlm.config import (
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    NoiseScale,
    Remat,
    RunConfig,
    SpikeRule,
    TrainConfig,
    llama,
)
from maxlm.training.step import make_trainer

_TRAIN = TrainConfig(steps=10_000, batch_size=8, seq_len=128)
_OF = {"noise_scale": "micro_batches", "all": "micro_batches", "float16": "bfloat16"}
"""What a variant is compared with, unless it is the plain step."""


def _configs() -> dict[str, RunConfig]:
    model = llama(vocab_size=2048, d_model=128, n_layers=2, n_heads=4, d_ff=344, max_seq_len=128)
    data = DataConfig(datasets=(Dataset(path="unused"),))
    plain = RunConfig(
        model=model, data=data, train=_TRAIN, execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE)
    )
    train = lambda **changes: dataclasses.replace(plain, train=dataclasses.replace(_TRAIN, **changes))
    dtype = lambda dtype: dataclasses.replace(plain, execution=dataclasses.replace(plain.execution, dtype=dtype))
    noise, spikes = NoiseScale(measure=True), SpikeRule(sigmas=6.0)
    return {
        "plain": plain,
        "again": plain,
        "spikes": train(spikes=spikes),
        "max_z_loss": train(max_z_loss=2e-4),
        "embedding_gradient": train(embedding_gradient=0.1),
        "micro_batches": train(micro_batches=2),
        "noise_scale": train(micro_batches=2, noise_scale=noise),
        "all": train(micro_batches=2, noise_scale=noise, spikes=spikes, max_z_loss=2e-4, embedding_gradient=0.1),
        "bfloat16": dtype(Dtype.BFLOAT16),
        "float16": dtype(Dtype.FLOAT16),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=30)
    rounds = parser.parse_args().rounds
    running = {}
    for name, config in _configs().items():
        trainer = make_trainer(config)
        program, state = trainer.start()
        running[name] = Running(step=program, state=state, batch=random_batch(trainer, config.model.vocab_size))
        running[name].go(2)
        if name == "plain":
            plain = trainer
    names, seconds = list(running), {name: list[float]() for name in running}
    for number in range(rounds):
        for name in (*names[number % len(names) :], *names[: number % len(names)]):
            seconds[name].append(running[name].go(1)[1])
    ratios, spread = {}, {}
    for name in names[1:]:
        pairs = [a / b for a, b in zip(seconds[name], seconds[_OF.get(name, "plain")], strict=True)]
        low, middle, high = statistics.quantiles(pairs, n=4)
        ratios[name], spread[name] = round(middle, 4), round((high - low) / 2, 4)
    looks = []
    one = running["plain"]
    jax.block_until_ready(plain.look(one.state, one.batch))
    for _ in range(9):
        began = time.process_time()
        jax.block_until_ready(plain.look(one.state, one.batch))
        looks.append(time.process_time() - began)
    step_s = statistics.median(seconds["plain"])
    result = {
        "step_cpu_ms": round(1e3 * step_s, 2),
        "ratios": ratios,
        "spread": spread,
        "look_steps": round(statistics.median(looks) / step_s, 2),
        "rounds": rounds,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "jax": jax.__version__,
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
