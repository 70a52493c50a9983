"""Chinchilla 70B (Hoffmann et al. 2022, arXiv:2203.15556, table 4): 70,057,992,192 parameters, 1.4T tokens.

    python -m maxlm.train --config configs/chinchilla_70b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 45 of 95 GB a chip. Data, and what is ours: as
gopher_280b.py, whose architecture it has. AdamW's weight decay is not printed: ours is the default, and
so is the clipping at 1.
Time and final loss: not measured. The batch is constant at its final 3M tokens, theirs begins with 1.5M.
"""

from dataclasses import replace
from math import ceil

from configs.gopher_280b import get_config as base
from configs.gopher_280b import gopher
from maxlm.config import AdamW, CosineSchedule, RunConfig, ShardingConfig


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=gopher(8192, 64),
        train=replace(run.train, steps=ceil(1.4e12 / (1536 * 2048)), batch_size=1536, micro_batches=12),
        optimizer=AdamW(learning_rate=1e-4, schedule=CosineSchedule(warmup_steps=1500)),
        sharding=ShardingConfig(fsdp=32, tensor=4, sequence_parallel=True),
        target="tpu:v5p:8x8x8",
        run_dir="runs/chinchilla_70b",
    )
