"""Mixtral 8x7B (Jiang et al. 2024, arXiv:2401.04088, table 1): 46,702,792,704 parameters, 12,879,925,248 active.

    python -m maxlm.data prepare TEXT... --out data/mixtral --tokenizer tokenizer.model
    python -m maxlm.train --config configs/mixtral8x7b.py

Hardware: TPU v5p-256, topology 4x4x8 (128 chips), one expert of each layer on each device of the expert axis. By
arithmetic, of 95 GB a chip: 6 GB parameters, optimizer and gradients; 9 GB saved inputs of the blocks; up to 25 GB
while experts run. Time and final loss: not measured.

The paper gives the architecture and the context of 32k tokens; RoPE's base is that of the released weights, which have
no sliding window. Tokens, batch and optimizer were not published: ours are 2T tokens with Llama 2's recipe (arXiv:
2307.09288), and the load-balancing weight of Switch (arXiv:2101.03961). A device has room for twice its even share of
tokens, the rest is dropped and counted.
"""

from math import ceil

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dropless,
    Experts,
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
        vocab_size=32_000,
        d_model=4096,
        n_layers=32,
        n_heads=32,
        n_kv_heads=8,
        d_ff=14_336,
        max_seq_len=32_768,
        rope=Rope(theta=1e6),
    )
    experts = Experts(
        n_experts=8, d_ff=14_336, router=TopKRouter(top_k=2, load_balance=0.01), dispatch=Dropless(buffer=2.0)
    )
    return RunConfig(
        model=with_experts(dense, experts),
        data=DataConfig(datasets=(Dataset(path="data/mixtral"),)),
        train=TrainConfig(steps=ceil(2.0e12 / (128 * 32_768)), batch_size=128, seq_len=32_768),
        optimizer=AdamW(learning_rate=3e-4, eps=1e-5, schedule=CosineSchedule(warmup_steps=2000)),
        sharding=ShardingConfig(fsdp=16, expert=8),
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target="tpu:v5p:4x4x8",
        run_dir="runs/mixtral8x7b",
    )
