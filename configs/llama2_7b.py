"""Llama 2 7B (Touvron et al. 2023, arXiv:2307.09288, table 1 and section 2.2): 6,738,415,616 parameters, 2.0T tokens.

    python -m maxlm.train --config configs/llama2_7b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 35 of 95 GB a chip. Data: as llama7b.py.
Time and final loss: not measured.
"""

from dataclasses import replace
from math import ceil

from configs.llama7b import get_config as base
from maxlm.config import RmsNorm, RunConfig


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=replace(run.model, max_seq_len=4096, norm=RmsNorm(eps=1e-5)),
        train=replace(run.train, steps=ceil(2.0e12 / (1024 * 4096)), batch_size=1024, seq_len=4096),
        target="tpu:v5p:4x4x4",
        run_dir="runs/llama2_7b",
    )
