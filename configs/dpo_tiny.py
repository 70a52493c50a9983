"""The model of sft_tiny.py (889,984 parameters) learns by DPO that polite answers are better than rude ones.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.train --config configs/dpo_tiny.py

The run in runs/sft_tiny is where it starts and what it is held to; as that has seen no such answers, the chosen ones'
own loss is learned beside. Hardware: two CPU cores, no download; two minutes.
"""

import dataclasses

from configs.reward_tiny import records
from configs.sft_tiny import get_config as sft
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, Dpo, ObserveConfig, Preference, Purpose, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=records("manners", Purpose.PREFERENCE),
        train=dataclasses.replace(base.train, steps=60, batch_size=8, eval_every=30),
        optimizer=AdamW(learning_rate=3e-4, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=30, init_from="runs/sft_tiny"),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=48),
        task=Preference(loss=Dpo(beta=0.1, nll_weight=0.2)),
        run_dir="runs/dpo_tiny",
    )
