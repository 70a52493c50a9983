"""A model of 100,000 parameters begins to learn how to sort six digits, for `grpo_sort.py` to go on.

    python -m maxlm.train --config configs/sort_sft.py
"""
from maxlm.config import *

def sorts(purpose, path="/tmp/brief/sort.jsonl"):
    return DataConfig(datasets=(Dataset(path=f"data/sort_{purpose.value}", prepare=PrepareConfig(documents=Conversations(paths=(path,), template="plain", purpose=purpose), tokenizer=ByteTokenizer(), validation_fraction=0.05)),))

def get_config():
    return RunConfig(
        model=llama(vocab_size=384, d_model=64, n_layers=2, n_heads=4, d_ff=172, max_seq_len=64),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=sorts(Purpose.SFT),
        train=TrainConfig(steps=200, batch_size=64, seq_len=40, eval_every=100),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=20)),
        checkpoint=CheckpointConfig(every=200),
        observe=ObserveConfig(sample_prompt="352914", sample_tokens=12),
        task=Sft(), target="cpu:1", run_dir="runs/sort_sft",
    )
