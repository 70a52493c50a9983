"""Medusa heads: what they learn, on a model that stays as it is, and the trees of guesses that are read in one step."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import (
    initial_parameters,
    latent_model,
    one_device,
    packed_batch,
    place,
    plainly,
    run_decoder,
    small_model,
    with_attention,
)
from helpers import small_run as plain_run
from paged_cases import BRANCHES, tree_rows
from run_folder import BYTE_MODEL
from test_engine import finish, loaded

from maxlm.config import (
    AdamW,
    Alibi,
    CheckpointConfig,
    ConstantSchedule,
    EngineConfig,
    LmHead,
    Medusa,
    MedusaHeads,
    ModelConfig,
    Pretrain,
    Remat,
    RunConfig,
    SamplingConfig,
    StridedPattern,
    TrainMedusa,
    UserError,
)
from maxlm.config.speculation import speculation
from maxlm.hub.folder import family_of
from maxlm.inference.drafting import check_tree
from maxlm.inference.engine import Engine
from maxlm.inference.request import Request
from maxlm.inference.step import came_true, read
from maxlm.models import Tokens, bind, ops
from maxlm.models.kv_cache import empty_cache
from maxlm.models.ops import TokenTree
from maxlm.models.tokens import Pages
from maxlm.models.upcycle import upcycle
from maxlm.plan.machines import Platform
from maxlm.plan.memory import estimate_memory
from maxlm.shapes import arrays, decoding_flops, flops_per_token, parameter_count, windows
from maxlm.training import make_trainer
from maxlm.training.later_tokens import LaterTokens

HEADS = MedusaHeads(n_heads=3)
TASK = TrainMedusa(weight=0.7)


def with_heads(model: ModelConfig) -> ModelConfig:
    return dataclasses.replace(model, medusa=HEADS)


def medusa_run(model: ModelConfig | None = None, **train: Any) -> RunConfig:
    return dataclasses.replace(
        plain_run(with_heads(model or small_model()), **train),
        task=TASK,
        checkpoint=CheckpointConfig(init_from="somewhere"),
        optimizer=AdamW(learning_rate=0.02, schedule=ConstantSchedule(), weight_decay=0.1),
    )


def started(model: ModelConfig, seed: int = 3) -> dict[str, Any]:
    """The parameters of a model with heads that have learned nothing yet."""
    source = dataclasses.replace(model, medusa=None)
    return upcycle(source, model, initial_parameters(source, seed), initial_parameters(model, seed))


@pytest.mark.parametrize(
    "head", [LmHead(), LmHead(tied=True, bias=True, scale=0.5, soft_cap=3.0)], ids=["plain", "all"]
)
def test_heads_begin_as_the_models_own(head: LmHead) -> None:
    model = with_heads(small_model(head=head))
    decoder = bind(model, started(model))
    hidden = jax.random.normal(jax.random.key(0), (2, 5, model.d_model))
    want = ops.logits(hidden, decoder.unembedding)
    found = decoder.later(hidden, plainly())
    assert len(found) == HEADS.n_heads
    for states, unembedding in found:
        np.testing.assert_array_equal(ops.logits(states, unembedding), want)


def test_the_loss_is_that_of_the_paper() -> None:
    """lambda_k = weight^k times the cross-entropy of the token k places after the next, by the formula in float64:
    silu(h W) + h, times the head's table; nothing is asked of a head where another document has begun."""
    config = medusa_run()
    parameters = initial_parameters(config.model, seed=1)
    for k, head in parameters["medusa"].items():
        head["proj"] = jax.random.normal(jax.random.key(int(k)), head["proj"].shape) / 5
    batch = packed_batch(config)
    objective = LaterTokens(config, TASK, one_device())
    given = {name: jnp.asarray(x) for name, x in batch.items()}
    sums = jax.jit(objective.loss)(parameters, None, given, jnp.float32(1))

    tokens = Tokens(given["positions"], given["segment_ids"])
    h = run_decoder(config.model, parameters, plainly(), given["inputs"], tokens).hidden
    h = np.asarray(h, np.float64)
    want, (B, T) = 0.0, batch["inputs"].shape
    for k in range(1, HEADS.n_heads + 1):
        W, table = (np.asarray(parameters["medusa"][str(k - 1)][name], np.float64) for name in ("proj", "unembed"))
        a = h @ W
        logits = (a / (1 + np.exp(-a)) + h) @ table.T
        log_z = np.log(np.exp(logits).sum(-1))
        loss = 0.0
        for b in range(B):
            for t in range(T - k):
                document = batch["segment_ids"][b]
                if document[t + k] == document[t] and batch["loss_mask"][b, t + k]:
                    loss += log_z[b, t] - logits[b, t, batch["targets"][b, t + k]]
        np.testing.assert_allclose(sums.means[f"medusa_{k}_loss"], loss, rtol=1e-5)
        want += TASK.weight**k * loss
    np.testing.assert_allclose(sums.objective, want, rtol=1e-5)
    assert sums.weight == batch["loss_mask"].sum()

    ranks = np.asarray(objective.ranks(parameters, given, most=64))
    assert (ranks[:, :-1].sum(1) == ranks[:, -1]).all()  # each token that came is somewhere among all 64
    one = int(ranks[1, 0])
    best = np.argmax(_logits(h, parameters["medusa"]["1"]), -1)
    hits = [
        best[b, t] == batch["targets"][b, t + 2]
        for b in range(B)
        for t in range(T - 2)
        if batch["segment_ids"][b, t + 2] == batch["segment_ids"][b, t] and batch["loss_mask"][b, t + 2]
    ]
    assert one == sum(hits)


