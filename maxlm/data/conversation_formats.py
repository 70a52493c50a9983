"""Records of conversations as people publish them, recognised by their keys, in one inner form.

| keys | format |
| --- | --- |
| messages [tools, label] | OpenAI: role, content, tool_calls; results of tools |
| conversations [system, tools] | ShareGPT: from, value |
| instruction, output [input, system, history] | Alpaca |
| prompt, completion [label] | a pair, and whether it is good |
| chosen, rejected [prompt or messages, score_chosen, score_rejected] | a preference |
| prompt, completions, ranks or ratings | a ranking; rank 1 is the best, of ratings the largest |
| any of these, context | what a teacher is told at the beginning of the conversation, for context distillation |
| text, label | a text and its class |
| query, positive [negative] | what a query should find, and should not |
| prompt; or messages, conversations | to be answered; a last turn of the assistant is left out |

A prompt and completions are text, or lists of messages. Text becomes a turn of the user, and one of the assistant.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, assert_never

import numpy as np

from maxlm.config import Purpose, UserError

Turn = dict[str, Any]
"""As templates have them: `role` (system, user, assistant, tool), `content`, perhaps `tool_calls` and more."""

_ROLES = {
    "system": "system", "developer": "system",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "bard": "assistant", "bing": "assistant",
    "model": "assistant", "function_call": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool", "function_response": "tool",
}  # fmt: skip
_FOLLOWS: dict[str | None, tuple[str, ...]] = {
    None: ("system", "user"),
    "system": ("user",),
    "user": ("assistant",),
    "assistant": ("user",),
    "tool": ("tool", "assistant"),
}
"""Which roles may follow a role; after an assistant that calls tools, only `tool`."""
_MOST = 10**9
"""The largest rank or rating."""
_HUMAN = re.compile(r"\n\n(Human|Assistant):[ ]?")
"""Between turns in Anthropic's files of preferences (arXiv:2204.05862)."""


class BadRecord(UserError):
    """A record that cannot be learned from. The message says what is wrong with it, and not where it stands."""


class Answer(NamedTuple):
    """What may follow a prompt."""

    messages: list[Turn]
    value: float


class Example(NamedTuple):
    """A conversation, or one prompt with several answers."""

    prompt: list[Turn]
    """Nothing of it counts; empty if all is in the one answer."""
    answers: list[Answer]
    tools: list[dict[str, Any]] | None
    context: str | None = None
    """What only a teacher is told."""


class Passages(NamedTuple):
    """Texts outside any conversation, with their values."""

    texts: list[tuple[str, float]]


def read(record: Mapping[str, Any], purpose: Purpose, classes: Sequence[str] = ()) -> Example | Passages:
    """What a record holds for that purpose, checked.

    Args:
        record: an object of JSON. Keys whose value is null are as keys that are missing.
        purpose: which of its texts are wanted, with which values.
        classes: names of the classes, where labels are names.

    Raises:
        BadRecord: it is of no known format, of one that the purpose has no use for, or not as its format wants it.
    """
    present = {key: value for key, value in record.items() if value is not None}
    if purpose in (Purpose.CLASSIFY, Purpose.EMBED) and "messages" not in present:
        return _passages(present, purpose, classes)
    formats = _ASKED if purpose is Purpose.PROMPTS else _FORMATS
    for keys, reader in formats:
        if keys <= present.keys():
            example = reader(present)
            break
    else:
        raise BadRecord(
            f"has the keys {_shown(sorted(present))}, of no known format; known: "
            + "; ".join(", ".join(sorted(keys)) for keys, _ in formats)
        )
    return _for(purpose, present, example, classes)


def turns_of(record: Mapping[str, Any]) -> list[Turn]:
    """The turns of a conversation that is not one of several answers, as they are: roles may be in any order.

    Raises:
        BadRecord: it is of another format, or a turn has no role or no text.
    """
    for key in ("messages", "conversations"):
        if record.get(key) is not None:
            return [*_system(record), *_messages(record[key], key)]
    raise BadRecord(f"has the keys {_shown(sorted(record))}, and neither messages nor conversations")


