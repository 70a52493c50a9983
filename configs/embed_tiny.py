"""A two-layer model (445,057 parameters) of vectors by which questions find their answers.

    python -m maxlm.train --config configs/embed_tiny.py
    python -m maxlm.serve --run runs/embed_tiny

From configs/data/animals.jsonl. Hardware: two CPU cores, no download; two minutes. The server then has the vectors at
/v1/embeddings.
"""

from configs.reward_tiny import records, small
from maxlm.config import Embed, EmbedHead, Purpose, RunConfig


def get_config() -> RunConfig:
    return small(Embed(), EmbedHead(), records("animals", Purpose.EMBED), steps=150, run_dir="runs/embed_tiny")
