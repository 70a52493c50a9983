"""Gopher 280B (Rae et al. 2021, arXiv:2112.11446, table 1 and section 3): 279,702,421,504 parameters, 300B tokens.

    python -m maxlm.data prepare TEXT... --out data/gopher --tokenizer tokenizer.model
    python -m maxlm.train --config configs/gopher_280b.py

Hardware: TPU v5p-2048 (1024 chips); by arithmetic about 75 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, RMSNorm, the relative positions of Transformer-XL (arXiv:1901.02860), 32,000 tokens, warm-up over
1500 steps, a cosine to a tenth, gradients clipped at 0.25. They are computed here as more dims of queries and keys, as
many as the model's width, which attention pays for. Of weight decay, betas and eps the paper says nothing: ours are
AdamW's defaults, without decay. The batch is constant at its final 6M tokens, theirs begins with 3M
(`train.phases` can double it).
"""

from math import ceil

from maxlm.config import (
    Activation,
    AdamW,
    BlockConfig,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    GroupedQuery,
    LmHead,
    Mlp,
    ModelConfig,
    RelativeSinusoids,
    RunConfig,
    ShardingConfig,
    TrainConfig,
)


def gopher(d_model: int, n_heads: int) -> ModelConfig:
    """80 layers with heads of 128, RMSNorm and a plain MLP, without biases. Input and output share a table."""
    attention = GroupedQuery(
        n_heads=n_heads, n_kv_heads=n_heads, head_dim=128, position=RelativeSinusoids(dims=d_model)
    )
    return ModelConfig(
        vocab_size=32_000,
        d_model=d_model,
        n_layers=80,
        blocks=(BlockConfig(attention=attention, mlp=Mlp(d_ff=4 * d_model, activation=Activation.GELU_TANH)),),
        max_seq_len=2048,
        head=LmHead(tied=True),
    )


def get_config() -> RunConfig:
    return RunConfig(
        model=gopher(16_384, 128),
        data=DataConfig(datasets=(Dataset(path="data/gopher"),)),
        train=TrainConfig(steps=ceil(300e9 / (3072 * 2048)), batch_size=3072, seq_len=2048, micro_batches=24),
        optimizer=AdamW(
            learning_rate=4e-5, weight_decay=0.0, clip_norm=0.25, schedule=CosineSchedule(warmup_steps=1500)
        ),
        sharding=ShardingConfig(fsdp=64, tensor=8, sequence_parallel=True),
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target="tpu:v5p:8x8x16",
        run_dir="runs/gopher_280b",
    )
