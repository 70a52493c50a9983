"""PaLM 62B (arXiv:2204.02311, table 1): 62,495,662,080 parameters, 780B tokens.

    python -m maxlm.train --config configs/palm_62b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 30 of 95 GB a chip. Data, and what is ours: as palm_540b.py.
Time and final loss: not measured.
"""

from configs.palm_540b import palm_run
from maxlm.config import RunConfig, ShardingConfig, palm


def get_config() -> RunConfig:
    model = palm(vocab_size=256_000, d_model=8192, n_layers=64, n_heads=32, head_dim=256, max_seq_len=2048)
    return palm_run(model, 1024, ShardingConfig(fsdp=64), "tpu:v5p:8x8x8", "runs/palm_62b")
