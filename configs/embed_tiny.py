"""A two-layer model (451,585 parameters) of vectors by which questions find their answers.

    python -m maxlm.train --config configs/embed_tiny.py
    python -m maxlm.serve --run runs/embed_tiny

From configs/data/animals.jsonl. Hardware: two CPU cores; two minutes. The server then has them at /v1/embeddings.
"""

import dataclasses

from configs.sft_tiny import get_config as sft
from configs.sft_tiny import records
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, Embed, EmbedHead, ObserveConfig, Purpose, RunConfig


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, head=EmbedHead()),
        data=records("animals", Purpose.EMBED),
        train=dataclasses.replace(base.train, steps=150, eval_every=50),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_tokens=0),
        task=Embed(),
        run_dir="runs/embed_tiny",
    )
