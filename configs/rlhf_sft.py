"""The first part of the classic chain (InstructGPT, arXiv:2203.02155): the model of life_pretrain.py learns to answer
(889,984 parameters).

    python -m maxlm.train --config configs/rlhf_sft.py

People demonstrate answers of both kinds, polite and rude ones: each question of configs/data/demonstrations.jsonl has
one of each. Hardware: two CPU cores, 1 GB of memory, no download; about a minute.
"""

import dataclasses

from configs.life_sft import get_config as sft
from maxlm.config import (
    AdamW,
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    CosineSchedule,
    DataConfig,
    Dataset,
    ObserveConfig,
    PrepareConfig,
    Purpose,
    RunConfig,
)


def records(name: str, purpose: Purpose, *paths: str) -> Dataset:
    """Of those files, prepared in data/rlhf/NAME. The prompts that are held out by a hash of their records are held out
    of the reward model's pairs too: those are the same records."""
    documents = Conversations(paths=paths, purpose=purpose, template="plain")
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.15)
    return Dataset(path=f"data/rlhf/{name}", prepare=prepare)


def get_config() -> RunConfig:
    base = sft()
    return dataclasses.replace(
        base,
        data=DataConfig(datasets=(records("demonstrations", Purpose.SFT, "configs/data/demonstrations.jsonl"),)),
        train=dataclasses.replace(base.train, steps=100, eval_every=50),
        optimizer=AdamW(learning_rate=1e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=100, init_from="runs/life/pretrain"),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=64),
        run_dir="runs/rlhf/sft",
    )
