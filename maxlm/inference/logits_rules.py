"""What changes logits before temperature and truncation: biases, penalties for what was said, and bans.

Letters: R rows, one for each token that is to be drawn; V vocabulary; M tokens that a history has room for. A rule is
worked out only if some row asks for it, and what it does to a row is a function of that row alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from maxlm.inference.settings import MASK_BITS, Settings

_ALL = np.uint32(2**MASK_BITS - 1)
_MOST = 1e30
"""The largest DRY penalty: repeating is then out of the question, and the logit stays finite."""


class History(NamedTuple):
    """What stands before the token that is to be drawn, prompt and text together."""

    texts: jax.Array
    """int32 [S, M]: all texts; anything from their `length` on."""
    slots: jax.Array
    """int32 [R]: which of them a row's is."""
    n_prompt: jax.Array
    """int32 [R]: tokens of the prompt."""
    length: jax.Array
    """int32 [R]: tokens in all: the position of the token that is to be drawn."""

    @property
    def tokens(self) -> jax.Array:
        """int32 [R, M]. Gathered where a rule asks for it."""
        return self.texts[self.slots]

    @property
    def known(self) -> jax.Array:
        """bool [R, M]: where there is a token."""
        return jnp.arange(self.texts.shape[1]) < self.length[:, None]

    @property
    def generated(self) -> jax.Array:
        """bool [R, M]: where there is one that the prompt did not bring."""
        return self.known & (jnp.arange(self.texts.shape[1]) >= self.n_prompt[:, None])


