"""Qwen 7B (Bai et al. 2023, arXiv:2309.16609, table 1 and section 2): 7,721,324,544 parameters, 2.4T tokens.

    python -m maxlm.data prepare TEXT... --out data/qwen --tokenizer tokenizer.json
    python -m maxlm.train --config configs/qwen_7b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 35 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, biases of queries, keys and values, learning rate, batches of 4M tokens in sequences of 2048, AdamW,
a cosine to a tenth; the vocabulary is that of the released weights. The warm-up of 2000 steps is Llama 2's. What Qwen
adds for longer texts once it is trained is in docs/configs.md.
"""

from dataclasses import replace
from math import ceil

from configs.llama7b import get_config as base
from maxlm.config import AdamW, CosineSchedule, DataConfig, Dataset, GroupedQuery, ModelConfig, RunConfig, llama


def qwen(*, vocab_size: int, d_model: int, n_layers: int, n_heads: int, d_ff: int) -> ModelConfig:
    """A LLaMA with biases where queries, keys and values are made."""
    model = llama(
        vocab_size=vocab_size,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=d_ff,
        max_seq_len=2048,
        norm_eps=1e-6,
    )
    (block,) = model.blocks
    attention = GroupedQuery(n_heads=n_heads, n_kv_heads=n_heads, head_dim=d_model // n_heads, qkv_bias=True)
    return replace(model, blocks=(replace(block, attention=attention),))


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=qwen(vocab_size=151_936, d_model=4096, n_layers=32, n_heads=32, d_ff=11_008),
        data=DataConfig(datasets=(Dataset(path="data/qwen"),)),
        train=replace(run.train, steps=ceil(2.4e12 / (2048 * 2048))),
        optimizer=AdamW(learning_rate=3e-4, schedule=CosineSchedule(warmup_steps=2000)),
        run_dir="runs/qwen_7b",
    )
