"""Llama 2 13B (arXiv:2307.09288, table 1 and section 2.2): 13,015,864,320 parameters, 2.0T tokens.

    python -m maxlm.train --config configs/llama2_13b.py

Hardware: TPU v5p-256 (128 chips); by arithmetic about 50 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama2_7b import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    return replace(
        base(),
        model=llama(vocab_size=32_000, d_model=5120, n_layers=40, n_heads=40, d_ff=13_824, max_seq_len=4096),
        sharding=ShardingConfig(fsdp=8),  # 5120 / 8 = 640; /16 is no multiple of 128
        target="tpu:v5p:4x4x8",
        run_dir="runs/llama2_13b",
    )
