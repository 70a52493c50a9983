"""Records of conversations as texts: ids, and which of them the assistant wrote.

The mask is found by rendering: the conversation up to a turn with the template's own words for "now the assistant"
ends where the turn begins, and the conversation with the turn ends where the turn ends. Stock templates need no
markers for that. Where a template writes the same turn in another way once others follow it (Qwen 3 leaves thoughts of
earlier turns out, Mistral puts the system's text into the last turn of the user), the turn is found between control
tokens around its text, of which there must be no doubt; else the record is refused.
"""

from __future__ import annotations

import bisect
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, assert_never

from maxlm.config import Counted, Purpose
from maxlm.data.chat import Chat, ChatError, ChatTemplate, Span
from maxlm.data.conversation_formats import BadRecord, Example, Passages, Turn, read
from maxlm.data.texts import Text, truncated
from maxlm.data.tokenizers import Tokenizer

NOW = 1_722_000_000.0
"""2024-07-26, the day of Llama 3.1's template, wherever one asks for the time: the same records are the same ids."""
_RESERVED = frozenset({"messages", "tools", "documents", "add_generation_prompt"})


def encode(
    record: Mapping[str, Any],
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    *,
    purpose: Purpose = Purpose.SFT,
    counted: Counted = Counted.ANSWERS,
    classes: Sequence[str] = (),
    before: Mapping[str, Any] | None = None,
    max_tokens: int | None = None,
    variables: Mapping[str, Any] | None = None,
) -> list[Text]:
    """The texts of a record, as `Purpose` says. Each but a prompt has at least one id that counts.

    Ids are the template's: no bos and no eos is added to what it writes. Outside conversations, as of queries, texts
    are as documents are. A token that is partly the assistant's counts.

    Args:
        record: an object of JSON in one of the formats of `maxlm/data/conversation_formats.py`.
        template: of the conversations; only texts outside any need none.
        tokenizer: of the model.
        purpose: what the record is for.
        counted: which tokens count; `ALL` is for SFT alone.
        classes: names of the classes, where labels are names.
        before: the record before it, for KTO.
        max_tokens: of each text. A longer conversation loses its oldest turns, from a user's up to the next one's, and
            keeps what the system says; if one exchange is still too long, it is cut as `truncated` does, and a prompt
            is refused: an answer to a part of it could not be judged.
        variables: more that the template reads, such as `enable_thinking`.

    Raises:
        BadRecord: the record, or what the template makes of it, cannot be learned from.
        UserError: as `ChatTemplate.encode` when jinja2 is not installed.
    """
    example = read(record, purpose, classes)
    match example:
        case Passages(texts=passages):
            found = [(tokenizer.document_ids(tokenizer.encode(text)), value) for text, value in passages]
            return [Text(ids, [True] * len(ids), value) for ids, value in found]
        case Example():
            pass
        case _:
            assert_never(example)
    if max_tokens is not None and max_tokens < 3:
        raise BadRecord(f"max_tokens = {max_tokens} must be at least 3")
    if template is None:
        raise BadRecord("is a conversation, and there is no chat template; name one")
    more = dict(variables or {})
    if reserved := (_RESERVED | set(template.tokens)) & set(more):
        raise BadRecord(f"variables must not hold {min(reserved)}, which is the template's own")
    if purpose is Purpose.CLASSIFY or (purpose is Purpose.SFT and counted is Counted.ALL):
        counted = Counted.ALL
    elif counted is Counted.ALL:
        raise BadRecord(f"counted = all: in {purpose.value} only answers count")
    other: list[Turn] | None = None
    if purpose is Purpose.KTO:
        if before is None:
            raise BadRecord("kto compares a completion with that of the record before it, and there is none")
        try:
            other = read(before, purpose, classes).answers[0].messages  # type: ignore[union-attr]
        except BadRecord as error:
            raise BadRecord(f"the record before it: {error}") from error
    talk = _Talk(template, tokenizer, example.tools, more)

    def made(left_out: int) -> list[Text]:
        short = _without_oldest(example, left_out)
        if purpose is Purpose.PROMPTS:
            return [talk.prompt(short.prompt)]
        texts = [talk.text(short.prompt, answer.messages, answer.value, counted) for answer in short.answers]
        if short.context is not None:
            return [*texts, talk.told(short, counted)]
        return texts if other is None else [*texts, talk.text(short.prompt, other, 0.0, counted)]

    texts = made(0)
    if purpose is Purpose.PREFERENCE:
        _refuse_equal(texts)
    if purpose is Purpose.CONTEXT:
        _refuse_others(texts)
    if max_tokens is None or max(len(text.ids) for text in texts) <= max_tokens:
        return texts
    fits = lambda left_out: max(len(text.ids) for text in made(left_out)) <= max_tokens
    texts = made(bisect.bisect_left(range(_exchanges(example) - 1), True, key=fits))
    if purpose is Purpose.PROMPTS:
        if (length := len(texts[0].ids)) > max_tokens:
            raise BadRecord(f"is a prompt of {length} tokens with its last turn alone, max_tokens = {max_tokens}")
        return texts
    if purpose is Purpose.CONTEXT and (most := max(len(text.ids) for text in texts)) > max_tokens:
        raise BadRecord(f"the context and one exchange are {most} tokens, more than max_tokens = {max_tokens}")
    return [truncated(text, max_tokens, int(text.ids[0] == tokenizer.bos_id))[0] for text in texts]


