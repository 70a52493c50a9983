"""Context distillation: the model of sft_tiny.py (889,984 parameters) learns to spell as if it were told that it is a
spelling bee, without being told.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.train --config configs/context_tiny.py

The run in runs/sft_tiny is where it starts, and who is told. The loss is the KL divergence of what the two say next, in
nats a token. configs/data/spelling.jsonl has conversations with their context. Hardware: two CPU cores, no download; a
minute or two.
"""

import dataclasses

from configs.reward_tiny import records
from configs.sft_tiny import get_config as sft
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DistillContext,
    ObserveConfig,
    Purpose,
    RunConfig,
)


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=records("spelling", Purpose.CONTEXT),
        train=dataclasses.replace(base.train, steps=60, batch_size=8, eval_every=30),
        optimizer=AdamW(learning_rate=3e-4, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=30, init_from="runs/sft_tiny"),
        observe=ObserveConfig(sample_prompt="Spell garden.", sample_tokens=16),
        task=DistillContext(),
        run_dir="runs/context_tiny",
    )
