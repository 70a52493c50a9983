"""A decoder with the sizes of Switch-Base (Fedus et al. 2021, arXiv:2101.03961, table 9): 3,730,459,392 parameters,
134,892,288 active.

    python -m maxlm.data prepare TEXT... --out data/switch --tokenizer spiece.model
    python -m maxlm.train --config configs/switch_base.py

Hardware: TPU v5p-32 (16 chips), 8 experts of each layer on each. By arithmetic, of 95 GB a chip: 5 GB parameters,
optimizer and gradients; 1 GB saved inputs of the blocks. Time and final loss: not measured.

The paper's model is an encoder-decoder: T5-Base with 128 experts in every second layer of both stacks, 7.4B parameters,
trained to fill in spans. This is its decoder alone, 12 layers that predict the next token, with RoPE in place of T5's
position biases; `SpanCorruption` and `RelativeBias` are to be had, and not used here. From the paper: top-1 routing,
capacity factor 1.25, load-balancing weight 0.01, gated GELU, a router in float32, and 550k steps of 2^20 tokens
(section 4.1); Adafactor with an inverse square root schedule is T5's (arXiv:1910.10683, section 3.1.2). Not here:
initial weights scaled to 0.1, and noise on the router's input.
"""

from dataclasses import replace

from maxlm.config import (
    Activation,
    Adafactor,
    Capacity,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Experts,
    InverseSqrtSchedule,
    RunConfig,
    ShardingConfig,
    TopKRouter,
    TrainConfig,
    llama,
    with_experts,
)


def get_config() -> RunConfig:
    dense = llama(vocab_size=32_128, d_model=768, n_layers=12, n_heads=12, d_ff=2048, max_seq_len=512, norm_eps=1e-6)
    (block,) = dense.blocks
    gelu = replace(dense, blocks=(replace(block, mlp=replace(block.mlp, activation=Activation.GELU_TANH)),))
    experts = Experts(
        n_experts=128,
        d_ff=2048,
        activation=Activation.GELU_TANH,
        router=TopKRouter(top_k=1, normalize=False, load_balance=0.01),
        dispatch=Capacity(factor=1.25),
    )
    return RunConfig(
        model=with_experts(gelu, experts, every=2),
        data=DataConfig(datasets=(Dataset(path="data/switch"),)),
        train=TrainConfig(steps=550_000, batch_size=2048, seq_len=512),
        optimizer=Adafactor(learning_rate=1e-2, schedule=InverseSqrtSchedule(warmup_steps=0, constant_steps=10_000)),
        sharding=ShardingConfig(expert=16),
        checkpoint=CheckpointConfig(every=2000, keep_every=50_000),
        target="tpu:v5p:2x2x4",
        run_dir="runs/switch_base",
    )
