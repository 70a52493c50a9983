"""Guesses at what comes next in texts that are decoded, so that one step reads several tokens of each.

What is guessed decides how many tokens a step gives, and never which: see `maxlm.inference.step.came_true`.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import (
    Alibi,
    DraftModel,
    EngineConfig,
    GroupedQuery,
    Medusa,
    ModelConfig,
    PromptLookup,
    RelativeBias,
    UserError,
)
from maxlm.config.fields import shown
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.request import BadRequest, Request
from maxlm.inference.scheduler import Sequence

if TYPE_CHECKING:
    from maxlm.inference.engine import Engine, Ticket
    from maxlm.inference.load import LoadedRun

_BLOCK_SIZE = 4
"""Of a draft model's cache: what is not in a full block is read again with every guess."""
_ENDLESS = 2**30
"""More texts than are ever asked for at once."""


class Drafter(Protocol):
    """Where an engine's drafts come from."""

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """Ids that may follow each text in this order, at most so many of each; none where the number is 0."""
        ...

    def saw(self, sequence: Sequence, guesses: npt.NDArray[np.int32]) -> None:
        """What the model's Medusa heads make of the text's newest token but one, best first: int32 [heads, guesses]. It
        is asked to propose next, when the text has its newest token too."""
        return None


def drafter_of(
    config: EngineConfig,
    model: ModelConfig,
    tokenizer: Tokenizer,
    draft: LoadedRun | None,
    engine: Callable[[LoadedRun, EngineConfig], Engine],
) -> Drafter | None:
    """What the config asks for.

    Args:
        config: of the engine that verifies.
        model: its own.
        tokenizer: of its texts.
        draft: the model that `DraftModel` names.
        engine: makes one of it.

    Raises:
        UserError: there is no such model, it has other tokens, or as `Engine`.
    """
    match config.speculation:
        case None:
            return None
        case PromptLookup():
            return Lookup(config.speculation)
        case DraftModel(run=place):
            if draft is None:
                raise UserError(
                    f"engine.speculation = DraftModel({shown(place)}) needs that model; give draft=load_run(...)"
                )
            require_same_tokens(tokenizer, draft.tokenizer, place)
            own = EngineConfig(
                slots=config.slots,
                block_size=_BLOCK_SIZE,
                queue=_ENDLESS,
                decode_steps=max(config.drafts - 1, 1),
            )
            return Continuing(engine(draft, own))
        case Medusa():
            check_tree(config.speculation, model)
            return HeadGuesses(config.speculation)
        case _:
            assert_never(config.speculation)


def check_tree(config: Medusa, model: ModelConfig) -> None:
    """
    Raises:
        UserError: the model has not the heads that the tree needs, or attention that cannot tell its paths apart.
    """
    if model.medusa is None:
        raise UserError(
            "engine.speculation = Medusa needs the heads of model.medusa, which is None; train them with task = "
            "TrainMedusa, or take another speculation"
        )
    where = f"engine.speculation.tree = {shown(config.tree)}"
    if config.depth > model.medusa.n_heads:
        raise UserError(f"{where} needs {config.depth} heads, and model.medusa.n_heads = {model.medusa.n_heads}")
    for block in model.layers:
        attention = block.attention
        if isinstance(attention.position, Alibi | RelativeBias):
            raise UserError(
                f"{where}: model.blocks[].attention.position = {type(attention.position).__name__} counts distances "
                "from places in the cache, which are not positions in a tree; take another speculation"
            )
        if isinstance(attention, GroupedQuery) and attention.pattern is not None:
            raise UserError(
                f"{where}: model.blocks[].attention.pattern = {type(attention.pattern).__name__} hides some of what is "
                "near, and a tree must be seen whole; take another speculation"
            )
        if attention.window is not None and attention.window <= config.depth:
            raise UserError(
                f"{where} is {config.depth} deep, and model.blocks[].attention.window = {attention.window} does not "
                f"reach over it; use paths of fewer than {attention.window} nodes"
            )


