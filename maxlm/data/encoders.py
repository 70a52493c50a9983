"""From documents, as bytes, to tokens: what is done in the processes that tokenise."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from maxlm.config import Conversations, PrepareConfig, Purpose, serialize
from maxlm.data.chat import ChatTemplate, find_chat_template
from maxlm.data.conversation_formats import BadRecord
from maxlm.data.conversations import encode
from maxlm.data.shards import CHAT, TEXT, TOKENIZER, UNFINISHED, token_dtype
from maxlm.data.texts import Text
from maxlm.data.tokenizers import Tokenizer, load_tokenizer


@dataclass(frozen=True, kw_only=True)
class Tokenised:
    """Documents as n texts of tokens: one of each, or those of a record."""

    tokens: npt.NDArray[np.unsignedinteger[Any]]
    """`[sum(lengths)]`, with bos and eos."""
    lengths: npt.NDArray[np.int64]
    """`[n]`: tokens of each text."""
    documents: npt.NDArray[np.int64]
    """`[n]`: which of the documents each text is of."""
    hashes: npt.NDArray[np.uint64]
    """`[n]`: a hash of its document, even over all 64-bit numbers."""
    text_bytes: npt.NDArray[np.int64]
    """`[n]`: UTF-8 bytes of each text; of a record's, of what is counted."""
    counts: npt.NDArray[np.bool_] | None = None
    """`[sum(lengths)]`: whether the loss counts it. Of records."""
    texts: npt.NDArray[np.void] | None = None
    """`[n]` of `shards.TEXT`. Of records."""
    records: tuple[bytes, ...] | None = None
    """`[n]`: the record of each text, a line of JSON. Of prompts."""
    refused: tuple[tuple[int, str], ...] = field(default=())
    """Documents that give no text, and why."""

    def where(self, mask: npt.NDArray[np.bool_]) -> Tokenised:
        """The texts where `mask[n]` is set."""
        of_tokens = np.repeat(mask, self.lengths)
        return Tokenised(
            tokens=self.tokens[of_tokens],
            lengths=self.lengths[mask],
            documents=self.documents[mask],
            hashes=self.hashes[mask],
            text_bytes=self.text_bytes[mask],
            counts=None if self.counts is None else self.counts[of_tokens],
            texts=None if self.texts is None else self.texts[mask],
            records=None if self.records is None else tuple(itertools.compress(self.records, mask)),
        )


Encoder = Callable[[Sequence[bytes], bytes], Tokenised]
"""Documents in UTF-8, and the one before the first of them."""


def text_hash(text: bytes) -> int:
    """The 64-bit number that decides which split a document belongs to."""
    return int.from_bytes(blake2b(text, digest_size=8).digest(), "little")


def open_encoder(folder: Path) -> Encoder:
    """As the config says with which the data set in `folder` is being made; its tokenizer and template are there."""
    documents, tokenizer = (
        serialize.load(PrepareConfig, folder / UNFINISHED).documents,
        load_tokenizer(folder / TOKENIZER),
    )
    if not isinstance(documents, Conversations):
        return lambda texts, before: tokenise(tokenizer, texts)
    template = find_chat_template(folder / CHAT)
    return lambda texts, before: encode_records(documents, template, tokenizer, texts, before)


def ends_of_answers(template: ChatTemplate, tokenizer: Tokenizer) -> list[int]:
    """The ids that may end what the assistant writes: as a template ends it, and the end of a document."""
    said = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    try:
        [text] = encode(said, template, tokenizer)
    except BadRecord:  # a template for other conversations than this one
        return [tokenizer.eos_id]
    last = [i for i, yes in zip(text.ids, text.counts, strict=True) if yes][-1]
    return list(dict.fromkeys([last, tokenizer.eos_id]))


def tokenise(tokenizer: Tokenizer, texts: Sequence[bytes]) -> Tokenised:
    """Of plain documents, at least one."""
    documents = [tokenizer.document_ids(ids) for ids in tokenizer.encode_batch([text.decode() for text in texts])]
    return Tokenised(
        tokens=np.concatenate([np.array(ids, token_dtype(tokenizer.vocab_size)) for ids in documents]),
        lengths=np.array([len(ids) for ids in documents], np.int64),
        documents=np.arange(len(documents)),
        hashes=np.array([text_hash(text) for text in texts], np.uint64),
        text_bytes=np.array([len(text) for text in texts], np.int64),
    )


def encode_records(
    conversations: Conversations,
    template: ChatTemplate | None,
    tokenizer: Tokenizer,
    records: Sequence[bytes],
    before: bytes,
) -> Tokenised:
    """Of records in JSON; those that cannot be learned from are refused."""
    found: list[tuple[int, bool, Text]] = []  # of each text its document, and whether it is the first of it
    refused: list[tuple[int, str]] = []
    last = json.loads(before)
    for number, content in enumerate(records):
        record = json.loads(content)
        try:
            texts = encode(
                record,
                template,
                tokenizer,
                purpose=conversations.purpose,
                counted=conversations.counted,
                classes=conversations.classes,
                before=last,
                max_tokens=conversations.max_tokens,
            )
            found += [(number, i == 0, text) for i, text in enumerate(texts)]
        except BadRecord as error:
            refused.append((number, str(error)))
        last = record
    counted = lambda text: [i for i, counts in zip(text.ids, text.counts, strict=True) if counts]
    return Tokenised(
        tokens=np.array([i for _, _, text in found for i in text.ids], token_dtype(tokenizer.vocab_size)),
        lengths=np.array([len(text.ids) for _, _, text in found], np.int64),
        documents=np.array([number for number, _, _ in found], np.int64),
        hashes=np.array([text_hash(records[number]) for number, _, _ in found], np.uint64),
        text_bytes=np.array([len(tokenizer.decode(counted(text)).encode()) for _, _, text in found], np.int64),
        counts=np.array([counts for _, _, text in found for counts in text.counts], np.bool_),
        texts=np.array([(first, text.value) for _, first, text in found], TEXT),
        records=tuple(records[n] for n, _, _ in found) if conversations.purpose is Purpose.PROMPTS else None,
        refused=tuple(refused),
    )
