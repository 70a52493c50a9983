"""Papers in LaTeX: what a reader reads of them."""

from __future__ import annotations

import re
from typing import NamedTuple

from maxlm.config.cleaning.source_steps import LatexToText
from maxlm.data.cleaning.findings import Finding, Limit, Page

_COMMENT_LINE = re.compile(r"^[ \t]*+%.*+\n?", re.MULTILINE)
_COMMENT = re.compile(r"(?<!\\)((?:\\\\)*+)%.*+")
_COMMENT_BLOCK = re.compile(r"\\begin\{comment\}.*?(?:\\end\{comment\}|\Z)", re.DOTALL)
_BEGIN = re.compile(r"\\begin\{document\}")
_END = re.compile(r"\\end\{document\}.*", re.DOTALL)
_SECTION = re.compile(r"\\(?:part|chapter|section)(?![A-Za-z])")
_BIBLIOGRAPHY = re.compile(
    r"\\begin\{thebibliography\}.*?(?:\\end\{thebibliography\}|\Z)|\\bibliography(?:style)?\s*+\{[^{}]*+\}"
    r"|\\printbibliography(?:\[[^\[\]]*+\])?",
    re.DOTALL,
)
_DEFINITION = re.compile(
    r"\\(?:newcommand|renewcommand|providecommand)\*?\s*+(?:\{\s*+\\(?P<braced>[A-Za-z@]++)\s*+\}|\\(?P<bare>[A-Za-z@]++))"
    r"\s*+(?:\[(?P<count>[1-9])\])?\s*+(?:\[(?P<default>[^\[\]]*+)\])?\s*+(?=\{)"
    r"|\\def\s*+\\(?P<plain>[A-Za-z@]++)(?P<marks>(?:#[1-9])*+)\s*+(?=\{)"
)
_COMMAND = re.compile(r"\\([A-Za-z@]++)")
_BRACE = re.compile(r"\\.|[{}]", re.DOTALL)
_ARGUMENT = re.compile(r"\s*+(\{|\\[A-Za-z@]++|\\?[^\s\\{}])")
_DEFAULT = re.compile(r"\s*+\[([^\[\]]*+)\]")
_PARAMETER = re.compile(r"#([1-9])")
_MANY_EMPTY = re.compile(r"\n(?:[ \t]*\n){2,}")
_ROUNDS = 10
"""How deep macros of macros are written out; one that names itself ends there."""
_KEPT = frozenset(
    ("part", "chapter", "section", "subsection", "subsubsection", "paragraph", "begin", "end", "item", "cite", "ref")
)
"""Commands that stay, also where an author defines them anew: they say how the paper is built."""


class Macro(NamedTuple):
    """What an author defines."""

    arguments: int
    default: str | None
    """Of the first argument, which then stands between `[` and `]` or is missing."""
    body: str


class LatexReader:
    """See `LatexToText`. Verbatim text is treated like other text."""

    def __init__(self, config: LatexToText) -> None:
        self._config = config
        self.limits = (Limit("growth by macros", most=config.most_growth, unit="times as long"),)

    def __call__(self, page: Page) -> Finding:
        text = _COMMENT_LINE.sub("", page.text)
        text = _COMMENT_BLOCK.sub("", _COMMENT.sub(r"\1", text))
        text, macros = _definitions(text) if self._config.macros else (text, {})
        begin = _BEGIN.search(text)
        text = _BIBLIOGRAPHY.sub("", _END.sub("", text[begin.end() if begin else 0 :]))
        written = _expanded(text, macros, int(len(text) * self._config.most_growth) + 1)
        section = _SECTION.search(written)
        growth = len(written) / max(1, len(text))
        written = _MANY_EMPTY.sub("\n\n", written[section.start() if section else 0 :]).strip()
        return Finding((growth,), text=written, changes={"LaTeX": 1}) if written != page.text else Finding((growth,))


def _definitions(text: str) -> tuple[str, dict[str, Macro]]:
    """The text without definitions of macros, and these; of several for one name the last."""
    kept, macros, at = [], {}, 0
    ends = _group_ends(text)
    while found := _DEFINITION.search(text, at):
        name = found["braced"] or found["bare"] or found["plain"]
        end = ends.get(found.end())
        if end is None or name in _KEPT:
            kept.append(text[at : found.end()])
            at = found.end()
            continue
        arguments = int(found["count"] or 0) or len(found["marks"] or "") // 2
        macros[name] = Macro(arguments, found["default"] if arguments else None, text[found.end() + 1 : end - 1])
        kept.append(text[at : found.start()])
        at = end
    return "".join((*kept, text[at:])), macros


def _group_ends(text: str) -> dict[int, int]:
    """Of each `{` whose `}` is there, its place and that behind its `}`."""
    opened, ends = [], {}
    for brace in _BRACE.finditer(text):
        if brace[0] == "{":
            opened.append(brace.start())
        elif brace[0] == "}" and opened:
            ends[opened.pop()] = brace.end()
    return ends


def _expanded(text: str, macros: dict[str, Macro], most: int) -> str:
    """The text with macros written out, and those in them; as soon as it has more than `most` characters, as far as
    that goes."""
    for _ in range(_ROUNDS if macros else 0):
        new = _expanded_once(text, macros, most)
        if new == text or len(new) > most:
            return new
        text = new
    return text


def _expanded_once(text: str, macros: dict[str, Macro], most: int) -> str:
    parts, at, length = [], 0, 0
    ends = _group_ends(text)
    for command in _COMMAND.finditer(text):
        macro = macros.get(command[1])
        if macro is None or command.start() < at:
            continue
        found = _arguments(text, command.end(), macro, ends)
        if found is None:
            continue
        values, end = found
        pieces = _PARAMETER.split(macro.body)  # every second one is a number
        pieces[1::2] = ("".join(values[int(i) - 1 : int(i)]) for i in pieces[1::2])
        body = "".join(pieces)
        parts += [text[at : command.start()], body]
        length += command.start() - at + len(body)
        at = end
        if length > most:
            break
    return "".join((*parts, text[at:]))


def _arguments(text: str, at: int, macro: Macro, ends: dict[int, int]) -> tuple[list[str], int] | None:
    """What stands behind a macro's name, and where it ends; None: not what the macro takes."""
    values = []
    if macro.default is not None:
        given = _DEFAULT.match(text, at)
        values.append(given[1] if given else macro.default)
        at = given.end() if given else at
    while len(values) < macro.arguments:
        found = _ARGUMENT.match(text, at)
        if not found:
            return None
        if found[1] == "{":
            end = ends.get(found.start(1))
            if end is None:
                return None
            values.append(text[found.start(1) + 1 : end - 1])
            at = end
        else:
            values.append(found[1])
            at = found.end()
    if not macro.arguments and text.startswith("{}", at):
        at += 2  # it only ends the name
    return values, at
