"""Reading documents in blocks and dealing them to the splits, so that a killed run continues where it was."""

from __future__ import annotations

import functools
import hashlib
import math
from collections.abc import Callable, Iterator
from dataclasses import field
from pathlib import Path
from typing import NamedTuple

import numpy as np

from maxlm.config import Conversations, PrepareConfig, UserError
from maxlm.config.fields import config
from maxlm.data.documents import Unreadable
from maxlm.data.encoders import Encoder, Tokenised
from maxlm.data.shards import Count, ShardInfo, Split, n_files, token_dtype
from maxlm.data.sources import describe_documents, iterate_documents
from maxlm.data.workers import DocumentBlock
from maxlm.data.writer import SplitWriter, Written

_BLOCK_BYTES = 1 << 20
_BLOCK_DOCUMENTS = 4096
_LEAST_PART = 16
"""Bytes of a document's end that are worth holding out."""


@config("")
class State:
    """Where a killed run is taken up: after so many documents, with the shards cut back to what is recorded here."""

    documents: Count = 0
    """Documents read."""
    digest: str = ""
    """Of all text up to there, to notice an input that has changed since."""
    reserve: Count | None = None
    """Number of the document that is held back, see `Splitter`."""
    train: Written = field(default_factory=Written)
    """How far it is written."""
    validation: Written = field(default_factory=Written)
    """How far it is written."""


class Reader:
    """The documents as blocks, from where an earlier run left off.

    What that run has written is read again, though not tokenised again: that costs little, and shows whether the
    input is still the same.
    """

    def __init__(
        self,
        prepare: PrepareConfig,
        out: Path,
        unreadable: Unreadable,
        state: State,
        take_back: Callable[[int, bytes, bytes], None],
    ) -> None:
        self._prepare, self._out, self._unreadable = prepare, out, unreadable
        self._state, self._take_back = state, take_back
        self.digest = hashlib.sha256()
        self.empty = 0

    def blocks(self) -> Iterator[DocumentBlock]:
        number, texts, size = 0, list[bytes](), 0
        places, last, before = list[tuple[str, int | None]](), b"", b""
        for document in iterate_documents(self._prepare.documents, self._unreadable, self._out):
            text = document.text.encode()
            if not text:
                self.empty += 1
                continue
            self.digest.update(len(text).to_bytes(8, "little"))
            self.digest.update(text)
            number += 1
            last, previous = text, last or text
            if number <= self._state.documents:
                if number - 1 == self._state.reserve:
                    self._take_back(number - 1, text, previous)
                if number == self._state.documents:
                    self._check_unchanged()
                continue
            before = before if texts else previous
            texts.append(text)
            places.append((document.file, document.row))
            size += len(text)
            if size >= _BLOCK_BYTES or len(texts) >= _BLOCK_DOCUMENTS:
                yield DocumentBlock(number - len(texts), texts, self.digest.hexdigest(), before, places)
                texts, places, size = [], [], 0
        if number < self._state.documents:
            self._check_unchanged()
        if texts:
            yield DocumentBlock(number - len(texts), texts, self.digest.hexdigest(), before, places)

    def _check_unchanged(self) -> None:
        if self.digest.hexdigest() != self._state.digest:
            raise UserError(
                f"{describe_documents(self._prepare.documents)}: has changed since this folder was begun, within the "
                f"first {self._state.documents} documents; delete the folder to begin again"
            )


class _Reserve(NamedTuple):
    number: int
    text: bytes
    tokenised: Tokenised


