"""Small runs and batches that the tests share."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from maxlm.config import (
    BlockConfig,
    CacheFormat,
    DataConfig,
    Dataset,
    Dtype,
    ExecutionConfig,
    GatedMlp,
    GroupedQuery,
    LatentAttention,
    ModelConfig,
    Remat,
    Rope,
    RunConfig,
    ShardingConfig,
    TrainConfig,
)
from maxlm.inference.step import read
from maxlm.models import Execution, Tokens, bind, init_parameters, ops
from maxlm.models.decoder import DecoderOutput
from maxlm.models.kv_cache import empty_cache
from maxlm.models.tokens import Pages
from maxlm.shapes import windows
from maxlm.sharding import Layout, make_layout
from maxlm.training import NextToken, Sums, Trainer
from maxlm.training import step as steps

PRESETS = sorted(path.stem for path in (Path(__file__).parent / "golden").glob("*.txt"))
"""The files of configs/ that come with maxlm; whoever puts one of their own beside them need not tell the tests."""

OTHER_SIZES = {
    *(f"gpt3_{size}" for size in ("125m", "350m", "760m", "1_3b", "2_7b", "6_7b", "13b")),
    *("palm_8b", "palm_62b", "chinchilla_70b", "qwen_14b", "baichuan2_7b", "llama_350m", "llama_1b", "llama13b"),
    *("llama33b", "llama2_13b", "llama3_405b"),
}
"""Of these, other sizes of another one."""

ONE_OF_A_FAMILY = [pytest.param(name, marks=[pytest.mark.nightly] * (name in OTHER_SIZES)) for name in PRESETS]
"""The others by default, these nightly: for what sizes do not change."""

FLOAT32 = ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat.NONE)


def small_model(**changes: Any) -> ModelConfig:
    """Two layers with grouped heads."""
    block = BlockConfig(
        attention=GroupedQuery(n_heads=4, n_kv_heads=2, head_dim=8, position=Rope()), mlp=GatedMlp(d_ff=48)
    )
    model = ModelConfig(
        vocab_size=64,
        d_model=32,
        n_layers=2,
        blocks=(block,),
        max_seq_len=64,
        init_std=0.2,
    )
    return dataclasses.replace(model, **changes)


def latent_model(model: ModelConfig | None = None, **attention: Any) -> ModelConfig:
    """A model, or the small one, whose keys and values are made from latents; no two sizes in it are the same."""
    values: dict[str, Any] = {"n_heads": 4, "kv_rank": 12, "content_head_dim": 6, "rope_head_dim": 4}
    made = LatentAttention(**{**values, "value_head_dim": 10, "position": Rope(theta=100.0), **attention})
    model = model or small_model()
    return dataclasses.replace(
        model, blocks=tuple(dataclasses.replace(block, attention=made) for block in model.blocks)
    )


def with_attention(model: ModelConfig, **changes: Any) -> ModelConfig:
    """The model with every block's attention changed."""
    blocks = tuple(
        dataclasses.replace(block, attention=dataclasses.replace(block.attention, **changes)) for block in model.blocks
    )
    return dataclasses.replace(model, blocks=blocks)


def small_run(model: ModelConfig | None = None, sharding: ShardingConfig | None = None, **train: Any) -> RunConfig:
    """A run of 8 sequences of 32 tokens a step."""
    values: dict[str, Any] = {"steps": 10, "batch_size": 8, "seq_len": 32, "loss_chunk": 24, **train}
    return RunConfig(
        model=model or small_model(),
        data=DataConfig(datasets=(Dataset(path="unused"),)),
        train=TrainConfig(**values),
        sharding=sharding or ShardingConfig(),
        execution=FLOAT32,
    )


def one_device() -> Layout:
    return make_layout(ShardingConfig(), jax.devices()[:1])


def plainly(layout: Layout | None = None) -> Execution:
    """In float32, with everything saved; on one device, if no layout says else."""
    return Execution(layout or one_device(), FLOAT32)


def run_decoder(model: ModelConfig, parameters: Any, how: Execution, ids: Any, tokens: Tokens) -> DecoderOutput:
    """The whole model, from ids to hidden states."""
    decoder = bind(model, parameters)
    return decoder(decoder.embeddings(ids, tokens, how), tokens, how)


def whole_logits(model: ModelConfig, parameters: Any, rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    """Of each text [T, V], by the forward pass that training uses, without a cache. The model looks back alone."""
    ids = np.zeros((len(rows), max(map(len, rows))), np.int32)
    for one, row in zip(ids, rows, strict=True):
        one[: len(row)] = row

    @jax.jit
    def forward(parameters: Any, ids: jax.Array) -> jax.Array:
        tokens = Tokens(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int32), ids.shape))
        hidden = run_decoder(model, parameters, plainly(), ids, tokens).hidden
        return ops.logits(hidden, bind(model, parameters).unembedding)

    found = np.asarray(forward(parameters, ids))
    return [logits[: len(row)] for logits, row in zip(found, rows, strict=True)]


