"""What is asked of a model in an evaluation: the log-probabilities of given continuations, and texts of its own."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import numpy.typing as npt

from maxlm.config import SamplingConfig, UserError
from maxlm.data.text_ends import TextEnds
from maxlm.inference.checks import check_learned
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Request, nth_seed

GREEDY = SamplingConfig(temperature=0.0)

_SHORTEST = 16
_LOGITS_BYTES = 1 << 28
"""Of the logits of one batch: they exist whole, in float32."""


class Likelihood(NamedTuple):
    """What a model says of one continuation."""

    log_probs: npt.NDArray[np.float64]
    """Natural logarithms [n], one for each token of the continuation, given all before it."""
    greedy: bool
    """Whether each token is the likeliest; True of no tokens."""

    @property
    def total(self) -> float:
        """The log-probability of the whole; 0 of no tokens."""
        return float(self.log_probs.sum())


Pair = tuple[Sequence[int], Sequence[int]]
"""Ids of a context, and of its continuation."""


class Examinee(Protocol):
    """A model with its tokenizer, as an evaluation sees it."""

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of the two texts, tokenized as one; the context begins as a text does, and is never empty."""

    def scores(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """What the model says of each continuation, given its context."""

    def texts(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: SamplingConfig, seed: int
    ) -> list[str]:
        """A continuation of each prompt, without the first of the `stop` strings and what follows it."""

    def embeddings(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """A vector for each text [n, D]: the mean of its hidden states, before the output table."""


class RunExaminee:
    """A run, or a published model, as an `Examinee`. A program is compiled for each power of two that lengths have."""

    def __init__(self, run: LoadedRun, *, chat: bool = False) -> None:
        """Compiles nothing yet.

        Args:
            run: the model.
            chat: whether texts are conversations as `rendered` gives them: names of control tokens in them are those
                tokens, and nothing is put before them.

        Raises:
            UserError: with `chat` the model has no chat template.
        """
        if chat and run.chat is None:
            raise UserError("the model has no chat template; leave out --chat")
        self.run = run
        self.tokenizer, self.ends = run.tokenizer, run.ends or TextEnds.of_documents(run.tokenizer)
        self.limit = run.config.model.max_seq_len
        usual = run.tokenizer.eos_id if run.tokenizer.bos_id is None else run.tokenizer.bos_id
        self.prefix = self.ends.first or (usual,)
        """Ids before a text that has nothing before it."""
        self._model, self._chat = run.model, chat
        self._first = () if chat else self.ends.first

    def split(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Blanks at the context's end go to the continuation, as vocabularies join them to the word that follows.
        Where a token spans the border, it counts to the continuation."""
        kept = context.rstrip()
        whole = self._encode(context + continuation)
        start = _common(whole, self._encode(kept)) if kept else 0
        return [*(self._first if start else self.prefix), *whole[:start]], whole[start:]

    def rendered(self, messages: Sequence[Mapping[str, str]]) -> str:
        """A conversation as text, up to where the model's answer begins.

        Raises:
            ChatError: the template does not take it.
        """
        assert self.run.chat is not None, "looked at when it was made"
        return self.run.chat.render(messages)

    def scores(self, pairs: Sequence[Pair]) -> list[Likelihood]:
        """Each token counts once, given as much before it as the model takes; see `windows`.

        Raises:
            UserError: a continuation has tokens, and its context none; the model's output is not finite; or it has
                learned nothing of a next token.
        """
        check_learned(self.run.config)
        pieces = [(i, *window) for i, pair in enumerate(pairs) for window in windows(*pair, self.limit)]
        log_probs, greedy = [np.empty(0)] * len(pairs), [True] * len(pairs)
        found: dict[int, tuple[npt.NDArray[np.float64], bool]] = {}
        for batch in batches_of([len(inputs) for _, inputs, _ in pieces], self._rows, self.limit):
            tokens, targets = np.zeros((2, batch.rows, batch.length), np.int32)
            for row, i in enumerate(batch.members):
                _, inputs, wanted = pieces[i]
                tokens[row, : len(inputs)] = inputs
                targets[row, len(inputs) - len(wanted) : len(inputs)] = wanted
            logits = self._model.logits(tokens)
            values, best = jax.device_get(_of_targets(logits, targets))
            for row, i in enumerate(batch.members):
                _, inputs, wanted = pieces[i]
                place = slice(len(inputs) - len(wanted), len(inputs))
                found[i] = values[row, place].astype(np.float64), bool(best[row, place].all())
        for i, (pair, _, _) in enumerate(pieces):
            log_probs[pair] = np.concatenate([log_probs[pair], found[i][0]])
            greedy[pair] &= found[i][1]
        if not all(np.isfinite(values).all() for values in log_probs):
            raise UserError(f"the logits of step {self.run.step} are not finite; use an earlier --step")
        return [Likelihood(*one) for one in zip(log_probs, greedy, strict=True)]

    def texts(
        self, prompts: Sequence[str], *, max_new_tokens: int, stop: Sequence[str], sampling: SamplingConfig, seed: int
    ) -> list[str]:
        """Prompts that are too long lose their beginning, but not what texts begin with.

        Raises:
            UserError: no token of a prompt fits before `max_new_tokens`, or as `Generator.answer`.
        """
        room = self.limit - max_new_tokens - len(self._first)
        if room < 1:
            raise UserError(f"max_new_tokens = {max_new_tokens} leaves no room in model.max_seq_len = {self.limit}")
        requests = [
            Request(
                prompt=tuple([*self._first, *self._encode(prompt)[-room:]] or self.prefix),
                max_new_tokens=max_new_tokens,
                sampling=sampling,
                seed=nth_seed(seed, n),
                ends=self.ends.last,
                stop=tuple(filter(None, stop)),
            )
            for n, prompt in enumerate(prompts)
        ]
        return [one.text for one in self.run.generator.answer(requests)]

    def embeddings(self, texts: Sequence[str]) -> npt.NDArray[np.float64]:
        """Of texts that are too long, the end."""
        ids = [[*self._first, *self._encode(text)][-self.limit :] or [self.prefix[0]] for text in texts]
        found = np.empty((len(ids), self.run.config.model.d_model))
        for batch in batches_of(list(map(len, ids)), self._rows, self.limit):
            tokens = np.zeros((batch.rows, batch.length), np.int32)
            for row, i in enumerate(batch.members):
                tokens[row, : len(ids[i])] = ids[i]
            hidden = np.asarray(self._model.hidden(tokens), np.float64)
            for row, i in enumerate(batch.members):
                found[i] = hidden[row, : len(ids[i])].mean(0)
        return found

    def _rows(self, length: int) -> int:
        """Of a batch of this length: a power of two, so that its logits take little memory."""
        fitting = _LOGITS_BYTES // (4 * length * self.run.config.model.vocab_size)
        return min(64, 1 << max(0, fitting.bit_length() - 1))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode_places(text, specials=True)[0] if self._chat else self.tokenizer.encode(text)


def windows(context: Sequence[int], continuation: Sequence[int], limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """The inputs of a model that takes `limit` tokens, and the targets of the last of them.

    A continuation that fits is one window, whose context loses its beginning. A longer one is cut as lm-eval cuts
    (`get_rolling_token_windows`): the last window is as full as the others, and every token is a target once.

    Raises:
        UserError: there is nothing that the first token follows.
    """
    ids, done = [*context, *continuation], len(context)
    if continuation and not context:
        raise UserError("the context has no token; begin it with the one that texts begin or end with")
    while done < len(ids):
        end = min(len(ids), done + limit)
        yield ids[max(0, end - 1 - limit) : end - 1], ids[done:end]
        done = end


class SameShape(NamedTuple):
    """Texts that are asked about at once."""

    rows: int
    length: int
    members: Sequence[int]


def batches_of(lengths: Sequence[int], rows_of: Callable[[int], int], limit: int) -> Iterator[SameShape]:
    """Places in `lengths`, the longest first, in batches that have one of few shapes."""
    shape = lambda i: min(limit, max(_SHORTEST, 1 << (lengths[i] - 1).bit_length()))
    for length, group in itertools.groupby(sorted(range(len(lengths)), key=lambda i: -lengths[i]), shape):
        rows = rows_of(length)
        while members := list(itertools.islice(group, rows)):
            yield SameShape(rows, length, members)


@jax.jit
def _of_targets(logits: jax.Array, targets: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target, float32 [B, T], and whether it is the likeliest token."""
    chosen = jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
    return chosen - jax.nn.logsumexp(logits, -1), logits.argmax(-1) == targets


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    """How many ids both begin with."""
    differing = (i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b)
    return next(differing, min(len(first), len(second)))
