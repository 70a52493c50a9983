"""The one compiled step: tokens of many texts in, one new token for each text whose newest is among them.

A batch is flat: T rows, each one token of the text in its slot. Prompts are read in chunks of many rows, texts are gone
on with in one row each, and both share a step. What a row becomes depends on nothing but its text: not on the other
rows, and of the number of rows only as far as products of another shape are rounded otherwise. The sizes that an engine
uses are therefore of one class (`maxlm.inference.engine`), within which they are not.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental.layout import Format
from jax.experimental.layout import Layout as ArrayLayout

from maxlm.config import ModelConfig
from maxlm.inference.logits_rules import History
from maxlm.inference.sampling import LogProbs, choose, guided
from maxlm.inference.settings import Settings, take
from maxlm.models import Decoder, Execution, Tokens, bind, ops
from maxlm.models.kv_cache import Cache
from maxlm.models.ops import TokenTree
from maxlm.models.tokens import Pages
from maxlm.models.weights.by_row import of_rows


class Texts(NamedTuple):
    """What the device knows of the text in each slot; numpy arrays on their way there."""

    history: Any
    """int32 [S, max_seq_len + 1]: its tokens. The last column is nobody's."""
    n_prompt: Any
    """int32 [S]."""
    end: Any
    """int32 [S]: tokens that it has at most."""
    done: Any
    """bool [S]: it has ended, which whoever planned a step may not know yet."""
    adapter: Any
    """int32 [S]: the number of its adapter; 0: none."""
    settings: Settings


class StepRows(NamedTuple):
    """What a step reads, and which of its rows it draws from; as `Texts`."""

    slots: Any
    """int32 [T]."""
    positions: Any
    """int32 [T]; -1: padding."""
    scored: Any
    """int32 [R]: rows whose logits are computed; -1: none."""
    samples: Any
    """bool [R]: a token is drawn; else the one that the text has is scored."""
    follows: Any
    """int32 [R]: of a twin's row, which of these R has the token that it takes; -1: it draws its own."""
    drafts: Any = None
    """int32 [T]: a guess at the token that this row reads; -1: the text's own is known. Guesses follow the row of the
    text's newest token, each behind the one before, among the scored rows too. None: the engine has no drafts."""
    branches: Any = None
    """`Branches`, in which several drafts of a text may stand at one position. None: drafts follow one another."""


class Branches(NamedTuple):
    """Where drafts stand in trees, each with the newest token of its text as the first node. All rows are nodes: what
    is no draft is a tree of its own. The keys of drafts lie behind those of the text in the order of the rows."""

    parents: Any
    """int32 [R]: the scored row whose token a draft follows; of other rows the row itself."""
    nodes: TokenTree
    """[T]."""


class Drawn(NamedTuple):
    """Of the steps n of a loop and the scored rows; only those that were asked for are set."""

    tokens: jax.Array
    """int32 [n, R]."""
    scores: LogProbs
    """[n, R, ...]."""
    broken: jax.Array
    """bool [n, R]: the logits were no numbers."""
    states: jax.Array
    """[n, R, D] in the compute dtype: what the logits are made of."""
    guesses: jax.Array | None = None
    """int32 [n, S, heads, guesses]: what the Medusa heads make of the newest token that was read of each slot's text,
    best first; anything where none was. None: nobody asked."""

    @staticmethod
    def nothing(steps: int, rows: int, config: ModelConfig, how: Execution) -> Drawn:
        """Room for it."""
        zeros, states = jnp.zeros((steps, rows), jnp.int32), jnp.zeros((steps, rows, config.d_model), how.dtype)
        return Drawn(zeros, LogProbs.nothing(steps, rows, vocab=config.vocab_size), zeros.astype(bool), states)


def empty_texts(model: ModelConfig, slots: int) -> Texts:
    """Of an engine that has begun nothing."""
    zeros = jnp.zeros(slots, jnp.int32)
    history = jnp.zeros((slots, model.max_seq_len + 1), jnp.int32)
    return Texts(history, zeros, zeros, zeros.astype(bool), zeros, Settings.empty(slots, model.vocab_size))


def begin(texts: Texts, slot: jax.Array, text: Texts) -> Texts:
    """Put another text, whose arrays have no dim of slots, into a slot."""
    return jax.tree.map(lambda all, one: all.at[slot].set(one), texts, text)


def allow(texts: Texts, slot: jax.Array, allowed: jax.Array) -> Texts:
    """Say which ids may come next in a slot: bits as `Settings.allowed` has them."""
    settings = texts.settings._replace(allowed=texts.settings.allowed.at[slot].set(allowed))
    return texts._replace(settings=settings)


