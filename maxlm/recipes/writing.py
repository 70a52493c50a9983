"""What a policy writes while it is trained: the engine, with the parameters as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from maxlm.config import Rollouts, SamplingConfig
from maxlm.data.prompts import Prompt
from maxlm.data.text_ends import TextEnds
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Finish, Request


class WrittenText(NamedTuple):
    """A completion."""

    tokens: tuple[int, ...]
    """The one that ended it is the last of them."""
    drawn: tuple[bool, ...]
    """Of each token, whether the policy drew it; others were said to it."""
    log_probs: tuple[float, ...]
    """Of each that was drawn, in the distribution that it was drawn from, by the engine; 0 of others."""
    finish: Finish
    text: str
    """Without what ended it."""


class PolicyWriter:
    """Holds the engine and its weights: in `execution.dtype`, on the devices of the run."""

    def __init__(self, loaded: Callable[[Any], LoadedRun], rollouts: Rollouts, length: int) -> None:
        """
        Args:
            loaded: the model with these parameters.
            rollouts: how it writes.
            length: tokens of the longest text, with its prompt.
        """
        self._loaded, self._rollouts = loaded, rollouts
        self._engine = rollouts.engine(length)
        self._generator: Generator | None = None
        self._ends: tuple[int, ...] = ()

    def update(self, parameters: Any) -> None:
        """Write with these from now on."""
        if self._generator is not None:
            self._generator.engine.update_weights(parameters)
            return
        run = self._loaded(parameters)
        self._ends = (run.ends or TextEnds.of_documents(run.tokenizer)).last
        self._generator = Generator(run, engine=self._engine)

    def write(self, prompts: Sequence[Prompt], seeds: Sequence[int], sampling: SamplingConfig) -> list[WrittenText]:
        """A completion of each prompt: a function of the parameters, its prompt, its seed and `sampling`."""
        assert self._generator is not None, "`update` comes first"
        asked = [
            Request(
                prompt=prompt.ids,
                max_new_tokens=self._rollouts.max_new_tokens,
                sampling=sampling,
                seed=seed,
                ends=self._ends,
                logprobs=0,
                processed_logprobs=True,
            )
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        found = []
        for text in self._generator.texts(asked):
            made = text.generation
            assert text.finish is not None, "all have ended"
            log_probs = tuple(score.logprob for score in text.scores)
            found.append(WrittenText(tuple(made.tokens), (True,) * len(made.tokens), log_probs, text.finish, made.text))
        return found


def seed_of(*numbers: int) -> int:
    """A seed of 32 bits, for each of several numbers another."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
