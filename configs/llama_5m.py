"""A four-layer LLaMA (5,261,568 parameters) on the Python standard library's own sources, for figures of a wide model.

    python -m maxlm.train --config configs/llama_5m.py

Hardware: two CPU cores, 1 GB of memory, no download; two to three minutes, data included. The training loss falls from
8.4 to about 4.4 nats a token, the held-out loss to about 4.9: for so short a run it is too wide, and tiny.py learns
more in the same time.
"""

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    ObserveConfig,
    PrepareConfig,
    Remat,
    RunConfig,
    StandardLibrary,
    TrainConfig,
    TrainSentencePiece,
    llama,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, d_ff=688, max_seq_len=512),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NAMES),
        data=DataConfig(
            datasets=(
                Dataset(
                    path="data/stdlib",
                    prepare=PrepareConfig(
                        documents=StandardLibrary(),
                        tokenizer=TrainSentencePiece(vocab_size=4096),
                        validation_fraction=0.05,
                    ),
                ),
            )
        ),
        train=TrainConfig(steps=200, batch_size=8, seq_len=256, log_every=5, eval_every=100, eval_batches=32),
        optimizer=AdamW(learning_rate=2e-3, schedule=CosineSchedule(warmup_steps=20)),
        checkpoint=CheckpointConfig(every=100),
        observe=ObserveConfig(sample_prompt="def ", sample_tokens=64),
        target="cpu:1",
        run_dir="runs/llama_5m",
    )
