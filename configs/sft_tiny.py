"""A two-layer model (500,736 parameters) that learns to answer questions of the way, politely.

    python -m maxlm.train --config configs/sft_tiny.py

The data are the chosen answers of configs/data/manners.jsonl; dpo_tiny.py and kto_tiny.py go on from here. Hardware:
two CPU cores, no download; a minute or two.
"""

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
    ObserveConfig,
    PrepareConfig,
    Purpose,
    Remat,
    RunConfig,
    Sft,
    TrainConfig,
    llama,
)


def records(name: str, purpose: Purpose, classes: tuple[str, ...] = ()) -> DataConfig:
    """Of configs/data/NAME.jsonl."""
    documents = Conversations(paths=(f"configs/data/{name}.jsonl",), purpose=purpose, classes=classes)
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.15, workers=1)
    return DataConfig(datasets=(Dataset(path=f"data/{name}-{purpose.value}", prepare=prepare),))


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=384, d_model=128, n_layers=2, n_heads=4, d_ff=352, max_seq_len=512),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=records("manners", Purpose.SFT),
        train=TrainConfig(steps=150, batch_size=8, seq_len=256, log_every=10, eval_every=50),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_prompt="Where is the bakery?", sample_tokens=48),
        task=Sft(),
        target="cpu:1",
        run_dir="runs/sft_tiny",
    )
