"""Any model that a config can say: it is what it declares, and every way of running it says the same."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import FLOAT32, gradient_function, one_device, packed_batch, plainly, run_decoder, small_run, through_cache
from hypothesis import HealthCheck, given, settings
from model_space import adapted_models, models, nearly_published
from test_layouts import assert_close

from maxlm.config import (
    EngineConfig,
    ExecutionConfig,
    LmHead,
    ModelConfig,
    ObserveConfig,
    RunConfig,
    ShardingConfig,
    UserError,
    serialize,
)
from maxlm.config.changes import changes
from maxlm.config.fields import Changes
from maxlm.config.layout_rules import broken_layout_rules
from maxlm.hub.folder import write_folder
from maxlm.hub.models import load_model, pieces_of
from maxlm.inference.language_model import LanguageModel
from maxlm.models import Tokens, bind, declared, init_parameters, parameter_dims
from maxlm.models.kv_cache import empty_cache
from maxlm.plan.bound import estimate_time
from maxlm.plan.machines import Platform, parse_machine
from maxlm.plan.memory import cache_bytes, estimate_memory
from maxlm.plan.traffic import estimate_traffic
from maxlm.shapes import arrays, parameter_count, windows
from maxlm.sharding import make_layout

quick = lambda examples: settings(
    max_examples=examples, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)
many = lambda examples: settings(
    max_examples=examples, deadline=None, database=None, suppress_health_check=list(HealthCheck)
)

LENGTHS = 23, 17
"""Of two documents in a row."""
WHOLE = sum(LENGTHS)


def parameters_of(model: ModelConfig) -> dict[str, Any]:
    """Random numbers, of norms' scales and biases too; made without compiling anything."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda array: rng.normal(0.2, 0.3, array.shape).astype(np.float32), declared(model))


def close(got: Any, want: Any) -> None:
    """float32 of two programs: as near as the largest of the numbers lets them be."""
    assert np.isfinite(want).all()
    np.testing.assert_allclose(got, want, rtol=0, atol=2e-5 * max(1.0, float(np.abs(want).max())))


# --- What a config says ---


