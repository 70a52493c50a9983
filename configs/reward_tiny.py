"""A two-layer reward model (451,712 parameters) that finds polite answers better than rude ones.

    python -m maxlm.train --config configs/reward_tiny.py

From the pairs of configs/data/manners.jsonl. Hardware: two CPU cores; a minute or two. The report has its accuracy on
held-out pairs, and its calibration.
"""

import dataclasses

from configs.sft_tiny import get_config as sft
from configs.sft_tiny import records
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, ObserveConfig, Purpose, Reward, RunConfig, ScalarHead


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, head=ScalarHead()),
        data=records("manners", Purpose.PREFERENCE),
        train=dataclasses.replace(base.train, steps=60, eval_every=20),
        optimizer=AdamW(learning_rate=1e-3, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=30),
        observe=ObserveConfig(sample_tokens=0),
        task=Reward(),
        run_dir="runs/reward_tiny",
    )
