"""GPT-3 (Brown et al. 2020, arXiv:2005.14165, table 2.1 and appendix B): 174,604,836,864 parameters, 300B tokens.

    python -m maxlm.data prepare TEXT... --out data/gpt3 --tokenizer gpt2/tokenizer.json
    python -m maxlm.train --config configs/gpt3_175b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 45 of 95 GB a chip. Time and final loss: not measured.
`gpt3` makes all eight sizes of the table: gpt3_125m, gpt3_350m, gpt3_760m, gpt3_1_3b, gpt3_2_7b, gpt3_6_7b, gpt3_13b.

As printed: sizes, batches in tokens, learning rates, Adam, clipping, weight decay, a warm-up over 375M tokens. Two
entries do not fit each other: the 1.3B model has 16 heads of 128 here, not 24, and the 13B one a width of 5120, not
5140, as 40 heads of 128 have. Every other layer is "locally banded" in the paper, which does not say how wide: ours
are 256 tokens. The batch is constant, where theirs grows to it over the first 4B to 12B tokens; the cosine ends with
the run, where theirs ends at 260B tokens and stays at its tenth. The vocabulary is padded to 50,304.
"""

from math import ceil
from typing import NamedTuple

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    RunConfig,
    ShardingConfig,
    TrainConfig,
    gpt,
)


class Size(NamedTuple):
    """A row of the paper's table, and where it is trained here."""

    n_layers: int
    d_model: int
    n_heads: int
    sequences: int
    """Of 2048 tokens, in a batch: of 0.5M, 1M, 2M and 3.2M tokens."""
    learning_rate: float
    target: str
    sharding: ShardingConfig


SIZES = {
    "125m": Size(12, 768, 12, 256, 6e-4, "tpu:v5e:2x4", ShardingConfig()),
    "350m": Size(24, 1024, 16, 256, 3e-4, "tpu:v5e:2x4", ShardingConfig(fsdp=2)),
    "760m": Size(24, 1536, 16, 256, 2.5e-4, "tpu:v5e:2x4", ShardingConfig(fsdp=4)),
    "1_3b": Size(24, 2048, 16, 512, 2e-4, "tpu:v5e:4x8", ShardingConfig(fsdp=8)),
    "2_7b": Size(32, 2560, 32, 512, 1.6e-4, "tpu:v5p:2x4x4", ShardingConfig(fsdp=4)),
    "6_7b": Size(32, 4096, 32, 1024, 1.2e-4, "tpu:v5p:4x4x4", ShardingConfig(fsdp=16)),
    "13b": Size(40, 5120, 40, 1024, 1e-4, "tpu:v5p:4x4x8", ShardingConfig(fsdp=8, tensor=4, sequence_parallel=True)),
    "175b": Size(
        96, 12_288, 96, 1536, 6e-5, "tpu:v5p:8x8x8", ShardingConfig(fsdp=32, tensor=4, sequence_parallel=True)
    ),
}


def gpt3(name: str) -> RunConfig:
    """One of the eight."""
    size = SIZES[name]
    batch = size.sequences * 2048
    return RunConfig(
        model=gpt(
            vocab_size=50_304,
            d_model=size.d_model,
            n_layers=size.n_layers,
            n_heads=size.n_heads,
            max_seq_len=2048,
            band=256,
        ),
        data=DataConfig(datasets=(Dataset(path="data/gpt3"),)),
        train=TrainConfig(steps=ceil(300e9 / batch), batch_size=size.sequences, seq_len=2048),
        optimizer=AdamW(learning_rate=size.learning_rate, schedule=CosineSchedule(warmup_steps=ceil(375e6 / batch))),
        sharding=size.sharding,
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target=size.target,
        run_dir=f"runs/gpt3_{name}",
    )


def get_config() -> RunConfig:
    return gpt3("175b")
