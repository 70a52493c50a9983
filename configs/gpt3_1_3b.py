"""GPT-3 XL (arXiv:2005.14165, table 2.1): 1,315,819,520 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_1_3b.py

Hardware: TPU v5e, topology 4x8 (32 chips); by arithmetic about 9 of 16 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("1_3b")
