"""As llama_125m.py, ten times as large, with groups of query heads: 1,235,585,024 parameters, 25B tokens.

    python -m maxlm.train --config configs/llama_1b.py

Hardware: one GPU of 141 GB (H200); its compiler gives it 28 GB; also on one of 80 GB (--target gpu:a100:1).
Data: as llama_125m.py. Time and final loss: not measured.
"""

from dataclasses import replace
from math import ceil

from configs.llama_125m import get_config as base
from maxlm.config import CosineSchedule, RunConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=50_304,
            d_model=2048,
            n_layers=24,
            n_heads=16,
            n_kv_heads=8,
            d_ff=5632,
            max_seq_len=2048,
            tie_embeddings=True,
        ),
        train=replace(run.train, steps=ceil(25e9 / (512 * 2048)), batch_size=512, micro_batches=64),
        optimizer=replace(run.optimizer, learning_rate=2e-4, schedule=CosineSchedule(warmup_steps=1000)),
        target="gpu:h200:1",
        run_dir="runs/llama_1b",
    )
