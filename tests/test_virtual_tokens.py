"""Virtual tokens: learned embeddings, keys and values before each text, in batches, decoding and a forward pass."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import initial_parameters, one_device, packed_batch, place, plainly, small_model, small_run, with_attention
from run_folder import BYTE_MODEL
from test_engine import finish, loaded

from maxlm.checkpoint.store import named_leaves
from maxlm.config import (
    AdamW,
    Adapter,
    AdapterKind,
    ConstantSchedule,
    EngineConfig,
    LstmEncoder,
    MlpEncoder,
    ModelConfig,
    PrefixTuning,
    PromptTuning,
    UserError,
)
from maxlm.data.packing import insert_virtual
from maxlm.inference.engine import Engine
from maxlm.inference.language_model import LanguageModel
from maxlm.inference.request import Request
from maxlm.models import Tokens, bind, ops
from maxlm.models.adapters import base_of, learned
from maxlm.models.prompts import encoded
from maxlm.shapes import PREFIX, arrays
from maxlm.training import make_trainer

pytestmark = pytest.mark.usefixtures("programs_kept")

P = 3
KINDS = {
    "prompt": PromptTuning(length=P),
    "mlp": PromptTuning(length=P, encoder=MlpEncoder(hidden=8)),
    "lstm": PromptTuning(length=P, encoder=LstmEncoder(hidden=8)),
    "prefix": PrefixTuning(length=P, hidden=8),
    "deep": PrefixTuning(length=P, hidden=None),
}


def on(model: ModelConfig, kind: AdapterKind) -> ModelConfig:
    return dataclasses.replace(model, adapter=Adapter(kind=kind))


def grown(model: ModelConfig) -> Any:
    """Parameters whose virtual tokens say something."""
    rng, parameters = np.random.default_rng(0), initial_parameters(model)
    moved = lambda x: x + 0.3 * rng.standard_normal(x.shape).astype(np.float32)
    return {**parameters, PREFIX: jax.tree.map(moved, parameters[PREFIX])}


def language_model(model: ModelConfig, parameters: Any) -> LanguageModel:
    return LanguageModel(model, plainly().config, one_device(), parameters)


IDS = np.random.default_rng(1).integers(0, 64, (1, 6))


@pytest.mark.parametrize("name", ["prompt", "lstm"])
def test_a_prompt_is_embeddings_before_the_text(name: str) -> None:
    """Concatenated by hand, and given to the base."""
    model = on(small_model(), KINDS[name])
    parameters, how = grown(model), plainly()

    @jax.jit
    def forward(parameters: Any) -> jax.Array:
        base = bind(base_of(model), {key: tree for key, tree in parameters.items() if key != PREFIX})
        rows = encoded(KINDS[name].encoder, parameters[PREFIX]["embed"])
        x = jnp.concatenate([rows[None], parameters["embed"][IDS]], 1)
        hidden = base(x, Tokens(jnp.arange(P + IDS.shape[1])[None]), how).hidden
        return ops.logits(hidden, base.unembedding)[:, P:]

    np.testing.assert_allclose(language_model(model, parameters)(IDS), forward(parameters), atol=1e-5)


@pytest.mark.parametrize("name", ["mlp", "lstm", "prefix"])
def test_what_made_them_is_dropped_when_they_are_learned(name: str) -> None:
    model = on(small_model(), KINDS[name])
    parameters = grown(model)
    without, kept = learned(model, parameters)
    assert {array.name.split("/")[-1] for array in arrays(without) if array.trained} == {"rows"}
    shapes = {name: leaf.shape for name, leaf in named_leaves(kept).items()}
    assert shapes == {array.name: array.shape for array in arrays(without)}
    np.testing.assert_allclose(
        language_model(without, kept)(IDS), language_model(model, parameters)(IDS), rtol=1e-5, atol=1e-5
    )
    assert learned(without, kept) == (without, kept)


def test_a_prefix_of_a_texts_own_keys_and_values_is_that_text() -> None:
    """In a model of one layer without positions, whose keys are easily made by hand."""
    model = on(with_attention(small_model(n_layers=1), position=None), PrefixTuning(length=P, hidden=None))
    parameters, context = grown(model), np.array([5, 9, 2])
    block = parameters["blocks"]["0"]
    x = np.asarray(parameters["embed"], np.float64)[context]
    normed = x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm.eps) * np.asarray(block["attention_norm"]["scale"])
    own = parameters[PREFIX]["blocks"]["0"]["attention"]
    for name in ("k_proj", "v_proj"):
        made = np.einsum("pd,dkh->pkh", normed, np.asarray(block["attention"][name], np.float64)[0])
        own[name]["rows"] = jnp.asarray(made[None], jnp.float32)
    base = {key: tree for key, tree in parameters.items() if key != PREFIX}
    whole = language_model(base_of(model), base)(np.concatenate([context[None], IDS], 1))[:, P:]
    np.testing.assert_allclose(language_model(model, parameters)(IDS), whole, atol=1e-5)


def test_the_lstm_is_the_papers() -> None:
    rng, D, h = np.random.default_rng(2), 4, 3
    shapes = {f"{way}_{n}": s for way in ("forward", "backward") for n, s in
              (("inputs", (D, 4 * h)), ("state", (h, 4 * h)), ("bias", (4 * h,)))}  # fmt: skip
    shapes |= {"rows": (P, D), "layer_0": (2 * h, h), "layer_0_bias": (h,), "layer_1": (h, D), "layer_1_bias": (D,)}
    own = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    sigmoid = lambda x: 1 / (1 + np.exp(-x))

    def one_way(way: str, rows: np.ndarray) -> np.ndarray:
        state, cell, found = np.zeros(h), np.zeros(h), []
        for row in rows:
            i, f, g, o = np.split(row @ own[f"{way}_inputs"] + state @ own[f"{way}_state"] + own[f"{way}_bias"], 4)
            cell = sigmoid(f) * cell + sigmoid(i) * np.tanh(g)
            state = sigmoid(o) * np.tanh(cell)
            found.append(state)
        return np.array(found)

    both = np.concatenate([one_way("forward", own["rows"]), one_way("backward", own["rows"][::-1])[::-1]], -1)
    wanted = np.maximum(both @ own["layer_0"] + own["layer_0_bias"], 0) @ own["layer_1"] + own["layer_1_bias"]
    arrays32 = {name: jnp.asarray(x, jnp.float32) for name, x in own.items()}
    np.testing.assert_allclose(encoded(LstmEncoder(hidden=h), arrays32), wanted, atol=1e-5)


def test_places_stand_before_each_text_of_a_window() -> None:
    tokens = np.array([7, 8, 1, 9, 9, 1, 6, 6, 6], np.int32)
    begins = np.array([0, 0, 1, 0, 0, 1, 0, 0, 0], np.bool_)
    counts = np.ones(9, np.bool_)
    insert_virtual(2, tokens, begins, counts)
    assert tokens.tolist() == [0, 0, 7, 8, 0, 0, 1, 9, 9]
    assert np.flatnonzero(begins).tolist() == [0, 4]
    assert np.flatnonzero(counts).tolist() == [3, 7, 8]


@pytest.mark.parametrize("name", ["mlp", "prefix"])
def test_the_engine_puts_them_before_each_prompt(name: str) -> None:
    model = on(BYTE_MODEL, KINDS[name])
    parameters, prompt = grown(model), tuple(range(7, 20))
    run = dataclasses.replace(loaded(BYTE_MODEL), parameters=parameters)
    run = dataclasses.replace(run, config=dataclasses.replace(run.config, model=model))
    engine = Engine(run, EngineConfig(slots=2, tokens_per_step=8, block_size=4, decode_steps=2))
    asked = Request(prompt=prompt, max_new_tokens=4, logprobs=3, prompt_logprobs=3)
    [deltas] = finish(engine, [asked])
    tokens = [*prompt, *(token for delta in deltas for token in delta.tokens)]
    logits = np.asarray(language_model(model, parameters)([tokens]), np.float64)[0]
    wanted = logits - np.logaddexp.reduce(logits, -1, keepdims=True)
    scores = [*deltas[0].prompt_scores, *(score for delta in deltas for score in delta.scores)]
    assert len(scores) == len(tokens) - 1
    for at, score in enumerate(scores):
        for token, log_prob in ((score.token, score.logprob), *score.top):
            assert log_prob == pytest.approx(wanted[at, token], abs=2e-5)
    with pytest.raises(UserError, match=r"make 65, more than model\.max_seq_len = 64"):
        engine.submit(dataclasses.replace(asked, prompt=(1,) * (model.max_seq_len - P), max_new_tokens=1))


@pytest.mark.parametrize("name", ["lstm", "prefix"])
def test_they_learn_and_nothing_else_does(name: str) -> None:
    model = on(small_model(), KINDS[name])
    config = dataclasses.replace(small_run(model), optimizer=AdamW(learning_rate=0.02, schedule=ConstantSchedule()))
    trainer = make_trainer(config, one_device())
    step, state = trainer.start()
    before, batch, losses = jax.tree.map(np.array, state.parameters), place(packed_batch(config), trainer), []
    for _ in range(3):
        state, output = step(state, batch)
        losses.append(float(output.figures["loss"]))
    assert losses[2] < losses[1] < losses[0]
    for array in arrays(model):
        old, new = (_at(tree, array.name) for tree in (before, state.parameters))
        assert bool(np.any(old != np.asarray(new))) is array.name.startswith(PREFIX), array.name


def _at(tree: Any, name: str) -> Any:
    for word in name.split("/"):
        tree = tree[word]
    return tree
