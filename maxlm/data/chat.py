"""Conversations as ids, by the chat template that a published model comes with.

A template writes control tokens (`<|im_start|>`) between the texts of a conversation. What a user writes must never
become one. So each conversation is rendered twice: as it is, and with the characters of the texts that control tokens
are spelt with replaced by characters that stand for them (private ones of Unicode that occur nowhere). Where the two
differ in nothing else, a control token of the second is the template's own, and one that only the first has is text.
The ids are otherwise those of `apply_chat_template` of transformers.

Not kept apart: added tokens that the tokenizer does not call special (`<tool_call>` of Qwen), as in any text; and half
a name that the template writes itself, where a text has the other half and the template also looks into the text.
"""

from __future__ import annotations

import atexit
import dataclasses
import importlib.util
import json
import multiprocessing
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.config.json_file import read_bytes, read_object
from maxlm.data.tokenizers import Tokenizer

_MAX_CHARS = 1 << 24
"""Of a rendered conversation."""
_MAX_SOURCE = 1 << 20
"""Bytes of a template."""
_SECONDS = 10.0
"""For one rendering, which takes about a millisecond."""
_START_SECONDS = 120.0
_MEMORY = 1 << 30
"""Bytes of address space that rendering may take, Python's own included."""
_COVERS = 4
"""Sets of characters that are tried."""
_PRIVATE = range(0xF0000, 0x10FFFE)
_TOKEN_KEYS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class ChatError(UserError):
    """A conversation that a template does not take, or a template that does not work."""


class Span(NamedTuple):
    """Where the text of a message lies among the ids of a conversation. A token that is partly of the text is in it."""

    message: int
    role: str
    start: int
    stop: int


