"""Conversations that people shared from web pages, cleaned as Vicuna's data was: HTML becomes Markdown, words of the
page's buttons go, and what is too long is split between turns."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.data.conversation_formats import BadRecord, Turn, in_order, turns_of

_HTML = re.compile(r"\A\s*<(?:div|p|pre|ul|ol|h[1-6]|table|blockquote)\b[^>]*>.*</\w+>\s*\Z", re.DOTALL)
"""A page's own markup around all of it; a tag inside Markdown is what the text is about."""
_BUTTONS = re.compile(r"^[ \t]*(?:Copy code|Regenerate response|Share Prompt)[ \t]*\n?", re.MULTILINE)
_LANGUAGE = re.compile(r"(?:language|lang)-([\w+#-]+)")
_BLOCKS = frozenset({"p", "div", "section", "article", "ul", "ol", "pre", "table", "blockquote", "hr",
                     "h1", "h2", "h3", "h4", "h5", "h6"})  # fmt: skip


def cleaned(
    record: Mapping[str, Any], limit: int | None = None, size: Callable[[str], int] = len
) -> list[dict[str, Any]]:
    """The conversation as `messages`, in one piece or several; empty if nothing is left of it.

    Turns before the first of the user go, as do empty ones at the end, and a user's that nobody answers. A piece begins
    with the system's turn, if there is one, and with a user's. What is repeated word for word within a record's own
    neighbouring turns of one role, as pages do that were saved twice, is one turn.

    Args:
        record: in one of the formats of conversations.
        limit: what a piece may have in all, of `size`; None: no limit. An exchange that alone has more is left out.
        size: of a turn's text, such as its tokens.

    Raises:
        BadRecord: it is no conversation, or its turns do not alternate even so.
        UserError: beautifulsoup4 is missing.
    """
    turns = list[Turn]()
    for turn in turns_of(record):
        text = turn["content"]
        if turn["role"] == "assistant":
            text = _BUTTONS.sub("", markdown(text) if _HTML.match(text) else text)
        turn = {**turn, "content": text.strip()}
        if not turn["content"] and turn["role"] != "tool" and "tool_calls" not in turn:
            raise BadRecord(f"the turn of {turn['role']} is empty when it is clean")
        if turns and turns[-1] == turn:
            continue
        turns.append(turn)
    system = turns[:1] if turns and turns[0]["role"] == "system" else []
    turns = turns[len(system) :]
    while turns and turns[0]["role"] != "user":
        turns = turns[1:]
    while turns and (turns[-1]["role"] != "assistant" or "tool_calls" in turns[-1]):
        turns = turns[:-1]
    pieces = [[*system, *piece] for piece in _split(turns, system, limit, size)]
    return [{"messages": in_order(piece, "messages", whole=True)} for piece in pieces]


def _split(
    turns: list[Turn], system: list[Turn], limit: int | None, size: Callable[[str], int]
) -> Iterator[list[Turn]]:
    if limit is None or not turns:
        yield from [turns] if turns else []
        return
    starts = [n for n, turn in enumerate(turns) if turn["role"] == "user"]
    exchanges = [turns[a:b] for a, b in zip(starts, [*starts[1:], len(turns)], strict=True)]
    base = sum(size(turn["content"]) for turn in system)
    piece, used = list[Turn](), base
    for exchange in exchanges:
        more = sum(size(turn["content"]) for turn in exchange)
        if piece and used + more > limit:
            yield piece
            piece, used = [], base
        if base + more <= limit:
            piece, used = [*piece, *exchange], used + more
    if piece:
        yield piece


def markdown(html: str) -> str:
    """Markdown that says what the HTML shows: paragraphs, headings, lists, code, tables, quotes, links, emphasis.

    Raises:
        UserError: beautifulsoup4 is missing.
    """
    try:
        import bs4
    except ImportError as error:
        raise UserError(f"HTML needs beautifulsoup4; {pip_install('beautifulsoup4')}") from error
    text = _block(bs4.BeautifulSoup(html, "html.parser"))
    return re.sub(r"\n{3,}", "\n\n", text).strip("\n")


def _block(node: Any) -> str:
    """What is in a node: blocks with blank lines between them, the rest as running text."""
    parts, running = list[str](), ""
    for child in node.children:
        if child.name in _BLOCKS:
            parts += [running.strip(), _one_block(child)]
            running = ""
        else:
            running += _inline(child)
    return "\n\n".join(part for part in [*parts, running.strip()] if part)


def _one_block(node: Any) -> str:
    match node.name:
        case "pre":
            code = node.find("code") or node
            named = _LANGUAGE.search(" ".join(code.get("class") or ()))
            return f"```{named[1] if named else ''}\n{code.get_text().strip(chr(10))}\n```"
        case "ul" | "ol":
            items = node.find_all("li", recursive=False)
            marks = (f"{n}. " if node.name == "ol" else "- " for n in range(int(node.get("start", 1)), 1 << 31))
            said = [(mark, _block(item)) for mark, item in zip(marks, items, strict=False)]
            return "\n".join(
                mark + text.replace("\n\n", "\n").replace("\n", "\n" + " " * len(mark)) for mark, text in said
            )
        case "table":
            rows = [
                [_block(cell).replace("\n", " ") for cell in row.find_all(["th", "td"])] for row in node.find_all("tr")
            ]
            lines = [f"| {' | '.join(row)} |" for row in rows if row]
            return "\n".join([*lines[:1], "|" + " --- |" * max(map(len, rows), default=1), *lines[1:]])
        case "blockquote":
            return "\n".join(f"> {line}".rstrip() for line in _block(node).split("\n"))
        case "hr":
            return "---"
        case "h1" | "h2" | "h3" | "h4" | "h5" | "h6":
            return f"{'#' * int(node.name[1])} {_block(node)}"
        case _:
            return _block(node)


def _inline(node: Any) -> str:
    if node.name is None:
        return re.sub(r"\s+", " ", str(node)) if type(node).__name__ == "NavigableString" else ""
    inner = "".join(_inline(child) for child in node.children)
    match node.name:
        case "br":
            return "\n"
        case "code":
            return f"`{node.get_text()}`"
        case "strong" | "b":
            return f"**{inner.strip()}**" if inner.strip() else inner
        case "em" | "i":
            return f"*{inner.strip()}*" if inner.strip() else inner
        case "a" if node.get("href") and inner.strip():
            return f"[{inner.strip()}]({node['href']})"
        case "script" | "style" | "button" | "svg":
            return ""
        case _:
            return inner
