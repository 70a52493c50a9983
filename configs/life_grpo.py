"""The fourth part of a small life (docs/life.md): the model of life_dpo.py (889,984 parameters) learns to sort from
nothing but whether its answers are right (GRPO).

    python -m maxlm.data build problems sort --count 4000 --seed 3 --out data/life/prompts.jsonl
    python -m maxlm.train --config configs/life_grpo.py
    python -m maxlm.chat --run runs/life/grpo

Each step the model answers 32 prompts eight times each; answers that are right become more likely where others to the
same prompt are wrong. Hardware: two CPU cores, 2 GB of memory, no download; about six minutes.
"""

import dataclasses

from configs.life_dpo import get_config as dpo
from configs.life_sft import records
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    ConstantSchedule,
    ExactReward,
    Grpo,
    ObserveConfig,
    Purpose,
    Rollouts,
    RunConfig,
)


def get_config() -> RunConfig:
    base = dpo()
    return dataclasses.replace(
        base,
        data=records("prompts", Purpose.PROMPTS, "data/life/prompts.jsonl"),
        train=dataclasses.replace(base.train, steps=300, batch_size=256, seq_len=48, eval_every=50),
        optimizer=AdamW(learning_rate=2e-4, schedule=ConstantSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50, init_from="runs/life/dpo"),
        observe=ObserveConfig(sample_prompt="Sort 352914.", sample_tokens=16),
        task=Grpo(
            rewards=(ExactReward(),), rollouts=Rollouts(prompts=32, samples=8, max_new_tokens=12, eval_prompts=64)
        ),
        run_dir="runs/life/grpo",
    )
