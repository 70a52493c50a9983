"""The second part of a small life (docs/life.md): the model of life_pretrain.py learns to answer questions.

    python -m maxlm.data build problems sort --count 600 --seed 2 --out data/life/sort.jsonl
    python -m maxlm.data build problems addition --count 1000 --seed 2 --out data/life/addition.jsonl
    python -m maxlm.train --config configs/life_sft.py
    python -m maxlm.chat --run runs/life/sft

It starts from the run in runs/life/pretrain (889,984 parameters), and has 2,720 conversations. Hardware: two CPU cores,
1 GB of memory, no download; about two minutes.
"""

import dataclasses

from configs.life_pretrain import get_config as pretrain
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
    Sft,
)


def records(name: str, purpose: Purpose, *paths: str) -> DataConfig:
    """Of those files, prepared in data/life/NAME."""
    documents = Conversations(paths=paths, purpose=purpose, template="plain")
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.05)
    return DataConfig(datasets=(Dataset(path=f"data/life/{name}", prepare=prepare),))


def get_config() -> RunConfig:
    base = pretrain()
    own = ("configs/data/conversations.jsonl", "configs/data/demonstrations.jsonl")
    files = (*own, "data/life/sort.jsonl", "data/life/addition.jsonl")
    return dataclasses.replace(
        base,
        data=records("conversations", Purpose.SFT, *files),
        train=dataclasses.replace(base.train, steps=250, batch_size=16, seq_len=256, eval_every=125),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=125, init_from="runs/life/pretrain"),
        observe=ObserveConfig(sample_prompt="Sort 352914.", sample_tokens=32),
        task=Sft(),
        run_dir="runs/life/sft",
    )
