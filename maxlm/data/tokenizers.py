"""Text to ids and back: bytes, sentencepiece and Hugging Face's `tokenizer.json` behind one small interface."""

from __future__ import annotations

import abc
import enum
import hashlib
import json
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from maxlm.config import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TokenizerConfig, UserError

_DESCRIPTOR = "config.json"
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "[CLS]")


class TokenizerKind(enum.Enum):
    """What a saved tokenizer is; its value stands in the descriptor file."""

    BYTES = "bytes"
    SENTENCEPIECE = "sentencepiece"
    HUGGING_FACE = "huggingface"


_FILE = {TokenizerKind.SENTENCEPIECE: "tokenizer.model", TokenizerKind.HUGGING_FACE: "tokenizer.json"}


class Tokenizer(abc.ABC):
    """Text to ids in [0, vocab_size) and back.

    A document in the training data is `[bos] ids eos`: bos where the tokenizer has one, eos always. `prompt_ids`
    starts a prompt in the same way, so that a model sees at generation what it saw in training.
    """

    kind: TokenizerKind
    vocab_size: int
    bos_id: int | None
    eos_id: int
    byte_ids: frozenset[int]
    """Ids that stand for one raw byte each, used for characters outside the vocabulary."""
    fingerprint: str
    """SHA-256 in hex of the bytes that define the tokenizer: equal fingerprints mean equal ids for every text."""

    def __init__(self, definition: bytes) -> None:
        self._definition = definition
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no bos, no eos, and names of special tokens inside the text are plain text."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on one core."""

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special ids give nothing; bytes that are not UTF-8 give U+FFFD."""

    def document_ids(self, ids: list[int]) -> list[int]:
        """`ids` between bos (where there is one) and eos, as in the training data."""
        return [*([] if self.bos_id is None else [self.bos_id]), *ids, self.eos_id]

    def prompt_ids(self, text: str) -> list[int]:
        """The ids that a continuation of `text` starts from: as a document starts, without eos.

        Never empty: without a bos, an empty prompt starts from eos, the boundary between documents.
        """
        return self.document_ids(self.encode(text))[:-1] or [self.eos_id]

    def save(self, folder: Path) -> None:
        """Write the tokenizer and its descriptor into `folder`, which appears only when it is complete."""
        partial = folder.with_name(folder.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        if file := _FILE.get(self.kind):
            (partial / file).write_bytes(self._definition)
        descriptor = {"kind": self.kind.value, "vocab_size": self.vocab_size, "fingerprint": self.fingerprint}
        (partial / _DESCRIPTOR).write_text(json.dumps(descriptor, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0..255, bos 256, eos 257."""

    kind = TokenizerKind.BYTES
    vocab_size = 258
    bos_id = 256
    eos_id = 257
    byte_ids = frozenset(range(256))

    def __init__(self) -> None:
        super().__init__(b"bytes 0..255, bos 256, eos 257")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")


