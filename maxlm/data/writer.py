"""Writing the shards of one split so that a killed run can take them up again."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO, Any

import numpy as np

from maxlm.config import UserError
from maxlm.config.fields import config
from maxlm.data.shards import TEXT, Count, ShardInfo, Split, file_sha256, shard_files
from maxlm.data.workers import Tokenised


@config("")
class Written:
    """How far a split is written: its finished shards, and how much of the next one."""

    shards: tuple[ShardInfo, ...] = ()
    """The finished ones."""
    tokens: Count = 0
    """Of the next one."""
    documents: Count = 0
    """Of the next one."""
    text_bytes: Count = 0
    """Of the next one."""
    counted: Count = 0
    """Of the next one, of conversations."""
    records_bytes: Count = 0
    """Of the next one, of prompts."""


class SplitWriter:
    """Appends documents to shard files, starting another when one has `shard_tokens` tokens.

    Where a shard ends depends on the documents alone, so a run taken up from `written` writes the same bytes as one
    that was never stopped.
    """

    def __init__(
        self,
        folder: Path,
        split: Split,
        shard_tokens: int,
        dtype: np.dtype[Any],
        written: Written,
        *,
        files: int = 2,
    ) -> None:
        """`files`: of a shard, as `shards.n_files` says."""
        self._folder, self._split, self._shard_tokens, self._dtype = folder, split, shard_tokens, dtype
        self._n_files = files
        self._shards = list(written.shards)
        self._tokens, self._documents, self._text_bytes = written.tokens, written.documents, written.text_bytes
        self._counted, self._records_bytes = written.counted, written.records_bytes
        self.total_tokens = written.tokens + sum(shard.tokens for shard in written.shards)
        self._streams: list[IO[bytes]] | None = None
        self._remove_what_followed()
        if written.documents:
            n = written.documents
            sizes = [written.tokens * dtype.itemsize, n * 8, written.tokens, n * TEXT.itemsize, written.records_bytes]
            self._streams = self._reopen(sizes)

    def append(self, documents: Tokenised) -> None:
        """Write documents at the end of the split."""
        lengths = documents.lengths
        done, first_token = 0, 0
        while done < len(lengths):
            ends = np.cumsum(lengths[done:])
            count = min(len(ends), int(np.searchsorted(ends, self._shard_tokens - self._tokens)) + 1)
            added = int(ends[count - 1])
            if self._streams is None:
                self._streams = [file.open("wb") for file in self._files(len(self._shards))]
            tokens, offsets, *of_records = self._streams
            of_tokens, of_documents = slice(first_token, first_token + added), slice(done, done + count)
            tokens.write(documents.tokens[of_tokens].tobytes())
            offsets.write((self._tokens + ends[:count] - lengths[of_documents]).astype("<i8").tobytes())
            if of_records:
                assert documents.texts is not None and documents.counts is not None
                of_records[0].write(documents.counts[of_tokens].tobytes())
                of_records[1].write(documents.texts[of_documents].tobytes())
                self._counted += int(documents.counts[of_tokens].sum())
            if of_records[2:]:
                assert documents.records is not None
                lines = b"".join(record + b"\n" for record in documents.records[of_documents])
                of_records[2].write(lines)
                self._records_bytes += len(lines)
            self._tokens += added
            self._documents += count
            self._text_bytes += int(documents.text_bytes[of_documents].sum())
            self.total_tokens += added
            done, first_token = done + count, first_token + added
            if self._tokens >= self._shard_tokens:
                self._finish_shard()

    def sync(self) -> Written:
        """Bring everything appended so far to the disk, and say how far that is."""
        for stream in self._streams or ():
            stream.flush()
            os.fsync(stream.fileno())
        return Written(
            shards=tuple(self._shards),
            tokens=self._tokens,
            documents=self._documents,
            text_bytes=self._text_bytes,
            counted=self._counted,
            records_bytes=self._records_bytes,
        )

    def finish(self) -> tuple[ShardInfo, ...]:
        """Close the last shard; all shards of the split."""
        if self._streams is not None:
            self._finish_shard()
        return tuple(self._shards)

    def close(self) -> None:
        """Let go of the files, whatever state they are in."""
        for stream in self._streams or ():
            stream.close()
        self._streams = None

    def _finish_shard(self) -> None:
        self.sync()
        self.close()
        tokens, offsets, *of_records = map(file_sha256, self._files(len(self._shards)))
        self._shards.append(
            ShardInfo(
                tokens=self._tokens,
                documents=self._documents,
                text_bytes=self._text_bytes,
                tokens_sha256=tokens,
                offsets_sha256=offsets,
                counted=self._counted if of_records else None,
                counts_sha256=of_records[0] if of_records else None,
                texts_sha256=of_records[1] if of_records else None,
                records_bytes=self._records_bytes if of_records[2:] else None,
                records_sha256=of_records[2] if of_records[2:] else None,
            )
        )
        self._tokens = self._documents = self._text_bytes = self._counted = self._records_bytes = 0

    def _files(self, number: int) -> tuple[Path, ...]:
        return shard_files(self._folder, self._split, number)[: self._n_files]

    def _remove_what_followed(self) -> None:
        """Delete shards begun after the state that we continue from."""
        number = len(self._shards) + (self._documents > 0)
        while any(file.exists() for file in shard_files(self._folder, self._split, number)):
            for file in shard_files(self._folder, self._split, number):
                file.unlink(missing_ok=True)
            number += 1

    def _reopen(self, sizes: list[int]) -> list[IO[bytes]]:
        """The unfinished shard's files, cut back to the recorded sizes."""
        files = self._files(len(self._shards))
        for file, size in zip(files, sizes, strict=False):
            seen = file.stat().st_size if file.exists() else 0
            if seen < size:
                raise UserError(
                    f"{file}: {seen} bytes, at least {size} expected; delete {self._folder} and prepare it again"
                )
            os.truncate(file, size)
        return [file.open("ab") for file in files]
