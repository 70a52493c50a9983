"""Llama 3 405B (arXiv:2407.21783, table 3 and section 3.4.1): 405,853,388,800 parameters, 15.6T tokens.

    python -m maxlm.train --config configs/llama3_405b.py

Hardware: TPU v5p-4096 (2048 chips); by arithmetic about 55 of 95 GB a chip. Data: as llama3_8b.py.
Time and final loss: not measured.

As printed: sizes, a peak of 8e-5 after 8000 steps, a cosine to 1 % of it, batches of 4M tokens in sequences of 4096, of
8M in sequences of 8192 after 252M tokens, of 16M after 2.87T. The cosine ends with the run, theirs is of 1.2M steps.
Not here: contexts up to 128K (further phases), annealing (`CosineSchedule(anneal_steps=...)`). Adam's numbers: as
llama3_8b.py.
"""

from dataclasses import replace
from math import ceil

from configs.llama3_8b import get_config as base
from maxlm.config import Phase, Rope, RunConfig, ShardingConfig, llama


def get_config() -> RunConfig:
    run = base()
    longer = ceil(252e6 / (1024 * 4096))
    larger = longer + ceil((2.87e12 - 252e6) / (1024 * 8192))
    seen = longer * 1024 * 4096 + (larger - longer) * 1024 * 8192
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
        train=replace(
            run.train,
            steps=larger + ceil((15.6e12 - seen) / (2048 * 8192)),
            batch_size=1024,
            seq_len=4096,
            micro_batches=1,
            phases=(Phase(start=longer, seq_len=8192), Phase(start=larger, batch_size=2048)),
        ),
        optimizer=replace(run.optimizer, learning_rate=8e-5),
        sharding=ShardingConfig(fsdp=128, tensor=4, sequence_parallel=True),
        target="tpu:v5p:8x16x16",
        run_dir="runs/llama3_405b",
    )
