"""Batches of random tokens in packed documents of several lengths, and how what is computed of them is compiled."""

from __future__ import annotations

import jax
import numpy as np

from maxlm.config import RunConfig
from maxlm.data.packing import Batch, pack
from maxlm.sharding import Layout


def in_haste(layout: Layout) -> dict[str, int | bool] | None:
    """Options of the compiler for programs that run once: that of CPUs takes longer to do its best than they run."""
    if not layout.on_cpu:
        return None
    old = jax.__version_info__ < (0, 12)  # later ones have no other emitter of loops
    return {"xla_backend_optimization_level": 1} | ({"xla_cpu_use_fusion_emitters": False} if old else {})


def small_batch(config: RunConfig, number: int) -> Batch:
    """A batch as `maxlm.data.packing.pack` says, another for each number.

    Rows hold one to four documents, and the loss counts another share of each row: micro-batches that were weighed
    alike would show.
    """
    rows, length = config.train.batch_size, config.train.seq_len + 1
    generator = np.random.default_rng([17, number])
    tokens = generator.integers(0, config.model.vocab_size, (rows, length)).astype(np.int32)
    begins = np.zeros((rows, length), np.bool_)
    for row in range(rows):
        begins[row, generator.choice(np.arange(1, length - 1), row % 4, replace=False)] = True
    counts = np.arange(length) < generator.integers(length // 4, length + 1, (rows, 1))
    return pack(tokens, begins, counts)
