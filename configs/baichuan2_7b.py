"""Baichuan 2 7B (Yang et al. 2023, arXiv:2309.10305, table 2 and section 2): 7,505,973,248 parameters, 2.6T tokens.

    python -m maxlm.data prepare TEXT... --out data/baichuan2 --tokenizer tokenizer.model
    python -m maxlm.train --config configs/baichuan2_7b.py

Hardware: TPU v5p-128 (64 chips); by arithmetic about 35 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, rows of the output table of length 1, AdamW with betas 0.9 and 0.95, weight decay 0.1, gradients
clipped at 0.5, warm-up over 2000 steps, learning rate, the loss on the largest logit (max-z). Batch and end of the
cosine are not: ours are 4M tokens and a tenth.
"""

from dataclasses import replace
from math import ceil

from configs.llama7b import get_config as base
from maxlm.config import AdamW, CosineSchedule, DataConfig, Dataset, LmHead, ModelConfig, RunConfig, llama


def baichuan2(d_model: int, n_layers: int, n_heads: int, d_ff: int) -> ModelConfig:
    """A LLaMA whose logits are of unit rows."""
    model = llama(
        vocab_size=125_696,
        d_model=d_model,
        n_layers=n_layers,
        n_heads=n_heads,
        d_ff=d_ff,
        max_seq_len=4096,
        norm_eps=1e-6,
    )
    return replace(model, head=LmHead(normalized=True))


def get_config() -> RunConfig:
    run = base()
    return replace(
        run,
        model=baichuan2(4096, 32, 32, 11_008),
        data=DataConfig(datasets=(Dataset(path="data/baichuan2"),)),
        train=replace(run.train, steps=ceil(2.6e12 / (1024 * 4096)), batch_size=1024, seq_len=4096, max_z_loss=2e-4),
        optimizer=AdamW(learning_rate=2e-4, clip_norm=0.5, schedule=CosineSchedule(warmup_steps=2000)),
        run_dir="runs/baichuan2_7b",
    )
