"""OPT-175B (Zhang et al. 2022, arXiv:2205.01068, table 1 and section 2.2): 174,604,468,224 parameters, 180B tokens.

    python -m maxlm.data prepare TEXT... --out data/opt --tokenizer tokenizer.json
    python -m maxlm.train --config configs/opt_175b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 35 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, ReLU, batches of 2M tokens, AdamW with weight decay 0.1, initial values of 0.006, warm-up over 2000
steps, a straight line to a tenth, clipping at 1. That line reaches its tenth at 300B tokens there, with the run here.
Not here: dropout of 0.1, float16, which TPUs do not multiply, and the learning rates and clipping that were changed by
hand on the way.
"""

from dataclasses import replace
from math import ceil

from maxlm.config import (
    Activation,
    AdamW,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Learned,
    LinearSchedule,
    RunConfig,
    ShardingConfig,
    TrainConfig,
    gpt,
)


def get_config() -> RunConfig:
    model = gpt(
        vocab_size=50_272,
        d_model=12_288,
        n_layers=96,
        n_heads=96,
        max_seq_len=2048,
        activation=Activation.RELU,
        init_std=0.006,
    )
    return RunConfig(
        model=replace(model, embedded_position=Learned(offset=2)),
        data=DataConfig(datasets=(Dataset(path="data/opt"),)),
        train=TrainConfig(steps=ceil(180e9 / (1024 * 2048)), batch_size=1024, seq_len=2048),
        optimizer=AdamW(learning_rate=1.2e-4, schedule=LinearSchedule(warmup_steps=2000, final_fraction=0.1)),
        sharding=ShardingConfig(fsdp=32, tensor=4, sequence_parallel=True),
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target="tpu:v5p:8x8x8",
        run_dir="runs/opt_175b",
    )
