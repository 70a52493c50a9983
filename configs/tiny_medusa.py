"""Three Medusa heads (3,342,336 parameters) for the model of llama_5m.py: 8,603,904 parameters in all.

    python -m maxlm.train --config configs/llama_5m.py
    python -m maxlm.train --config configs/tiny_medusa.py

The heads alone are trained, on the model of the run in runs/llama_5m, whose tokens stay what they are: another run is
named with --checkpoint.init_from=DIR. Hardware: two CPU cores, 1 GB of memory; two minutes of processor time.
docs/generate.md has what they are for.
"""

import dataclasses

from configs.llama_5m import get_config as llama_5m
from maxlm.config import AdamW, CheckpointConfig, CosineSchedule, MedusaHeads, ObserveConfig, RunConfig, TrainMedusa


def get_config() -> RunConfig:
    base = llama_5m()
    return dataclasses.replace(
        base,
        model=dataclasses.replace(base.model, medusa=MedusaHeads(n_heads=3)),
        train=dataclasses.replace(base.train, steps=100, eval_every=50, eval_batches=8),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=100, init_from="runs/llama_5m"),
        observe=ObserveConfig(sample_tokens=0),
        task=TrainMedusa(),
        run_dir="runs/tiny_medusa",
    )
