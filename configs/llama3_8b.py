"""Llama 3 8B (Grattafiori et al. 2024, arXiv:2407.21783, table 3): 8,030,261,248 parameters, 15T tokens.

    python -m maxlm.data prepare TEXT... --out data/llama3 --tokenizer tokenizer.json
    python -m maxlm.train --config configs/llama3_8b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 35 of 95 GB a chip.
Time and final loss: not measured.

The report gives the size and the peak learning rate of each model, but warm-up, decay (to 1 %) and batch only of the
405B one: they are taken from there. Ours are a constant batch of 8M tokens (theirs grew from 4M to 16M), Llama 2's Adam
betas, eps, clipping and weight decay, and no annealing at the end.
"""

from dataclasses import replace
from math import ceil

from configs.llama7b import get_config as base
from maxlm.config import AdamW, CosineSchedule, DataConfig, Dataset, Rope, RunConfig, llama


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=llama(
            vocab_size=128_256,
            d_model=4096,
            n_layers=32,
            n_heads=32,
            n_kv_heads=8,
            d_ff=14_336,
            max_seq_len=8192,
            rope=Rope(theta=500_000.0),
        ),
        data=DataConfig(datasets=(Dataset(path="data/llama3"),)),
        train=replace(run.train, steps=ceil(15e12 / (1024 * 8192)), batch_size=1024, seq_len=8192, micro_batches=2),
        optimizer=AdamW(learning_rate=3e-4, eps=1e-5, schedule=CosineSchedule(warmup_steps=8000, final_fraction=0.01)),
        target="tpu:v5p:4x4x4",
        run_dir="runs/llama3_8b",
    )
