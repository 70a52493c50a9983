"""A two-layer classifier (501,120 parameters) that tells good, middling and bad reviews apart.

    python -m maxlm.train --config configs/classify_tiny.py

From configs/data/reviews.jsonl; the loss of the text itself helps along, as in the first GPT. Hardware: two CPU cores;
two minutes.
"""

import dataclasses

from configs.sft_tiny import get_config as sft
from configs.sft_tiny import records
from maxlm.config import (
    AdamW,
    CheckpointConfig,
    ClassHead,
    Classify,
    CosineSchedule,
    LmHead,
    ObserveConfig,
    Purpose,
    RunConfig,
)


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, head=ClassHead(n_classes=3, lm=LmHead())),
        data=records("reviews", Purpose.CLASSIFY, classes=("bad", "middling", "good")),
        train=dataclasses.replace(base.train, steps=100, eval_every=50),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_tokens=0),
        task=Classify(lm_weight=0.5),
        run_dir="runs/classify_tiny",
    )
