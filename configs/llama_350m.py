"""As llama_125m.py, three times as large: 359,842,816 parameters, 7.2B tokens.

    python -m maxlm.train --config configs/llama_350m.py

Hardware: one host of TPU v5e (8 chips); its compiler gives it 9.4 of 16 GB a chip. Data: as llama_125m.py.
Time and final loss: not measured.
"""

from dataclasses import replace
from math import ceil

from configs.llama_125m import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=50_304, d_model=1024, n_layers=24, n_heads=16, d_ff=2816, max_seq_len=2048, tie_embeddings=True
        ),
        train=replace(run.train, steps=ceil(7.2e9 / (256 * 2048)), micro_batches=1),
        optimizer=replace(run.optimizer, learning_rate=3e-4),
        sharding=ShardingConfig(fsdp=2),
        target="tpu:v5e:2x4",
        run_dir="runs/llama_350m",
    )