def through_cache(
    model: ModelConfig,
    parameters: Any,
    how: Execution,
    rows: Sequence[Sequence[int]],
    widths: Sequence[int] = (8, 3),
    *,
    block_size: int = 4,
    kept_in: CacheFormat = CacheFormat.DTYPE,
) -> list[np.ndarray]:
    """Of each text [T, V], read as the engine reads: in pieces, several texts in a batch, each in blocks all over.

    Blocks hold nothing that is a number before they are written.

    Args:
        model: what it is.
        parameters: in whatever format.
        how: it runs; where it cuts the batch, each shard has as many texts as the next.
        rows: token ids of the texts.
        widths: rows of a shard of the batches, in turn; each compiles a program.
        block_size: positions of a block.
        kept_in: number format of the cache.
    """
    n_shards, rng = how.layout.batch_shards, np.random.default_rng(0)
    slots, length = len(rows) // n_shards, -(-max(map(len, rows)) // block_size)
    scattered = lambda: 1 + rng.permutation(slots * length).reshape(slots, length).astype(np.int32)
    tables = {window: np.concatenate([scattered() for _ in range(n_shards)]) for window in windows(model)}

    @functools.partial(jax.jit, donate_argnums=1)
    def step(parameters: Any, cache: Any, ids: jax.Array, positions: jax.Array, slots: jax.Array) -> Any:
        decoder = bind(model, parameters)
        hidden, cache = read(decoder, how, cache, ids, positions, Pages(slots, tables))
        return cache, ops.logits(hidden, decoder.unembedding)

    blocks = dict.fromkeys(tables, slots * length + 1)
    nothing = lambda x: jax.numpy.full_like(x, 77 if x.dtype == np.int8 else np.nan)
    empty = lambda: jax.tree.map(nothing, empty_cache(model, blocks, block_size, how, kept_in))
    cache, done = jax.jit(empty)(), [0] * len(rows)
    found = [np.full((len(row), model.vocab_size), np.nan, np.float32) for row in rows]
    for width in itertools.cycle(widths):
        left = [[i for i in range(s * slots, (s + 1) * slots) if done[i] < len(rows[i])] for s in range(n_shards)]
        if not any(left):
            return found
        ids, of_slot = np.zeros((2, n_shards * width), np.int32)
        positions = np.full(n_shards * width, -1, np.int32)
        for shard, texts in enumerate(left):
            row, end = shard * width, (shard + 1) * width
            for n_before, text in enumerate(rng.permutation(texts).tolist()):
                count = min(len(rows[text]) - done[text], -(-(end - row) // (len(texts) - n_before)))
                positions[row : row + count] = range(done[text], done[text] + count)
                ids[row : row + count] = rows[text][done[text] : done[text] + count]
                of_slot[row : row + count] = text
                row, done[text] = row + count, done[text] + count
        cache, logits = step(parameters, cache, ids, positions, of_slot)
        for one, text, place in zip(np.asarray(logits), of_slot, positions, strict=True):
            if place >= 0:
                found[text][place] = one
    raise AssertionError("widths are endless")


@functools.cache
def initial_parameters(model: ModelConfig, seed: int = 0) -> Any:
    """Compiled once a model; copy before changing the dict."""
    return jax.jit(init_parameters, static_argnums=0)(model, jax.random.key(seed))


def packed_batch(config: RunConfig, seed: int = 0) -> dict[str, np.ndarray]:
    """Random tokens in documents of random lengths, as the loader packs them."""
    rng = np.random.default_rng(seed)
    B, T = config.train.batch_size, config.train.seq_len
    tokens = rng.integers(0, config.model.vocab_size, (B, T + 1), dtype=np.int32)
    starts = rng.random((B, T + 1)) < 0.1
    starts[:, 0] = True
    segments = np.cumsum(starts, axis=1).astype(np.int32)
    first = np.maximum.accumulate(np.where(starts, np.arange(T + 1), 0), axis=1)
    positions = (np.arange(T + 1) - first).astype(np.int32)
    return {
        "inputs": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "segment_ids": segments[:, :-1],
        "positions": positions[:, :-1],
        "loss_mask": (segments[:, 1:] == segments[:, :-1]).astype(np.float32),
    }


def place(batch: dict[str, np.ndarray], trainer: Trainer) -> dict[str, jax.Array]:
    """The batch on the devices where the trainer wants it."""
    return trainer.place(batch)


def loss_function(config: RunConfig, layout: Layout) -> Callable[..., Sums]:
    """Parameters and batch -> the sums of next-token prediction."""
    objective = NextToken(config, layout)
    return lambda parameters, batch: objective.loss(parameters, None, batch, objective.counted(parameters, None, batch))


def gradient_function(config: RunConfig, layout: Layout) -> Callable[..., tuple[Sums, Any]]:
    """Parameters and batch -> sums and gradient of next-token prediction."""
    gradient = steps.gradient_function(config, layout, NextToken(config, layout))
    return lambda parameters, batch: gradient(parameters, None, batch)


def hlo_shapes(text: str) -> set[tuple[str, tuple[int, ...]]]:
    """Element type and shape of every array that a compiled program (its text) names."""
    found = re.findall(r"\b(pred|[sufbc]\w*\d+)\[([\d,]+)\]", text)
    return {(dtype, tuple(int(size) for size in shape.split(","))) for dtype, shape in found}
