"""LoRA on the model of sft_tiny.py: 968,064 parameters, 78,080 of them trained; it learns to answer politely.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.train --config configs/lora_tiny.py --model.adapter.kind.rank 8
    python -m maxlm.serve --run runs/sft_tiny --adapter polite=runs/lora_tiny

The base is the run in runs/sft_tiny, which stays as it is; of configs/data/manners.jsonl the better answers are
learned. Hardware: two CPU cores, no download; two minutes.
"""

import dataclasses

from configs.reward_tiny import records
from configs.sft_tiny import get_config as sft
from maxlm.config import AdamW, Adapter, CheckpointConfig, CosineSchedule, Lora, ObserveConfig, Purpose, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, adapter=Adapter(kind=Lora(rank=8, targets=("all-linear",)))),
        data=records("manners", Purpose.SFT),
        train=dataclasses.replace(base.train, steps=60, batch_size=8, eval_every=30),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=5)),
        checkpoint=CheckpointConfig(every=30, init_from="runs/sft_tiny"),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=48),
        run_dir="runs/lora_tiny",
    )
