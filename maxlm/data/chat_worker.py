"""Renders chat templates, in a process of its own: a template is a program of strangers, and jinja2 bounds neither its
time nor its memory. `maxlm/data/chat.py` starts this file by its path, sends what to render, and kills it if it must.

Nothing of this project is imported, so that it starts fast.
"""

from __future__ import annotations

import datetime
import functools
import json
import resource
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox


class _Refusal(jinja2.TemplateError):
    """What a template says of messages that it does not take."""


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` around what a model writes itself, as templates for training have it: rendered as it is."""

    tags = {"generation"}  # noqa: RUF012 (jinja2's own way)

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _refuse(message: str) -> None:
    raise _Refusal(message)


def _to_json(value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None,
             sort_keys: bool = False) -> str:  # fmt: skip
    """As transformers has it; jinja2's own escapes what HTML would take for a tag."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


@functools.lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _to_json
    environment.globals["raise_exception"] = _refuse
    return environment.from_string(source)


def _answer(asked: dict[str, Any]) -> dict[str, Any]:
    """As `_rendered`; or, where `cuts` are asked for, `texts` of that many first messages each, with or without words
    for the assistant's turn after them."""
    texts = []
    for count, prompt in asked.get("cuts", ()):
        messages = asked["values"]["messages"][:count]
        found = _rendered(asked | {"values": asked["values"] | {"messages": messages, "add_generation_prompt": prompt}})
        if "text" not in found:
            return found
        texts.append(found["text"])
    return {"texts": texts} if "cuts" in asked else _rendered(asked)


def _rendered(asked: dict[str, Any]) -> dict[str, str]:
    """`text`; or `refused`, the template's own words; or `broken`, why there is none."""
    now = datetime.datetime.fromtimestamp(asked["now"])
    clock: Callable[[str], str] = lambda layout: now.strftime(layout)
    pieces, left = [], asked["limit"]
    try:
        for piece in _compiled(asked["source"]).generate(strftime_now=clock, **asked["values"]):
            pieces.append(piece)
            left -= len(piece)
            if left < 0:
                return {"broken": f"it writes more than {asked['limit']:,} characters"}
        return {"text": "".join(pieces)}
    except _Refusal as error:
        return {"refused": str(error.message)}
    except jinja2.TemplateSyntaxError as error:
        return {"broken": f"line {error.lineno}: {error.message}"}
    except MemoryError:
        pieces.clear()
        return {"broken": "it takes more memory than it may have"}
    except RecursionError:
        return {"broken": "it calls itself without an end"}
    except Exception as error:  # whatever a program may raise
        return {"broken": f"{type(error).__name__}: {error}"}


def _serve(connection: Connection) -> None:
    connection.send_bytes(b"ready")
    while True:
        try:
            asked = connection.recv_bytes()
        except EOFError:  # who asked is gone
            return
        connection.send_bytes(json.dumps(_answer(json.loads(asked))).encode())


if __name__ == "__main__":
    _descriptor, _memory = map(int, sys.argv[1:])
    resource.setrlimit(resource.RLIMIT_AS, (_memory, _memory))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _serve(Connection(_descriptor))
