"""What a policy writes while it is trained: the engine, with the parameters as they are."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import Rollouts, SamplingConfig
from maxlm.data.conversation_formats import Turn
from maxlm.data.prompts import Prompt
from maxlm.data.text_ends import TextEnds
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Finish, Request, nth_seed
from maxlm.recipes.tools import Toolbox


class WrittenText(NamedTuple):
    """A completion."""

    tokens: tuple[int, ...]
    """The one that ended it is the last of them."""
    drawn: tuple[bool, ...]
    """Of each token, whether the policy drew it; others were said to it."""
    log_probs: tuple[float, ...]
    """Of each that was drawn, in the distribution that it was drawn from, by the engine; 0 of others."""
    finish: Finish
    """`LENGTH`, too, where a tool's answer left no room to go on."""
    text: str
    """Of its last turn, without what ended it."""
    calls: int = 0
    """Of tools."""
    failed: int = 0
    """Of the calls, those that were wrong."""
    unanswered: bool = False
    """Whether it ended with calls, after which it could not go on."""


@dataclasses.dataclass
class _Draft:
    """A completion that grows; what it shares with `WrittenText` is as there."""

    prompt: Prompt
    seed: int
    turns: list[Turn]
    """The conversation up to the turn that is written."""
    tokens: list[int] = dataclasses.field(default_factory=list)
    drawn: list[bool] = dataclasses.field(default_factory=list)
    log_probs: list[float] = dataclasses.field(default_factory=list)
    finish: Finish = Finish.LENGTH
    text: str = ""
    calls: int = 0
    failed: int = 0
    unanswered: bool = False

    def add(self, tokens: Sequence[int], log_probs: Sequence[float] | None) -> None:
        """Tokens that were drawn; without log-probabilities, that were said to it."""
        self.tokens += tokens
        self.drawn += [log_probs is not None] * len(tokens)
        self.log_probs += [0.0] * len(tokens) if log_probs is None else log_probs

    @property
    def written(self) -> WrittenText:
        """As it is."""
        lists = tuple(self.tokens), tuple(self.drawn), tuple(self.log_probs)
        return WrittenText(*lists, self.finish, self.text, self.calls, self.failed, self.unanswered)


class PolicyWriter:
    """Holds the engine and its weights: in `execution.dtype`, on the devices of the run."""

    def __init__(
        self, loaded: Callable[[Any], LoadedRun], rollouts: Rollouts, length: int, tools: Toolbox | None = None
    ) -> None:
        """
        Args:
            loaded: the model with these parameters.
            rollouts: how it writes.
            length: tokens of the longest text, with its prompt and virtual tokens.
            tools: that it may call.
        """
        self._loaded, self._rollouts, self._longest, self._tools = loaded, rollouts, length, tools
        self._engine = rollouts.engine(length)
        self._generator: Generator | None = None
        self._ends: tuple[int, ...] = ()
        self.fingerprint = "" if tools is None else tools.fingerprint
        """Of all that writes but the policy."""

    def update(self, parameters: Any) -> None:
        """Write with these from now on."""
        if self._generator is not None:
            self._generator.engine.update_weights(parameters)
            return
        run = self._loaded(parameters)
        self._longest = min(self._longest, run.config.model.max_seq_len) - run.config.model.virtual_tokens
        self._ends = (run.ends or TextEnds.of_documents(run.tokenizer)).last
        self._generator = Generator(run, engine=self._engine)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingConfig) -> list[WrittenText]:
        """A completion of each prompt: a function of the parameters, its prompt, its seed and `sampling`.

        Where it calls tools, their answers are added to it as the template writes them, and it goes on: the tokens that
        were drawn stay as they are.
        """
        assert self._generator is not None, "`update` comes first"
        drafts = [_Draft(prompt, seed, list(prompt.turns)) for prompt, seed in zip(prompts, seeds, strict=True)]
        going, replies = drafts, 0 if self._tools is None else self._rollouts.tool_turns
        for turn in range(replies + 1):
            texts = self._generator.texts([self._request(draft, turn, sampling) for draft in going])
            for draft, text in zip(going, texts, strict=True):
                assert text.finish is not None, "all have ended"
                draft.add(text.generation.tokens, [score.logprob for score in text.scores])
                draft.text, draft.finish = text.generation.text, text.finish
            going = [draft for draft in going if self._goes_on(draft, may=turn < replies)]
            if not going:
                break
        return [draft.written for draft in drafts]

    def _request(self, draft: _Draft, turn: int, sampling: SamplingConfig) -> Request:
        return Request(
            prompt=(*draft.prompt.ids, *draft.tokens),
            max_new_tokens=self._room(draft),
            sampling=sampling,
            seed=nth_seed(draft.seed, turn),
            ends=self._ends,
            logprobs=0,
            processed_logprobs=True,
        )

    def _room(self, draft: _Draft, said: int = 0) -> int:
        """Tokens that may still be drawn after so many more that are said."""
        free = self._longest - len(draft.prompt.ids) - len(draft.tokens) - said
        return min(free, self._rollouts.max_new_tokens - sum(draft.drawn))

    def _goes_on(self, draft: _Draft, *, may: bool) -> bool:
        """Whether its turn calls tools, may do so, and their results, which are then part of it, leave room."""
        if self._tools is None or draft.finish is not Finish.STOP:
            return False
        if (calls := self._tools.calls(draft.text)) is None:
            return False
        draft.calls += len(calls.made)
        draft.unanswered = True
        if not may or (reply := self._tools.reply(draft.turns, calls)) is None:
            return False
        draft.failed += reply.failed
        if self._room(draft, len(reply.ids)) < 1:
            draft.finish = Finish.LENGTH
            return False
        draft.add(reply.ids, None)
        draft.turns += [calls.turn, *reply.turns]
        draft.unanswered = False
        return True


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, for each of several numbers another."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
