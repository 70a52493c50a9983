"""A Llama 3 recipe in small (500,352 parameters): a batch that grows, longer contexts with another RoPE, annealing.

    python -m maxlm.train --config configs/tiny_phases.py

As Llama 3 was trained (arXiv:2407.21783, section 3.4), with a batch that grows as GPT-3's did (arXiv:2005.14165,
appendix B): docs/phases.md. Hardware: two CPU cores, 1 GB of memory, no download; the text is the Python standard
library, and at the end the Python sources of maxlm too, in bytes.
"""

from maxlm.config import (
    AdamW,
    ByteTokenizer,
    CheckpointConfig,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    Files,
    ObserveConfig,
    Phase,
    PrepareConfig,
    Recovered,
    Remat,
    Rollback,
    Rope,
    RunConfig,
    StandardLibrary,
    TrainConfig,
    WsdSchedule,
    linear_ramp,
    llama,
)


def get_config() -> RunConfig:
    ours = Files(paths=("maxlm",), pattern="*.py")
    return RunConfig(
        model=llama(vocab_size=384, d_model=128, n_layers=2, n_heads=4, d_ff=352, max_seq_len=512),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NAMES),
        data=DataConfig(
            datasets=(
                Dataset(
                    path="data/stdlib_bytes",
                    prepare=PrepareConfig(documents=StandardLibrary(), tokenizer=ByteTokenizer()),
                ),
                Dataset(
                    path="data/maxlm_bytes",
                    weight=0.0,
                    prepare=PrepareConfig(documents=ours, tokenizer=ByteTokenizer(), validation_fraction=0.05),
                ),
            )
        ),
        train=TrainConfig(
            steps=200,
            batch_size=8,
            seq_len=128,
            log_every=5,
            eval_every=40,
            eval_batches=8,
            phases=(
                *linear_ramp(8, 32, by=8, tokens=184_320, seq_len=128, micro_batch=16),
                Phase(start=130, batch_size=16, micro_batches=1, seq_len=256, rope=Rope(theta=50_000.0)),
                Phase(start=150, early=Recovered(every=5), batch_size=8, seq_len=512, rope=Rope(theta=500_000.0)),
                Phase(start=170, weights=(0.7, 0.3)),
            ),
            rollback=Rollback(window=20, patience=5, before=10, skip=10),
        ),
        optimizer=AdamW(learning_rate=2e-3, schedule=WsdSchedule(warmup_steps=20, decay_steps=30)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_prompt="def ", sample_tokens=64),
        target="cpu:1",
        run_dir="runs/tiny_phases",
    )