def read(
    model: Decoder, how: Execution, cache: Cache, ids: jax.Array, positions: jax.Array, pages: Pages
) -> tuple[jax.Array, Cache]:
    """Tokens of any texts, at any positions: int32 [T] -> hidden states [T, D], and the cache with them.

    Tokens of one text must be consecutive, and all before them in the cache or among the rows.
    """
    tokens = Tokens(positions[:, None], pages=pages)
    hidden, cache_after, _ = model(model.embeddings(ids[:, None], tokens, how), tokens, how, cache)
    assert cache_after is not None
    return hidden[:, 0], cache_after


def came_true(drafts: jax.Array, tokens: jax.Array, parents: jax.Array | None = None) -> jax.Array:
    """Whether what each scored row read is what its text has come to be.

    A row draws with its text's own noise for its position, as it would have without drafts, and a draft holds if the
    row before it drew just that token. So a text has the very tokens that it has without drafts. (Speculative sampling,
    arXiv:2211.17192, accepts by chance and draws from a remainder: the same distribution, but other samples.)

    Args:
        drafts: int32 [R]: what a row read; -1: a token that its text has.
        tokens: int32 [R]: what it drew.
        parents: int32 [R]: the row before it, itself where there is none; None: of a draft, the one in front.

    Returns:
        bool [R]: it is no draft, or it and all drafts before it are what the rows before them drew.
    """
    row = jnp.arange(len(drafts))
    before = jnp.where(drafts < 0, row, row - 1) if parents is None else parents
    good = (drafts < 0) | (tokens[before] == drafts)
    for _ in range(len(drafts).bit_length()):  # each turn looks back twice as far
        good, before = good & good[before], before[before]
    return good


