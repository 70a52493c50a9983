"""Batches of random tokens in packed documents of several lengths."""

from __future__ import annotations

import numpy as np

from maxlm.config import RunConfig
from maxlm.data.packing import Batch, pack


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
