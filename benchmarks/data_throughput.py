"""Tokens a second that one core reads from prepared shards, shuffled, packed and with masks.

    python -m benchmarks.data_throughput

Prints one line of JSON. The data are random documents of log-normal length, made in a temporary folder.
"""

from __future__ import annotations

import json
import os
import platform
import tempfile
import time
from pathlib import Path

import grain
import numpy as np

from maxlm.config import ByteTokenizer, DataConfig, Dataset, Files, PrepareConfig
from maxlm.data.loader import open_batches
from maxlm.data.prepare import prepare
from maxlm.data.shards import Split

_SECONDS = 5.0
_ROUNDS = 3


def tokens_per_second(config: DataConfig, seq_len: int, batch_size: int) -> float:
    """The best of a few rounds, as other programs on the machine can only slow one down."""
    batches = open_batches(config, batch_size=batch_size, seq_len=seq_len, split=Split.TRAIN)
    step, best = 0, 0.0
    for _ in range(_ROUNDS):
        first, began = step, time.perf_counter()
        while time.perf_counter() - began < _SECONDS / _ROUNDS:
            batches.rows(step, slice(None))
            step += 1
        best = max(best, (step - first) * batch_size * seq_len / (time.perf_counter() - began))
    return best


def main() -> None:
    draw = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as scratch:
        lengths = draw.lognormal(6.5, 1.0, 30_000).astype(int) + 1  # mean about 1,100 tokens
        text = Path(scratch, "text.jsonl")
        with text.open("w") as file:
            file.writelines(json.dumps({"text": "x" * length}) + "\n" for length in lengths)
        folder = Path(scratch, "prepared")
        prepare(PrepareConfig(documents=Files(paths=(str(text),)), tokenizer=ByteTokenizer(), workers=1), folder)
        config = DataConfig(datasets=(Dataset(path=str(folder)),))
        mixture = DataConfig(datasets=(Dataset(path=str(folder), weight=0.7), Dataset(path=str(folder), weight=0.3)))
        result = {
            "benchmark": "data_throughput",
            "tokens_per_s": {str(seq_len): round(tokens_per_second(config, seq_len, 8)) for seq_len in (512, 2048)},
            "tokens_per_s_mixture_of_2": {
                str(seq_len): round(tokens_per_second(mixture, seq_len, 8)) for seq_len in (512, 2048)
            },
            "batch_size": 8,
            "grain": grain.__version__,
            "numpy": np.__version__,
            "python": platform.python_version(),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
