"""A LLaMA of GPT-2's size to begin with: 123,587,328 parameters, 2.5B tokens, 20 a parameter (arXiv:2203.15556).

    python -m maxlm.data prepare TEXT... --out data/web --tokenizer gpt2/tokenizer.json
    python -m maxlm.train --config configs/llama_125m.py

Hardware: one GPU of 24 GB (RTX 4090); 3.5 GB by arithmetic, 3.2 compiled for an A100. Time and
final loss: not measured.

The batch of 0.5M tokens and the learning rate are GPT-3's for this size (arXiv:2005.14165, table 2.1), the rest is
LLaMA's (arXiv:2302.13971, section 2); input and output share a table, as it is a third of the parameters.
"""

from math import ceil

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    RunConfig,
    TrainConfig,
    llama,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(
            vocab_size=50_304, d_model=768, n_layers=12, n_heads=12, d_ff=2048, max_seq_len=2048, tie_embeddings=True
        ),
        data=DataConfig(datasets=(Dataset(path="data/web"),)),
        train=TrainConfig(steps=ceil(2.5e9 / (256 * 2048)), batch_size=256, seq_len=2048, micro_batches=32),
        optimizer=AdamW(learning_rate=6e-4, schedule=CosineSchedule(warmup_steps=500)),
        checkpoint=CheckpointConfig(every=1000),
        target="gpu:rtx4090:1",
        run_dir="runs/llama_125m",
    )
