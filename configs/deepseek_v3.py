"""DeepSeek-V3 (DeepSeek-AI 2024, arXiv:2412.19437, section 4.2): 682,636,487,424 parameters in training,
38,240,398,080 active, 14.8T tokens. Without the module that predicts one more token, as it is used: 671,026,419,200
parameters, 37,552,297,472 active. The released files have 685B: of the module also copies of embedding and head.

    python -m maxlm.data prepare TEXT... --out data/deepseek_v3 --tokenizer tokenizer.json
    python -m maxlm.train --config configs/deepseek_v3.py

Hardware: TPU v5p-2048 (1024 chips), 4 of a layer's 256 routed experts on each device of the expert axis; by arithmetic
about 86 of 95 GB a chip. Time and final loss: not measured.

As printed: latent attention, experts chosen by sigmoids among those of 4 of 8 groups, biases that move by 0.001, three
dense layers, AdamW, initial values of 0.006, a peak of 2.2e-4 after 2000 steps, one module for the token after the next
with weight 0.3. Theirs has weight 0.1 from 10T tokens on: stop at step 158,946, and go on with --model.mtp.weight=0.1.
Not here: the balance loss of a sequence (weight 0.0001), their FP8 with a scale for each tile
(`execution.products=Float8Products()` has one an array). The batch is constant at 15,360 sequences, theirs grows to it
over 469B tokens, as `train.phases` can. Of the learning rate's five phases there are the warm-up, the constant one up
to 10T tokens, and a cosine over the rest, which theirs ends at 14.3T, with two lower constants after it. A device has
room for twice its even share of tokens; the paper drops none.
"""

from math import ceil

from maxlm.config import (
    AdamW,
    BlockConfig,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Decay,
    Dropless,
    ExpertGroups,
    Experts,
    GatedMlp,
    LatentAttention,
    ModelConfig,
    MtpModules,
    ResidualInit,
    RmsNorm,
    Rope,
    RunConfig,
    ShardingConfig,
    SigmoidRouter,
    TrainConfig,
    WsdSchedule,
)

BATCH = 15_360 * 4096


def get_config() -> RunConfig:
    attention = LatentAttention(
        n_heads=128,
        kv_rank=512,
        query_rank=1536,
        content_head_dim=128,
        rope_head_dim=64,
        value_head_dim=128,
        position=Rope(interleaved=True),
    )
    experts = Experts(
        n_experts=256,
        d_ff=2048,
        n_shared_experts=1,
        routed_scaling=2.5,
        router=SigmoidRouter(top_k=8, groups=ExpertGroups(n_groups=8, top_groups=4)),
        dispatch=Dropless(buffer=2.0),
    )
    return RunConfig(
        model=ModelConfig(
            vocab_size=129_280,
            d_model=7168,
            n_layers=61,
            first_blocks=(BlockConfig(attention=attention, mlp=GatedMlp(d_ff=18_432)),) * 3,
            blocks=(BlockConfig(attention=attention, mlp=experts),),
            max_seq_len=4096,
            norm=RmsNorm(eps=1e-6),
            init_std=0.006,
            residual_init=ResidualInit.NONE,
            mtp=MtpModules(depth=1, weight=0.3),
        ),
        data=DataConfig(datasets=(Dataset(path="data/deepseek_v3"),)),
        train=TrainConfig(steps=ceil(14.8e12 / BATCH), batch_size=15_360, seq_len=4096, micro_batches=15),
        optimizer=AdamW(
            learning_rate=2.2e-4,
            schedule=WsdSchedule(
                warmup_steps=2000, decay_steps=ceil(4.8e12 / BATCH), decay=Decay.COSINE, final_fraction=0.1
            ),
        ),
        sharding=ShardingConfig(fsdp=8, expert=64),
        checkpoint=CheckpointConfig(every=500, keep_every=10_000),
        target="tpu:v5p:8x8x16",
        run_dir="runs/deepseek_v3",
    )
