"""LLaMA 65B (arXiv:2302.13971, table 2): 65,285,660,672 parameters, 1.4T tokens.

    python -m maxlm.train --config configs/llama65b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 30 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured. The released 65B weights use a norm eps of 1e-5, the smaller ones 1e-6.
"""

from dataclasses import replace

from configs.llama33b import get_config as base
from maxlm.config import RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    return replace(
        base(),
        model=llama(
            vocab_size=32_000, d_model=8192, n_layers=80, n_heads=64, d_ff=22_016, max_seq_len=2048, norm_eps=1e-5
        ),
        sharding=ShardingConfig(fsdp=64),
        target="tpu:v5p:8x8x8",
        run_dir="runs/llama65b",
    )
