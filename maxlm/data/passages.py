"""Files as passages: pieces of a few paragraphs, each with the place that it stands at.

Markdown and text are taken as they are; of HTML the text is, and of PDF the text of each page. Links that lead out of
the folder are not followed. What cannot be read is passed over, and said.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.data.tokenizers import Tokenizer

_LOG = logging.getLogger(__name__)

TEXTS, PAGES, PDFS = (".md", ".markdown", ".txt"), (".html", ".htm"), (".pdf",)
LARGEST = 32 << 20
"""Bytes of a file."""
PASSAGE, OVERLAP = 256, 64
"""Tokens of a passage at most, and of the end of one that the next begins with."""
_UNSEEN = ("script", "style", "template", "noscript", "head", "nav", "svg")
_PARAGRAPHS = (
    "p", "li", "pre", "td", "th", "dt", "dd", "blockquote", "figcaption", "h1", "h2", "h3", "h4", "h5", "h6", "div",
    "section", "article", "main", "header", "footer", "table", "ul", "ol", "body",
)  # fmt: skip


class Paragraph(NamedTuple):
    """Text that is best not cut."""

    text: str
    first: int
    """Line that it begins at, from 1; of a PDF the page."""
    last: int


class Passage(NamedTuple):
    """What is found."""

    file: str
    """In the folder, with slashes."""
    first: int
    last: int
    text: str
    tokens: int

    @property
    def place(self) -> str:
        """For people: `guide.md:3-9`, `paper.pdf:page 2`."""
        where = f"{self.first}" if self.first == self.last else f"{self.first}-{self.last}"
        return f"{self.file}:{'page ' if self.file.lower().endswith(PDFS) else ''}{where}"


def passages_of(folder: Path, tokenizer: Tokenizer) -> list[Passage]:
    """Those of all documents below a folder, in the order of their names.

    Raises:
        UserError: there is no such folder, it has no document with text, or a package is missing.
    """
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of documents; name one with Markdown, text, HTML or PDF files")
    found: list[Passage] = []
    files = [path for path in _files(folder) if path.suffix.lower() in TEXTS + PAGES + PDFS]
    for path in files:
        name = path.relative_to(folder).as_posix()
        try:
            paragraphs = _paragraphs(path)
        except (OSError, ValueError) as error:
            _LOG.warning("%s: passed over: %s", name, error)
            continue
        found += _passages(name, paragraphs, tokenizer)
    if not found:
        kinds = ", ".join(TEXTS + PAGES + PDFS)
        raise UserError(f"{folder} has {len(files)} documents ({kinds}), and no text in them; name another folder")
    return found


def _files(folder: Path) -> Iterator[Path]:
    """Regular files that lie in the folder, hidden ones not."""
    inside = folder.resolve()
    for place, folders, names in os.walk(folder):  # which follows no link to a folder
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            path = Path(place, name)
            if not name.startswith(".") and path.is_file() and path.resolve().is_relative_to(inside):
                yield path


def _paragraphs(path: Path) -> list[Paragraph]:
    """
    Raises:
        OSError, ValueError: it cannot be read, is too large, or is not what its name says.
        UserError: a package is missing.
    """
    if (size := path.stat().st_size) > LARGEST:
        raise ValueError(f"has {size:,} bytes; at most {LARGEST:,} are read")
    if path.suffix.lower() in PDFS:
        return _of_pdf(path)
    text = path.read_bytes().decode("utf-8-sig")  # UnicodeDecodeError is a ValueError
    return _of_html(text) if path.suffix.lower() in PAGES else list(of_lines(text))


def of_lines(text: str) -> Iterator[Paragraph]:
    """What stands between empty lines."""
    lines: list[str] = []
    for number, line in enumerate([*text.splitlines(), ""], start=1):
        if line.strip():
            lines.append(line)
        elif lines:
            yield Paragraph("\n".join(lines), number - len(lines), number - 1)
            lines = []


def _of_html(text: str) -> list[Paragraph]:
    try:
        from bs4 import BeautifulSoup, Tag
    except ImportError as error:
        raise UserError(f"HTML among documents needs beautifulsoup4; {pip_install('beautifulsoup4')}") from error
    soup = BeautifulSoup(text, "html.parser")
    for tag in soup(_UNSEEN):
        tag.decompose()
    found: list[Paragraph] = []
    of: Tag | None = None
    for string in soup.find_all(string=lambda text: type(text).__name__ == "NavigableString"):
        parent = string.parent
        home = parent if parent is None or parent.name in _PARAGRAPHS else parent.find_parent(_PARAGRAPHS)
        words = str(string) if home is not None and home.name == "pre" else " ".join(string.split())
        if not words.strip():
            continue
        line = (parent.sourceline if parent is not None else None) or 1
        end = line + str(string).strip().count("\n")
        if found and home is of:
            found[-1] = Paragraph(f"{found[-1].text} {words}", found[-1].first, max(end, found[-1].last))
        else:
            found.append(Paragraph(words, line, end))
        of = home
    return found


def _of_pdf(path: Path) -> list[Paragraph]:
    try:
        import pypdf
    except ImportError as error:
        raise UserError(f"PDF files among documents need pypdf; {pip_install('pypdf')}") from error
    try:
        texts = [page.extract_text() for page in pypdf.PdfReader(path).pages]
    except Exception as error:  # of damaged files it raises whatever it meets
        raise ValueError(f"no PDF that can be read ({type(error).__name__}: {str(error)[:80]})") from error
    return [Paragraph(one.text, n, n) for n, text in enumerate(texts, start=1) for one in of_lines(text)]


def _passages(file: str, paragraphs: list[Paragraph], tokenizer: Tokenizer) -> Iterator[Passage]:
    """As many paragraphs each as there is room for. One begins with the last ones of that before, as far as they are
    short; what is too long alone is cut."""
    counts = [len(ids) for ids in tokenizer.encode_batch([one.text for one in paragraphs])]
    pieces = [piece for one, n in zip(paragraphs, counts, strict=True) for piece in _halves(one, n, tokenizer)]
    kept: list[tuple[Paragraph, int]] = []
    new = False
    for piece, n in pieces:
        while kept and sum(size for _, size in kept) + n > PASSAGE:
            if new:
                yield _joined(file, kept)
                new = False
            while kept and (sum(size for _, size in kept) > OVERLAP or sum(size for _, size in kept) + n > PASSAGE):
                kept.pop(0)
        kept.append((piece, n))
        new = True
    if new:
        yield _joined(file, kept)


def _joined(file: str, kept: list[tuple[Paragraph, int]]) -> Passage:
    text = "\n\n".join(one.text for one, _ in kept)
    return Passage(file, kept[0][0].first, kept[-1][0].last, text, sum(n for _, n in kept))


def _halves(one: Paragraph, n: int, tokenizer: Tokenizer) -> list[tuple[Paragraph, int]]:
    """A paragraph in pieces that fit, cut at blanks near their middles."""
    if n <= PASSAGE or len(one.text) < 2:
        return [(one, n)]
    middle = len(one.text) // 2
    at = max(one.text.rfind(" ", 0, middle), one.text.rfind("\n", 0, middle)) + 1 or middle
    left, right = one.text[:at], one.text[at:]
    end, begin = one.last, one.first
    if one.text.count("\n") == one.last - one.first:  # else its lines are not those of the file
        end, begin = one.first + left.rstrip().count("\n"), one.first + left.count("\n")
    halves = Paragraph(left.rstrip(), one.first, end), Paragraph(right, begin, one.last)
    return [piece for half in halves for piece in _halves(half, len(tokenizer.encode(half.text)), tokenizer)]
