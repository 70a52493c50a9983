"""LLaMA 7B (Touvron et al. 2023, arXiv:2302.13971, table 2): 6,738,415,616 parameters, 1.0T tokens.

    python -m maxlm.data prepare TEXT... --out data/llama --tokenizer tokenizer.model
    python -m maxlm.train --config configs/llama7b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 35 of 95 GB a chip, half of it the saved inputs of the blocks.
Time and final loss: not measured. The paper does not give Adam's eps; it is Llama 2's.
"""

from math import ceil

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    RunConfig,
    ShardingConfig,
    TrainConfig,
    llama,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(
            vocab_size=32_000, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008, max_seq_len=2048, norm_eps=1e-6
        ),
        data=DataConfig(datasets=(Dataset(path="data/llama"),)),
        train=TrainConfig(steps=ceil(1.0e12 / (2048 * 2048)), batch_size=2048, seq_len=2048),
        optimizer=AdamW(learning_rate=3e-4, eps=1e-5, schedule=CosineSchedule(warmup_steps=2000)),
        sharding=ShardingConfig(fsdp=32),  # not all 64 chips: docs/plan.md, fsdp over a whole TPU torus
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target="tpu:v5p:4x4x4",
        run_dir="runs/llama7b",
    )
