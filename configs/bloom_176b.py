"""BLOOM-176B (Le Scao et al. 2022, arXiv:2211.05100, table 3): 176,247,271,424 parameters, 366B tokens.

    python -m maxlm.data prepare TEXT... --out data/bloom --tokenizer tokenizer.json
    python -m maxlm.train --config configs/bloom_176b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 40 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, ALiBi (arXiv:2108.12409), a norm of the embeddings, batches of 2048 sequences, AdamW, a warm-up over
375M tokens, a cosine to a tenth, which ends at 410B tokens there and with the run here. Parameters are those of the
released weights. Not here: a batch that grows from 192 sequences. Initial values are ours.
"""

from dataclasses import replace
from math import ceil

from maxlm.config import (
    AdamW,
    Alibi,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    GroupedQuery,
    RunConfig,
    ShardingConfig,
    TrainConfig,
    gpt,
)


def get_config() -> RunConfig:
    model = gpt(vocab_size=250_880, d_model=14_336, n_layers=70, n_heads=112, max_seq_len=2048)
    (block,) = model.blocks
    attention = GroupedQuery(n_heads=112, n_kv_heads=112, head_dim=128, position=Alibi(), qkv_bias=True, out_bias=True)
    batch = 2048 * 2048
    return RunConfig(
        model=replace(
            model, blocks=(replace(block, attention=attention),), embedding_norm=True, embedded_position=None
        ),
        data=DataConfig(datasets=(Dataset(path="data/bloom"),)),
        train=TrainConfig(steps=ceil(366e9 / batch), batch_size=2048, seq_len=2048, micro_batches=2),
        optimizer=AdamW(learning_rate=6e-5, schedule=CosineSchedule(warmup_steps=ceil(375e6 / batch))),
        sharding=ShardingConfig(fsdp=16, tensor=8, sequence_parallel=True),
        checkpoint=CheckpointConfig(every=1000, keep_every=20_000),
        target="tpu:v5p:8x8x8",
        run_dir="runs/bloom_176b",
    )
