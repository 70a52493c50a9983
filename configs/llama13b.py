"""LLaMA 13B (arXiv:2302.13971, table 2): 13,015,864,320 parameters, 1.0T tokens.

    python -m maxlm.train --config configs/llama13b.py

Hardware: TPU v5p-256 (128 chips); by arithmetic about 50 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama7b import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    return replace(
        base(),
        model=llama(
            vocab_size=32_000, d_model=5120, n_layers=40, n_heads=40, d_ff=13_824, max_seq_len=2048, norm_eps=1e-6
        ),
        sharding=ShardingConfig(fsdp=8),  # 5120 / 8 = 640; /16 is no multiple of 128
        target="tpu:v5p:4x4x8",
        run_dir="runs/llama13b",
    )
