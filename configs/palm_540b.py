"""PaLM 540B (Chowdhery et al. 2022, arXiv:2204.02311, table 1 and section 5): 540,356,474,880 parameters, 780B tokens.

    python -m maxlm.data prepare TEXT... --out data/palm --tokenizer tokenizer.model
    python -m maxlm.train --config configs/palm_540b.py

Hardware: TPU v5p, topology 8x12x12 (1152 chips); by arithmetic about 87 of 95 GiB a chip.
Time and final loss: not measured. `palm_run` makes palm_8b and palm_62b too.

As printed: sizes, blocks, z-loss, clipping, Adafactor with a momentum of 0.9 (here in bfloat16) and second moments of
all numbers, a decay of them of 1 - k^-0.8, and a learning rate of 1e-2 for 10,000 steps that then falls with 1 /
sqrt(step). Not here: weight decay of the learning rate squared. The batch of 540B grows after 50,000 and 115,000 steps,
from 576 sequences to 1152 and 2016 where theirs has 512, 1024 and 2048: 288 parts of this mesh (data 2, fsdp 144, as
18,432 = 144 x 128) cut a batch. The smaller ones have their largest batch from the start. Initial values: as
`maxlm.config.palm` says.
"""

from dataclasses import replace
from math import ceil

from maxlm.config import (
    Adafactor,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Dtype,
    InverseSqrtSchedule,
    ModelConfig,
    Phase,
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
            learning_rate=1e-2,
            schedule=InverseSqrtSchedule(warmup_steps=0, constant_steps=10_000),
            b1=0.9,
            moment_dtype=Dtype.BFLOAT16,
            min_factored_dim=2**20,
        ),
        sharding=sharding,
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target=target,
        run_dir=run_dir,
    )


def get_config() -> RunConfig:
    model = palm(vocab_size=256_000, d_model=18_432, n_layers=118, n_heads=48, head_dim=256, max_seq_len=2048)
    sharding = ShardingConfig(data=2, fsdp=144, seq=4)
    run = palm_run(model, 2016, sharding, "tpu:v5p:8x12x12", "runs/palm_540b")
    earlier = 50_000 * 576 + 65_000 * 1152  # sequences of the first two batch sizes
    train = replace(
        run.train,
        steps=115_000 + ceil((780e9 / 2048 - earlier) / 2016),
        batch_size=576,
        phases=(Phase(start=50_000, batch_size=1152), Phase(start=115_000, batch_size=2016)),
    )
    return replace(run, train=train)
