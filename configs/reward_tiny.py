"""A two-layer reward model (445,184 parameters) that finds polite answers better than rude ones.

    python -m maxlm.train --config configs/reward_tiny.py

Each line of configs/data/manners.jsonl has a question, a polite and a rude answer. Hardware: two CPU cores, no
download; a minute or two. The report has the share of held-out pairs that are right, and the calibration.
"""

import dataclasses

from maxlm.config import (
    AdamW,
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    Head,
    ObserveConfig,
    PrepareConfig,
    Purpose,
    Remat,
    Reward,
    RunConfig,
    ScalarHead,
    Task,
    TrainConfig,
    llama,
)


def records(name: str, purpose: Purpose, classes: tuple[str, ...] = ()) -> DataConfig:
    """Of configs/data/NAME.jsonl."""
    documents = Conversations(paths=(f"configs/data/{name}.jsonl",), purpose=purpose, template="plain", classes=classes)
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.15)
    return DataConfig(datasets=(Dataset(path=f"data/{name}_{purpose.value}", prepare=prepare),))


def small(task: Task, head: Head, data: DataConfig, *, steps: int, run_dir: str) -> RunConfig:
    """A small model with this head."""
    model = llama(vocab_size=384, d_model=128, n_layers=2, n_heads=4, d_ff=344, max_seq_len=512)
    return RunConfig(
        model=dataclasses.replace(model, head=head),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=data,
        train=TrainConfig(steps=steps, batch_size=8, seq_len=256, log_every=10, eval_every=50),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_tokens=0),
        task=task,
        target="cpu:1",
        run_dir=run_dir,
    )


def get_config() -> RunConfig:
    data = records("manners", Purpose.PREFERENCE)
    return small(Reward(), ScalarHead(), data, steps=60, run_dir="runs/reward_tiny")
