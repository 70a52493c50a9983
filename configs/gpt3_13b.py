"""GPT-3 13B (arXiv:2005.14165, table 2.1): 12,853,626,880 parameters, 300B tokens.

    python -m maxlm.train --config configs/gpt3_13b.py

Hardware: TPU v5p-256 (128 chips); by arithmetic about 17 of 95 GB a chip. Time and final loss: not measured.
Data, and what is ours: as gpt3_175b.py.
"""

from configs.gpt3_175b import gpt3
from maxlm.config import RunConfig


def get_config() -> RunConfig:
    return gpt3("13b")