def step(
    parameters: Any,
    cache: Cache,
    texts: Texts,
    tables: dict[int, jax.Array],
    rows: StepRows,
    n_steps: jax.Array,
    *,
    config: ModelConfig,
    how: Execution,
    most_steps: int,
    guesses: int = 0,
) -> tuple[Cache, Texts, Drawn]:
    """Read rows, draw tokens, and go on with these for n_steps in all, if every row is the newest token of its text.

    Behind a newest token may stand drafts; n_steps is then 1. What is drawn from a draft that did not come true counts
    for nothing: its keys lie beyond the text's end, where the next step writes others.

    Args:
        parameters: of the model, as decoding holds them.
        cache: what was read before.
        texts: what is known of the texts.
        tables: blocks of the texts, with room for all tokens of all steps.
        rows: what to read.
        n_steps: int32, 1 .. most_steps.
        config: static: the model.
        how: static: it runs.
        most_steps: static: room for results.
        guesses: static: of each Medusa head, that are wanted.

    Returns:
        Cache and texts after it, and what was drawn.
    """
    parameters = of_rows(parameters, texts.adapter[rows.slots])
    model, everywhere = bind(config, parameters), how.layout.sharding()
    slots, nowhere = rows.slots[rows.scored], texts.history.shape[1] - 1
    settings = take(texts.settings, slots)
    follows = rows.follows >= 0
    twins = jnp.full_like(rows.follows, -1)
    twins = twins.at[jnp.where(follows, rows.follows, len(twins))].set(jnp.arange(len(twins)), mode="drop")

    def turn(number: jax.Array, positions: jax.Array, cache: Cache, texts: Texts) -> tuple[Any, ...]:
        ids = texts.history[rows.slots, positions.clip(0)]
        pages, known, whose = Pages(rows.slots, tables), texts.history, slots
        if (branches := rows.branches) is not None:
            ids = jnp.where(rows.drafts >= 0, rows.drafts, ids)
            pages = pages._replace(
                tree=branches.nodes._replace(places=jnp.where(positions < 0, -1, branches.nodes.places))
            )
            known, whose = _paths(rows, positions, texts.history), jnp.arange(len(slots))
        hidden, cache = read(model, how, cache, ids, positions, pages)
        states = hidden[rows.scored]
        # Each device its part of the vocabulary, then all of it: else the table would be sent, and not the logits.
        logits = how.layout.constrain(ops.logits(states, model.unembedding), "batch", "vocab")
        logits = jax.lax.with_sharding_constraint(logits, everywhere)  # choosing needs a row's whole vocabulary
        at = jnp.where(rows.scored < 0, -1, positions[rows.scored])
        samples = rows.samples & (at >= 0)
        given = jnp.where(samples, -1, texts.history[slots, at + 1])
        broken = ~jnp.isfinite(logits).all(-1) & (at >= 0)
        broken |= (twins >= 0) & broken[twins]
        tokens, of_tokens = choose(
            guided(logits, settings.guidance, twins),
            settings,
            History(known, whose, texts.n_prompt[slots], at + 1),
            given,
        )
        tokens = jnp.where(follows, tokens[rows.follows], tokens)
        if rows.drafts is not None:
            parents = None if branches is None else branches.parents
            samples &= came_true(rows.drafts[rows.scored], tokens, parents)
        drawn = Drawn(tokens, of_tokens, broken, states)
        if guesses:
            newest = jnp.full(len(texts.done), -1).at[slots].max(jnp.where(samples, at, -1))
            last = jnp.where(samples & (at == newest[slots]), slots, len(newest))
            row = jnp.zeros_like(newest).at[last].set(rows.scored, mode="drop")
            heads = [ops.logits(*one)[:, 0] for one in model.later(hidden[row][:, None], how)]
            drawn = drawn._replace(guesses=jnp.stack([jax.lax.top_k(one, guesses)[1] for one in heads], axis=1))

        after = texts.history.at[slots, jnp.where(samples, at + 1, nowhere)].set(tokens)
        ended = samples & ((tokens[:, None] == settings.ends).any(-1) | (at + 2 >= texts.end[slots]))
        done = texts.done.at[jnp.where(ended, slots, len(texts.done))].set(True, mode="drop")
        goes_on = jnp.where(samples & ~ended, rows.scored, len(positions))
        positions = jnp.full_like(positions, -1).at[goes_on].set(at + 1, mode="drop")
        return positions, cache, texts._replace(history=after, done=done), drawn

    def more(carry: tuple[Any, ...]) -> jax.Array:
        number, positions, *_ = carry
        return (number < n_steps) & (positions >= 0).any()

    def body(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        number, positions, cache, texts, results = carry
        positions, cache, texts, drawn = turn(number, positions, cache, texts)
        put = lambda all, one: jax.lax.dynamic_update_index_in_dim(all, one, number, 0)
        return number + 1, positions, cache, texts, jax.tree.map(put, results, drawn)

    positions = jnp.where(texts.done[rows.slots], -1, rows.positions)
    if rows.drafts is not None and rows.branches is None:
        guessed = jnp.where((rows.drafts >= 0) & (positions >= 0), positions, nowhere)
        texts = texts._replace(history=texts.history.at[rows.slots, guessed].set(rows.drafts))
    results = Drawn.nothing(most_steps, len(rows.scored), config, how)
    if guesses and config.medusa is not None:
        shape = (most_steps, len(texts.done), config.medusa.n_heads, guesses)
        results = results._replace(guesses=jnp.zeros(shape, jnp.int32))
    carry = jax.lax.while_loop(more, body, (jnp.int32(0), positions, cache, texts, results))
    return carry[2], carry[3], jax.lax.with_sharding_constraint(carry[4], everywhere)


def compiler_chooses(parameters: Any) -> Any:
    """`formats` of `jitted_step` with which the compiler says in which order a weight's dims lie in memory.

    On a TPU the usual order of queries' and keys' weights is not that in which a product of few rows reads them: every
    step would turn them round first, as the compiled program's text says.
    """
    return jax.tree.map(lambda x: Format(ArrayLayout.AUTO, x.sharding), parameters)


def jitted_step(
    config: ModelConfig, how: Execution, cache: Cache, texts: Texts, formats: Any, *, most_steps: int, guesses: int = 0
) -> Any:
    """`step`, to be lowered. It takes cache and texts over, and gives them back where they were.

    Args:
        config: the model.
        how: it runs.
        cache: as it is, or `jax.ShapeDtypeStruct`s of it.
        texts: the same.
        formats: of the parameters, `jax.experimental.layout.Format`s; None: as they are.
        most_steps: as of `step`.
        guesses: as of `step`.
    """
    same = jax.tree.map(lambda x: x.sharding, (cache, texts))
    run = functools.partial(step, config=config, how=how, most_steps=most_steps, guesses=guesses)
    return jax.jit(
        run,
        donate_argnums=(1, 2),
        in_shardings=(formats, *[None] * 5),
        out_shardings=(*same, how.layout.sharding()),
    )


def _paths(rows: StepRows, positions: jax.Array, history: jax.Array) -> jax.Array:
    """int32 [R, M]: the tokens of each scored row's text, with the drafts that lead to it at their positions."""
    known, every = history[rows.slots[rows.scored]], jnp.arange(len(rows.scored))
    nowhere, node = history.shape[1] - 1, every
    for _ in range(min(31, len(every))):  # as deep as any tree may be
        row = rows.scored[node]
        at = jnp.where((rows.drafts[row] >= 0) & (positions[row] >= 0), positions[row], nowhere)
        known = known.at[every, at].set(rows.drafts[row])
        node = rows.branches.parents[node]
    return known
