"""Training a sentencepiece model on a fixed sample of the documents, and measuring how well a tokenizer compresses."""

from __future__ import annotations

import io
import random
import re
import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import sentencepiece

from maxlm.config import TrainSentencePiece, UserError
from maxlm.data.documents import Document
from maxlm.data.tokenizers import SentencePiece, Tokenizer

_LINE = re.compile(r"[^\n]{1,4096}\n*|\n+")
"""A line with the blank lines after it; longer lines are cut."""
_THREADS = 4
"""Fixed, not the machine's: sentencepiece writes the number into the model and sums in an order that depends on it."""


def train_sentencepiece(config: TrainSentencePiece, documents: Iterable[str], folder: Path) -> Tokenizer:
    """Train a model on lines sampled from `documents` and save it into `folder`.

    The same documents, config and sentencepiece version give the same bytes. Nothing is normalised, so with
    `byte_fallback` decoding gives back every text exactly.

    Raises:
        UserError: there is no text, or `vocab_size` is too large or too small for it.
    """
    lines = sample_lines(documents, config.max_sentences, config.seed)
    if not lines:
        raise UserError("there is no text to train the tokenizer on")
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_writer=model,
            model_type=config.model.value,
            vocab_size=config.vocab_size,
            split_digits=config.split_digits,
            byte_fallback=config.byte_fallback,
            allow_whitespace_only_pieces=config.whitespace_pieces,
            user_defined_symbols=list(config.user_symbols),
            control_symbols=list(config.special_tokens),
            required_chars="\n\t",
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            add_dummy_prefix=False,
            max_sentence_length=1 << 20,
            input_sentence_size=0,
            shuffle_input_sentence=False,
            num_threads=_THREADS,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise _refused(config.vocab_size, str(error)) from error
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "tokenizer.model")
        file.write_bytes(model.getvalue())
        tokenizer = SentencePiece(file)
    tokenizer.save(folder)
    return tokenizer


def sample_lines(documents: Iterable[str], count: int, seed: int) -> list[str]:
    """`count` lines drawn evenly from all (reservoir sampling, Vitter 1985, algorithm R), the same for the same seed.

    Blank lines stay with the line before them. Memory: `count` lines.
    """
    sample: list[str] = []
    draw = random.Random(seed).random
    for seen, line in enumerate(_lines(documents), start=1):
        if seen <= count:
            sample.append(line)
        elif (slot := int(draw() * seen)) < count:
            sample[slot] = line
    return sample


def _lines(documents: Iterable[str]) -> Iterator[str]:
    for text in documents:
        for line in _LINE.findall(text):
            if "\0" not in line:  # sentencepiece ends a sentence there
                yield line


def _refused(vocab_size: int, message: str) -> UserError:
    """sentencepiece's complaint in our words."""
    if limit := re.search(r"set it to a value <= (\d+)", message):
        return UserError(
            f"vocab_size = {vocab_size} is too large for this text; use at most {limit.group(1)} or more text"
        )
    if limit := re.search(r"Vocabulary size is smaller than required_chars\. \d+ vs (\d+)", message):
        return UserError(
            f"vocab_size = {vocab_size} is too small for the characters of this text; use at least {limit.group(1)}"
        )
    return UserError(
        f"sentencepiece cannot train a tokenizer of vocab_size = {vocab_size}: {' '.join(message.split())}"
    )


@dataclass
class Compression:
    """What a tokenizer makes of some text."""

    documents: int = 0
    text_bytes: int = 0
    tokens: int = 0
    """Without bos and eos."""
    byte_tokens: int = 0
    """Tokens that spell one byte of a character outside the vocabulary."""

    def add(self, other: Compression) -> None:
        self.documents += other.documents
        self.text_bytes += other.text_bytes
        self.tokens += other.tokens
        self.byte_tokens += other.byte_tokens


def measure(tokenizer: Tokenizer, documents: Iterable[Document]) -> dict[str, Compression]:
    """Compression for each kind of document (the ending of its file's name)."""
    kinds: dict[str, Compression] = {}
    for document in documents:
        ids = tokenizer.encode(document.text)
        spelled = sum(i in tokenizer.byte_ids for i in ids)
        size = len(document.text.encode())
        kinds.setdefault(document.kind, Compression()).add(
            Compression(documents=1, text_bytes=size, tokens=len(ids), byte_tokens=spelled)
        )
    return kinds


def report(tokenizer: Tokenizer, kinds: dict[str, Compression]) -> str:
    """A table of bytes per token, largest kind first, beside the byte tokenizer's 1."""
    total = Compression()
    for kind in kinds.values():
        total.add(kind)
    rows = sorted(kinds.items(), key=lambda item: (-item[1].text_bytes, item[0]))
    lines = [f"{'kind':<16}{'documents':>10}{'bytes':>14}{'tokens':>14}{'bytes/token':>13}{'byte tokens':>13}"]
    if len(rows) > 1:
        rows.append(("all", total))
    size = total.text_bytes
    rows.append(("byte tokenizer", Compression(total.documents, size, tokens=size, byte_tokens=size)))
    for name, kind in rows:
        lines.append(
            f"{name:<16}{kind.documents:>10,}{kind.text_bytes:>14,}{kind.tokens:>14,}"
            f"{kind.text_bytes / max(1, kind.tokens):>13.3f}{kind.byte_tokens / max(1, kind.tokens):>13.2%}"
        )
    lines.append(f"vocabulary {tokenizer.vocab_size:,}, bos {tokenizer.bos_id}, eos {tokenizer.eos_id}")
    lines.append(f"fingerprint {tokenizer.fingerprint}")
    return "\n".join(lines)
