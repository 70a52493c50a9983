"""LLaMA-Adapter: attention to learned vectors, with a softmax and a gate of its own (arXiv:2303.16199)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, plainly, small_model, small_run, with_attention
from run_folder import BYTE_MODEL
from test_engine import finish, loaded

from maxlm.config import (
    Adapter,
    EngineConfig,
    LlamaAdapter,
    ModelConfig,
    QkNorm,
    RelativeSinusoids,
    ShardingConfig,
    UserError,
)
from maxlm.inference.engine import Engine
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.request import Request
from maxlm.models import ops
from maxlm.models.adapters import base_of
from maxlm.models.weights.around import Prompted
from maxlm.shapes import PREFIX, arrays
from maxlm.sharding import make_layout
from maxlm.training import NextToken

P = 3
IDS = np.random.default_rng(1).integers(0, 64, (2, 7))


def adapted(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, adapter=Adapter(kind=LlamaAdapter(length=P)))


def grown(model: ModelConfig) -> Any:
    """Parameters whose vectors say something."""
    rng, parameters = np.random.default_rng(0), initial_parameters(model)
    moved = lambda x: x + rng.standard_normal(x.shape).astype(np.float32)
    return {**parameters, PREFIX: jax.tree.map(moved, parameters[PREFIX])}


def language_model(model: ModelConfig, parameters: Any) -> LanguageModel:
    return LanguageModel(model, plainly().config, one_device(), parameters)


@pytest.mark.parametrize("one_gate", [False, True])
def test_it_is_its_formula(one_gate: bool) -> None:
    """Head by head in float64; grouped heads share keys and values."""
    rng = np.random.default_rng(3)
    B, T, N, K, H, D, scale = 2, 4, 4, 2, 8, 16, 0.3
    q, out = rng.standard_normal((2, B, T, N, H))
    rows, gate = rng.standard_normal((P, D)), np.full(N, rng.standard_normal()) if one_gate else rng.standard_normal(N)
    wk, wv = rng.standard_normal((2, D, K, H))
    wanted = out.copy()
    for n in range(N):
        k, v = (np.einsum("pd,dh->ph", rows, w[:, n // (N // K)]) for w in (wk, wv))
        scores = scale * np.einsum("bth,ph->btp", q[:, :, n], k)
        shares = np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)
        wanted[:, :, n] += gate[n] * np.einsum("btp,ph->bth", shares, v)
    single = lambda x: jnp.asarray(x, jnp.float32)
    weight = Prompted(single(np.zeros((D, N, H))), single(rows), single(gate[:1] if one_gate else gate))
    made = lambda x: (jnp.einsum("btd,dkh->btkh", x, single(wk)), jnp.einsum("btd,dkh->btkh", x, single(wv)))
    np.testing.assert_allclose(ops.prompted(weight, single(q), single(out), made, scale), wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [None, QkNorm.HEADS], ids=["plain", "normed"])
def test_it_begins_as_its_base_and_gates_learn_first(qk_norm: QkNorm | None) -> None:
    config = small_run(adapted(with_attention(small_model(), qk_norm=qk_norm)))
    model, parameters = config.model, initial_parameters(config.model)
    base = {key: tree for key, tree in parameters.items() if key != PREFIX}
    np.testing.assert_array_equal(language_model(model, parameters)(IDS), language_model(base_of(model), base)(IDS))
    assert {array.name.rsplit("/", 1)[1] for array in arrays(model) if array.trained} == {"rows", "gate"}
    objective, batch = NextToken(config, one_device()), packed_batch(config)
    gradient = jax.jit(jax.grad(lambda p: objective.loss(p, None, batch, jnp.float32(1)).objective))
    at_first = gradient(parameters)[PREFIX]["blocks"]["0"]["attention"]["q_proj"]
    assert np.abs(at_first["gate"]).min() > 0 and not np.any(at_first["rows"])
    later = gradient(grown(model))[PREFIX]["blocks"]["0"]["attention"]["q_proj"]
    assert np.abs(later["rows"]).max() > 0


def test_sharded_is_unsharded() -> None:
    sharding = ShardingConfig(data=2, tensor=2, seq=2)
    config = small_run(adapted(small_model()), sharding)
    batch, parameters, layout = packed_batch(config), grown(config.model), make_layout(sharding)
    loss = lambda layout: jax.jit(lambda p, b: NextToken(config, layout).loss(p, None, b, jnp.float32(1)).objective)
    want = loss(one_device())(parameters, batch)
    with jax.set_mesh(layout.mesh):
        got = loss(layout)(parameters, batch)
    np.testing.assert_allclose(got, want, rtol=1e-5)


@pytest.mark.usefixtures("programs_kept")
def test_the_engine_decodes_with_it() -> None:
    model = adapted(BYTE_MODEL)
    parameters, prompt = grown(model), tuple(range(7, 20))
    run = dataclasses.replace(loaded(BYTE_MODEL), parameters=parameters)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    engine = Engine(run, EngineConfig(slots=2, tokens_per_step=8, block_size=4, decode_steps=2))
    [deltas] = finish(engine, [Request(prompt=prompt, max_new_tokens=4, logprobs=1)])
    tokens = [*prompt, *(token for delta in deltas for token in delta.tokens)]
    logits = np.asarray(language_model(model, parameters)([tokens]), np.float64)[0]
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    for at, score in enumerate([score for delta in deltas for score in delta.scores], len(prompt) - 1):
        assert score.logprob == pytest.approx(wanted[at, score.token], abs=2e-5)


def test_models_without_keys_of_that_kind_are_refused() -> None:
    with pytest.raises(UserError, match="LlamaAdapter has keys of its own, and those of this model have distances"):
        arrays(adapted(with_attention(small_model(), position=RelativeSinusoids(dims=8))))