def _for(purpose: Purpose, record: Mapping[str, Any], example: Example, classes: Sequence[str]) -> Example:
    several, labelled = len(example.answers) > 1, "label" in record
    match purpose:
        case Purpose.SFT:
            best = max(example.answers, key=lambda answer: answer.value)
            if labelled and not several and not _good(record["label"]):
                raise BadRecord(f"label = {record['label']!r}: sft would learn an answer that is labelled bad")
            return example._replace(answers=[best._replace(value=1.0)])
        case Purpose.CONTEXT:
            context = record.get("context")
            if not isinstance(context, str):
                raise BadRecord("context: is missing, or no text; it is what the teacher is told, and may be empty")
            return _for(Purpose.SFT, record, example, classes)._replace(context=context)
        case Purpose.PREFERENCE:
            if not several:
                raise BadRecord("has one answer; a preference needs chosen and rejected, or completions with ratings")
            return example
        case Purpose.KTO | Purpose.BINARY:
            if several or not labelled:
                raise BadRecord(f"{purpose.value} needs prompt, completion and label (true or false)")
            if not example.prompt:
                *prompt, last = example.answers[0].messages
                example = Example(prompt, [Answer([last], 1.0)], example.tools)
            bad = -1.0 if purpose is Purpose.KTO else 0.0
            value = 1.0 if _good(record["label"]) else bad
            return example._replace(answers=[example.answers[0]._replace(value=value)])
        case Purpose.CLASSIFY:
            if not labelled:
                raise BadRecord("has no label, its class")
            value = _class(record["label"], classes)
            return example._replace(answers=[example.answers[0]._replace(value=value)])
        case Purpose.EMBED:
            raise BadRecord("embed needs query and positive, not messages")
        case Purpose.PROMPTS:
            return Example(example.prompt or example.answers[0].messages[:-1], [], example.tools)
        case _:
            assert_never(purpose)


def _passages(record: Mapping[str, Any], purpose: Purpose, classes: Sequence[str]) -> Passages:
    wanted = ("text", "label") if purpose is Purpose.CLASSIFY else ("query", "positive")
    if missing := [key for key in wanted if key not in record]:
        raise BadRecord(f"has no {' and no '.join(missing)}, only {_shown(sorted(record))}; {purpose.value} needs them")
    if purpose is Purpose.CLASSIFY:
        return Passages([(_text(record["text"], "text"), _class(record["label"], classes))])
    negatives = record.get("negative", [])
    negatives = negatives if isinstance(negatives, list) else [negatives]
    texts = [(_text(record["query"], "query"), 1.0), (_text(record["positive"], "positive"), 0.0)]
    texts += [(_text(one, "negative"), -1.0) for one in negatives]
    if len({text for text, _ in texts[1:]}) < len(texts) - 1:
        raise BadRecord("negative: is also positive, or twice there")
    return Passages(texts)


def _openai(record: Mapping[str, Any]) -> Example:
    messages = in_order(_messages(record["messages"], "messages"), "messages", whole=True)
    return Example([], [Answer(messages, 1.0)], _tools(record))


def _sharegpt(record: Mapping[str, Any]) -> Example:
    messages = _messages(record["conversations"], "conversations")
    messages = in_order([*_system(record), *messages], "conversations", whole=True)
    return Example([], [Answer(messages, 1.0)], _tools(record))


