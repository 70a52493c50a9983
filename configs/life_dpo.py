"""The third part of a small life (docs/life.md): the model of life_sft.py learns by DPO which answers people prefer.

    python -m maxlm.train --config configs/life_dpo.py

Of configs/data/manners.jsonl, a polite and a rude answer to each question. The run in runs/life/sft is where it starts
and what it is held to (889,984 parameters). Hardware: two CPU cores, 1 GB of memory, no download; about a minute.
"""

import dataclasses

from configs.life_sft import get_config as sft
from configs.life_sft import records
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, Dpo, ObserveConfig, Preference, Purpose, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=records("manners", Purpose.PREFERENCE, "configs/data/manners.jsonl"),
        train=dataclasses.replace(base.train, steps=40, batch_size=8, eval_every=20),
        optimizer=AdamW(learning_rate=5e-5, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=20, init_from="runs/life/sft"),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=48),
        task=Preference(loss=Dpo(beta=0.1, nll_weight=0.2)),
        run_dir="runs/life/dpo",
    )