def _logits(h: np.ndarray, head: dict[str, Any]) -> np.ndarray:
    W, table = (np.asarray(head[name], np.float64) for name in ("proj", "unembed"))
    a = h @ W
    return (a / (1 + np.exp(-a)) + h) @ table.T


def test_only_heads_are_trained() -> None:
    """The rest keeps every bit and has neither gradient nor moments; weight decay does not touch it."""
    config = medusa_run(micro_batches=2)
    trainer = make_trainer(config, one_device(), LaterTokens(config, TASK, one_device()))
    state = trainer.init()
    before = jax.tree.map(np.asarray, state.parameters)
    losses = []
    for step in range(3):
        state, output = trainer.step(state, place(packed_batch(config, seed=step % 1), trainer))
        losses.append(float(output.figures["loss"]))
    assert losses[2] < losses[0]
    after = jax.tree.map(np.asarray, state.parameters)
    for name in before.keys() - {"medusa"}:
        jax.tree.map(np.testing.assert_array_equal, before[name], after[name])
    for old, new in zip(jax.tree.leaves(before["medusa"]), jax.tree.leaves(after["medusa"]), strict=True):
        assert not np.array_equal(old, new)
    moments = sum(x.size for x in jax.tree.leaves(state.optimizer) if x.ndim)
    assert moments == 2 * parameter_count(config.model).medusa


def test_what_is_counted() -> None:
    """Heads alone are trained; FLOPs are 6 for each of their numbers and 2 for those of the rest, whose own head is not
    used; the plan has gradients and moments for them alone."""
    model, plain = with_heads(small_model()), small_model()
    D, V = model.d_model, model.vocab_size
    count = parameter_count(model)
    assert count.medusa == 3 * (D * D + V * D) and count.total == parameter_count(plain).total + count.medusa
    assert {array.name.split("/")[0] for array in arrays(model) if array.trained} == {"medusa"}
    flops, without = (flops_per_token(one, 16, Remat.NONE) for one in (model, plain))
    assert flops.parameters_term == 2 * (parameter_count(plain).matmul - V * D) + 6 * count.medusa
    assert (3 * flops.attention_term, flops.recompute) == (without.attention_term, 0)
    assert decoding_flops(model, 9) == decoding_flops(plain, 9)
    memory = estimate_memory(medusa_run(), 1, Platform.CPU)
    assert memory.parameters == 4 * count.total and memory.optimizer == 2 * 4 * count.medusa
    assert memory.gradients == 4 * count.medusa


