"""Llama 3 405B (arXiv:2407.21783, table 3 and section 3.4.1): 405,853,388,800 parameters, 15.6T tokens.

    python -m maxlm.train --config configs/llama3_405b.py

Hardware: TPU v5p-4096 (2048 chips); by arithmetic about 55 of 95 GB a chip. Data: as llama3_8b.py.
Time and final loss: not measured.

As printed: sizes, a peak of 8e-5 after 8000 steps, a cosine to 1 % of it. The batch is constant at the 16M tokens that
most of theirs has (4M and 8M before), in sequences of 8192; the cosine ends with the run, theirs is of 1.2M steps.
"""

from dataclasses import replace
from math import ceil

from configs.llama3_8b import get_config as base
from maxlm.config import Rope, RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=128_256,
            d_model=16_384,
            n_layers=126,
            n_heads=128,
            n_kv_heads=8,
            d_ff=53_248,
            max_seq_len=8192,
            rope=Rope(theta=500_000.0),
        ),
        train=replace(run.train, steps=ceil(15.6e12 / (2048 * 8192)), batch_size=2048, micro_batches=1),
        optimizer=replace(run.optimizer, learning_rate=8e-5),
        sharding=ShardingConfig(fsdp=128, tensor=4, sequence_parallel=True),
        target="tpu:v5p:8x16x16",
        run_dir="runs/llama3_405b",
    )
