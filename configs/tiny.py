"""A four-layer LLaMA (725,568 parameters) on the Python standard library's own sources: the whole path on a CPU.

    python -m maxlm.train --config configs/tiny.py

Hardware: two CPU cores, 1 GB of memory, no download; one to two minutes, data included. It reads 1.8 million tokens,
half of the text, and ends at 1.64 bits a byte on what is held out; with another Python, whose sources are the text,
somewhere near. How its sizes were found: docs/demo.md.
"""

from maxlm.config import (
    CheckpointConfig,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    Muon,
    ObserveConfig,
    PrepareConfig,
    Remat,
    RunConfig,
    StandardLibrary,
    TrainConfig,
    TrainSentencePiece,
    WsdSchedule,
    llama,
)


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=4096, d_model=64, n_layers=4, n_heads=4, d_ff=176, max_seq_len=512),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=DataConfig(
            datasets=(
                Dataset(
                    path="data/stdlib",
                    prepare=PrepareConfig(
                        documents=StandardLibrary(),
                        tokenizer=TrainSentencePiece(vocab_size=4096),
                        validation_fraction=0.05,
                    ),
                ),
            )
        ),
        train=TrainConfig(steps=880, batch_size=8, seq_len=256, log_every=20, eval_every=0),
        optimizer=Muon(
            learning_rate=5e-3,
            adam_learning_rate=5e-3,
            schedule=WsdSchedule(warmup_steps=44, decay_steps=290),
        ),
        checkpoint=CheckpointConfig(every=440),
        observe=ObserveConfig(sample_prompt="def ", sample_tokens=64),
        target="cpu:1",
        run_dir="runs/tiny",
    )