def windowed() -> ModelConfig:
    """A layer with a window over one that sees everything."""
    whole = small_model().blocks[0]
    local = dataclasses.replace(whole, attention=dataclasses.replace(whole.attention, window=8))
    return small_model(blocks=(local, whole))


@pytest.mark.parametrize("model", [windowed(), latent_model()], ids=["window", "latents"])
def test_rows_of_a_tree_equal_each_path_read_alone(model: ModelConfig) -> None:
    """Logits through the cache, where siblings lie beside each other."""
    parameters, how, start = initial_parameters(model, 3), plainly(), 11
    rng = np.random.default_rng(0)
    text, drafts = rng.integers(0, 64, start), rng.integers(0, 64, len(BRANCHES))
    rows, tree = tree_rows((0, start, BRANCHES))
    tables = {window: np.arange(1, 9, dtype=np.int32)[None] for window in windows(model)}
    places = np.arange(start, dtype=np.int32)  # the text itself: each row a tree of its own
    alone = TokenTree(places, places, np.ones_like(places))
    nodes = TokenTree(*(np.concatenate(pair) for pair in zip(alone, tree, strict=True)))
    positions = np.concatenate([places, [position for _, position in rows]]).astype(np.int32)

    @jax.jit
    def through_cache(parameters: Any, ids: Any) -> Any:
        decoder, cache = bind(model, parameters), empty_cache(model, dict.fromkeys(tables, 9), 4, how)
        hidden, _ = read(decoder, how, cache, ids, positions, Pages(jnp.zeros_like(ids), tables, nodes))
        return ops.logits(hidden, decoder.unembedding)

    @jax.jit
    def as_lines(parameters: Any, lines: Any) -> Any:
        tokens = Tokens(jnp.broadcast_to(jnp.arange(lines.shape[1]), lines.shape))
        return ops.logits(
            run_decoder(model, parameters, how, lines, tokens).hidden, bind(model, parameters).unembedding
        )

    got = through_cache(parameters, np.concatenate([text, drafts]))[start:]
    paths = [[n for n in range(len(BRANCHES)) if int(tree.path[node]) >> n & 1] for node in range(len(BRANCHES))]
    lines = np.zeros((len(paths), start + len(BRANCHES)), np.int32)
    for line, path in zip(lines, paths, strict=True):
        line[: start + len(path)] = [*text, *drafts[path]]
    want = as_lines(parameters, lines)
    for node, path in enumerate(paths):
        expected = want[node, start + len(path) - 1]
        np.testing.assert_allclose(got[node], expected, rtol=0, atol=2e-5 * np.abs(expected).max())


def test_what_came_true_of_a_tree() -> None:
    """Newest token in row 0, drafts 5 and 6 after it, 7 and 8 after the 6, 9 after the 7."""
    drafts, parents = jnp.array([-1, 5, 6, 7, 8, 9, -1]), jnp.array([0, 0, 0, 2, 2, 3, 6])
    tokens = jnp.array([6, 7, 8, 9, 1, 2, 3])
    np.testing.assert_array_equal(came_true(drafts, tokens, parents), [1, 0, 1, 0, 1, 0, 1])


ENGINE = EngineConfig(slots=2, tokens_per_step=8, block_size=4, cache_tokens=96, speculation=Medusa(tree="0,00,000,1"))


