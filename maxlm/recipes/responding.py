"""Models that answer prompts, as builders of data ask them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from maxlm.config import Purpose, SamplingConfig, UserError
from maxlm.data.conversation_formats import Example, Turn, read
from maxlm.data.conversations import NOW
from maxlm.data.prompts import Prompt
from maxlm.data.text_ends import TextEnds
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Finish, Request
from maxlm.recipes.completions import Completion
from maxlm.recipes.rewards import Judged

Worth = Callable[[Sequence[Completion]], Judged]
"""What answers are worth."""

_READ = frozenset(
    {
        "messages", "conversations", "prompt", "completion", "completions", "chosen", "rejected", "ranks", "ratings",
        "score_chosen", "score_rejected", "label", "instruction", "input", "output", "system", "history", "functions",
        "tools",
    }
)  # fmt: skip
"""Keys that say what a record is."""


class Inquiry(NamedTuple):
    """A prompt, before any model's template has made ids of it."""

    number: int
    turns: list[Turn]
    """The conversation so far; the assistant comes next."""
    tools: list[dict[str, Any]] | None
    record: Mapping[str, Any]
    """All of it, as it was written."""

    @property
    def others(self) -> dict[str, Any]:
        """What a record of an answer to it also has: tools, and what is there for those that judge answers."""
        tools = {} if self.tools is None else {"tools": self.tools}
        return tools | {key: value for key, value in self.record.items() if key not in _READ}

    def answered(self, text: str) -> dict[str, Any]:
        """The record of a conversation that ends with this answer."""
        return {"messages": [*self.turns, {"role": "assistant", "content": text.strip()}], **self.others}


def question(number: int, record: Mapping[str, Any]) -> Inquiry:
    """What a record asks.

    Raises:
        BadRecord: it asks nothing.
    """
    example = read(record, Purpose.PROMPTS)
    assert isinstance(example, Example), "a prompt is of a conversation"
    return Inquiry(number, example.prompt, example.tools, record)


class Respondent(Protocol):
    """Who answers prompts."""

    name: str
    """For those that read what was written."""

    def __call__(self, questions: Sequence[Inquiry], seeds: Sequence[int]) -> list[Completion | None]:
        """An answer to each, which is a function of the question and its seed; None: it is too long to be answered."""


class RunRespondent:
    """A run, or a published model, as a `Respondent`."""

    def __init__(self, run: LoadedRun, sampling: SamplingConfig, max_new_tokens: int, name: str) -> None:
        """
        Args:
            run: the model.
            sampling: how the next token is drawn.
            max_new_tokens: of an answer.
            name: what it is called.

        Raises:
            UserError: it has no chat template.
        """
        if run.chat is None:
            raise UserError(f"{name}: has no chat template; choose a model that was taught with conversations")
        self.name, self._run, self._template = name, run, run.chat
        self._sampling, self._max_new_tokens = sampling, max_new_tokens
        self._ends = (run.ends or TextEnds.of_documents(run.tokenizer)).last

    def __call__(self, questions: Sequence[Inquiry], seeds: Sequence[int]) -> list[Completion | None]:
        """
        Raises:
            UserError: a question's turns do not go with the template, or as `Generator.texts`.
        """
        room = self._run.config.model.max_seq_len - self._max_new_tokens
        prompts = [self._prompt(one) for one in questions]
        fitting = [n for n, prompt in enumerate(prompts) if len(prompt.ids) <= room]
        asked = [
            Request(
                prompt=prompts[n].ids,
                max_new_tokens=self._max_new_tokens,
                sampling=self._sampling,
                seed=seeds[n],
                ends=self._ends,
            )
            for n in fitting
        ]
        found: list[Completion | None] = [None] * len(questions)
        for n, text in zip(fitting, self._run.generator.texts(asked), strict=True):
            made = text.generation
            found[n] = Completion(prompts[n], made.text, tuple(made.tokens), text.finish or Finish.LENGTH)
        return found

    def _prompt(self, asked: Inquiry) -> Prompt:
        ids = self._template.encode(self._run.tokenizer, asked.turns, tools=asked.tools, now=NOW).ids
        return Prompt(asked.number, tuple(ids), asked.turns, asked.record)
