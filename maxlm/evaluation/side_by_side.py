"""The same prompts put to any model, each as it is asked, and which answers are exactly right."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import Conversations, DataConfig, Dataset, EngineConfig, Purpose, SamplingConfig, UserError
from maxlm.data.conversation_formats import BadRecord, Example, Turn, read
from maxlm.data.documents import Unreadable
from maxlm.data.prompts import open_prompts
from maxlm.data.shards import RECORD, Split
from maxlm.data.sources import iterate_documents
from maxlm.data.text_ends import TextEnds
from maxlm.inference.generator import Generator
from maxlm.inference.load import LoadedRun
from maxlm.inference.request import Finish, Request

ANSWER = "answer"
"""The key of a record that says what is right: text, a number, or a list of such."""
_SLOTS = 16


class Question(NamedTuple):
    """A prompt, and what is known of its answer."""

    turns: list[Turn]
    tools: list[dict[str, Any]] | None
    answers: tuple[str, ...]
    """Each of them is right; none: nobody has said."""

    @property
    def text(self) -> str:
        """For people: what was said last."""
        return str(self.turns[-1]["content"])


class Said(NamedTuple):
    """What a model says to a question."""

    ids: tuple[int, ...]
    """As it was asked."""
    tokens: tuple[int, ...]
    """Of its answer, with the one that ended it."""
    finish: Finish
    """Why it ended."""
    text: str
    """Without blanks at the ends."""


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """Of a file of records that can be prompts, or those held out in a folder that was prepared as prompts; the first
    so many, or all.

    Raises:
        UserError: it cannot be read, has no record, or one that is no prompt.
    """
    found = list[Question]()
    if (Path(path) / RECORD).is_file():
        held_out = open_prompts(DataConfig(datasets=(Dataset(path=path),)), Split.VALIDATION)
        if held_out is None:
            raise UserError(f"{path}: has no prompts held out; prepare it with a larger validation_fraction")
        for n in range(min(len(held_out), limit or len(held_out))):
            prompt = held_out[n]
            found.append(_question(prompt.record))
        return found
    for document in iterate_documents(Conversations(paths=(path,), purpose=Purpose.PROMPTS), Unreadable(strict=True)):
        if len(found) == limit:
            break
        try:
            found.append(_question(json.loads(document.text)))
        except BadRecord as error:
            raise UserError(f"{document.file}:{document.row}: {error}") from error
    if not found:
        raise UserError(f"{path}: has no prompts; write records with the key prompt")
    return found


def answers(run: LoadedRun, questions: Sequence[Question], max_new_tokens: int) -> list[Said]:
    """What the model answers to each, taking the likeliest token each time.

    A model with a chat template is asked in its words. One without goes on with the text of the turns.

    Raises:
        UserError: the model writes no text, or has no room for a prompt.
    """
    generator = Generator(run, engine=EngineConfig(slots=min(_SLOTS, len(questions))))
    engine, ends = generator.engine, run.ends or TextEnds.of_documents(run.tokenizer)

    def ids(question: Question) -> tuple[int, ...]:
        if run.chat is None:
            return engine.prompt_ids("\n\n".join(turn["content"] for turn in question.turns))
        return tuple(run.chat.encode(run.tokenizer, question.turns, tools=question.tools).ids)

    prompts = [ids(question) for question in questions]
    requests = [
        Request(
            prompt=prompt,
            max_new_tokens=max(1, min(max_new_tokens, engine.max_length - len(prompt))),
            sampling=SamplingConfig(temperature=0),
            ends=ends.last,
        )
        for prompt in prompts
    ]
    return [
        Said(prompt, tuple(one.tokens), Finish.STOP if one.tokens[-1] in ends.last else Finish.LENGTH, one.text.strip())
        for prompt, one in zip(prompts, generator.answer(requests), strict=True)
    ]


def _question(record: Mapping[str, Any]) -> Question:
    """
    Raises:
        BadRecord: it is no prompt, or what it says to be right cannot be.
    """
    example = read(record, Purpose.PROMPTS)
    assert isinstance(example, Example), "a prompt is of a conversation"
    return Question(example.prompt, example.tools, _right(record))


def _right(record: Mapping[str, Any]) -> tuple[str, ...]:
    said = record.get(ANSWER)
    values = said if isinstance(said, list) else [] if said is None else [said]
    if not all(isinstance(one, str | int | float) and not isinstance(one, bool) for one in values):
        raise BadRecord(f"{ANSWER} = {said!r}: must be text, a number, or a list of such")
    return tuple(str(one) for one in values)
