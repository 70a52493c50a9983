"""GLM-130B (Zeng et al. 2022, arXiv:2210.02414, section 2 and appendix): 128,697,794,560 parameters, 400B tokens.

    python -m maxlm.data prepare TEXT... --out data/glm --tokenizer tokenizer.json
    python -m maxlm.train --config configs/glm_130b.py

Hardware: TPU v5p-1024 (512 chips); by arithmetic about 35 of 95 GB a chip. Time and final loss: not measured.

As printed: sizes, DeepNorm (arXiv:2203.00555) with a factor of sqrt(2L), gated GELU, RoPE, batches of 4224 sequences,
AdamW, a learning rate of 8e-5 that falls to a tenth, gradients of the embedding times 0.1. A recipe of the next token:
GLM's own (30 % [MASK], 70 % [gMASK]) is said as in glm_tiny.py, with `BlankInfilling(positions=GapPositions.ONE)`. Not
here: dropout of 0.1; float16, which TPUs do not multiply; a batch that grows from 192 over the first 2.5 %
(`train.phases`, but this mesh does not cut so few).
"""

from math import ceil

from maxlm.config import (
    Activation,
    AdamW,
    BlockConfig,
    CheckpointConfig,
    CosineSchedule,
    DataConfig,
    Dataset,
    DeepNorm,
    GatedMlp,
    GroupedQuery,
    LayerNorm,
    LmHead,
    ModelConfig,
    RunConfig,
    ShardingConfig,
    TrainConfig,
)

L = 70
STEPS = ceil(400e9 / (4224 * 2048))


def get_config() -> RunConfig:
    block = BlockConfig(
        attention=GroupedQuery(n_heads=96, n_kv_heads=96, head_dim=128, qkv_bias=True, out_bias=True),
        mlp=GatedMlp(d_ff=32_768, activation=Activation.GELU, bias=True),
        residual=DeepNorm(alpha=(2 * L) ** 0.5, beta=(2 * L) ** -0.5),
    )
    return RunConfig(
        model=ModelConfig(
            vocab_size=150_528,
            d_model=12_288,
            n_layers=L,
            blocks=(block,),
            max_seq_len=2048,
            norm=LayerNorm(),
            embedding_norm=True,  # which is the norm before their first layer, as every later one has it behind
            final_norm=False,
            head=LmHead(tied=True),
        ),
        data=DataConfig(datasets=(Dataset(path="data/glm"),)),
        train=TrainConfig(steps=STEPS, batch_size=4224, seq_len=2048, micro_batches=3, embedding_gradient=0.1),
        optimizer=AdamW(learning_rate=8e-5, schedule=CosineSchedule(warmup_steps=STEPS // 200)),
        sharding=ShardingConfig(fsdp=32, tensor=4, sequence_parallel=True),
        checkpoint=CheckpointConfig(every=1000, keep_every=10_000),
        target="tpu:v5p:8x8x8",
        run_dir="runs/glm_130b",
    )