def check_declared(model: ModelConfig) -> None:
    """Without running anything."""
    tree, dims = jax.eval_shape(lambda: init_parameters(model, jax.random.key(0))), parameter_dims(model)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in leaves}
    assert [(array.name, array.shape) for array in arrays(model)] == list(named.items())
    assert jax.tree.structure(tree) == jax.tree.structure(dims, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert parameter_count(model).total == sum(array.size for array in arrays(model))

    run = dataclasses.replace(small_run(model), observe=ObserveConfig(sample_tokens=0))
    assert serialize.from_dict(RunConfig, json.loads(json.dumps(serialize.to_dict(run)))) == run
    assert estimate_memory(run, 1, Platform.CPU).peak > 4 * sum(array.size for array in arrays(model))
    machine = parse_machine("gpu:h200:1")
    assert estimate_time(run, machine, estimate_traffic(run, machine)) is not None
    if model.decodes:
        C = EngineConfig().block_size
        blocks = dict.fromkeys(windows(model), 8 * -(-model.max_seq_len // C) + 1)
        cache = jax.eval_shape(lambda: empty_cache(model, blocks, C, plainly()))
        assert sum(4 * leaf.size for leaf in jax.tree.leaves(cache)) == cache_bytes(run, 1)


@quick(10)
@given(model=models())
def test_a_model_is_what_it_declares_and_survives_a_file(model: ModelConfig) -> None:
    check_declared(model)


@quick(5)
@given(model=adapted_models())
def test_a_model_with_an_adapter_is_what_it_declares(model: ModelConfig) -> None:
    check_declared(model)


@pytest.mark.nightly
@many(500)
@given(model=models() | adapted_models())
def test_many_models_are_what_they_declare(model: ModelConfig) -> None:
    check_declared(model)


# --- What it computes ---


def check_computed(model: ModelConfig, *, gradients: bool) -> None:
    """All ways of running it."""
    parameters = parameters_of(model)
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, WHOLE)).astype(np.int32)
    if not isinstance(model.head, LmHead):
        where = Tokens(jnp.tile(jnp.arange(WHOLE), (2, 1)))
        scalars = lambda parameters: bind(model, parameters).scalars(
            run_decoder(model, parameters, plainly(), tokens, where).hidden
        )
        assert np.isfinite(jax.jit(scalars)(parameters)).all()
        return
    whole = check_logits(model, parameters, tokens)
    if model.decodes:
        check_decoding(model, parameters, tokens, whole)
    if gradients:
        check_gradients(model, parameters)


def check_logits(model: ModelConfig, parameters: Any, tokens: np.ndarray) -> np.ndarray:
    """[2, WHOLE, V] of whole rows. A document among others is as alone, and a mesh computes the same."""
    column, first = np.arange(WHOLE), LENGTHS[0]
    later = np.append(tokens[0, first:], tokens[0, :first])  # its second document, and what it does not see
    ids = np.stack([*tokens, tokens[0], later])
    segments = np.stack([column * 0, column * 0, column >= first, column * 0]).astype(int)
    places = np.stack([column, column, np.where(column < first, column, column - first), column])
    language_model = lambda layout: LanguageModel(model, FLOAT32, layout, parameters)
    plain = np.asarray(language_model(one_device()).logits(ids, segments, places))
    assert np.isfinite(plain).all()
    if model.decodes:
        close(plain[2, :first], plain[0, :first])
        close(plain[2, first:], plain[3, : LENGTHS[1]])
    if layout := layout_of(model):
        close(language_model(layout).logits(ids, segments, places), plain)
    return plain[:2]


def layout_of(model: ModelConfig) -> Any:
    """The mesh that it is tried on, if it fits."""
    sharding = ShardingConfig(data=1, fsdp=2, tensor=2)
    sizes = {"n_devices": 4, "batch_size": 4, "seq_len": WHOLE, "micro_batches": 1}
    if broken_layout_rules(model, sharding, ExecutionConfig(), **sizes):
        return None
    return make_layout(sharding, jax.devices()[:4])


def check_decoding(model: ModelConfig, parameters: Any, tokens: np.ndarray, whole: np.ndarray) -> None:
    """In pieces, beside each other, and a text that ends earlier than the other."""
    texts = [tokens[0].tolist(), tokens[1, : LENGTHS[1]].tolist()]
    for got, want in zip(through_cache(model, parameters, plainly(), texts), whole, strict=True):
        close(got, want[: len(got)])


def check_gradients(model: ModelConfig, parameters: Any) -> None:
    """Of training, on a mesh as on one device."""
    found = []
    for layout in filter(None, (one_device(), layout_of(model))):
        run = small_run(model, layout.config, batch_size=4, seq_len=WHOLE)
        sums, gradient = jax.jit(gradient_function(run, layout))(parameters, packed_batch(run))
        found.append(jax.device_get((sums.objective, sums.router, gradient)))
    for one in found:
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(one))
    if len(found) == 2:
        largest = max(1.0, *(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(found[0])))
        assert_close(found[1], found[0], 3e-5 * largest)


@quick(6)
@given(model=models())
def test_every_way_of_running_a_model_says_the_same(model: ModelConfig) -> None:
    check_computed(model, gradients=False)


@pytest.mark.nightly
@many(100)
@given(model=models() | adapted_models())
def test_every_way_of_running_many_models_says_the_same(model: ModelConfig) -> None:
    check_computed(model, gradients=True)


# --- What a family of published models says of it ---


def check_published(model: ModelConfig) -> None:
    """Either no family can say it, or what is written is read as the same; but for how it was trained."""
    parameters = parameters_of(model)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place) / "model"
        try:
            write_folder(model, pieces_of(parameters), folder, dtype=np.dtype("float32"))
        except UserError as error:
            assert "none of the families" in str(error) and not folder.exists()
            return
        read, config = load_model(folder)
    apart = lambda model: dataclasses.replace(model, blocks=model.layers, first_blocks=())
    assert not [one for one in changes(apart(model), apart(config)) if one.change is Changes.IDENTITY]
    jax.tree.map(np.testing.assert_array_equal, by_layer(config, read.parameters), by_layer(model, parameters))


def by_layer(model: ModelConfig, parameters: Any) -> tuple[Any, list[Any]]:
    """What is outside of the layers, and each of them, however they are stacked."""
    outside = {name: tree for name, tree in parameters.items() if name not in ("blocks", "first_blocks")}
    singles = [parameters["first_blocks"][str(i)] for i in range(len(model.first_blocks))]
    for number in range(model.n_layers - len(singles)):
        repeat, entry = divmod(number, len(model.blocks))
        singles.append(jax.tree.map(lambda x, repeat=repeat: x[repeat], parameters["blocks"][str(entry)]))
    return outside, singles


@quick(25)
@given(model=nearly_published())
def test_a_family_says_all_of_a_model_or_refuses(model: ModelConfig) -> None:
    check_published(model)


@pytest.mark.nightly
@many(1000)
@given(model=nearly_published())
def test_families_say_all_of_many_models_or_refuse(model: ModelConfig) -> None:
    check_published(model)
