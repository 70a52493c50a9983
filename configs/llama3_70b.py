"""Llama 3 70B (arXiv:2407.21783, table 3): 70,553,706,496 parameters, 15T tokens.

    python -m maxlm.train --config configs/llama3_70b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 50 of 95 GB a chip. Data and our own choices: as llama3_8b.py.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama3_8b import get_config as base
from maxlm.config import Rope, RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=128_256,
            d_model=8192,
            n_layers=80,
            n_heads=64,
            n_kv_heads=8,
            d_ff=28_672,
            max_seq_len=8192,
            rope=Rope(theta=500_000.0),
        ),
        train=replace(run.train, micro_batches=1),
        optimizer=replace(run.optimizer, learning_rate=1.5e-4),
        sharding=ShardingConfig(fsdp=64),
        target="tpu:v5p:8x8x8",
        run_dir="runs/llama3_70b",
    )
