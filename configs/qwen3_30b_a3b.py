"""Qwen3-30B-A3B (Yang et al. 2025, arXiv:2505.09388, table 2): 30,532,122,624 parameters, 3,353,032,704 active.

    python -m maxlm.data prepare TEXT... --out data/qwen3 --tokenizer tokenizer.json
    python -m maxlm.train --config configs/qwen3_30b_a3b.py

Hardware: TPU v5p-256, topology 4x4x8 (128 chips), 16 of a layer's 128 experts on each device of the expert axis. By
arithmetic about 20 of 95 GB a chip. A device has room for twice its even share of tokens, the rest is dropped and
counted. Time and final loss: not measured.

Sizes are those of the paper and the released weights, whose config also gives the load-balancing weight. The paper
balances the load over the global batch; ours is balanced over each of four micro-batches. It trains on 36T tokens, most
of them in sequences of 4096, and does not give batch, learning rate or optimizer: ours are a batch of 8M tokens, Llama
3's numbers for its 8B model (arXiv:2407.21783), and only sequences of 4096.
"""

from dataclasses import replace
from math import ceil

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dropless,
    Experts,
    GroupedQuery,
    QkNorm,
    Rope,
    RunConfig,
    ShardingConfig,
    TopKRouter,
    TrainConfig,
    llama,
    with_experts,
)


def get_config() -> RunConfig:
    dense = llama(
        vocab_size=151_936, d_model=2048, n_layers=48, n_heads=32, d_ff=6144, max_seq_len=32_768, norm_eps=1e-6
    )
    attention = GroupedQuery(n_heads=32, n_kv_heads=4, head_dim=128, qk_norm=QkNorm.HEADS, position=Rope(theta=1e6))
    experts = Experts(
        n_experts=128, d_ff=768, router=TopKRouter(top_k=8, load_balance=0.001), dispatch=Dropless(buffer=2.0)
    )
    (block,) = dense.blocks
    return RunConfig(
        model=with_experts(replace(dense, blocks=(replace(block, attention=attention),)), experts),
        data=DataConfig(datasets=(Dataset(path="data/qwen3"),)),
        train=TrainConfig(steps=ceil(36e12 / (2048 * 4096)), batch_size=2048, seq_len=4096, micro_batches=4),
        optimizer=AdamW(learning_rate=3e-4, eps=1e-5, schedule=CosineSchedule(warmup_steps=8000, final_fraction=0.01)),
        sharding=ShardingConfig(fsdp=16, expert=8),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        target="tpu:v5p:4x4x8",
        run_dir="runs/qwen3_30b_a3b",
    )
