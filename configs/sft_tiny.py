"""Supervised fine-tuning in small (889,984 parameters): 640 short conversations, byte by byte, from nothing.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.chat --run runs/sft_tiny

Hardware: two CPU cores, 1 GB of memory, no download. The conversations are in configs/data/conversations.jsonl, in four
formats; the loss counts what the assistant says. To teach a model that can do more already, add
`--checkpoint.init_from hf:DIR` and prepare the data with its tokenizer (docs/posttrain.md).
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
    RunConfig,
    Sft,
    TrainConfig,
    llama,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=384, d_model=128, n_layers=4, n_heads=4, d_ff=344, max_seq_len=512),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=DataConfig(
            datasets=(
                Dataset(
                    path="data/conversations",
                    prepare=PrepareConfig(
                        documents=Conversations(paths=("configs/data/conversations.jsonl",), template="plain"),
                        tokenizer=ByteTokenizer(),
                        validation_fraction=0.05,
                    ),
                ),
            )
        ),
        train=TrainConfig(steps=400, batch_size=16, seq_len=256, eval_every=100),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=20)),
        checkpoint=CheckpointConfig(every=200),
        observe=ObserveConfig(sample_prompt="Write garden in capitals.", sample_tokens=32),
        task=Sft(),
        target="cpu:1",
        run_dir="runs/sft_tiny",
    )
