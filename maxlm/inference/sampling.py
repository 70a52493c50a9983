"""One token for each row of logits: temperature, truncation, drawing, and how likely it was.

Nothing is sorted: a CPU takes a tenth of a second for 32 vocabularies. `fewest` finds a truncation's edge by bisection.

Letters: R rows, one for each token that is to be drawn; V vocabulary.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.random import threefry_2x32

from maxlm.inference.logits_rules import History, edit, edits, known_only
from maxlm.inference.settings import MAX_TOLD, Settings

COLDEST = 1e-6  # float32 cannot divide by much less; logits that differ at all are then already decided
TOP = 20
"""So many of the likeliest tokens have their log-probability told, if it is asked for."""


class LogProbs(NamedTuple):
    """How likely tokens were: natural logarithms."""

    chosen: jax.Array
    """float32 [R]: of the token itself."""
    top_ids: jax.Array
    """int32 [R, TOP]: the likeliest, in falling order."""
    top: jax.Array
    """float32 [R, TOP]: theirs."""
    told: jax.Array
    """float32 [R, MAX_TOLD]: of the ids that the settings name."""

    @staticmethod
    def nothing(*shape: int, vocab: int) -> LogProbs:
        """Room for those of rows [...], of logits [..., vocab]."""
        top = (*shape, min(TOP, vocab))
        return LogProbs(jnp.zeros(shape), jnp.zeros(top, jnp.int32), jnp.zeros(top), jnp.zeros((*shape, MAX_TOLD)))


class Chosen(NamedTuple):
    """One token for each row."""

    tokens: jax.Array
    """int32 [R]; -1 where no token is left: all are banned, or the logits are not finite."""
    logprobs: LogProbs
    """Of rows that ask for it; of the others anything."""


def choose(logits: jax.Array, rows: Settings, history: History, given: jax.Array | None = None) -> Chosen:
    """The next token of each row.

    It depends on the row's own logits, settings and history alone, to the bit, and its randomness on the seed and the
    token's position alone.

    Args:
        logits: float32 [R, V].
        rows: settings [R, ...].
        history: what stands before the token.
        given: int32 [R]: where it is not negative, it is the token, and nothing is drawn.
    """
    damaged = row_sum(jnp.isnan(logits).astype(jnp.int32)) > 0  # of which a maximum need not tell

    def by_rules() -> Chosen:
        after = processed(logits, rows, history)
        return scored(after, draw(after, rows, history.length))

    def plainly() -> Chosen:
        after = known_only(logits, rows)
        return scored(after, likeliest(after))

    def scored(after: jax.Array, tokens: jax.Array) -> Chosen:
        tokens = tokens if given is None else jnp.where(given < 0, tokens, given)
        tokens = jnp.where(damaged, -1, tokens)

        def all_of_them() -> LogProbs:
            return log_probs(jnp.where(rows.processed_logprobs[:, None], after, logits), tokens, rows.told)

        nothing = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(all_of_them))
        return Chosen(tokens, jax.lax.cond((rows.logprobs >= 0).any(), all_of_them, lambda: nothing))

    ruled = edits(rows, history) | (rows.temperature != 0)
    return jax.lax.cond(ruled.any(), by_rules, plainly)


def guided(logits: jax.Array, scale: jax.Array, twins: jax.Array) -> jax.Array:
    """Classifier-free guidance (Ho and Salimans 2022, arXiv:2207.12598; of texts: Sanchez et al. 2023,
    arXiv:2306.17806, equation 7): n + scale * (p - n), p and n the log-probabilities of a row and of its twin.

    Args:
        logits: float32 [R, V].
        scale: float32 [R].
        twins: int32 [R]: the row that stands at the same place of the text after the negative prompt; -1: there is
            none, and the row stays as it is.
    """

    def apart(x: jax.Array) -> jax.Array:
        after = _log_softmax(x)
        negative = after[jnp.maximum(twins, 0)]
        return jnp.where((twins >= 0)[:, None], negative + scale[:, None] * (after - negative), x)

    return jax.lax.cond((twins >= 0).any(), apart, lambda x: x, logits)


def processed(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """Logits after all rules of SamplingConfig: what is drawn from is their softmax.

    A row of temperature 0 has the rules up to there.

    Args:
        logits: float32 [R, V], finite or -inf.
        rows: settings [R, ...].
        history: what stands before the token.

    Returns:
        float32 [R, V], -inf of tokens that cannot come.
    """
    return truncated(edit(logits, rows, history), rows)


def truncated(logits: jax.Array, rows: Settings) -> jax.Array:
    """Temperature, then top_k, top_p, min_p and typical_p; rows of temperature 0 as they are.

    Args:
        logits: float32 [R, V], finite or -inf.
        rows: settings [R, ...].
    """
    hot = rows.temperature != 0

    def temperature(x: jax.Array) -> jax.Array:
        return (x - _finite_max(x)) / jnp.maximum(rows.temperature, COLDEST)[:, None]

    def top_k(x: jax.Array) -> jax.Array:
        return fewest(x, jnp.ones_like(x), rows.top_k.astype(jnp.float32))

    def top_p(x: jax.Array) -> jax.Array:
        return fewest(x, jnp.exp(_log_softmax(x)), rows.top_p)

    def min_p(x: jax.Array) -> jax.Array:
        return x - _finite_max(x) >= jnp.log(rows.min_p)[:, None]

    def typical_p(x: jax.Array) -> jax.Array:
        surprise = -_log_softmax(x)
        p = jnp.exp(-surprise)
        entropy = row_sum(jnp.where(p > 0, p * surprise, 0))[:, None]
        return fewest(-jnp.abs(surprise - entropy), p, rows.typical_p)

    def only(asked: jax.Array, kept: Callable[[jax.Array], jax.Array], x: jax.Array) -> jax.Array:
        return jnp.where(kept(x) | ~asked[:, None], x, -jnp.inf)

    def all_rules(x: jax.Array) -> jax.Array:
        x = jnp.where(hot[:, None], temperature(x), x)
        for asked, kept in (
            ((rows.top_k > 0) & (rows.top_k < x.shape[1]), top_k),
            (rows.top_p < 1, top_p),
            (rows.min_p > 0, min_p),
            (rows.typical_p < 1, typical_p),
        ):
            x = jax.lax.cond((asked & hot).any(), functools.partial(only, asked & hot, kept), lambda x: x, x)
        return x

    return jax.lax.cond(hot.any(), all_rules, lambda x: x, logits)


def fewest(values: jax.Array, weights: jax.Array, mass: jax.Array) -> jax.Array:
    """The fewest entries of each row, in falling order of `values` (of equal ones the lower index first), whose weights
    sum to at least `mass`; all, if all together do not.

    By bisection on the bits of float32, whose order is that of the numbers, until one distinct value is left between
    too few and enough; then, where that value stands several times, by bisection on the index.

    Args:
        values: float32 [R, V], without NaN.
        weights: float32 [R, V], not negative.
        mass: float32 [R], positive: at least one entry is kept.

    Returns:
        bool [R, V].
    """
    rows, width = values.shape

    def held(kept: jax.Array) -> jax.Array:
        return row_sum(jnp.where(kept, weights, 0))

    def from_(key: jax.Array) -> jax.Array:
        return values >= _of_key(key)[:, None]

    def open_(edge: _Edge) -> jax.Array:
        return (edge.low + 1 < edge.high) & (edge.n_low - edge.n_high > 1)

    def halve(edge: _Edge) -> _Edge:
        middle = (edge.low >> 1) + (edge.high >> 1) + (edge.low & edge.high & 1)  # their sum may not fit
        kept = from_(middle)
        n, enough = row_sum(kept.astype(jnp.int32)), held(kept) >= mass
        down, up = open_(edge) & enough, open_(edge) & ~enough
        return _Edge(
            jnp.where(down, middle, edge.low),
            jnp.where(up, middle, edge.high),
            jnp.where(down, n, edge.n_low),
            jnp.where(up, n, edge.n_high),
        )

    counts = jnp.full(rows, width, jnp.int32), jnp.zeros(rows, jnp.int32)
    start = _Edge(jnp.full(rows, _key(-np.inf)), jnp.full(rows, _key(np.inf)), *counts)
    edge = jax.lax.while_loop(lambda edge: open_(edge).any(), halve, start)

    above, tied = from_(edge.high), from_(edge.low) & ~from_(edge.high)
    index = jnp.arange(width)

    def undecided(ends: tuple[jax.Array, jax.Array]) -> jax.Array:
        return ends[0] + 1 < ends[1]

    def halve_index(ends: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        few, many = ends
        middle = (few + many) // 2
        enough = held(above | (tied & (index <= middle[:, None]))) >= mass
        go = undecided(ends)
        return jnp.where(go & ~enough, middle, few), jnp.where(go & enough, middle, many)

    last = jnp.full(rows, width - 1, jnp.int32)
    several = edge.n_low - edge.n_high > 1
    ends = jnp.where(several, -1, last - 1), last
    _, last = jax.lax.while_loop(lambda ends: undecided(ends).any(), halve_index, ends)
    return above | (tied & (index <= last[:, None]))


class _Edge(NamedTuple):
    """Where the key of the sought value is, int32 [R] each."""

    low: jax.Array
    """What is from this key on has the mass."""
    high: jax.Array
    """What is from this one on has not."""
    n_low: jax.Array
    """Entries from `low` on."""
    n_high: jax.Array


def _key(x: float) -> np.int32:
    """Of a float32: keys have the order of the numbers. (Keys of denormal numbers are as good as that of 0, since
    comparisons take these numbers for 0.)"""
    bits = np.float32(x).view(np.int32)
    return bits if bits >= 0 else bits ^ _FLIP


def _of_key(key: jax.Array) -> jax.Array:
    return jax.lax.bitcast_convert_type(jnp.where(key < 0, key ^ _FLIP, key), jnp.float32)


_FLIP = np.int32(2**31 - 1)


def draw(processed: jax.Array, rows: Settings, position: jax.Array) -> jax.Array:
    """One token for each row from softmax(processed): the largest sum of a logit and Gumbel noise (arXiv:1411.0030).

    Two models that draw with the same noise mostly choose the same token (arXiv:2408.07978).

    Args:
        processed: float32 [R, V], what `processed` gives.
        rows: settings [R, ...]; where the temperature is 0, the likeliest is taken.
        position: int32 [R], of the tokens that are drawn.

    Returns:
        int32 [R]; -1 where no token has a finite logit.
    """

    def noisy(x: jax.Array) -> jax.Array:
        added = jnp.where((rows.temperature != 0)[:, None], noise(rows.seed, position, x.shape[1]), 0)
        return likeliest(x + added)

    return jax.lax.cond((rows.temperature != 0).any(), noisy, likeliest, processed)


_BLOCK = 512


def noise(seed: jax.Array, position: jax.Array, vocab: int) -> jax.Array:
    """float32 [R, vocab] of standard Gumbel noise in [-2.9, 16.7]: that of an id is a function of seed uint32 [R],
    position int32 [R] and the id alone, whatever the vocabulary's size.

    One call of Threefry gives the bits of two ids, 512 apart; `jax.random.gumbel` would take one for each.
    """
    blocks = -(-vocab // (2 * _BLOCK))
    counter = jnp.arange(blocks * _BLOCK, dtype=jnp.uint32)
    counter = jnp.concatenate([counter, jnp.zeros_like(counter)])

    def row(seed: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.key_data(jax.random.fold_in(jax.random.key(seed), position))
        bits = threefry_2x32(key, counter).reshape(2, blocks, _BLOCK)
        return jnp.swapaxes(bits, 0, 1).reshape(-1)[:vocab]

    # 23 bits and a half: a float32 holds no more below 1, and 1 itself would give an infinite number.
    uniform = ((jax.vmap(row)(seed, position) >> 9).astype(jnp.float32) + 0.5) * 2.0**-23
    return -jnp.log(-jnp.log(uniform))


def log_probs(logits: jax.Array, tokens: jax.Array, told: jax.Array) -> LogProbs:
    """How likely int32 [R] tokens and ids int32 [R, _] are under softmax(logits), logits float32 [R, V], and which are
    the likeliest."""
    most = _finite_max(logits)
    total = jnp.log(row_sum(jnp.exp(logits - most)))[:, None]
    top, ids = jax.lax.top_k(logits, min(TOP, logits.shape[1]))
    named = jnp.concatenate([tokens[:, None], told], 1)
    named = jnp.take_along_axis(logits, jnp.maximum(named, 0), 1) - most - total
    return LogProbs(named[:, 0], ids, top - most - total, named[:, 1:])


def likeliest(logits: jax.Array) -> jax.Array:
    """The lowest id of the largest; -1 if that is not finite. (XLA:CPU takes five times as long for an argmax.)"""
    most = logits.max(-1, keepdims=True)
    ids = jnp.arange(logits.shape[1], dtype=jnp.int32)
    first = jnp.min(jnp.where(logits == most, ids, logits.shape[1]), -1)
    return jnp.where(jnp.isfinite(most[:, 0]), first, -1)


def row_sum(x: jax.Array) -> jax.Array:
    """Sums of the rows [R, V], added in an order that this file says and not the compiler.

    XLA's own sum of a row depends, in its last bits, on how many rows there are. On a CPU this one is faster, too.
    """
    while (width := x.shape[1]) >= _PARTS**2:
        part, rest = width // _PARTS, width % _PARTS
        parts = [x[:, i * part : (i + 1) * part] for i in range(_PARTS)]
        if rest:
            parts.append(jnp.pad(x[:, -rest:], ((0, 0), (0, part - rest))))
        x = functools.reduce(operator.add, parts)
    return functools.reduce(operator.add, [x[:, i] for i in range(width)])


_PARTS = 8


def _log_softmax(x: jax.Array) -> jax.Array:
    shifted = x - _finite_max(x)
    return shifted - jnp.log(row_sum(jnp.exp(shifted)))[:, None]


def _finite_max(x: jax.Array) -> jax.Array:
    """[R, 1]; 0 where nothing is finite."""
    most = x.max(-1, keepdims=True)
    return jnp.where(jnp.isfinite(most), most, 0)
