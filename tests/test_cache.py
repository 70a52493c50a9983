"""The cache of keys and values, which is carried through the layers: read and written where it lies."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, one_device, plainly, small_model, small_run
from maxlm.inference.steps import Choice, DecodeState, decode_chunk, row_keys

from kernels_pallas import DistanceBias, Scores, cached_attention, masks, oracle
from kernels_pallas.masks import Mask
from maxlm.config import GatedMlp, ModelConfig, Remat, SamplingConfig
from maxlm.models import abstract_parameters, bind, ops
from maxlm.training import make_trainer


@pytest.mark.parametrize("mask", [masks.causal, masks.local(129, 0)], ids=str)
@pytest.mark.parametrize("T", [1, 3])
def test_attention_in_place_is_attention(mask: Mask, T: int) -> None:
    """Of one layer among several, each row at its own position; slots behind it hold what must not be seen."""
    rng = np.random.default_rng(0)
    L, B, S, N, K, H = 3, 2, 256, 4, 2, 8
    q = rng.standard_normal((B, T, N, H), np.float32)
    k, v = (rng.standard_normal((L, B, K, S, H), np.float32) for _ in range(2))
    first = np.array([0, 251], np.int32)
    got = jax.jit(functools.partial(cached_attention, scores=Scores(mask=mask)))(q, k, v, jnp.int32(1), first)
    reach = 129 if mask is not masks.causal else S
    for row, start in enumerate(first):
        for t in range(T):
            seen = slice(max(start + t - reach, 0), start + t + 1)
            for head in range(N):
                scores = k[1, row, head // (N // K), seen].astype(np.float64) @ q[row, t, head] / np.sqrt(H)
                weights = np.exp(scores - scores.max())
                want = weights @ v[1, row, head // (N // K), seen] / weights.sum()
                np.testing.assert_allclose(got[row, t, head], want, atol=1e-5)


def test_all_that_shapes_scores_holds_in_a_cache() -> None:
    """Few queries against the oracle, with ends of their own that reach beyond them."""
    B, T, S, N, K, H = 2, 3, 256, 4, 2, 8
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)
    q, k, v, table, sinks = normal(B, T, N, H), normal(1, B, S, K, H), normal(1, B, S, K, H), normal(N, 8), normal(N)
    slopes, first = np.asarray(0.5 ** np.arange(1, N + 1), np.float32), np.array([5, 180], np.int32)
    ends = np.array([[20, 7, 130], [181, 200, 1]], np.int32)
    scores = Scores(
        mask=masks.local(150, 0),
        soft_cap=2.0,
        alibi_slopes=slopes,
        relative_bias=DistanceBias(table, 20, True),
        sinks=sinks,
    )
    got = jax.jit(functools.partial(cached_attention, scores=scores))(
        q, k.swapaxes(2, 3), v.swapaxes(2, 3), jnp.int32(0), first, visible_to=ends
    )
    want = oracle.attention(
        q, k[0], v[0], np.zeros_like(q), mask=("local", 150, 0), visible_to=ends, q_offset=first, soft_cap=2.0,
        alibi_slopes=slopes, bias_table=table, bucket_rule=(20, True), sinks=sinks,
    )  # fmt: skip
    np.testing.assert_allclose(got, want.out, atol=1e-5, rtol=0)


def test_many_queries_give_what_few_give() -> None:
    """A long prompt takes a kernel over a copy of the layer's keys, a token reads them in place."""
    rng = np.random.default_rng(1)
    q = rng.standard_normal((2, 24, 4, 8), np.float32)
    k, v = (rng.standard_normal((2, 2, 2, 64, 8), np.float32) for _ in range(2))
    attend = jax.jit(functools.partial(ops.attention_to_cache, one_device(), scores=Scores(mask=ops.causal(20))))
    first = np.array([3, 30], np.int32)
    whole = attend(q, k, v, jnp.int32(1), first)
    for t in range(24):
        one = attend(q[:, t : t + 1], k, v, jnp.int32(1), first + t)
        np.testing.assert_allclose(whole[:, t : t + 1], one, atol=1e-5)


def _decode_program(config: ModelConfig, length: int) -> tuple[jax.stages.Compiled, int]:
    """Four tokens for each of two rows, and the bytes of the cache."""
    how = plainly()
    parameters = abstract_parameters(config, how.layout)
    cache = jax.eval_shape(lambda p: bind(config, p).empty_cache(2, length, how), parameters)
    row = jax.ShapeDtypeStruct((2,), jnp.int32)

    def run(parameters: dict, state: DecodeState) -> tuple:
        choose = Choice(SamplingConfig(temperature=0), config.vocab_size, (-1,))
        keys = row_keys(jnp.uint32(0), 2)
        return decode_chunk(bind(config, parameters), how, state, keys, jnp.int32(4), chunk=4, choose=choose)

    state = DecodeState(cache, row, row, jax.ShapeDtypeStruct((2,), jnp.bool))
    program = jax.jit(run, donate_argnums=1).lower(parameters, state).compile()
    return program, sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache))


def test_decoding_holds_one_cache_whatever_its_length() -> None:
    config = small_model(n_layers=4, max_seq_len=4096)
    (short, _), (long, n_bytes) = (_decode_program(config, length) for length in (256, 4096))
    temporary = [program.memory_analysis().temp_size_in_bytes for program in (short, long)]
    assert temporary[1] < temporary[0] + 4096, temporary  # no layer's keys, let alone all
    assert long.memory_analysis().alias_size_in_bytes >= n_bytes  # the donated cache is the new one


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
