"""The second part of the classic chain: a reward model of two layers (445,184 parameters) learns what people prefer.

    python -m maxlm.train --config configs/rlhf_reward.py

It is smaller than the policy of rlhf_sft.py, and begins from nothing. Hardware: two CPU cores, 1 GB of memory, no
download; a minute or two. Who judges the chain at its end is another one, which no policy has seen:

    python -m maxlm.train --config configs/rlhf_reward.py --train.seed 1 --run_dir runs/rlhf/judge
"""

from configs.reward_tiny import small
from configs.rlhf_sft import records
from maxlm.config import DataConfig, Purpose, Reward, RunConfig, ScalarHead


def get_config() -> RunConfig:
    data = DataConfig(datasets=(records("manners", Purpose.PREFERENCE, "configs/data/manners.jsonl"),))
    return small(Reward(), ScalarHead(), data, steps=60, run_dir="runs/rlhf/reward")
