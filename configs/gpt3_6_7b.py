"""GPT-3 6.7B (arXiv:2005.14165, table 2.1): 6,658,596,864 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_6_7b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 20 of 95 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("6_7b")
