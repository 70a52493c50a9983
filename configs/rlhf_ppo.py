"""The third part of the classic chain: the policy of rlhf_sft.py (889,984 parameters) learns from the reward model of
rlhf_reward.py (PPO-ptx).

    python -m maxlm.train --config configs/rlhf_ppo.py

The critic begins as the reward model, which is smaller than the policy. A penalty for leaving the policy of rlhf_sft.py
is part of the reward, and the text of pre-training is learned beside (InstructGPT's equation 2). After more than 40
steps the answers please this reward model still more, and another one less (docs/life.md). Hardware: two CPU cores,
2 GB of memory, no download; two to three minutes.
"""

import dataclasses

from configs.life_pretrain import get_config as pretrain
from configs.rlhf_sft import get_config as sft
from configs.rlhf_sft import records
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    ConstantSchedule,
    DataConfig,
    ModelReward,
    ObserveConfig,
    Ppo,
    Purpose,
    Rollouts,
    RunConfig,
)


def get_config() -> RunConfig:
    base = sft()
    library = pretrain().data.datasets[0]
    prompts = records("prompts", Purpose.PROMPTS, "configs/data/manners.jsonl")
    return dataclasses.replace(
        base,
        data=DataConfig(datasets=(prompts, library)),
        train=dataclasses.replace(base.train, steps=40, batch_size=64, seq_len=128, eval_every=20),
        optimizer=AdamW(learning_rate=3e-5, schedule=ConstantSchedule(warmup_steps=0)),
        checkpoint=CheckpointConfig(every=20, init_from="runs/rlhf/sft"),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=64),
        task=Ppo(
            rewards=(ModelReward(run="runs/rlhf/reward", std=5.0),),  # as eval_reward_std of that run says
            critic="runs/rlhf/reward",
            text_weight=1.0,
            rollouts=Rollouts(prompts=64, samples=1, max_new_tokens=72, eval_prompts=32),
        ),
        run_dir="runs/rlhf/ppo",
    )