class Chat(NamedTuple):
    """A conversation as a model sees it."""

    text: str
    ids: list[int]
    spans: tuple[Span, ...]
    """Of the messages whose `content` is a string with more than blanks, if they were asked for, in order. What the
    template leaves out has none."""
    places: tuple[tuple[int, int], ...]
    """Where each id lies in the text: start and stop, in characters."""
    controls: tuple[tuple[int, int], ...]
    """Where the names of the template's own control tokens lie in it."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatTemplate:
    """A template with the names that it writes. It is first read when it is used."""

    sources: Mapping[str, str]
    """Jinja2, by name: `default`, and `tool_use` where tools have one of their own."""
    tokens: Mapping[str, str]
    """`bos_token` and its like: what the template knows them by, and their names."""
    place: str
    """Where it came from, for messages."""

    def render(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        now: float | None = None,
        **variables: Any,
    ) -> str:
        """The text of a conversation, with the names of control tokens in it. For people; models want `encode`.

        Raises:
            ChatError: as `encode`.
        """
        asked = self._values(messages, tools, add_generation_prompt, variables)
        text: str = self._ask(asked, tools is not None, time.time() if now is None else now)["text"]
        return text

    def prefixes(
        self,
        messages: Sequence[Mapping[str, Any]],
        cuts: Sequence[tuple[int, bool]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        now: float,
        **variables: Any,
    ) -> list[str]:
        """For each of `cuts` what `render` says of so many first messages; the bool is `add_generation_prompt`.

        Raises:
            ChatError: as `encode`.
        """
        asked = self._values(messages, tools, False, variables)
        texts: list[str] = self._ask(asked, tools is not None, now, cuts=cuts)["texts"]
        return texts

    def encode(
        self,
        tokenizer: Tokenizer,
        messages: Sequence[Mapping[str, Any]],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        spans: bool = False,
        now: float | None = None,
        **variables: Any,
    ) -> Chat:
        """The ids of a conversation. No bos is put before them: templates write it themselves.

        Args:
            tokenizer: of the model.
            messages: `role`, `content` and whatever else the template reads, as JSON has it.
            tools: JSON schemas of functions.
            add_generation_prompt: whether it ends where the model's answer begins.
            spans: whether to say where each message's text lies.
            now: what the template takes for the time, in seconds since 1970; None: the machine's clock.
            variables: more that the template reads, such as `enable_thinking`.

        Raises:
            ChatError: the template refuses the messages, is no template, takes more time or memory than it may, or
                changes texts so that they cannot be kept apart from control tokens; or a text is no Unicode.
            UserError: jinja2 is not installed.
        """
        asked, now = (
            self._values(messages, tools, add_generation_prompt, variables),
            time.time() if now is None else now,
        )
        render = lambda changed: self._ask(asked | changed, tools is not None, now)["text"]
        text = render({})
        ids, places = tokenizer.encode_places(text, specials=True)
        specials = tokenizer.specials
        values = {key: value for key, value in asked.items() if key not in self.tokens}
        used = {*"".join(self.sources.values()), *"".join(specials), *json.dumps(asked, ensure_ascii=False)}
        free = (chr(code) for code in _PRIVATE if chr(code) not in used)
        own = self._own(text, values, specials, render, free)
        control = set(specials.values())
        found = [place for i, place in zip(ids, places, strict=True) if i in control]
        if (own and not found) or any(not any(start <= a and b <= stop for a, b in own) for start, stop in found):
            ids, places = _apart(tokenizer, text, own)
        where = self._spans(text, places, asked["messages"], render, free) if spans else ()
        return Chat(text, ids, where, tuple(places), tuple(own))

    def _values(self, messages: Any, tools: Any, add_generation_prompt: bool, variables: Any) -> dict[str, Any]:
        values = {"messages": list(messages), "tools": None if tools is None else list(tools), "documents": None}
        values |= variables | {"add_generation_prompt": add_generation_prompt, **self.tokens}
        try:
            json.dumps(values, ensure_ascii=False).encode()
        except (TypeError, ValueError, RecursionError) as error:
            raise ChatError(f"messages: {error}; they must be what JSON can hold, in Unicode") from error
        return values

    def _ask(self, values: dict[str, Any], has_tools: bool, now: float, **more: Any) -> dict[str, Any]:
        source = self.sources.get("tool_use" if has_tools else "default", self.sources.get("default"))
        if source is None:
            raise ChatError(f"{self.place}: has no chat template for this; its templates: {', '.join(self.sources)}")
        answer = _RENDERER.ask({"source": source, "values": values, "limit": _MAX_CHARS, "now": now, **more})
        if "refused" in answer:
            raise ChatError(f"messages: the chat template refuses them: {' '.join(answer['refused'].split())}")
        if "broken" in answer:
            why = " ".join(answer["broken"].split())
            raise ChatError(
                f"{self.place}: its chat template does not work here ({why}); use another model or template"
            )
        return answer

    def _own(
        self, text: str, values: dict[str, Any], specials: Mapping[str, int], render: Any, free: Iterator[str]
    ) -> list[tuple[int, int]]:
        """Where the control tokens lie that the template writes itself, in characters of the text."""
        if not specials:
            return []
        covers = _covers(list(specials))
        letters = "".join(sorted(set("".join(specials))))
        stands_for = dict(zip(letters, free, strict=False))
        back = str.maketrans({other: letter for letter, other in stands_for.items()})
        table = lambda chosen: str.maketrans({letter: stands_for[letter] for letter in chosen})
        for of_texts, of_keys in [(letters, covers[0]), *((cover, cover) for cover in covers)]:
            try:
                masked = render(
                    {key: _translated(value, table(of_texts), table(of_keys)) for key, value in values.items()}
                )
            except ChatError:  # it looks at texts, and takes no others
                continue
            if masked.translate(back) == text:
                names = sorted(specials, key=len, reverse=True)  # as tokenizers do, the longest first
                return [match.span() for match in re.finditer("|".join(map(re.escape, names)), masked)]
        raise ChatError(
            f"messages: the chat template of {self.place} changes texts with any of {' '.join(covers[0])}, so that "
            "they cannot be kept apart from its control tokens; leave such characters out"
        )

    def _spans(
        self, text: str, places: list[tuple[int, int]], messages: list[Any], render: Any, free: Iterator[str]
    ) -> tuple[Span, ...]:
        """Each text's first and last character is replaced by one of its own, to see where it comes out."""
        marked, marks, back = [], [], {}
        for i, message in enumerate(messages):
            content = message.get("content")
            core = content.strip() if isinstance(content, str) else ""
            if core:
                start = content.index(core)
                ends = start, start + len(core) - 1
                characters = list(content)
                mark = tuple(next(free) for _ in set(ends))
                for at, character in zip(ends, mark, strict=False):
                    back[ord(character)] = characters[at]
                    characters[at] = character
                marks.append((i, message["role"], mark))
                message = {**message, "content": "".join(characters)}
            marked.append(message)
        found = render({"messages": marked})
        spans = []
        for i, role, mark in marks:
            counts = {found.count(character) for character in mark}
            if counts == {1}:
                at = found.index(mark[0]), found.index(mark[-1]) + 1
                inside = [n for n, (start, stop) in enumerate(places) if stop > at[0] and start < at[1]]
                spans.append(Span(i, role, inside[0], inside[-1] + 1))
            if counts not in ({0}, {1}) or found.translate(back) != text:
                raise ChatError(
                    f"messages: the chat template of {self.place} repeats or changes message {i}, so that nobody can "
                    "say where its text lies"
                )
        return tuple(spans)


