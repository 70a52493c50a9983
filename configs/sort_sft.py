"""148,288 parameters that have seen how six digits are sorted, and do it right about three times in four.

    python -m maxlm.data build problems sort --count 6000 --out data/sort.jsonl
    python -m maxlm.train --config configs/sort_sft.py

Hardware: two CPU cores, no download; half a minute. `grpo_sort.py` goes on from there.
"""

from maxlm.config import (
    AdamW,
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    ObserveConfig,
    PrepareConfig,
    Purpose,
    RunConfig,
    Sft,
    TrainConfig,
    llama,
)


def problems(purpose: Purpose) -> DataConfig:
    """Six digits, and the same sorted."""
    documents = Conversations(paths=("data/sort.jsonl",), purpose=purpose, template="raw")
    prepare = PrepareConfig(documents=documents, tokenizer=ByteTokenizer(), validation_fraction=0.05)
    return DataConfig(datasets=(Dataset(path=f"data/sort_{purpose.value}", prepare=prepare),))


def get_config() -> RunConfig:
    return RunConfig(
        model=llama(vocab_size=384, d_model=64, n_layers=2, n_heads=4, d_ff=172, max_seq_len=32),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=problems(Purpose.SFT),
        train=TrainConfig(steps=140, batch_size=128, seq_len=24, eval_every=70),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=20)),
        checkpoint=CheckpointConfig(every=140),
        observe=ObserveConfig(sample_prompt="Sort 352914.", sample_tokens=8),
        task=Sft(),
        target="cpu:1",
        run_dir="runs/sort_sft",
    )
