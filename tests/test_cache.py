"""Memory of programs: the cache is read and written where it lies; a layer of a pattern waits for no other."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    FLOAT32,
    initial_parameters,
    latent_model,
    one_device,
    plainly,
    small_model,
    small_run,
    through_cache,
    whole_logits,
)

from maxlm.config import CacheFormat, GatedMlp, ModelConfig, Remat
from maxlm.inference.step import StepRows, empty_texts, step
from maxlm.models import abstract_parameters
from maxlm.models.kv_cache import empty_cache
from maxlm.training import make_trainer


def _step_program(model: ModelConfig, blocks: int) -> tuple[jax.stages.Compiled, int]:
    """The engine's step for four rows of two texts, and the bytes of the cache."""
    how, int32 = plainly(), lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)
    cache = jax.eval_shape(lambda: empty_cache(model, {0: blocks}, 16, how))
    rows = StepRows(int32(4), int32(4), int32(2), jax.ShapeDtypeStruct((2,), bool), int32(2))
    program = jax.jit(functools.partial(step, config=model, how=how, most_steps=4), donate_argnums=(1, 2)).lower(
        abstract_parameters(model, how.layout),
        cache,
        jax.eval_shape(lambda: empty_texts(model, 2)),
        {0: int32(2, model.max_seq_len // 16)},
        rows,
        int32(),
    )
    return program.compile(), sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_a_step_holds_one_cache_however_large() -> None:
    model = small_model(n_layers=4, max_seq_len=1024)
    (few, _), (many, n_bytes) = (_step_program(model, blocks) for blocks in (16, 1024))
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (few, many)]
    assert temporary[1] < temporary[0] + 4096, temporary  # no layer's keys, let alone all
    assert many.memory_analysis().alias_size_in_bytes >= n_bytes  # the donated cache is the new one


@pytest.mark.parametrize("model", [small_model(max_seq_len=32), latent_model()], ids=["keys", "latents"])
def test_a_cache_of_int8_is_near_and_the_same_to_the_bit(model: ModelConfig) -> None:
    """In whatever pieces a text is read, beside whatever others."""
    rng, parameters = np.random.default_rng(0), initial_parameters(model)
    rows = [rng.integers(0, model.vocab_size, n).tolist() for n in (13, 7, 10)]
    read = functools.partial(through_cache, model, parameters, plainly(), kept_in=CacheFormat.INT8)
    in_pieces, alone = read(rows, (8,)), read(rows[:1], (8,))[0]
    np.testing.assert_array_equal(in_pieces[0], alone)
    for found, exact in zip(in_pieces, whole_logits(model, parameters, rows), strict=True):
        off = np.abs(found - exact).max() / np.abs(exact).max()
        assert 1e-5 < off < 0.02, off


@pytest.mark.slow
def test_a_layer_of_a_pattern_waits_for_no_other() -> None:
    """With full rematerialisation the pattern's length decides nothing about memory: each block is recomputed alone."""

    def temporary(entries: int) -> int:
        model = small_model(n_layers=6, max_seq_len=128)
        block = dataclasses.replace(
            model.blocks[0], mlp=GatedMlp(d_ff=384)
        )  # what it computes outweighs its parameters
        config = small_run(dataclasses.replace(model, blocks=(block,) * entries), batch_size=16, seq_len=128)
        config = dataclasses.replace(config, execution=dataclasses.replace(FLOAT32, remat=Remat.FULL))
        trainer = make_trainer(config, one_device())
        return trainer.step.lower(trainer.state, trainer.batch).compile().memory_analysis().temp_size_in_bytes

    alone, together = temporary(1), temporary(6)
    assert together < 1.5 * alone, (alone, together)
