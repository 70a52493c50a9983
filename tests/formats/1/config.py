import dataclasses
from maxlm.config import (AdamW, AttentionConfig, BlockConfig, CheckpointConfig, ConstantSchedule, DataConfig, Dataset, Dtype, GluConfig, MoeConfig, ModelConfig, ObserveConfig, Remat, RopeConfig, RunConfig, TopKRouter, TrainConfig)

def get_config():
    attention = AttentionConfig(n_heads=2, n_kv_heads=1, head_dim=4, rope=RopeConfig(theta=100.0))
    dense = BlockConfig(attention=attention, ffn=GluConfig(d_ff=16))
    nope = BlockConfig(attention=dataclasses.replace(attention, rope=None, qk_norm=True), ffn=MoeConfig(n_experts=2, d_ff=8, router=TopKRouter(top_k=1, normalize=False)))
    model = ModelConfig(vocab_size=264, d_model=8, n_layers=2, blocks=(dense, nope), max_seq_len=64, tie_embeddings=True, norm_eps=1e-3)
    return RunConfig(
        model=dataclasses.replace(model, compute_dtype=Dtype.FLOAT32, remat=Remat.NONE),
        data=DataConfig(datasets=(Dataset(path="data"),)),
        train=TrainConfig(steps=2, batch_size=2, seq_len=16, log_every=1, eval_batches=0),
        optimizer=AdamW(learning_rate=1e-2, schedule=ConstantSchedule()),
        checkpoint=CheckpointConfig(every=2, keep_last=1),
        observe=ObserveConfig(sample_tokens=0),
        run_dir="run",
    )
