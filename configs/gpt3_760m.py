"""GPT-3 Large (arXiv:2005.14165, table 2.1): 760,372,224 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_760m.py

Hardware: one host of TPU v5e (8 chips); by arithmetic about 12 of 16 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("760m")
