"""Text to ids and back: bytes, sentencepiece and Hugging Face's `tokenizer.json` behind one small interface."""

from __future__ import annotations

import abc
import contextlib
import enum
import functools
import hashlib
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers

from maxlm.config import ByteTokenizer, HuggingFaceTokenizer, SentencePieceTokenizer, TokenizerConfig, UserError
from maxlm.config.data import BYTE_ENDS
from maxlm.config.fields import shown
from maxlm.config.json_file import read_bytes, read_object
from maxlm.data.named_ends import eos_ids_beside, names_beside
from maxlm.data.tiktoken import to_json
from maxlm.data.token_bytes import spelled, unknown_in

_DESCRIPTOR = "config.json"
_EOS_NAMES = ("</s>", "<|endoftext|>", "<|end_of_text|>", "<|eot_id|>", "<eos>", "<|im_end|>", "[EOS]", "[SEP]")
_BOS_NAMES = ("<s>", "<|begin_of_text|>", "<bos>", "<|startoftext|>", "[BOS]", "[CLS]")
_MORE_EOS_NAMES = ("<\uff5cend\u2581of\u2581sentence\uff5c>", "<EOS_TOKEN>", "<|eos|>", "<EOS>", "<eod>", "<|end|>")
"""Of DeepSeek, Cohere and others."""
_MORE_BOS_NAMES = ("<\uff5cbegin\u2581of\u2581sentence\uff5c>", "<BOS_TOKEN>", "<|bos|>", "<BOS>")
_LIKELY = re.compile(r"eo[sdt]|end|stop|sep|/s|return", re.IGNORECASE)
_MAX_DEFINITION = 1 << 30


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
    unknown_id: int | None = None
    """What stands for characters that nothing else spells; None: there is none."""
    fingerprint: str
    """SHA-256 in hex of the bytes that define the tokenizer: equal fingerprints mean equal ids for every text."""

    def __init__(self, definition: bytes) -> None:
        self._definition = definition
        self._described: dict[str, Any] = {}
        """Names of `eos` and `bos`, or of more special tokens, where the definition does not say them."""
        self._specials: Mapping[str, int] = {}
        self.fingerprint = hashlib.sha256(definition).hexdigest()

    @property
    def text_size(self) -> int:
        """One more than the highest id that `encode` may give: special tokens may come after all that texts are of."""
        return self.vocab_size

    def encode(self, text: str) -> list[int]:
        """The ids of `text` alone: no bos, no eos, and names of special tokens inside the text are plain text."""
        return self.encode_batch([text])[0]

    @abc.abstractmethod
    def name_of(self, token: int) -> str | None:
        """How the tokenizer's file spells a token; None: there is no file."""

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """`encode` of every text, on one core."""

    @property
    def specials(self) -> Mapping[str, int]:
        """Names of special tokens, which a text may spell without meaning them, and their ids."""
        return self._specials

    @abc.abstractmethod
    def encode_places(self, text: str, *, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text` and where each lies in it: start and stop, in characters.

        Args:
            text: any.
            specials: whether names of special tokens in it are those tokens, and not text. Only a tokenizer.json has
                a rule for that; to the other kinds they are always text.
        """

    @abc.abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`. Special ids give nothing, nor do those that a model has beyond the vocabulary; bytes that
        are not UTF-8 give U+FFFD."""

    @abc.abstractmethod
    def token_bytes(self) -> list[bytes | None]:
        """What each id adds to a text that has begun; None: nothing, as of special ids.

        Raises:
            UserError: that depends on the ids around it.
        """

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
        descriptor |= self._described
        (partial / _DESCRIPTOR).write_text(json.dumps(descriptor, indent=2) + "\n")
        if folder.exists():
            shutil.rmtree(folder)
        partial.rename(folder)


class Bytes(Tokenizer):
    """UTF-8 bytes as ids 0..255, bos 256, eos 257, and more special tokens from 258 on."""

    kind = TokenizerKind.BYTES
    bos_id = 256
    eos_id = 257
    byte_ids = frozenset(range(256))

    def __init__(self, special_tokens: tuple[str, ...] = ()) -> None:
        more = json.dumps(special_tokens).encode() if special_tokens else b""
        super().__init__(b"bytes 0..255, bos 256, eos 257" + more)
        self._specials = {name: 256 + i for i, name in enumerate((*BYTE_ENDS, *special_tokens))}
        self.vocab_size = 256 + len(self._specials)
        if special_tokens:
            self._described = {"special_tokens": list(special_tokens)}

    def name_of(self, token: int) -> str | None:
        return None

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        return [list(text.encode()) for text in texts]

    def encode_places(self, text: str, *, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        return self.encode(text), [(i, i + 1) for i, letter in enumerate(text) for _ in letter.encode()]

    def decode(self, ids: Sequence[int]) -> str:
        return bytes(i for i in ids if i < 256).decode(errors="replace")

    def token_bytes(self) -> list[bytes | None]:
        return [*(bytes([i]) for i in range(256)), *[None] * len(self._specials)]


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
        self.unknown_id = self._model.unk_id()
        # sentencepiece writes a space as U+2581 and so reads that character back as a space. Spelling it in bytes
        # keeps it. (A user's own piece for the character is not touched: there is nothing to lose it to.)
        spelling = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in "\u2581".encode()]
        self._lower_block: list[int] | None = spelling
        probe = "a\u2581a"  # a model without bytes, or that puts a space before every text, is left as it is
        if not set(spelling) <= self.byte_ids or self.decode(self._encode_with_lower_block(probe, spelling)) != probe:
            self._lower_block = None

    def name_of(self, token: int) -> str | None:
        name: str = self._model.id_to_piece(token)
        return name

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

    @functools.cached_property
    def specials(self) -> Mapping[str, int]:
        return {self._model.id_to_piece(i): i for i in range(self.vocab_size) if self._model.is_control(i)}

    def encode_places(self, text: str, *, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        ids, places, at = list[int](), list[tuple[int, int]](), 0
        for n, part in enumerate([text] if self._lower_block is None else text.split("\u2581")):
            if n:
                ids += self._lower_block or []
                places += [(at - 1, at)] * len(self._lower_block or [])
            characters = [at + i for i, letter in enumerate(part) for _ in letter.encode()] + [at + len(part)]
            pieces = self._model.encode(part, return_type="proto").pieces
            ids += [piece.id for piece in pieces]
            found, stop = list[tuple[int, int]](), len(characters) - 1
            for piece in reversed(pieces):  # of bytes that spell a character, the last one alone has a width
                stop = piece.end if piece.end > piece.begin else stop
                found.append((characters[piece.begin], characters[stop]))
            places += reversed(found)
            at += len(part) + 1
        return ids, places

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids if i < self.vocab_size])
        return text

    def token_bytes(self) -> list[bytes | None]:
        def spelling(i: int) -> bytes | None:
            piece: str = self._model.id_to_piece(i)
            if self._model.is_byte(i):
                return bytes([int(piece[3:5], 16)])
            if self._model.is_control(i) or self._model.is_unknown(i) or self._model.is_unused(i):
                return None
            return piece.replace("\u2581", " ").encode()

        return [spelling(i) for i in range(self.vocab_size)]


class HuggingFace(Tokenizer):
    """A `tokenizer.json` of the `tokenizers` library, or a `.tiktoken` file, which becomes one.

    The end of a document is `eos` where it is given, else the first that the vocabulary has of: well known names, what
    a `tokenizer_config.json` beside the file says, more names, `eos_token_id` beside the file. The same for its
    beginning, but for the last, which may be without a token (`bos=""`).
    """

    kind = TokenizerKind.HUGGING_FACE

    def __init__(self, path: Path, eos: str | None = None, bos: str | None = None) -> None:
        definition = _read(path, "a tokenizer.json")
        super().__init__(to_json(path, definition) if path.suffix == ".tiktoken" else definition)
        self._path = path
        try:
            with self._guarded(lambda: "when it reads the file"):
                self._model = tokenizers.Tokenizer.from_buffer(self._definition)
        except UserError:
            raise
        except Exception as error:  # the library raises plain Exception
            reason = " ".join(str(error).split())
            raise UserError(f"{path}: not a tokenizer.json that the tokenizers library can read ({reason})") from error
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True  # "</s>" in a document is text, not the end of the document
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        special = {token.content: i for i, token in self._model.get_added_tokens_decoder().items() if token.special}
        self._specials = special
        known = special, vocabulary
        usual_eos, usual_bos = _first_known(_EOS_NAMES, *known), _first_known(_BOS_NAMES, *known)
        said_eos, said_bos = names_beside(path)
        found_eos = usual_eos if eos is None else self._named("eos", eos, *known)
        if found_eos is None:
            found_eos = _first_known([*said_eos, *_MORE_EOS_NAMES], *known)
        if found_eos is None:
            said_ids = eos_ids_beside(path.parent)
            found_eos = next((i for i in said_ids if i in vocabulary.values()), None)
        if found_eos is None:
            raise UserError(
                f"{path}: none of its tokens is known as the end of a document; name it with prepare.tokenizer.eos (on "
                "the command line --eos), or with eos_token in a tokenizer_config.json beside it, such as "
                f"{_choices(special)}"
            )
        self.eos_id = found_eos
        if bos is not None:
            self.bos_id = self._named("bos", bos, *known) if bos else None
        else:
            self.bos_id = usual_bos if usual_bos is not None else _first_known([*said_bos, *_MORE_BOS_NAMES], *known)
        self.byte_ids = frozenset(i for name, i in vocabulary.items() if re.fullmatch("<0x[0-9A-F]{2}>", name))
        self.unknown_id = unknown_in(json.loads(self._definition)["model"], vocabulary)
        self._text_size = max((i for name, i in vocabulary.items() if name not in special), default=-1) + 1
        if (self.eos_id, self.bos_id) != (usual_eos, usual_bos):
            names = {i: name for name, i in vocabulary.items()}
            # Beside the file itself, they decide what a document's ids are; and the saved copy lies alone.
            self._described = {
                "eos": names[self.eos_id],
                "bos": "" if self.bos_id is None else names[self.bos_id],
            }
            self.fingerprint = hashlib.sha256(self._definition + json.dumps(self._described).encode()).hexdigest()

    @property
    def text_size(self) -> int:
        return self._text_size

    def name_of(self, token: int) -> str | None:
        name: str | None = self._model.id_to_token(token)
        return name

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        # The library's own batch call would start a thread for every core.
        batch: list[list[int]] = []
        with self._guarded(lambda: f"on a text that begins {texts[len(batch)][:40]!r}"):
            for text in texts:
                batch.append(self._model.encode(text, add_special_tokens=False).ids)
        return batch

    def encode_places(self, text: str, *, specials: bool) -> tuple[list[int], list[tuple[int, int]]]:
        model = self._obeying if specials else self._model
        with self._guarded(lambda: f"on a text that begins {text[:40]!r}"):
            found = model.encode(text, add_special_tokens=False)
        return found.ids, found.offsets

    @functools.cached_property
    def _obeying(self) -> tokenizers.Tokenizer:
        """The same, but that a name of a special token in a text is that token."""
        model = tokenizers.Tokenizer.from_str(self._model.to_str())
        model.encode_special_tokens = False
        return model

    def decode(self, ids: Sequence[int]) -> str:
        text: str = self._model.decode([int(i) for i in ids], skip_special_tokens=True)
        return text

    def token_bytes(self) -> list[bytes | None]:
        decoder = json.loads(self._definition).get("decoder")
        found: list[bytes | None] = [None] * self.vocab_size
        for name, i in self._model.get_vocab(with_added_tokens=True).items():
            found[i] = spelled(name, decoder)
        for i, token in self._model.get_added_tokens_decoder().items():
            if token.special:
                found[i] = None
        return found

    def _named(self, key: str, name: str, *vocabularies: dict[str, int]) -> int:
        found = _first_known([name], *vocabularies)
        if found is None:
            raise UserError(
                f"{self._path}: prepare.tokenizer.{key} = {name!r} is not one of its tokens; use one, such as "
                f"{_choices(vocabularies[0])}"
            )
        return found

    @contextlib.contextmanager
    def _guarded(self, doing: Callable[[], str]) -> Iterator[None]:
        """Turn a panic of the library, of a regular expression that backtracks without end for one, into a line."""
        try:
            with _stderr_aside():
                yield
        except BaseException as error:
            if type(error).__name__ != "PanicException":  # of pyo3, which gives it no module to import it from
                raise
            raise UserError(
                f"{self._path}: the tokenizers library breaks {doing()} ({' '.join(str(error).split())}); mend the "
                "file's regular expressions, or use another tokenizer"
            ) from error


def open_tokenizer(config: TokenizerConfig) -> Tokenizer:
    """The tokenizer that `config` names.

    Raises:
        UserError: the file is missing, is not of that kind, or has no end-of-document token.
    """
    match config:
        case ByteTokenizer(special_tokens=names):
            return Bytes(names)
        case SentencePieceTokenizer(path=path):
            return SentencePiece(Path(path))
        case HuggingFaceTokenizer(path=path, eos=eos, bos=bos):
            return HuggingFace(Path(path), eos, bos)


def saved_tokenizer(folder: Path) -> TokenizerConfig:
    """What `Tokenizer.save` wrote into `folder`, as a config.

    Raises:
        UserError: the descriptor is missing or does not name a kind of tokenizer.
    """
    return _config_of(_read_descriptor(folder), folder)


def load_tokenizer(folder: Path) -> Tokenizer:
    """The tokenizer that `Tokenizer.save` wrote into `folder`.

    Raises:
        UserError: a file is missing, or the tokenizer is not the one that was saved.
    """
    descriptor = _read_descriptor(folder)
    config = _config_of(descriptor, folder)
    tokenizer = open_tokenizer(config)
    if tokenizer.fingerprint != descriptor["fingerprint"]:
        file = folder / _FILE.get(tokenizer.kind, _DESCRIPTOR)
        raise UserError(
            f"{file}: has changed since it was saved: its SHA-256 is {tokenizer.fingerprint[:12]}..., "
            f"{folder / _DESCRIPTOR} says {str(descriptor['fingerprint'])[:12]}...; restore the file"
        )
    return tokenizer


def _read_descriptor(folder: Path) -> dict[str, Any]:
    file = folder / _DESCRIPTOR
    descriptor = read_object(file, "a saved tokenizer's descriptor")
    kinds = [kind.value for kind in TokenizerKind]
    for key, fits in (("kind", descriptor.get("kind") in kinds), ("fingerprint", True), ("eos", True), ("bos", True)):
        value = descriptor.get(key, "" if key in ("eos", "bos") else None)
        if not (fits and isinstance(value, str)):
            allowed = f"one of {kinds}; of a published model name the file itself" if key == "kind" else "a string"
            raise UserError(f"{file}: not a tokenizer's descriptor: its {key} = {value!r} must be {allowed}")
    names = descriptor.get("special_tokens", [])
    if not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise UserError(f"{file}: not a tokenizer's descriptor: its special_tokens = {shown(names)} must be strings")
    return descriptor


@contextlib.contextmanager
def _stderr_aside() -> Iterator[None]:
    """Keep what is printed to descriptor 2, by code that is not Python's, and print it in the end.

    Where that is an exception's end, it is not printed: a library that panics prints its stack there.
    """
    with contextlib.ExitStack() as stack:
        try:
            aside = stack.enter_context(tempfile.TemporaryFile())
            there = os.dup(2)
        except OSError:  # no room for it, or no such descriptor: then it is printed as it comes
            yield
            return
        sys.stderr.flush()
        os.dup2(aside.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(there, 2)
            os.close(there)
        aside.seek(0)
        sys.stderr.write(aside.read().decode(errors="replace"))


def _choices(special: dict[str, int]) -> str:
    """Special tokens, those first that sound like the end of a document."""
    names = sorted(special, key=lambda name: (_LIKELY.search(name) is None, special[name]))
    return ", ".join(map(repr, names[:8])) or "a token of its vocabulary (it has no special ones)"


def _first_known(names: Sequence[str], *vocabularies: dict[str, int]) -> int | None:
    """The id of the first name in the first vocabulary that has one: a plain token may be the HTML tag `<s>`."""
    return next((known[name] for known in vocabularies for name in names if name in known), None)


def _config_of(descriptor: dict[str, Any], folder: Path) -> TokenizerConfig:
    kind = TokenizerKind(descriptor["kind"])
    match kind:
        case TokenizerKind.BYTES:
            return ByteTokenizer(special_tokens=tuple(descriptor.get("special_tokens", ())))
        case TokenizerKind.SENTENCEPIECE:
            return SentencePieceTokenizer(path=str(folder / _FILE[kind]))
        case TokenizerKind.HUGGING_FACE:
            ends = {key: descriptor.get(key) for key in ("eos", "bos")}
            return HuggingFaceTokenizer(path=str(folder / _FILE[kind]), **ends)


def _read(path: Path, what: str) -> bytes:
    try:
        return read_bytes(path, _MAX_DEFINITION)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); name {what}") from error