def between_turns(
    said: list[Turn], n: int, template: ChatTemplate, tokenizer: Tokenizer, tools: list[dict[str, Any]]
) -> list[int]:
    """The ids after the token that ends the assistant's turn n, up to where its next turn begins.

    Raises:
        BadRecord: the template refuses the messages, or nobody can say where that turn ends.
    """
    return _Talk(template, tokenizer, tools, {}).between(said, n).ids


def _refuse_equal(texts: list[Text]) -> None:
    """A template may leave out what two answers differ by, as blanks at their ends."""
    values = dict[tuple[int, ...], float]()
    for text in texts:
        if values.setdefault(tuple(text.ids), text.value) != text.value:
            raise BadRecord("two completions are equal as the template writes them, and one is preferred to the other")


def _refuse_others(texts: list[Text]) -> None:
    """A tokenizer may put what the assistant says together with what is before it."""
    counted = [[i for i, counts in zip(text.ids, text.counts, strict=True) if counts] for text in texts]
    if counted[0] != counted[1]:
        raise BadRecord("the answers are other tokens after the context; use a template that keeps turns apart")


def _exchanges(example: Example) -> int:
    return sum(turn["role"] == "user" for turn in example.prompt or example.answers[0].messages)


def _without_oldest(example: Example, count: int) -> Example:
    """Without that many of the oldest turns of the user, and what follows each."""
    turns = example.prompt or example.answers[0].messages
    if count == 0:
        return example
    first = [n for n, turn in enumerate(turns) if turn["role"] == "user"][count]
    left = [*(turn for turn in turns[:1] if turn["role"] == "system"), *turns[first:]]
    if example.prompt:
        return example._replace(prompt=left)
    return example._replace(answers=[example.answers[0]._replace(messages=left)])


def told(turns: Sequence[Turn], context: str) -> list[Turn]:
    """A conversation at whose beginning the system says the context, and then what else it says."""
    own = turns[:1] if turns[0]["role"] == "system" else []
    said = "\n\n".join([context, *(turn["content"] for turn in own)])
    return [{"role": "system", "content": said}, *turns[len(own) :]]


