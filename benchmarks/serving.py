"""The engine with many requests: ragged lengths against the ideal full batch, prefix hits, and the host's own time.

    python -m benchmarks.serving [--json FILE]

A LLaMA-like decoder of 4 layers and d_model 256, float32, random parameters, 32 slots. All figures are ratios of times
within this process, medians of `PASSES`:

ragged: 64 requests whose new tokens are drawn from 16 to 256, over what they would take if all slots were always busy,
    at the rate of 32 equal texts.
prefix: first token of a second request with the same 1,024 tokens of a prompt, over that of the first.
host: milliseconds of a step that Python takes, with a device that answers at once.
"""

from __future__ import annotations

import argparse
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
    RunConfig,
    SamplingConfig,
    ShardingConfig,
    TrainConfig,
    llama,
)
from maxlm.data.tokenizers import Bytes
from maxlm.inference.engine import Engine
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request
from maxlm.inference.sampling import LogProbs
from maxlm.inference.step import Drawn, StepRows
from maxlm.models import init_parameters
from maxlm.sharding import make_layout

SLOTS, PASSES, CONTEXT, VOCAB = 32, 3, 2048, 512
GREEDY = SamplingConfig(temperature=0)


def run() -> LoadedRun:
    """A model with random parameters."""
    model = llama(vocab_size=VOCAB, d_model=256, n_layers=4, n_heads=4, d_ff=688, max_seq_len=CONTEXT)
    config = RunConfig(
        model=model,
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=DataConfig(datasets=(Dataset(path="none: the prompts are random"),)),
        train=TrainConfig(steps=1, batch_size=1, seq_len=CONTEXT),
        sharding=ShardingConfig(data=1),
    )
    layout = make_layout(config.sharding, jax.devices()[:1])
    parameters = jax.jit(lambda: init_parameters(model, jax.random.key(0)))()
    return LoadedRun(config=config, layout=layout, parameters=parameters, tokenizer=Bytes(), step=0)


def request(rng: np.random.Generator, prompt: int, new: int) -> Request:
    return Request(prompt=tuple(rng.integers(0, 258, prompt).tolist()), max_new_tokens=new, sampling=GREEDY)


def finish(engine: Engine, requests: list[Request]) -> float:
    """Seconds until all have ended."""
    for one in requests:
        engine.submit(one)
    began = time.perf_counter()
    while not engine.idle:
        engine.step()
    return time.perf_counter() - began


def ragged(engine: Engine) -> float:
    """Time over the ideal."""
    rng = np.random.default_rng(0)
    full = finish(engine, [request(rng, 1, 128) for _ in range(SLOTS)]) / (SLOTS * 128)
    lengths = rng.integers(16, 257, 64).tolist()
    return finish(engine, [request(rng, 1, new) for new in lengths]) / (full * sum(lengths))


def prefix(engine: Engine) -> float:
    """Second first token over first first token."""
    rng = np.random.default_rng(time.perf_counter_ns())
    first = request(rng, 1024, 1)
    cold = finish(engine, [first])
    return finish(engine, [first]) / cold


class AtOnce:
    """In place of the device: it answers at once."""

    def __init__(self, programs: Any, config: EngineConfig) -> None:
        self._programs, self.config = programs, config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._programs, name)

    def run(self, width: int, rows: StepRows, n_steps: int) -> Drawn:
        n = self.config.decode_steps, len(rows.scored)
        numbers: Any = np.zeros((*n, 20), np.float32)
        ids: Any = numbers.astype(np.int32)
        return Drawn(ids[..., 0], LogProbs(numbers[..., 0], ids, numbers, numbers), ids[..., 0].astype(bool), numbers)


def host(engine: Engine) -> float:
    """Milliseconds of Python for a launched step of all slots."""
    programs = engine._programs
    engine._programs = AtOnce(programs, engine.config)  # type: ignore[assignment]
    rng, before = np.random.default_rng(0), engine.stats.steps
    turns = 0
    for _ in range(SLOTS):
        engine.submit(request(rng, 1, 1024))
    began = time.perf_counter()
    while not engine.idle:
        engine.step()
        turns += 1
    seconds = time.perf_counter() - began
    engine._programs = programs
    assert engine.stats.steps > before
    return seconds / turns * 1e3


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    engine = Engine(run(), EngineConfig(slots=SLOTS))
    finish(engine, [request(np.random.default_rng(1), 40, 40) for _ in range(SLOTS)])  # warm
    figures = {
        "ragged": [round(ragged(engine), 3) for _ in range(PASSES)],
        "prefix": [round(prefix(engine), 3) for _ in range(PASSES)],
        "host_ms": [round(host(engine), 3) for _ in range(PASSES)],
    }
    for name, values in figures.items():
        print(f"{name:8} median {statistics.median(values):6.3f}  of {values}")
    if options.json:
        facts = {"command": "python -m benchmarks.serving", "cpu": cpu_name(), "jax": jax.__version__, **figures}
        options.json.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
