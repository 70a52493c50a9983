"""GLM-130B's objective in small: 889,984 parameters fill in blanks, byte by byte, from nothing.

    python -m maxlm.train --config configs/glm_tiny.py

Of the Python standard library's own sources 30 % are learned as short gaps [MASK], 70 % as ends [gMASK]
(arXiv:2210.02414, section 2.1), and every twentieth window has instructions (section 2.1, "multi-task instruction
pre-training"): the prompt sees itself whole, the answer is the gap. Hardware: two CPU cores, 1 GB of memory, no
download; a minute.
"""

import dataclasses

from maxlm.config import (
    AdamW,
    BlankInfilling,
    ByteTokenizer,
    CheckpointConfig,
    Conversations,
    CosineSchedule,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    GlmRope,
    GroupedQuery,
    Mixed,
    ModelConfig,
    ObserveConfig,
    PrepareConfig,
    Pretrain,
    RunConfig,
    Share,
    StandardLibrary,
    SuffixInfilling,
    TrainConfig,
    llama,
    special_tokens,
)

TEXT = Mixed(shares=(Share(weight=0.3, prediction=BlankInfilling()), Share(weight=0.7, prediction=SuffixInfilling())))
TOKENIZER = ByteTokenizer(special_tokens=special_tokens(TEXT))


def model() -> ModelConfig:
    """Positions count in two: in the text, and in the gap that is written."""
    made = llama(vocab_size=384, d_model=128, n_layers=4, n_heads=4, d_ff=344, max_seq_len=256)
    attention = GroupedQuery(n_heads=4, n_kv_heads=4, head_dim=32, position=GlmRope())
    return dataclasses.replace(made, blocks=(dataclasses.replace(made.blocks[0], attention=attention),))


def get_config() -> RunConfig:
    text = PrepareConfig(documents=StandardLibrary(), tokenizer=TOKENIZER, validation_fraction=0.02)
    conversations = Conversations(paths=("configs/data/conversations.jsonl",), template="plain")
    instructions = PrepareConfig(documents=conversations, tokenizer=TOKENIZER, validation_fraction=0.05)
    return RunConfig(
        model=model(),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=DataConfig(
            datasets=(
                Dataset(path="data/glm_text", weight=0.95, prepare=text),
                Dataset(path="data/glm_instructions", weight=0.05, predict=SuffixInfilling(), prepare=instructions),
            )
        ),
        train=TrainConfig(steps=100, batch_size=8, seq_len=256, eval_every=50, eval_batches=8),
        optimizer=AdamW(learning_rate=3e-3, schedule=CosineSchedule(warmup_steps=10)),
        checkpoint=CheckpointConfig(every=50),
        observe=ObserveConfig(sample_prompt="def ", sample_tokens=32),
        task=Pretrain(predict=TEXT),
        target="cpu:1",
        run_dir="runs/glm_tiny",
    )