class SentencePiece(Tokenizer):
    """A sentencepiece model (Kudo and Richardson 2018, arXiv:1808.06226)."""

    kind = TokenizerKind.SENTENCEPIECE

    def __init__(self, path: Path) -> None:
        super().__init__(_read(path, "a sentencepiece model file"))
        self._model = sentencepiece.SentencePieceProcessor()
        try:
            self._model.LoadFromSerializedProto(self._definition)
        except (RuntimeError, OSError, ValueError) as error:
            raise UserError(
                f"{path}: not a sentencepiece model; name the .model file that its trainer wrote"
            ) from error
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise UserError(f"{path}: the model has no end-of-document piece; train it with eos_id >= 0")
        self.bos_id = self._model.bos_id() if self._model.bos_id() >= 0 else None
        self.byte_ids = frozenset(i for i in range(self.vocab_size) if self._model.is_byte(i))
        # sentencepiece writes a space as U+2581 and so reads that character back as a space. Spelling it in bytes
        # keeps it. (A user's own piece for the character is not touched: there is nothing to lose it to.)
        spelling = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._lower_block: list[int] | None = spelling
        probe = "a\u2581a"  # a model without bytes, or that puts a space before every text, is left as it is
        if not set(spelling) <= self.byte_ids or self.decode(self._encode_with_lower_block(probe, spelling)) != probe:
            self._lower_block = None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        batch: list[list[int]] = self._model.encode(list(texts), out_type=int, num_threads=1)
        if self._lower_block is not None:
            for i, text in enumerate(texts):
                if "\u2581" in text:
                    batch[i] = self._encode_with_lower_block(text, self._lower_block)
        return batch

    def _encode_with_lower_block(self, text: str, spelling: list[int]) -> list[int]:
        first, *rest = (self._model.encode(part, out_type=int) for part in text.split("\u2581"))
        return [*first, *(i for part in rest for i in (*spelling, *part))]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids])
        return text


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library."""

    kind = TokenizerKind.HUGGING_FACE

    def __init__(self, path: Path) -> None:
        super().__init__(_read(path, "a tokenizer.json"))
        try:
            self._model = tokenizers.Tokenizer.from_buffer(self._definition)
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a tokenizer.json that the tokenizers library can read ({reason})") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" in a document is text, not the end of the document
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        special = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        eos = _first_known(_EOS_NAMES, special, vocabulary)
        if eos is None:
            raise UserError(f"{path}: has no end-of-document token; one of {', '.join(_EOS_NAMES)} must be in it")
        self.eos_id = eos
        self.bos_id = _first_known(_BOS_NAMES, special, vocabulary)
        self.byte_ids = frozenset(i for name, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", name))

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The library's own batch call would start a thread for every core.
        return [self._model.encode(text, add_special_tokens=False).ids for text in texts]

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids], skip_special_tokens=True)
        return text


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises:
        UserError: the file is missing, is not of that kind, or has no end-of-document token.
    """
    match config:
        case ByteTokenizer():
            return Bytes()
        case SentencePieceTokenizer(path=path):
            return SentencePiece(Path(path))
        case HuggingFaceTokenizer(path=path):
            return HuggingFace(Path(path))


def saved_tokenizer(folder: Path) -> TokenizerConfig:
    """What `Tokenizer.save` wrote into `folder`, as a config.

    Raises:
        UserError: the descriptor is missing or does not name a kind of tokenizer.
    """
    return _config_of(TokenizerKind(_read_descriptor(folder)["kind"]), folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
        UserError: a file is missing, or the tokenizer is not the one that was saved.
    """
    descriptor = _read_descriptor(folder)
    config = _config_of(TokenizerKind(descriptor["kind"]), folder)
    tokenizer = open_tokenizer(config)
    if tokenizer.fingerprint != descriptor["fingerprint"]:
        file = folder / _FILE.get(tokenizer.kind, _DESCRIPTOR)
        raise UserError(
            f"{file}: has changed since it was saved: its SHA-256 is {tokenizer.fingerprint[:12]}..., "
            f"{folder / _DESCRIPTOR} says {str(descriptor['fingerprint'])[:12]}...; restore the file"
        )
    return tokenizer


def _read_descriptor(folder: Path) -> dict[str, object]:
    file = folder / _DESCRIPTOR
    definition = _read(file, "a saved tokenizer's descriptor")
    try:
        descriptor = json.loads(definition)
        TokenizerKind(descriptor["kind"]), descriptor["fingerprint"]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: not a tokenizer's descriptor; its kind must be one of {[k.value for k in TokenizerKind]}"
        ) from error
    return descriptor


def _first_known(names: Sequence[str], *vocabularies: dict[str, int]) -> int | None:
    """The id of the first name in the first vocabulary that has one: a plain token may be the HTML tag `<s>`."""
    return next((known[name] for known in vocabularies for name in names if name in known), None)


def _config_of(kind: TokenizerKind, folder: Path) -> TokenizerConfig:
    match kind:
        case TokenizerKind.BYTES:
            return ByteTokenizer()
        case TokenizerKind.SENTENCEPIECE:
            return SentencePieceTokenizer(path=str(folder / _FILE[kind]))
        case TokenizerKind.HUGGING_FACE:
            return HuggingFaceTokenizer(path=str(folder / _FILE[kind]))


def _read(path: Path, what: str) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name {what}") from error
