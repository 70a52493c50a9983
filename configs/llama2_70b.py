"""Llama 2 70B (arXiv:2307.09288, table 1 and section 2.2): 68,976,648,192 parameters, 2.0T tokens.

    python -m maxlm.train --config configs/llama2_70b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 35 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama2_7b import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=32_000, d_model=8192, n_layers=80, n_heads=64, n_kv_heads=8, d_ff=28_672, max_seq_len=4096
        ),
        optimizer=replace(run.optimizer, learning_rate=1.5e-4),
        sharding=ShardingConfig(fsdp=64),
        target="tpu:v5p:8x8x8",
        run_dir="runs/llama2_70b",
    )