class Splitter:
    """Deals documents to the two splits.

    While validation is empty, the document with the smallest hash so far is held back, so that at the end there is
    one to hold out; a smaller one, or a document that belongs there, sends it to train. If it has nine tenths of all
    tokens, as a single document has, it is cut: its end is held out. So the first document of all is held back too,
    whatever its hash, until there is a second one. Of records a whole one is held back, and none is cut.
    """

    def __init__(self, prepare: PrepareConfig, out: Path, encode: Encoder, vocab_size: int, state: State) -> None:
        self._encode = encode
        self._of_records = isinstance(prepare.documents, Conversations)
        self._share = prepare.validation_fraction
        self._bound = int(prepare.validation_fraction * 2**64)
        writer = functools.partial(SplitWriter, dtype=token_dtype(vocab_size), files=n_files(prepare.documents))
        self._train = writer(out, Split.TRAIN, prepare.shard_tokens, written=state.train)
        self._validation = writer(out, Split.VALIDATION, prepare.shard_tokens, written=state.validation)
        self._reserve: _Reserve | None = None
        self.cut: int | None = None
        """Number of the document that `finish` has cut, its beginning in train and its end in validation."""

    @property
    def tokens(self) -> int:
        """Tokens written so far."""
        return self._train.total_tokens + self._validation.total_tokens

    def add(self, block: DocumentBlock, documents: Tokenised) -> None:
        """Write the documents of a block."""
        if not len(documents.lengths):
            return
        held_out = documents.hashes < np.uint64(self._bound)
        trained_on = ~held_out
        if self._reserve is not None and self._reserve.tokenised.hashes[0] < self._bound:
            self._release(self._validation)
        if self._bound and not self._validation.total_tokens:
            smallest = int(documents.hashes.argmin())
            alone = block.first == 0 and len(block.texts) == 1
            if held_out[smallest] and not alone:
                self._release(self._train)
            elif self._reserve is None or documents.hashes[smallest] < self._reserve.tokenised.hashes[0]:
                self._release(self._train)
                number = int(documents.documents[smallest])
                own = documents.documents == number
                trained_on &= ~own
                held_out &= ~own
                self._reserve = _Reserve(block.first + number, block.texts[number], documents.where(own))
        self._train.append(documents.where(trained_on))
        self._validation.append(documents.where(held_out))

    def take_back_reserve(self, number: int, text: bytes, before: bytes) -> None:
        """Hold back again the document that an earlier run held back; `before`: the one before it."""
        self._reserve = _Reserve(number, text, self._encode([text], before))

    def state(self, documents: int, digest: str) -> State:
        """Bring everything to the disk and say where to continue after so many documents."""
        return State(
            documents=documents,
            digest=digest,
            reserve=None if self._reserve is None else self._reserve.number,
            train=self._train.sync(),
            validation=self._validation.sync(),
        )

    def finish(self) -> tuple[tuple[ShardInfo, ...], tuple[ShardInfo, ...]]:
        """Close all files; the shards of train and of validation."""
        if (reserve := self._reserve) is not None:
            most = len(reserve.tokenised.tokens) > 9 * self._train.total_tokens
            if most and not self._of_records and (begin := last_part(reserve.text, self._share)):
                self._train.append(self._encode([reserve.text[:begin]], b""))
                self._validation.append(self._encode([reserve.text[begin:]], b""))
                self._reserve, self.cut = None, reserve.number
        self._release(self._validation if self._train.total_tokens else self._train)
        return self._train.finish(), self._validation.finish()

    def close(self) -> None:
        """Let go of the files, whatever state they are in."""
        self._train.close()
        self._validation.close()

    def _release(self, writer: SplitWriter) -> None:
        if self._reserve is not None:
            writer.append(self._reserve.tokenised)
            self._reserve = None


def last_part(text: bytes, share: float) -> int:
    """Where the last part of a text begins, `share` of its bytes or a little more: with a line, if one begins near
    there (so that the part becomes no more than a quarter larger), else with a character. 0: it is too short."""
    begin = len(text) - math.ceil(share * len(text))
    if len(text) - begin < _LEAST_PART:
        return 0
    line = text.rfind(b"\n", 0, begin) + 1
    if line and begin - line <= (len(text) - begin) / 4:
        return line
    while begin > 0 and text[begin] & 0xC0 == 0x80:  # inside a character
        begin -= 1
    return begin
