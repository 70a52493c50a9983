"""The model of sft_tiny.py (889,984 parameters) learns by KTO from answers that are each called good or bad.

    python -m maxlm.train --config configs/sft_tiny.py
    python -m maxlm.train --config configs/kto_tiny.py

configs/data/manners_labels.jsonl has one answer to each question, and whether somebody liked it. Hardware: two CPU
cores, no download; two minutes.
"""

import dataclasses

from configs.dpo_tiny import get_config as dpo
from configs.reward_tiny import records
from maxlm.config import Kto, Preference, Purpose, RunConfig


def get_config() -> RunConfig:
    return dataclasses.replace(
        dpo(),
        data=records("manners_labels", Purpose.KTO),
        task=Preference(loss=Kto(beta=0.1)),
        run_dir="runs/kto_tiny",
    )
