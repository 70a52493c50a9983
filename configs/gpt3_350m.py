"""GPT-3 Medium (arXiv:2005.14165, table 2.1): 355,919,872 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_350m.py

Hardware: one host of TPU v5e (8 chips); by arithmetic about 9 of 16 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("350m")
