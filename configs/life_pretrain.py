"""The first part of a small life (docs/life.md): 889,984 parameters learn to continue text, byte by byte.

    python -m maxlm.data build problems addition --count 12000 --seed 1 --as text --out data/life/addition_text.jsonl
    python -m maxlm.train --config configs/life_pretrain.py

`make life` does this and all that follows. Hardware: two CPU cores, 1 GB of memory, no download; two to three minutes.
Two windows in three are of the Python standard library's own sources, the third of sums, in digits and in words.
"""

from maxlm.config import (
    AdamW,
    ByteTokenizer,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    Files,
    ObserveConfig,
    PrepareConfig,
    RunConfig,
    StandardLibrary,
    TrainConfig,
    llama,
)


def get_config() -> RunConfig:
    sums = Files(paths=("data/life/addition_text.jsonl",))
    return RunConfig(
        model=llama(vocab_size=384, d_model=128, n_layers=4, n_heads=4, d_ff=344, max_seq_len=256),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=DataConfig(
            datasets=(
                Dataset(
                    path="data/life/library",
                    weight=2.0,
                    prepare=PrepareConfig(
                        documents=StandardLibrary(), tokenizer=ByteTokenizer(), validation_fraction=0.02
                    ),
                ),
                Dataset(
                    path="data/life/sums",
                    prepare=PrepareConfig(documents=sums, tokenizer=ByteTokenizer(), validation_fraction=0.02),
                ),
            )
        ),
        train=TrainConfig(steps=450, batch_size=32, seq_len=128, eval_every=150, eval_batches=8),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=20)),
        checkpoint=CheckpointConfig(every=150),
        observe=ObserveConfig(sample_prompt="What is 12 + 7? ", sample_tokens=32),
        target="cpu:1",
        run_dir="runs/life/pretrain",
    )
