"""The model of sft_tiny.py (500,736 parameters) learns by DPO that polite answers are better than rude ones.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.train --config configs/dpo_tiny.py

Each line of configs/data/manners.jsonl has a question, a polite and a rude answer. The run in runs/sft_tiny is where it
starts and what it is held to. Hardware: two CPU cores; a minute or two.
"""

import dataclasses

from configs.sft_tiny import get_config as sft
from configs.sft_tiny import records
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, Dpo, Preference, Purpose, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=records("manners", Purpose.PREFERENCE),
        train=dataclasses.replace(base.train, steps=60, eval_every=30),
        optimizer=AdamW(learning_rate=1e-4, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=30, init_from="runs/sft_tiny"),
        task=Preference(loss=Dpo(beta=0.1)),
        run_dir="runs/dpo_tiny",
    )
