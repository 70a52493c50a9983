"""PaLM 8B (arXiv:2204.02311, table 1): 8,632,012,800 parameters, 780B tokens.

    python -m maxlm.train --config configs/palm_8b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 17 of 95 GB a chip. Data, and what is ours: as palm_540b.py.
Time and final loss: not measured.
"""

from configs.palm_540b import palm_run
from maxlm.config import RunConfig, ShardingConfig, palm


def get_config() -> RunConfig:
    model = palm(vocab_size=256_000, d_model=4096, n_layers=32, n_heads=16, head_dim=256, max_seq_len=2048)
    return palm_run(model, 512, ShardingConfig(fsdp=16), "tpu:v5p:4x4x4", "runs/palm_8b")
