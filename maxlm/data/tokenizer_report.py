"""How well tokenizers compress text, side by side, for each kind of it."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from maxlm.config import Conversations, Files, UserError
from maxlm.data.documents import Document, Unreadable
from maxlm.data.sources import iterate_documents
from maxlm.data.tokenizers import Tokenizer

_ALL = "all"


@dataclass
class Compression:
    """What a tokenizer makes of some text."""

    documents: int = 0
    text_bytes: int = 0
    words: int = 0
    """Runs of characters without white space."""
    tokens: int = 0
    """Without bos and eos."""
    byte_tokens: int = 0
    """Tokens that spell one byte of a character outside the vocabulary."""
    unknown_tokens: int = 0
    """Tokens for characters that nothing spells."""

    def add(self, other: Compression) -> None:
        for name, value in vars(other).items():
            setattr(self, name, getattr(self, name) + value)

    def figures(self) -> dict[str, float]:
        """Ratios: bytes_per_token, tokens_per_byte; fertility, tokens for each word (Rust et al. 2021,
        arXiv:2012.15613, here with the tokens of white space and marks); shares of the tokens."""
        tokens = max(1, self.tokens)
        return {
            "bytes_per_token": self.text_bytes / tokens,
            "tokens_per_byte": self.tokens / max(1, self.text_bytes),
            "fertility": self.tokens / max(1, self.words),
            "byte_share": self.byte_tokens / tokens,
            "unknown_share": self.unknown_tokens / tokens,
        }


Compressions = Mapping[str, Sequence[Compression]]
"""Of each kind of text, what each tokenizer makes of it; the last kind, where there are several, is all of it."""


def tagged(files: Files, key: str, unreadable: Unreadable) -> Iterator[Document]:
    """Records' texts, each with what the record says under `key` as its tag."""
    records = Conversations(paths=files.paths, pattern=files.pattern)  # which are read whole
    for record in iterate_documents(records, unreadable):
        values = json.loads(record.text)
        kind, text = values.get(key), values.get(files.text_key)
        if not isinstance(text, str):
            unreadable.report(record.file, record.row, f"has no text under {files.text_key!r}; set text_key")
        elif not isinstance(kind, str):
            unreadable.report(record.file, record.row, f"has no name under {key!r}; name another by --by")
        elif text:
            yield Document(text, record.file, record.row, kind)


def first_of_each(documents: Iterable[Document], limit: int) -> Iterator[Document]:
    """Whole documents of each kind until they have `limit` bytes of text or more."""
    sizes = Counter[str]()
    for document in documents:
        if sizes[document.kind] < limit:
            sizes[document.kind] += len(document.text.encode())
            yield document


def measure(tokenizers: Sequence[Tokenizer], documents: Iterable[Document]) -> Compressions:
    """Compression for each kind of document, largest first.

    Raises:
        UserError: there is no document.
    """
    kinds: dict[str, list[Compression]] = {}
    for document in documents:
        size, words = len(document.text.encode()), len(document.text.split())
        found = kinds.setdefault(document.kind, [Compression() for _ in tokenizers])
        for tokenizer, so_far in zip(tokenizers, found, strict=True):
            ids = tokenizer.encode(document.text)
            spelled = sum(i in tokenizer.byte_ids for i in ids)
            unknown = sum(i == tokenizer.unknown_id for i in ids)
            so_far.add(Compression(1, size, words, len(ids), spelled, unknown))
    if not kinds:
        raise UserError("there is no text to measure tokenizers on; name other files")
    ordered = dict(sorted(kinds.items(), key=lambda item: (-item[1][0].text_bytes, item[0])))
    if len(ordered) == 1:
        return ordered
    total = [Compression() for _ in tokenizers]
    for found in ordered.values():
        for so_far, one in zip(total, found, strict=True):
            so_far.add(one)
    return {**{_own(kind): found for kind, found in ordered.items()}, _ALL: total}


def _own(kind: str) -> str:
    """A name beside that of all."""
    return f"{kind} (kind)" if kind == _ALL else kind


def table_of(names: Sequence[str], measured: Compressions) -> Table:
    """A row for each kind and tokenizer."""
    table = Table()
    for name in ("kind", "tokenizer"):
        table.add_column(name, overflow="fold")
    columns = ("documents", "bytes", "tokens", "bytes/token", "tokens/byte", "tokens/word", "byte tokens", "unknown")
    for name in columns:
        table.add_column(name, justify="right", no_wrap=True)
    for kind, found in measured.items():
        for n, (name, one) in enumerate(zip(names, found, strict=True)):
            figures = one.figures()
            table.add_row(
                "" if n else Text(kind),
                Text(name),
                "" if n else f"{one.documents:,}",
                "" if n else f"{one.text_bytes:,}",
                f"{one.tokens:,}",
                *(f"{figures[key]:.3f}" for key in ("bytes_per_token", "tokens_per_byte", "fertility")),
                *(f"{figures[key]:.2%}" for key in ("byte_share", "unknown_share")),
            )
        if len(names) > 1:
            table.add_section()
    return table


def short_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path that says something, if that tells them apart."""
    found = [Path(path) for path in paths]
    short = [path.parent.name or path.name if path.name == "tokenizer" else path.name for path in found]
    return short if len(set(short)) == len(short) else list(paths)


def lines_of(names: Sequence[str], tokenizers: Sequence[Tokenizer]) -> list[str]:
    """What each tokenizer is."""
    return [
        f"{name}: vocabulary {one.vocab_size:,}, bos {one.bos_id}, eos {one.eos_id}, fingerprint {one.fingerprint}"
        for name, one in zip(names, tokenizers, strict=True)
    ]


def as_json(names: Sequence[str], tokenizers: Sequence[Tokenizer], measured: Compressions) -> dict[str, Any]:
    """All figures."""
    about = {
        name: {"vocab_size": one.vocab_size, "fingerprint": one.fingerprint}
        for name, one in zip(names, tokenizers, strict=True)
    }
    kinds = {
        kind: {name: {**vars(one), **one.figures()} for name, one in zip(names, found, strict=True)}
        for kind, found in measured.items()
    }
    return {"tokenizers": about, "kinds": kinds}
