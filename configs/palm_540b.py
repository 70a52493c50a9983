"""PaLM 540B (Chowdhery et al. 2022, arXiv:2204.02311, table 1 and section 5): 540,356,474,880 parameters, 780B tokens.

    python -m maxlm.data prepare TEXT... --out data/palm --tokenizer tokenizer.model
    python -m maxlm.train --config configs/palm_540b.py

Hardware: TPU v5p, topology 8x12x12 (1152 chips); by arithmetic about 85 of 95 GB a chip.
Time and final loss: not measured. `palm_run` makes palm_8b and palm_62b too.

As printed: sizes, blocks, z-loss, clipping, Adafactor with second moments of all numbers, a decay of them of
1 - k^-0.8, and a learning rate of 1e-2 that falls with 1 / sqrt(step) from step 10,000 on. What Adafactor has not here:
a momentum of 0.9; and weight decay of the learning rate squared. The learning rate rises to step 10,000, where theirs
is constant. The batch is constant, theirs grows to it (512, 1024, 2048 sequences); of 540B it has 2016 sequences, as
18,432 = 144 x 128 is cut evenly by no power of two. Initial values: as `maxlm.config.palm` says.
"""

from math import ceil

from maxlm.config import (
    Adafactor,
    CheckpointConfig,
    DataConfig,
    Dataset,
    InverseSqrtSchedule,
    ModelConfig,
    RunConfig,
    ShardingConfig,
    TrainConfig,
    palm,
)


def palm_run(model: ModelConfig, sequences: int, sharding: ShardingConfig, target: str, run_dir: str) -> RunConfig:
    """780B tokens in batches of so many sequences of 2048."""
    return RunConfig(
        model=model,
        data=DataConfig(datasets=(Dataset(path="data/palm"),)),
        train=TrainConfig(steps=ceil(780e9 / (sequences * 2048)), batch_size=sequences, seq_len=2048, z_loss=1e-4),
        optimizer=Adafactor(
            learning_rate=1e-2, schedule=InverseSqrtSchedule(warmup_steps=10_000), min_factored_dim=2**20
        ),
        sharding=sharding,
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target=target,
        run_dir=run_dir,
    )


def get_config() -> RunConfig:
    model = palm(vocab_size=256_000, d_model=18_432, n_layers=118, n_heads=48, head_dim=256, max_seq_len=2048)
    sharding = ShardingConfig(data=2, fsdp=144, seq=4)
    return palm_run(model, 2016, sharding, "tpu:v5p:8x12x12", "runs/palm_540b")