def _alpaca(record: Mapping[str, Any]) -> Example:
    messages = _system(record)
    history = record.get("history", [])
    if not isinstance(history, list) or not all(isinstance(pair, list) and len(pair) == 2 for pair in history):
        raise BadRecord("history: must be a list of [question, answer]")
    for n, pair in enumerate(history):
        messages += [
            {"role": role, "content": _text(text, f"history[{n}]")}
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    asked = _text(record["instruction"], "instruction")
    if isinstance(more := record.get("input", ""), str) and more.strip():
        asked += "\n\n" + more
    elif not isinstance(more, str):
        raise BadRecord(f"input: holds {_kind(more)}, not text")
    messages += [_user(asked), _assistant(_text(record["output"], "output"))]
    return Example([], [Answer(messages, 1.0)], _tools(record))


def _pair(record: Mapping[str, Any]) -> Example:
    prompt = _prompt(record)
    return Example(prompt, [Answer(_completion(prompt, record["completion"], "completion"), 1.0)], _tools(record))


def _preference(record: Mapping[str, Any]) -> Example:
    two = [record["chosen"], record["rejected"]]
    given = "prompt" in record or "messages" in record
    if all(isinstance(one, str) and one.startswith("\n\nHuman:") for one in two) and not given:
        two = [_anthropic(one) for one in two]
    if all(isinstance(one, list) and one and _role(one[0]) not in ("assistant", None) for one in two):
        lists = [_messages(one, key) for one, key in zip(two, ("chosen", "rejected"), strict=True)]
        same = 0
        while same < min(map(len, lists)) and lists[0][same] == lists[1][same]:
            same += 1
        if same == len(lists[0]) == len(lists[1]):
            raise BadRecord("chosen and rejected are equal; there is nothing to prefer")
        prompt, answers = lists[0][:same], [one[same:] for one in lists]
        if isinstance(said := record.get("prompt"), str) and said.strip() not in [
            message["content"].strip() for message in prompt
        ]:
            raise BadRecord("prompt: is another than what chosen and rejected begin with")
        if not prompt:
            raise BadRecord("chosen and rejected begin with different messages, and there is no prompt; add prompt")
        in_order(prompt, "chosen", whole=False)
        answers = [_completion(prompt, one, key) for one, key in zip(answers, ("chosen", "rejected"), strict=True)]
    elif given:
        prompt = _prompt(record)
        answers = [_completion(prompt, one, key) for one, key in zip(two, ("chosen", "rejected"), strict=True)]
    else:
        raise BadRecord(
            "chosen and rejected have no prompt; add prompt, or make both lists of messages that begin with it"
        )
    scores = [record.get(f"score_{key}") for key in ("chosen", "rejected")]
    values = [1.0, 0.0] if None in scores else _numbers(scores, "score_chosen and score_rejected", 2)
    if values[0] <= values[1]:
        raise BadRecord(f"score_chosen = {values[0]:g} is not more than score_rejected = {values[1]:g}")
    return Example(prompt, _unequal(list(map(Answer, answers, values))), _tools(record))


def _ranking(record: Mapping[str, Any]) -> Example:
    prompt, completions = _prompt(record), record["completions"]
    if not isinstance(completions, list) or len(completions) < 2:
        raise BadRecord("completions: must be a list of at least two")
    if ("ranks" in record) == ("ratings" in record):
        raise BadRecord("completions need ranks (1 is the best) or ratings (the largest is the best), one of them")
    key, sign = ("ranks", -1.0) if "ranks" in record else ("ratings", 1.0)
    values = [sign * value for value in _numbers(record[key], key, len(completions))]
    answers = [_completion(prompt, one, f"completions[{n}]") for n, one in enumerate(completions)]
    if len(set(values)) == 1:
        raise BadRecord(f"{key}: all are equal; there is nothing to prefer")
    return Example(prompt, _unequal(list(map(Answer, answers, values))), _tools(record))


def _asked(record: Mapping[str, Any]) -> Example:
    """A prompt; of a conversation all before the assistant's last turn, if it ends with that."""
    if "prompt" in record:
        return Example(_prompt(record), [], _tools(record))
    key = "messages" if "messages" in record else "conversations"
    messages = [*_system(record), *_messages(record[key], key)]
    if messages[-1]["role"] == "assistant":
        messages.pop()
    if not messages:
        raise BadRecord(f"{key}: has no turn of the user")
    return Example(in_order(messages, key, whole=False), [], _tools(record))


_FORMATS: list[tuple[frozenset[str], Callable[[Mapping[str, Any]], Example]]] = [
    (frozenset({"chosen", "rejected"}), _preference),
    (frozenset({"prompt", "completions"}), _ranking),
    (frozenset({"prompt", "completion"}), _pair),
    (frozenset({"messages"}), _openai),
    (frozenset({"conversations"}), _sharegpt),
    (frozenset({"instruction", "output"}), _alpaca),
]
"""The first whose keys a record has."""
_ASKED: list[tuple[frozenset[str], Callable[[Mapping[str, Any]], Example]]] = [
    (frozenset({"chosen", "rejected"}), _preference),
    *((frozenset({key}), _asked) for key in ("prompt", "messages", "conversations")),
    (frozenset({"instruction", "output"}), _alpaca),
]
"""The same of what is to be answered, whose answers may be missing, or anything."""


def _unequal(answers: list[Answer]) -> list[Answer]:
    for n, answer in enumerate(answers):
        for other in answers[:n]:
            if answer.messages == other.messages and answer.value != other.value:
                raise BadRecord("two completions are equal, and one is preferred to the other")
    return answers


def _prompt(record: Mapping[str, Any]) -> list[Turn]:
    key = "prompt" if "prompt" in record else "messages"
    asked = record[key]
    if isinstance(asked, str):
        return [*_system(record), _user(_text(asked, key))]
    return in_order([*_system(record), *_messages(asked, key)], key, whole=False)


def _completion(prompt: list[Turn], value: Any, key: str) -> list[Turn]:
    messages = [_assistant(_text(value, key))] if isinstance(value, str) else _messages(value, key)
    if not messages:
        raise BadRecord(f"{key}: is empty")
    return in_order([*prompt, *messages], key, whole=True)[len(prompt) :]


def _system(record: Mapping[str, Any]) -> list[Turn]:
    """An empty one, as many files have it, is none."""
    said = record.get("system", "")
    if not isinstance(said, str):
        raise BadRecord(f"system: holds {_kind(said)}, not text")
    return [{"role": "system", "content": said}] if said.strip() else []


def _user(text: str) -> Turn:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Turn:
    return {"role": "assistant", "content": text}


def _anthropic(text: str) -> list[Turn]:
    _, *parts = _HUMAN.split(text)
    return [
        {"role": "user" if who == "Human" else "assistant", "content": said.strip()}
        for who, said in zip(parts[::2], parts[1::2], strict=True)
    ]


def _role(message: Any) -> str | None:
    """The role of a message, in our words; None: it has none that is known."""
    said = message.get("role", message.get("from")) if isinstance(message, dict) else None
    return _ROLES.get(said) if isinstance(said, str) else None


def _messages(value: Any, key: str) -> list[Turn]:
    if not isinstance(value, list) or not value:
        raise BadRecord(f"{key}: must be a list of messages that is not empty, not {_kind(value)}")
    return [_message(one, f"{key}[{n}]") for n, one in enumerate(value)]


def _message(value: Any, place: str) -> Turn:
    if not isinstance(value, dict):
        raise BadRecord(f"{place}: holds {_kind(value)}, not a message")
    said = value.get("role", value.get("from"))
    role = _role(value)
    if role is None:
        raise BadRecord(f"{place}: role = {said!r} is unknown; known: {', '.join(_ROLES)}")
    content = value.get("content", value.get("value"))
    calls = value.get("tool_calls") or []
    if said == "function_call":  # of ShareGPT: the text is the call
        content, calls = "", _calls_of(content, place)
    elif value.get("function_call"):  # of OpenAI, before there were several
        calls = [value["function_call"]]
    if not isinstance(calls, list):
        raise BadRecord(f"{place}: tool_calls must be a list, not {_kind(calls)}")
    if calls and role != "assistant":
        raise BadRecord(f"{place}: {role} calls tools, which only the assistant does")
    if isinstance(content, list):
        content = "".join(_part(part, place) for part in content)
    if content is not None and not isinstance(content, str):
        raise BadRecord(f"{place}: content holds {_kind(content)}, not text")
    kept = ("name", "tool_call_id", "reasoning_content", "weight")
    message = {"role": role, "content": content or ""} | {key: value[key] for key in kept if value.get(key) is not None}
    return message | ({"tool_calls": [_call(call, place) for call in calls]} if calls else {})


def _part(part: Any, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        text: str = part["text"]
        return text
    kind = part.get("type") if isinstance(part, dict) else _kind(part)
    raise BadRecord(f"{place}: content has a part of type {kind!r}; only text can be learned here")


def _calls_of(text: Any, place: str) -> list[Any]:
    try:
        found = json.loads(text)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRecord(f"{place}: a function_call must be JSON with name and arguments ({error})") from error
    return found if isinstance(found, list) else [found]


def _call(call: Any, place: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise BadRecord(f"{place}: a call of a tool must be an object with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        with contextlib.suppress(ValueError, RecursionError):  # what a model wrote may be no JSON
            arguments = json.loads(arguments) if arguments else {}
    named = {"id": call["id"]} if isinstance(call.get("id"), str) else {}
    return {**named, "type": "function", "function": {"name": function["name"], "arguments": arguments}}


def _tools(record: Mapping[str, Any]) -> list[dict[str, Any]] | None:
    tools = record.get("tools", record.get("functions"))
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else []
        except (ValueError, RecursionError) as error:
            raise BadRecord(f"tools: not JSON ({error})") from error
    if not tools:
        return None
    if not isinstance(tools, list):
        raise BadRecord(f"tools: must be a list, not {_kind(tools)}")
    found = []
    for n, tool in enumerate(tools):
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise BadRecord(f"tools[{n}]: must be an object with the name of a function")
        found.append({"type": "function", "function": function})
    return found


def in_order(messages: list[Turn], key: str, *, whole: bool) -> list[Turn]:
    """The messages, of which none is empty, and whose roles are in order.

    Args:
        messages: of a conversation, from its beginning.
        key: where they are, for what is said of them.
        whole: whether the assistant has the last word; else it comes next.

    Raises:
        BadRecord: it is not so.
    """
    before: Turn | None = None
    for n, message in enumerate(messages):
        last, calling = (None, False) if before is None else (before["role"], "tool_calls" in before)
        allowed = ("tool",) if calling else _FOLLOWS[last]
        if message["role"] not in allowed:
            after = "at the beginning" if last is None else f"after {last}{' that calls tools' if calling else ''}"
            raise BadRecord(f"{key}: message {n} is of {message['role']} {after}, where {' or '.join(allowed)} must be")
        if not message["content"].strip() and message["role"] != "tool" and "tool_calls" not in message:
            raise BadRecord(f"{key}: message {n}, the turn of {message['role']}, is empty")
        before = message
    last = before["role"] if before else None
    if whole and last != "assistant":
        raise BadRecord(f"{key}: ends with {last}, and the assistant must have the last word")
    if not whole and last not in ("user", "tool"):
        raise BadRecord(f"{key}: ends with {last}, and the assistant must come next")
    return messages


def _text(value: Any, key: str) -> str:
    if not isinstance(value, str):
        raise BadRecord(f"{key}: holds {_kind(value)}, not text")
    if not value.strip():
        raise BadRecord(f"{key}: is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:  # JSON can spell half of a surrogate pair
        raise BadRecord(f"{key}: is no Unicode text ({error.reason})") from error
    return value


def _numbers(values: Any, key: str, count: int) -> list[float]:
    fits = isinstance(values, list) and len(values) == count
    if not fits or not all(type(one) in (int, float) and abs(one) <= _MOST for one in values):
        raise BadRecord(f"{key}: must be {count} numbers within +-{_MOST}, one for each completion")
    return [float(np.float32(one)) for one in values]  # as they are kept: what is equal there is equal here


def _good(label: Any) -> bool:
    words = {"true": True, "false": False, "1": True, "0": False}  # of a table, where all is text
    found = words.get(label.lower(), label) if isinstance(label, str) else label
    if found not in (True, False, 1, -1):
        raise BadRecord(f"label = {label!r} must be true or false")
    return bool(found == 1)


def _class(label: Any, classes: Sequence[str]) -> float:
    if isinstance(label, str) and not classes and label.isdecimal() and len(label) < 9:
        label = int(label)  # of a table, where all is text
    if isinstance(label, str):
        if label not in classes:
            raise BadRecord(f"label = {label!r} is none of the classes ({', '.join(classes) or 'none is named'})")
        return float(classes.index(label))
    most = len(classes) if classes else 1 << 24  # float32 has all whole numbers up to there
    if type(label) not in (int, bool, float) or not (0 <= label < most and label == int(label)):
        raise BadRecord(f"label = {label!r} must be the number of a class, from 0 to {most - 1}")
    return float(label)


def _shown(keys: Sequence[str]) -> str:
    return ", ".join(repr(key[:40]) for key in keys[:8]) or "none"


def _kind(value: Any) -> str:
    kinds = {str: "text", int: "a number", float: "a number", bool: "true or false", list: "a list", dict: "an object"}
    return "null" if value is None else kinds.get(type(value), type(value).__name__)
