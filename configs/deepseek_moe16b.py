"""DeepSeekMoE 16B (Dai et al. 2024, arXiv:2401.06066, section 5.1): 16,375,728,128 parameters, 2,828,650,496 active.

    python -m maxlm.data prepare TEXT... --out data/deepseek_moe --tokenizer tokenizer.json
    python -m maxlm.train --config configs/deepseek_moe16b.py

Hardware: TPU v5p-128 (64 chips), 8 of a layer's 64 routed experts on each device of the expert axis. By arithmetic
about 20 of 95 GB a chip. A device has room for twice its even share of tokens, the rest is dropped and counted: room
for the worst case would be four times the bytes to exchange, and take longer than computing. Time and final loss: not
measured.

27 layers with 2 shared experts and 6 of 64 routed ones follow a dense first layer, whose width is that of the released
weights. The learning rate is cut to 0.316 after 80 % and to 0.1 after 90 % of the steps, as printed. "4.5K sequences"
are read as 4608.
"""

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Dropless,
    Experts,
    MultiStepSchedule,
    RunConfig,
    ShardingConfig,
    TopKRouter,
    TrainConfig,
    llama,
    with_experts,
)

STEPS = 106_449


def get_config() -> RunConfig:
    dense = llama(
        vocab_size=102_400,
        d_model=2048,
        n_layers=28,
        n_heads=16,
        d_ff=10_944,
        max_seq_len=4096,
        norm_eps=1e-6,
        init_std=0.006,
    )
    experts = Experts(
        n_experts=64,
        d_ff=1408,
        n_shared_experts=2,
        router=TopKRouter(top_k=6, normalize=False, load_balance=0.001),
        dispatch=Dropless(buffer=2.0),
    )
    return RunConfig(
        model=with_experts(dense, experts, first_dense=1),
        data=DataConfig(datasets=(Dataset(path="data/deepseek_moe"),)),
        train=TrainConfig(steps=STEPS, batch_size=4608, seq_len=4096, micro_batches=18),
        optimizer=AdamW(
            learning_rate=4.2e-4,
            schedule=MultiStepSchedule(warmup_steps=2000),
        ),
        sharding=ShardingConfig(fsdp=8, expert=8),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        target="tpu:v5p:4x4x4",
        run_dir="runs/deepseek_moe16b",
    )
