"""The model of sort_sft.py (148,288 parameters) learns to sort six digits by PPO from right and wrong alone.

    python -m maxlm.train --config configs/sort_sft.py
    python -m maxlm.train --config configs/ppo_sort.py

A critic, which begins as the policy with a head that says 0, learns what is still to come; the policy is held near the
one that it began as. Hardware: two CPU cores, no download; some minutes.
"""

import dataclasses

from configs.grpo_sort import get_config as grpo
from maxlm.config import CheckpointConfig, ExactReward, FixedKl, Ppo, Rollouts, RunConfig


def get_config() -> RunConfig:
    base = grpo()
    return dataclasses.replace(
        base,
        train=dataclasses.replace(base.train, steps=200, batch_size=128),
        checkpoint=CheckpointConfig(every=100, init_from="runs/sort_sft"),
        task=Ppo(
            rewards=(ExactReward(),),
            kl=FixedKl(beta=0.01),
            rollouts=Rollouts(prompts=256, samples=1, max_new_tokens=8, epochs=2, eval_prompts=256),
        ),
        run_dir="runs/ppo_sort",
    )