def require_same_tokens(tokenizer: Tokenizer, other: Tokenizer, place: str) -> None:
    """
    Raises:
        UserError: an id of the other one, which belongs to the model at `place`, is another token.
    """
    if tokenizer.fingerprint == other.fingerprint:
        return

    def name(one: Tokenizer, i: int) -> str:
        found = one.name_of(i) if i < one.vocab_size else None
        return "a token without a name" if found is None else repr(found)

    for i in range(max(tokenizer.vocab_size, other.vocab_size)):
        if name(tokenizer, i) != name(other, i):
            raise UserError(
                f"engine.speculation.run = {shown(place)}: id {i} is {name(other, i)} there and {name(tokenizer, i)} "
                "of the model; use a draft model with the same tokenizer"
            )


class Lookup(Drafter):
    """What followed the text's last tokens where they stood before; see `PromptLookup`."""

    def __init__(self, config: PromptLookup) -> None:
        self._config = config
        self._followed: weakref.WeakKeyDictionary[Sequence, Followed] = weakref.WeakKeyDictionary()

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """As `Drafter`."""
        return [self._of(sequence, most) if most else [] for sequence, most in asked]

    def _of(self, sequence: Sequence, most: int) -> list[int]:
        known = self._followed.setdefault(sequence, Followed(self._config.shortest, self._config.ngram))
        return known.guess(sequence.tokens, most)


class Followed:
    """Of a text that grows: where each run of tokens stood last, but for the end."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._after: dict[tuple[int, ...], int] = {}
        """Run -> the place after it."""
        self._n = 0
        """Tokens that were looked at."""

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What followed the longest run that the text ends with when it stood there last. Where that reaches the text's
        end, the guess goes on with itself: a text that repeats itself does so again.

        Args:
            tokens: of the text, as far as it was and more.
            most: of the guess.
        """
        for end in range(self._n, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._after[tuple(tokens[end - size : end])] = end
        self._n = len(tokens)
        runs = (tuple(tokens[len(tokens) - size :]) for size in self._sizes if size <= len(tokens))
        start = next((self._after[run] for run in runs if run in self._after), None)
        if start is None:
            return []
        guess: list[int] = []
        for place in range(start, start + most):
            guess.append(tokens[place] if place < len(tokens) else guess[place - len(tokens)])
        return guess


class HeadGuesses(Drafter):
    """What the model's Medusa heads guessed when they saw the text last; see `Medusa`."""

    def __init__(self, config: Medusa) -> None:
        self._paths = config.paths
        self._seen: weakref.WeakKeyDictionary[Sequence, npt.NDArray[np.int32]] = weakref.WeakKeyDictionary()

    def saw(self, sequence: Sequence, guesses: npt.NDArray[np.int32]) -> None:
        self._seen[sequence] = guesses

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """As `Drafter`: the nodes of the tree, in its order."""
        return [self._of(sequence)[:most] for sequence, most in asked]

    def _of(self, sequence: Sequence) -> list[int]:
        if (guesses := self._seen.get(sequence)) is None:
            return []
        return [int(guesses[len(path) - 1, path[-1]]) for path in self._paths]


class Continuing(Drafter):
    """What another model goes on with, in an engine of its own; see `DraftModel`.

    It is asked with the whole text each time, and finds most of it in its cache.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def propose(self, asked: list[tuple[Sequence, int]]) -> list[list[int]]:
        """As `Drafter`."""
        found: list[list[int]] = [[] for _ in asked]
        places: dict[Ticket, int] = {}
        for number, (sequence, most) in enumerate(asked):
            most = min(most, self._engine.max_length - len(sequence.tokens))
            if most > 0:
                try:
                    places[self._engine.submit(_beginning(sequence, most))] = number
                except BadRequest:  # it does not fit its cache
                    continue
        while not self._engine.idle:
            for ticket, delta in self._engine.step():
                found[places[ticket]] += delta.tokens
        return found


def _beginning(sequence: Sequence, most: int) -> Request:
    """A text so far as a prompt, that is gone on with as the text is: the noise is that of the seed and the place.
    Penalties of what was generated, and only these, begin anew."""
    asked = sequence.request
    left = max(asked.sampling.min_new_tokens - sequence.generated, 0)
    return Request(
        prompt=tuple(sequence.tokens),
        max_new_tokens=most,
        sampling=dataclasses.replace(asked.sampling, min_new_tokens=left),
        seed=asked.seed,
        ends=asked.ends,
        logit_bias=asked.logit_bias,
        banned=asked.banned,
    )
