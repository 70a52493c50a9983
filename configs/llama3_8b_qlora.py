"""QLoRA on Llama 3 8B (Dettmers et al. 2023, arXiv:2305.14314): 8,198,033,408 parameters, 167,772,160 of them trained.

    python -m maxlm.data prepare chats.jsonl --purpose sft --tokenizer models/Meta-Llama-3-8B --template llama3 \\
        --out data/oasst1
    python -m maxlm.train --config configs/llama3_8b_qlora.py

The base, read from the published folder, is held in NF4; beside each of its matrices are two of rank 64. Rank, alpha,
dropout, learning rate, batch, clipping and steps are the paper's for 7B models on OASST1 (table 9 and section B.2).
Hardware: one GPU of 80 GB; by arithmetic (`python -m maxlm.plan --config llama3_8b_qlora`) about 12 GB of it.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama3_8b import get_config as base
from maxlm.config import (
    AdamW,
    Adapter,
    BaseFormat,
    CheckpointConfig,
    ConstantSchedule,
    DataConfig,
    Dataset,
    Lora,
    RunConfig,
    Sft,
    ShardingConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    run = base()
    lora = Lora(rank=64, alpha=16, dropout=0.1, targets=("all-linear",))
    return replace(
        run,
        model=replace(run.model, adapter=Adapter(kind=lora, base=BaseFormat.NF4)),
        data=DataConfig(datasets=(Dataset(path="data/oasst1"),)),
        train=TrainConfig(steps=1875, batch_size=16, seq_len=2048, micro_batches=4),
        optimizer=AdamW(learning_rate=2e-4, b2=0.999, weight_decay=0.0, clip_norm=0.3, schedule=ConstantSchedule()),
        sharding=ShardingConfig(),
        checkpoint=CheckpointConfig(every=250, init_from="hf:models/Meta-Llama-3-8B"),
        task=Sft(),
        target="gpu:h100:1",
        run_dir="runs/llama3_8b_qlora",
    )
