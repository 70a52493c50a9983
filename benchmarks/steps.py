"""What the benchmarks of training steps share: a batch of random tokens, and processor time a step. No command."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np

from maxlm.training import Trainer
from maxlm.training.state import TrainState


def random_batch(trainer: Trainer, vocab_size: int) -> dict[str, jax.Array]:
    """Random tokens, one document a row, laid out as the trainer wants them."""
    rng = np.random.default_rng(0)
    shape = trainer.batch["inputs"].shape
    tokens = rng.integers(0, vocab_size, (shape[0], shape[1] + 1), dtype=np.int32)
    batch = {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": np.ones(shape, np.int32),
        "positions": np.tile(np.arange(shape[1], dtype=np.int32), (shape[0], 1)),
        "loss_mask": np.ones(shape, np.float32),
    }
    return {name: jax.device_put(values, trainer.batch[name].sharding) for name, values in batch.items()}


@dataclass
class Running:
    """A compiled step, what it works on, and a state that moves on."""

    step: jax.stages.Compiled
    state: TrainState
    batch: dict[str, jax.Array]

    def go(self, steps: int) -> tuple[float, float]:
        """Run some steps: seconds of the clock, and seconds of all cores together."""
        jax.block_until_ready(self.state)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch)
        jax.block_until_ready(self.state)
        return time.perf_counter() - wall, time.process_time() - cpu


def cpu_name() -> str:
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")
