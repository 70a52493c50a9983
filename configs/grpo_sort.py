"""The model of sort_sft.py (148,288 parameters) learns to sort six digits by GRPO from right and wrong alone.

    python -m maxlm.train --config configs/sort_sft.py
    python -m maxlm.train --config configs/grpo_sort.py

Hardware: two CPU cores, no download; two minutes. Each step the model answers 32 prompts eight times each; right
answers become more likely where others to the same prompt are wrong. `eval_reward` is the share of right answers to
prompts that it never trains on.
"""

import dataclasses

from configs.sort_sft import get_config as sft
from configs.sort_sft import problems
from maxlm.config import AdamW, CheckpointConfig, ConstantSchedule, ExactReward, Grpo, Purpose, Rollouts, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=problems(Purpose.PROMPTS),
        train=dataclasses.replace(base.train, steps=100, batch_size=256, eval_every=25),
        optimizer=AdamW(learning_rate=3e-4, schedule=ConstantSchedule(warmup_steps=0)),
        checkpoint=CheckpointConfig(every=50, init_from="runs/sort_sft"),
        task=Grpo(
            rewards=(ExactReward(),), rollouts=Rollouts(prompts=32, samples=8, max_new_tokens=8, eval_prompts=256)
        ),
        run_dir="runs/grpo_sort",
    )