@pytest.mark.usefixtures("programs_kept")
def test_trained_heads_guess_more_and_no_text_is_another() -> None:
    """Heads trained on what the model says itself. With penalties, whose history has the path that leads to a guess."""
    model = with_heads(dataclasses.replace(BYTE_MODEL, n_layers=1, max_seq_len=40))
    run = dataclasses.replace(loaded(model), parameters=started(model))
    asked = [
        Request(prompt=(7 + i, 70), max_new_tokens=22, seed=i, sampling=sampling)
        for i, sampling in enumerate(
            [
                SamplingConfig(temperature=0),
                SamplingConfig(temperature=0),
                SamplingConfig(temperature=0.5, top_k=20),
                SamplingConfig(temperature=0.5, repetition_penalty=1.4, no_repeat_ngram=2),
            ]
        )
    ]

    def tokens(engine: Engine) -> list[list[int]]:
        return [[token for delta in deltas for token in delta.tokens] for deltas in finish(engine, asked)]

    engine = Engine(run, ENGINE)
    heads, engine._drafter = engine._drafter, None
    want = tokens(engine)
    engine._drafter = heads
    assert tokens(engine) == want
    untrained, drafted = engine.stats.accepted_tokens, engine.stats.drafted_tokens

    lines = np.array([[*request.prompt, *line][:24] for request, line in zip(asked, want, strict=True)] * 2, np.int32)
    config = medusa_run(model, batch_size=8, seq_len=23)
    trainer = make_trainer(config, one_device(), LaterTokens(config, TASK, one_device()))
    ones = np.ones((8, 23), np.int32)
    batch = {
        "inputs": lines[:, :-1],
        "targets": lines[:, 1:],
        "segment_ids": ones,
        "positions": np.cumsum(ones, 1, dtype=np.int32) - 1,
        "loss_mask": ones.astype(np.float32),
    }
    state = dataclasses.replace(trainer.init(), parameters=jax.tree.map(jnp.copy, run.parameters))
    for _ in range(60):
        state, _ = trainer.step(state, place(batch, trainer))
    engine.update_weights(state.parameters)
    assert tokens(engine) == want
    stats = engine.stats
    assert (stats.accepted_tokens - untrained) / (stats.drafted_tokens - drafted) > 0.2 > 2 * untrained / drafted
    assert stats.free_blocks == stats.blocks


def test_says_which_tree_is_none() -> None:
    assert speculation("medusa:tree=0,00,1").parents == (-1, 0, -1)
    assert (Medusa().drafts, Medusa().depth, Medusa().guesses) == (7, 3, 3)
    for tree, message in (
        ("0,x", "'x' is no node"),
        ("0,0", "none twice"),
        ("00,0", "'00' comes before what it follows; put '0' in front"),
        ("0" + "".join(f",{'0' * n}" for n in range(2, 33)), "at most 31"),
    ):
        with pytest.raises(UserError, match=message):
            Medusa(tree=tree)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (small_model(), "needs the heads of model.medusa"),
        (dataclasses.replace(small_model(), medusa=MedusaHeads(n_heads=2)), "needs 3 heads"),
        (with_heads(with_attention(small_model(), position=Alibi())), "position = Alibi counts distances"),
        (with_heads(with_attention(small_model(), window=3)), "window = 3 does not reach"),
        (with_heads(with_attention(small_model(), pattern=StridedPattern(stride=4))), "StridedPattern hides"),
    ],
)
def test_says_which_models_have_no_trees(model: ModelConfig, message: str) -> None:
    with pytest.raises(UserError, match=message):
        check_tree(Medusa(), model)


def test_says_what_a_run_of_heads_needs() -> None:
    config = medusa_run()
    config.validate(1)
    for changes, message in (
        ({"checkpoint": CheckpointConfig()}, "checkpoint.init_from is None"),
        ({"model": small_model()}, "model.medusa, which is None"),
        ({"task": Pretrain()}, "task = Pretrain does not train"),
        ({"train": dataclasses.replace(config.train, seq_len=3)}, "guess beyond the windows"),
    ):
        with pytest.raises(UserError, match=message):
            dataclasses.replace(config, **changes).validate(1)


def test_published_folders_have_no_heads() -> None:
    with pytest.raises(UserError, match=r"model\.medusa: other programs have no heads"):
        family_of(with_heads(small_model()))
