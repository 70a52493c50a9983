"""LLaMA 33B (arXiv:2302.13971, table 2): 32,528,943,616 parameters, 1.4T tokens.

    python -m maxlm.train --config configs/llama33b.py

Hardware: TPU v5p-512 (256 chips); by arithmetic about 55 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace
from math import ceil

from configs.llama7b import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=32_000, d_model=6656, n_layers=60, n_heads=52, d_ff=17_920, max_seq_len=2048, norm_eps=1e-6
        ),
        train=replace(run.train, steps=ceil(1.4e12 / (2048 * 2048))),
        optimizer=replace(run.optimizer, learning_rate=1.5e-4),
        # 6656 = 52 x 128 allows no wider fsdp in whole vectors; tensor takes a share of the state instead.
        sharding=ShardingConfig(fsdp=4, tensor=4, sequence_parallel=True),
        target="tpu:v5p:4x8x8",
        run_dir="runs/llama33b",
    )