class _Talk(NamedTuple):
    """What the conversations of a record have in common."""

    template: ChatTemplate
    tokenizer: Tokenizer
    tools: list[dict[str, Any]] | None
    variables: dict[str, Any]

    def text(self, prompt: list[Turn], answer: list[Turn], value: float, counted: Counted) -> Text:
        """
        Raises:
            BadRecord: see `encode`.
        """
        said = [*prompt, *answer]
        turns = [n for n, message in enumerate(said) if message["role"] == "assistant" and n >= len(prompt)]
        turns = [n for n in turns if said[n].get("weight") != 0]  # of OpenAI: a turn that is not to be learned
        return self._made(said, lambda messages: self._text(messages, turns, value, counted))

    def prompt(self, said: list[Turn]) -> Text:
        """The conversation up to where the assistant's next turn begins, of which nothing counts.

        Raises:
            BadRecord: see `encode`.
        """

        def asked(messages: list[Turn]) -> Text:
            chat = self.template.encode(self.tokenizer, messages, tools=self.tools, now=NOW, **self.variables)
            self._check_all_is_there(messages, chat)
            return Text(chat.ids, [False] * len(chat.ids), 0.0)

        return self._made(said, asked)

    def between(self, said: list[Turn], n: int) -> Text:
        """See `between_turns`; nothing counts."""

        def after(messages: list[Turn]) -> Text:
            chat = self.template.encode(self.tokenizer, messages, tools=self.tools, now=NOW, **self.variables)
            self._check_all_is_there(messages, chat)
            _, stop = self._turn(messages, n, chat, *self._render(messages, [(n, True), (n + 1, False)]))
            ids = [i for i, (start, _) in zip(chat.ids, chat.places, strict=True) if start >= stop]
            return Text(ids, [False] * len(ids), 0.0)

        return self._made(said, after)

    def _made(self, said: list[Turn], make: Callable[[list[Turn]], Text]) -> Text:
        """What `make` makes of messages as templates know them."""
        messages = [{key: inner for key, inner in message.items() if key != "weight"} for message in said]
        errors: list[ChatError] = []
        for arguments in (lambda value: value, _as_string):  # most templates want objects, some the string itself
            try:
                return make(_with_arguments(messages, arguments))
            except ChatError as error:
                errors.append(error)
                if not any("tool_calls" in message for message in messages):
                    break
        raise BadRecord(str(errors[0])) from errors[0]

    def told(self, example: Example, counted: Counted) -> Text:
        """The conversation with its context at the beginning, where it has any.

        Raises:
            BadRecord: see `encode`.
        """
        [answer], context = example.answers, example.context or ""
        if not context.strip():
            return self.text(example.prompt, answer.messages, 0.0, counted)
        if example.prompt:
            return self.text(told(example.prompt, context), answer.messages, 0.0, counted)
        return self.text([], told(answer.messages, context), 0.0, counted)

    def _text(self, messages: list[Turn], turns: list[int], value: float, counted: Counted) -> Text:
        chat = self.template.encode(
            self.tokenizer, messages, tools=self.tools, add_generation_prompt=False, now=NOW, **self.variables
        )
        self._check_all_is_there(messages, chat)
        match counted:
            case Counted.ALL:
                return Text(chat.ids, [True] * len(chat.ids), value)
            case Counted.LAST:
                turns = [n for n in turns if n == len(messages) - 1]
            case Counted.ANSWERS:
                pass
            case _:
                assert_never(counted)
        cuts = [(n, True) for n in turns] + [(n + 1, False) for n in turns if n + 1 < len(messages)]
        begins = dict(zip(cuts, self._render(messages, cuts), strict=True))
        starts, stops = list[int](), list[int]()
        for n in turns:
            start, stop = self._turn(messages, n, chat, begins[n, True], begins.get((n + 1, False), chat.text))
            if stops and start < stops[-1]:
                raise BadRecord(f"message {n}: the template does not keep it apart from the turn before it")
            starts.append(start)
            stops.append(stop)
        counts = [False] * len(chat.ids)
        for i, (a, b) in enumerate(chat.places):
            turn = bisect.bisect_right(stops, a)  # the first that ends after the token begins
            counts[i] = turn < len(turns) and (b > starts[turn] or a >= starts[turn])
        if not any(counts):
            raise BadRecord("nothing counts: no turn is the assistant's to learn")
        return Text(chat.ids, counts, value)

    def _check_all_is_there(self, messages: list[Turn], chat: Chat) -> None:
        """A template that does not know tools, or a role, may leave them out and say nothing."""
        for n, message in enumerate(messages):
            if message["role"] in ("system", "user") and message["content"].strip() not in chat.text:
                raise BadRecord(f"message {n}: the template leaves out or changes the text of {message['role']}")
            for call in message.get("tool_calls", ()):
                if call["function"]["name"] not in chat.text:
                    raise BadRecord(f"message {n}: the template leaves out calls of tools; use another template")
        for tool in self.tools or ():
            if tool["function"]["name"] not in chat.text:
                raise BadRecord("the template leaves out tools; use another template")

    def _turn(self, messages: list[Turn], n: int, chat: Chat, before: str, through: str) -> tuple[int, int]:
        """Where the turn of message n begins and ends in the text, its end token included."""
        spans: tuple[Span, ...] | None = None
        start = len(before)
        if not chat.text.startswith(before):
            start = next((i for i, (a, b) in enumerate(zip(before, chat.text, strict=False)) if a != b), len(chat.text))
        if before[start:].strip():  # blanks that only the prompt has are as if it had none
            spans = self._spans(messages, n)
            start = self._start_around(before, _span(spans, n), chat, n)
        elif any(control[0] == start for control in chat.controls) and [before] == self._render(messages, [(n, False)]):
            spans = self._spans(messages, n)  # it does not say "now the assistant": it has no words of its own for that
            start = _characters(_span(spans, n), chat)[0]
        inside = [control for control in chat.controls if start <= control[0] and control[1] <= len(through)]
        if chat.text.startswith(through) and inside and not chat.text[inside[-1][1] : len(through)].strip():
            return start, inside[-1][1]
        if not any(start <= control[0] for control in chat.controls) or n + 1 == len(messages):
            raise BadRecord(
                f"message {n}: the template ends the assistant's turn with no control token, so that a model would "
                "never learn to stop; use another template"
            )
        spans = self._spans(messages, n) if spans is None else spans
        return start, self._stop_around(through, spans, messages, chat, n, start)

    def _start_around(self, before: str, own: Span, chat: Chat, n: int) -> int:
        """The turn begins after the control token before its text and after what the template writes there itself."""
        at, _ = _characters(own, chat)
        controls = [control for control in chat.controls if control[1] <= at]
        names = list(self._names.finditer(before))
        if controls and names:
            (start, stop), last = controls[-1], names[-1]
            here, there = chat.text[stop:at], before[last.end() :]
            if last[0] == chat.text[start:stop] and (here.startswith(there) or there.startswith(here)):
                return stop + min(len(here), len(there))
        raise BadRecord(f"message {n}: nobody can say where the assistant's turn begins in what the template writes")

    def _stop_around(
        self, through: str, spans: tuple[Span, ...], messages: list[Turn], chat: Chat, n: int, start: int
    ) -> int:
        """The turn ends with the control token after its text, and that is before the text of the next message."""
        following = [_characters(span, chat)[0] for span in spans if span.message == n + 1]
        if following:
            calls = "tool_calls" in messages[n]
            at = start if calls else _characters(_span(spans, n), chat)[1]
            ends = [(a, b) for a, b in chat.controls if at <= a and b <= following[0]]
            if calls:  # control tokens may be around calls too: the one that ends the turn when it is the last
                names = self._names.findall(through)
                ends = [(a, b) for a, b in ends if names and chat.text[a:b] == names[-1]]
            if ends:
                return ends[0][1]
        raise BadRecord(f"message {n}: nobody can say where the assistant's turn ends in what the template writes")

    def _spans(self, messages: list[Turn], n: int) -> tuple[Span, ...]:
        try:
            return self.template.encode(
                self.tokenizer, messages, tools=self.tools, add_generation_prompt=False, spans=True, now=NOW,
                **self.variables,
            ).spans  # fmt: skip
        except ChatError as error:
            raise BadRecord(
                f"message {n}: the template writes earlier turns in another way, and nobody can say where they lie "
                f"({error}); count the last turn alone"
            ) from error

    def _render(self, messages: list[Turn], cuts: list[tuple[int, bool]]) -> list[str]:
        return self.template.prefixes(messages, cuts, tools=self.tools, now=NOW, **self.variables)

    @property
    def _names(self) -> re.Pattern[str]:
        names = sorted(self.tokenizer.specials, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names)) or r"(?!)")


def _span(spans: tuple[Span, ...], n: int) -> Span:
    for span in spans:
        if span.message == n:
            return span
    raise BadRecord(
        f"message {n}: has no text, and the template writes earlier turns in another way, so that nobody can say "
        "where it lies; count the last turn alone"
    )


def _characters(span: Span, chat: Chat) -> tuple[int, int]:
    return chat.places[span.start][0], chat.places[span.stop - 1][1]


def _with_arguments(messages: list[Turn], change: Any) -> list[Turn]:
    def changed(call: dict[str, Any]) -> dict[str, Any]:
        function = call["function"]
        return {**call, "function": {**function, "arguments": change(function["arguments"])}}

    return [
        {**message, "tool_calls": [changed(call) for call in message["tool_calls"]]}
        if "tool_calls" in message
        else message
        for message in messages
    ]


def _as_string(arguments: Any) -> str:
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
