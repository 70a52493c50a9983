"""Baichuan 2 13B (arXiv:2309.10305, table 2), with ALiBi: 13,896,668,160 parameters, 2.6T tokens.

    python -m maxlm.train --config configs/baichuan2_13b.py

Hardware: TPU v5p-256 (128 chips); by arithmetic about 30 of 95 GB a chip. Data, and what is ours: as
baichuan2_7b.py. Time and final loss: not measured.
"""

from dataclasses import replace

from configs.baichuan2_7b import baichuan2
from configs.baichuan2_7b import get_config as base
from maxlm.config import Alibi, GroupedQuery, RunConfig, ShardingConfig


def get_config() -> RunConfig:
    run, model = base(), baichuan2(5120, 40, 40, 13_696)
    (block,) = model.blocks
    attention = GroupedQuery(n_heads=40, n_kv_heads=40, head_dim=128, position=Alibi())
    return replace(
        run,
        model=replace(model, blocks=(replace(block, attention=attention),)),
        optimizer=replace(run.optimizer, learning_rate=1.5e-4),
        sharding=ShardingConfig(fsdp=8, tensor=4, sequence_parallel=True),
        target="tpu:v5p:4x4x8",
        run_dir="runs/baichuan2_13b",
    )
