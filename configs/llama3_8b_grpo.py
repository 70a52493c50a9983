"""Llama 3 8B Instruct learns to solve problems whose answers are numbers (GRPO; Shao et al. 2024, arXiv:2402.03300):
8,030,261,248 parameters.

    python -m maxlm.data prepare problems.jsonl --purpose prompts --tokenizer models/Meta-Llama-3-8B-Instruct \\
        --template llama3 --validation_fraction 0.05 --out data/problems
    python -m maxlm.train --config configs/llama3_8b_grpo.py

A record of problems.jsonl: {"prompt": "...", "answer": "42"}. 64 completions of each prompt, 1024 tokens each at most,
1024 completions a step, one step a rollout, learning rate and the distance to the reference are the paper's (section
4.2); theirs is a model of 7B.
Hardware: one host of H200 (8 chips); by arithmetic (`python -m maxlm.plan --config llama3_8b_grpo`) about 53 of 105 GiB
a GPU, 26 of them weights and cache of the engine that writes 128 texts on each.
Time and final loss: not measured.
"""

from dataclasses import replace

from configs.llama3_8b import get_config as base
from maxlm.config import (
    AdamW,
    Aggregation,
    CheckpointConfig,
    ConstantSchedule,
    DataConfig,
    Dataset,
    Grpo,
    KlEstimator,
    NumberReward,
    Rollouts,
    RunConfig,
    ShardingConfig,
    TrainConfig,
)


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        data=DataConfig(datasets=(Dataset(path="data/problems"),)),
        train=TrainConfig(steps=1000, batch_size=1024, seq_len=1536, micro_batches=32, eval_every=50),
        optimizer=AdamW(learning_rate=1e-6, weight_decay=0.0, schedule=ConstantSchedule()),
        sharding=ShardingConfig(data=1, fsdp=8),
        checkpoint=CheckpointConfig(every=50, init_from="hf:models/Meta-Llama-3-8B-Instruct"),
        task=Grpo(
            rewards=(NumberReward(),),
            rollouts=Rollouts(prompts=16, samples=64, max_new_tokens=1024, slots=128, eval_prompts=256),
            aggregation=Aggregation.SEQUENCE_MEAN,
            kl_weight=0.04,
            kl_estimator=KlEstimator.K3,
        ),
        target="gpu:h200:8",
        run_dir="runs/llama3_8b_grpo",
    )