def find_chat_template(folder: Path) -> ChatTemplate | None:
    """That of a published model's folder, as transformers finds it: chat_template.jinja and the files of
    additional_chat_templates; else `chat_template` of chat_template.json or tokenizer_config.json.

    Raises:
        UserError: a file cannot be read, or its template is neither a string nor a list of named ones.
    """
    said = _object(folder / "tokenizer_config.json")
    tokens = {key: name for key in _TOKEN_KEYS if (name := _name(said.get(key))) is not None}
    files = {"default": folder / "chat_template.jinja"}
    files |= {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    sources, place = {name: _text(file) for name, file in files.items() if file.is_file()}, str(folder)
    for file in (folder / "chat_template.json", folder / "tokenizer_config.json"):
        if not sources and (found := _object(file).get("chat_template")):
            sources, place = _named(found, file), str(file)
    return ChatTemplate(sources=sources, tokens=tokens, place=place) if sources else None


def save_chat_template(template: ChatTemplate, folder: Path, ends: Sequence[int]) -> None:
    """Write what `find_chat_template` and `published_ends` read into `folder`, which appears only when it is complete.

    Args:
        template: to write.
        folder: not there yet.
        ends: ids each of which ends an answer.
    """
    partial = folder.with_name(folder.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "additional_chat_templates").mkdir(parents=True)
    for name, source in template.sources.items():
        place = "chat_template.jinja" if name == "default" else f"additional_chat_templates/{name}.jinja"
        (partial / place).write_text(source)
    (partial / "tokenizer_config.json").write_text(json.dumps(dict(template.tokens), indent=2) + "\n")
    (partial / "generation_config.json").write_text(json.dumps({"eos_token_id": list(ends)}, indent=2) + "\n")
    partial.rename(folder)


def _object(file: Path) -> dict[str, Any]:
    return read_object(file, "an object, as the model came with it") if file.is_file() else {}


def _text(file: Path) -> str:
    try:
        return read_bytes(file, _MAX_SOURCE).decode()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file}: cannot be read ({error}); restore the file") from error


def _name(token: Any) -> str | None:
    name = token.get("content") if isinstance(token, dict) else token
    return name if isinstance(name, str) else None


def _named(found: Any, file: Path) -> dict[str, str]:
    if isinstance(found, str):
        return {"default": found}
    listed = found if isinstance(found, list) else []
    pairs: list[Any] = [(one.get("name"), one.get("template")) for one in listed if isinstance(one, dict)]
    if not pairs or not all(isinstance(word, str) for pair in pairs for word in pair):
        raise UserError(f"{file}: chat_template must be a string, or a list of objects with name and template")
    return dict(pairs)


