"""Training a sentencepiece model on a fixed sample of the documents, or of a mixture of several sets of them."""

from __future__ import annotations

import heapq
import io
import math
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import sentencepiece

from maxlm.config import TrainSentencePiece, UserError
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


def sample_mixture(sets: Sequence[Iterable[str]], weights: Sequence[float], limit: int, seed: int) -> list[list[str]]:
    """Lines of each set, in their order, which have its share of `limit` bytes; the same for the same seed.

    Lines are drawn evenly. Where a set has less than its share, all sets give so much less that the shares hold.
    Memory: `limit` bytes of text.
    """
    shares = [weight / math.fsum(weights) for weight in weights]
    found = [
        _LeastKeys(documents, share * limit, f"{seed} {i}")
        for i, (documents, share) in enumerate(zip(sets, shares, strict=True))
    ]
    total = min([limit, *(one.size / share for one, share in zip(found, shares, strict=True))])
    return [one.within(share * total) for one, share in zip(found, shares, strict=True)]


class _LeastKeys:
    """The lines that have the least of random keys, which is an even sample for any number of bytes."""

    def __init__(self, documents: Iterable[str], room: float, seed: str) -> None:
        self._heap: list[tuple[float, int, str]] = []  # the largest key first, as its negative
        self.size = 0
        """Bytes of the lines: at least `room`, or all."""
        draw = random.Random(seed).random
        for number, line in enumerate(_lines(documents)):
            heapq.heappush(self._heap, (-draw(), number, line))
            self.size += len(line.encode())
            self._drop(room)

    def _drop(self, room: float) -> None:
        while self._heap and self.size - (largest := len(self._heap[0][2].encode())) >= room:
            heapq.heappop(self._heap)
            self.size -= largest

    def within(self, room: float) -> list[str]:
        """Those of so many bytes, or a line more, in the order of the text."""
        self._drop(room)
        return [line for _, line in sorted((number, line) for _, number, line in self._heap)]


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
