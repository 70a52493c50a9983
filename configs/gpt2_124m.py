"""GPT-2 of 124M as nanoGPT trains it (Radford et al. 2019, table 2; hyper-parameters as of nanoGPT's
config/train_gpt2.py): 124,475,904 parameters, 491,520 tokens a step.

    python -m maxlm.data prepare openwebtext.jsonl --out data/openwebtext --tokenizer gpt2/tokenizer.json
    python -m maxlm.train --config configs/gpt2_124m.py

Hardware: one A100 of 80 GB; its compiler gives it 3.1 GB. On several, --sharding.data takes them all by itself, and
--train.micro_batches may be fewer: 12 sequences of each on a GPU. Time and final loss: not measured. nanoGPT's 600,000
steps are 295B tokens; 2.5B, 20 a parameter (arXiv:2203.15556), are --train.steps=5100
--optimizer.schedule.warmup_steps=500. It leaves the biases out; these are GPT-2's. No dropout, as in nanoGPT.
"""

from maxlm.config import (
    AdamW,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    RunConfig,
    TrainConfig,
    gpt,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=gpt(vocab_size=50_304, d_model=768, n_layers=12, n_heads=12, max_seq_len=1024),
        data=DataConfig(datasets=(Dataset(path="data/openwebtext"),)),
        train=TrainConfig(steps=600_000, batch_size=480, seq_len=1024, micro_batches=40),
        optimizer=AdamW(learning_rate=6e-4, schedule=CosineSchedule(warmup_steps=2000)),
        checkpoint=CheckpointConfig(every=1000, keep_every=50_000),
        target="gpu:a100:1",
        run_dir="runs/gpt2_124m",
    )