def _translated(value: Any, of_texts: Any, of_keys: Any) -> Any:
    """A JSON value with characters of its strings replaced. `role` and `type` are words of the format, as keys are."""
    if isinstance(value, str):
        return value.translate(of_texts)
    if isinstance(value, dict):
        plain = ("role", "type")
        return {
            key.translate(of_keys): _translated(inner, of_keys if key in plain else of_texts, of_keys)
            for key, inner in value.items()
        }
    return [_translated(inner, of_texts, of_keys) for inner in value] if isinstance(value, list) else value


def _covers(names: Sequence[str]) -> list[str]:
    """Sets of characters of which every name has one, signs before letters."""
    order = sorted({*"".join(names)}, key=lambda c: (c.isalnum(), -sum(c in name for name in names), c))
    found = []
    for first in order[:_COVERS]:
        cover, left = first, [name for name in names if first not in name]
        while left:
            cover += max(order, key=lambda c: (sum(c in name for name in left), not c.isalnum()))
            left = [name for name in left if cover[-1] not in name]
        found.append(cover)
    return found


def _apart(tokenizer: Tokenizer, text: str, own: list[tuple[int, int]]) -> tuple[list[int], list[tuple[int, int]]]:
    """Ids of a text, where the control tokens at those places are the only ones, and their places."""
    ids, places, at = list[int](), list[tuple[int, int]](), 0
    for start, stop in [*own, (len(text), len(text))]:
        some, where = tokenizer.encode_places(text[at:start], specials=False)
        ids += some
        places += [(a + at, b + at) for a, b in where]
        if stop > start:
            ids.append(tokenizer.specials[text[start:stop]])
            places.append((start, stop))
        at = stop
    return ids, places


class _Renderer:
    """The process of `chat_worker.py`: one for all templates, started when it is first asked, and after its death."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None
        atexit.register(self.stop)

    def ask(self, question: dict[str, Any]) -> dict[str, Any]:
        """What the worker answers; `broken` if it does not in time, or dies."""
        with self._lock:
            connection = self._connection or self._start()
            try:
                connection.send_bytes(json.dumps(question).encode())
                if connection.poll(_SECONDS):
                    answer: dict[str, Any] = json.loads(connection.recv_bytes())
                    return answer
                why = f"it takes more than {_SECONDS:g} s"
            except (EOFError, OSError):
                why = "it takes more memory than it may have, or ends the process that renders it"
            except BaseException:
                self.stop()  # its answer would be taken for that of the next question
                raise
            self.stop()
            return {"broken": why}

    def stop(self) -> None:
        """End the process, if there is one."""
        process, connection = self._process, self._connection
        self._process = self._connection = None
        if connection is not None:
            connection.close()
        if process is not None:
            process.kill()
            process.wait()

    def _start(self) -> Connection:
        if importlib.util.find_spec("jinja2") is None:
            raise UserError(f"a chat template needs jinja2; {pip_install('jinja2')}")
        ours, theirs = multiprocessing.Pipe()
        worker = Path(__file__).with_name("chat_worker.py")
        # -P: this folder has files that are called as modules of Python are.
        words = [sys.executable, "-P", str(worker), str(theirs.fileno()), str(_MEMORY)]
        self._process = subprocess.Popen(
            words, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, start_new_session=True,  # Ctrl-C is for this process, whose end closes the pipe
        )  # fmt: skip
        theirs.close()
        self._connection = ours
        try:
            started = ours.poll(_START_SECONDS) and ours.recv_bytes() == b"ready"
        except (EOFError, OSError):
            started = False
        if not started:
            self.stop()
            raise UserError(f"{worker}: does not start; try {sys.executable} -P {worker} to see why")
        return ours


_RENDERER = _Renderer()