def edit(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """Biases, penalties and bans, in the order that SamplingConfig gives.

    Args:
        logits: float32 [R, V].
        rows: settings [R, ...].
        history: of each row.

    Returns:
        float32 [R, V], -inf of what must not come.
    """
    for asked, rule in _rules(rows, history):
        logits = _where_asked(asked, rule, logits)
    return known_only(logits, rows)


def known_only(logits: jax.Array, rows: Settings) -> jax.Array:
    """-inf for ids that stand for no token: the model's table may be longer than the tokenizer's."""
    return jnp.where(jnp.arange(logits.shape[1]) < rows.vocab[:, None], logits, -jnp.inf)


def edits(rows: Settings, history: History) -> jax.Array:
    """bool [R]: whether `edit` does more to a row than to hide ids that stand for no token."""
    return jnp.stack([asked for asked, _ in _rules(rows, history)]).any(0)


LogitsRule = Callable[[jax.Array], jax.Array]


def _rules(rows: Settings, history: History) -> list[tuple[jax.Array, LogitsRule]]:
    """Which rows ask for a rule, bool [R], and the rule."""
    generated = history.length - history.n_prompt
    return [
        ((rows.edited >= 0).any(1), lambda x: _biased(x, rows)),
        (rows.repetition_penalty != 1, lambda x: _repetition(x, rows, history)),
        ((rows.presence_penalty != 0) | (rows.frequency_penalty != 0), lambda x: _presence(x, rows, history)),
        ((rows.dry_multiplier != 0) | (rows.no_repeat_ngram != 0), lambda x: _repeating(x, rows, history)),
        ((rows.words >= 0).any((1, 2)), lambda x: _banned_words(x, rows, history)),
        (generated < rows.min_new_tokens, lambda x: _marked(x, rows.ends, rows.ends >= 0)),
        ((rows.allowed != _ALL).any(1), lambda x: jnp.where(unpacked(rows.allowed, x.shape[1]), x, -jnp.inf)),
    ]


def _where_asked(asked: jax.Array, rule: LogitsRule, logits: jax.Array) -> jax.Array:
    """The rule where it is asked for; elsewhere the logits to the bit."""
    return jax.lax.cond(asked.any(), lambda x: jnp.where(asked[:, None], rule(x), x), lambda x: x, logits)


def _biased(logits: jax.Array, rows: Settings) -> jax.Array:
    """OpenAI's logit_bias: added before everything else."""
    return _scattered(logits, rows.edited).add(rows.bias, mode="drop")


def _repetition(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """CTRL (arXiv:1909.05858, section 4.1), with negative logits multiplied, as transformers does."""
    penalty = rows.repetition_penalty[:, None]
    penalised = jnp.where(logits < 0, logits * penalty, logits / penalty)
    return jnp.where(_seen(history.tokens, history.known, logits.shape[1]), penalised, logits)


def _presence(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """logit - count * frequency_penalty - (count > 0) * presence_penalty (OpenAI's API reference, "Frequency and
    presence penalties"), counted in the generated text."""
    ids = jnp.where(history.generated, history.tokens, -1)
    count = _scattered(jnp.zeros_like(logits), ids).add(1.0, mode="drop")
    return logits - count * rows.frequency_penalty[:, None] - (count > 0) * rows.presence_penalty[:, None]


def _repeating(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """What comes after tokens that the history ends with, too.

    DRY (text-generation-webui, pull request 5677, as in llama.cpp): a token that would repeat n others and itself loses
    multiplier * base ** (n - allowed_length), n at least allowed_length; the longest repetition counts. Breakers end
    what is repeated and are never penalised.

    No n-gram twice (arXiv:1705.04304, section 2.5; fairseq and transformers do it in prompt and text): what would
    complete one that stands in the history is banned.
    """
    place = jnp.arange(history.texts.shape[1])
    breaks = (rows.dry_breakers[:, :, None] == history.tokens[:, None]).any(1) & history.known
    since_break = history.length - 1 - jnp.max(jnp.where(breaks, place, -1), 1)
    dry = jnp.where(rows.dry_multiplier != 0, since_break, 0)
    context = rows.no_repeat_ngram - 1
    repeated = _repeated(history, jnp.maximum(dry, context))

    first = jnp.where(rows.dry_range > 0, jnp.maximum(history.length - rows.dry_range, 0), 0)
    in_range = jnp.minimum(jnp.minimum(repeated, dry[:, None]), place - first[:, None])
    in_range = jnp.where(history.known & ~breaks, in_range, 0)
    over = in_range - rows.dry_allowed_length[:, None]
    penalty = rows.dry_multiplier[:, None] * jnp.power(rows.dry_base[:, None], jnp.maximum(over, 0))
    penalty = jnp.where((in_range > 0) & (over >= 0), jnp.minimum(penalty, _MOST), 0)
    logits -= _scattered(jnp.zeros_like(logits), history.tokens).max(penalty, mode="drop")
    return _marked(logits, history.tokens, history.known & (repeated >= context[:, None]) & (context >= 0)[:, None])


def _banned_words(logits: jax.Array, rows: Settings, history: History) -> jax.Array:
    """Bans the last id of a word where the history ends with its others."""
    beginnings, last = rows.words[:, :, :-1], rows.words[:, :, -1]
    place = history.length[:, None] - beginnings.shape[2] + jnp.arange(beginnings.shape[2])
    ending = jnp.where(place >= 0, jnp.take_along_axis(history.tokens, jnp.maximum(place, 0), 1), -2)
    said = ((beginnings < 0) | (beginnings == ending[:, None])).all(2)
    return _marked(logits, last, said & (last >= 0))


def unpacked(mask: jax.Array, vocab: int) -> jax.Array:
    """bool [R, vocab] of bits in uint32 [R, ceil(vocab / 32)]."""
    bits = (mask[:, :, None] >> jnp.arange(MASK_BITS, dtype=jnp.uint32)) & 1
    return bits.reshape(mask.shape[0], -1)[:, :vocab] != 0


def _repeated(history: History, most: jax.Array) -> jax.Array:
    """int32 [R, M]: how many tokens right before a place are also the last of the history, in the same order; counted
    up to `most` [R]. Each token of the longest repetition costs a pass."""
    tokens, length = history.tokens, history.length[:, None]
    place = jnp.arange(tokens.shape[1])

    def step(carry: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, runs, count = carry
        last = jnp.take_along_axis(tokens, jnp.maximum(length - 1 - n, 0), 1)
        runs &= (n < most[:, None]) & (place > n) & (jnp.roll(tokens, n + 1, 1) == last)
        return n + 1, runs, count + runs

    start = (place < length) & (most > 0)[:, None]
    none = jnp.zeros(tokens.shape, jnp.int32)
    return jax.lax.while_loop(lambda carry: carry[1].any(), step, (jnp.int32(0), start, none))[2]


def _marked(logits: jax.Array, ids: jax.Array, marked: jax.Array) -> jax.Array:
    """-inf at those of the ids [R, _] that are marked."""
    return jnp.where(_seen(ids, marked, logits.shape[1]), -jnp.inf, logits)


def _seen(ids: jax.Array, marked: jax.Array, vocab: int) -> jax.Array:
    """bool [R, vocab]: the ids [R, _] that are marked somewhere."""
    places = jnp.where(marked, ids, -1)
    return _scattered(jnp.zeros((ids.shape[0], vocab), bool), places).set(True, mode="drop")


def _scattered(x: jax.Array, ids: jax.Array):  # type: ignore[no-untyped-def] # jax gives the type no public name
    """`x[row, ids[row]]` of every row, to be added to or set; ids below 0 are nowhere."""
    ids = jnp.where(ids < 0, x.shape[1], ids)  # a negative index would count from the end; this one is dropped
    return x.at[jnp.arange(x.shape[0])[:, None], ids]
