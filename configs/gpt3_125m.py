"""GPT-3 Small (arXiv:2005.14165, table 2.1): 125,262,336 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_125m.py

Hardware: one host of TPU v5e (8 chips); by arithmetic about 5 of 16 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("125m")
