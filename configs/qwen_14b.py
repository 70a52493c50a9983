"""Qwen 14B (arXiv:2309.16609, table 1): 14,167,290,880 parameters, 3.0T tokens.

    python -m maxlm.train --config configs/qwen_14b.py

Hardware: TPU v5p-256 (128 chips); by arithmetic about 30 of 95 GB a chip. Data, and what is ours: as qwen_7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace
from math import ceil

from configs.qwen_7b import get_config as base
from configs.qwen_7b import qwen
from maxlm.config import RunConfig, ShardingConfig


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=qwen(vocab_size=152_064, d_model=5120, n_layers=40, n_heads=40, d_ff=13_696),
        train=replace(run.train, steps=ceil(3.0e12 / (2048 * 2048))),
        sharding=ShardingConfig(fsdp=8, tensor=4, sequence_parallel=True),
        target="tpu:v5p:4x4x8",
        run_dir="runs/qwen_14b",
    )
