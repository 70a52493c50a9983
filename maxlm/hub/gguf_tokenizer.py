"""The tokenizer that a GGUF file describes, as a tokenizer.json: the same ids as llama.cpp and transformers give.

llama   SentencePiece's BPE: of two neighbouring pieces those are joined first whose sum has the highest score
gpt2    BPE over bytes: pairs are joined in the order of `merges`, within the pieces that `pre` cuts a text into

Facts: src/llama-vocab.cpp of llama.cpp; the expressions are those of the models' own tokenizer.json.
"""

from __future__ import annotations

import abc
import json
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors

from maxlm.config import HuggingFaceTokenizer, UserError
from maxlm.config.fields import NotNegative
from maxlm.data.chat import ChatTemplate
from maxlm.data.text_ends import TextEnds
from maxlm.data.tokenizers import Tokenizer, open_tokenizer
from maxlm.hub.folder import write_ends
from maxlm.hub.gguf_file import BETTER, GgufFile
from maxlm.hub.published import Published

_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED = 1, 2, 3, 4
"""Kinds of tokens (`tokenizer.ggml.token_type`)."""
_SPACE = "\u2581"

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BREAKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT4 = rf"{_CONTRACTIONS}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n]*|{_BREAKS}"
_BIG, _SMALL = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"


def _cased(after: str, digits: str) -> str:
    """Words are cut where a capital follows a small letter."""
    words = "|".join(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_BIG}{big}{_SMALL}{small}{after}" for big, small in (("*", "+"), ("+", "*"))
    )
    return rf"{words}|{digits}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|{_BREAKS}"


@dataclass(frozen=True, kw_only=True)
class _Cut:
    """How a text is cut before pairs are joined."""

    expressions: tuple[str, ...]
    """One after the other, each in the pieces of the one before."""
    whole: bool = False
    """Whether a piece that is a token is not cut further."""
    bos: bool = False
    """Whether a text begins with bos, where the file does not say."""


_DIGITS = _Cut(expressions=(r"\p{N}", _GPT2))
_PLAIN = _Cut(expressions=(_GPT2,))
_LLAMA3 = _Cut(expressions=(_GPT4,), whole=True, bos=True)
_QWEN2 = _Cut(expressions=(_GPT4.replace("{1,3}", ""),))
_GPT4O = _Cut(expressions=(_cased(f"{_CONTRACTIONS}?", r"\p{N}{1,3}"),))
CUTS = {
    "default": _Cut(expressions=(r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", "[0-9][0-9][0-9]")),
    **dict.fromkeys(("gpt-2", "phi-2", "olmo", "mpt", "jais"), _PLAIN),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell"), _DIGITS),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3"), _LLAMA3),
    **dict.fromkeys(("dbrx", "smaug-bpe"), _Cut(expressions=(_GPT4,))),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2"), _QWEN2),
    "tekken": _Cut(expressions=(_cased("", r"\p{N}"),), whole=True, bos=True),
    **dict.fromkeys(("gpt-4o", "llama4"), _GPT4O),
}
"""By `tokenizer.ggml.pre`."""


def find_tokenizer(file: GgufFile) -> Tokenizer | None:
    """None where the file has no vocabulary.

    Raises:
        UserError: it is of a kind that is not supported, or damaged.
    """
    vocabulary = _vocabulary(file)
    if vocabulary is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokenizer.json"
        path.write_text(vocabulary.definition(), encoding="utf-8")
        bos = (vocabulary.special("bos") or "") if vocabulary.adds_bos else ""
        return open_tokenizer(HuggingFaceTokenizer(path=str(path), eos=vocabulary.special("eos"), bos=bos))


def find_ends(file: GgufFile, tokenizer: Tokenizer) -> TextEnds:
    """Raises UserError as `find_tokenizer`."""
    usual, vocabulary = TextEnds.of_documents(tokenizer), _vocabulary(file)
    return usual if vocabulary is None else usual._replace(last=tuple(vocabulary.last_ids()) or usual.last)


def find_chat(file: GgufFile) -> ChatTemplate | None:
    """None where the file has no chat template.

    Raises:
        UserError: as `find_tokenizer`.
    """
    prefix = "tokenizer.chat_template"
    found = {key: value for key, value in file.metadata.items() if key.startswith(prefix) and isinstance(value, str)}
    vocabulary = _vocabulary(file)
    if vocabulary is None or not found:
        return None
    sources = {key.removeprefix(prefix).lstrip(".") or "default": value for key, value in found.items()}
    return ChatTemplate(sources=sources, tokens=_names(vocabulary), place=str(file.path))


def write_tokenizer(file: GgufFile, folder: Path) -> None:
    """tokenizer.json, tokenizer_config.json, generation_config.json and chat_template.jinja, as far as it has them.

    Raises:
        UserError: as `find_tokenizer`.
    """
    vocabulary = _vocabulary(file)
    if vocabulary is None:
        return
    (folder / "tokenizer.json").write_text(vocabulary.definition(), encoding="utf-8")
    config = {**_names(vocabulary), "tokenizer_class": "PreTrainedTokenizerFast", "add_bos_token": vocabulary.adds_bos}
    _write_json(folder / "tokenizer_config.json", config)
    last, bos = vocabulary.last_ids(), vocabulary.special_id("bos")
    ids = {"bos_token_id": bos, "eos_token_id": last[0] if len(last) == 1 else last or None}
    write_ends(folder, ids)
    template = file.metadata.get("tokenizer.chat_template")
    if isinstance(template, str):
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")


def _names(vocabulary: _Vocabulary) -> dict[str, str]:
    """Of special tokens, by the keys of tokenizer_config.json."""
    keys = {"bos": "bos_token", "eos": "eos_token", "unknown": "unk_token", "padding": "pad_token"}
    return {key: name for end, key in keys.items() if (name := vocabulary.special(end)) is not None}


def _write_json(path: Path, values: dict[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _vocabulary(file: GgufFile) -> _Vocabulary | None:
    model = file.metadata.get("tokenizer.ggml.model", "none")
    if model == "none":
        return None
    if model not in _KINDS:
        raise UserError(
            f"{file.path}: tokenizer.ggml.model = {model!r} is not supported; it may be {', '.join(_KINDS)}"
        )
    return _KINDS[model](file)


class _Vocabulary(abc.ABC):
    """What both kinds have."""

    byte_level: bool
    adds_bos: bool

    def __init__(self, file: GgufFile, *, adds_bos: bool) -> None:
        prefix = "tokenizer.ggml."
        values = {key.removeprefix(prefix): value for key, value in file.metadata.items() if key.startswith(prefix)}
        self.said = Published(values, f"{file.path}: tokenizer.ggml", BETTER)
        self.tokens: list[str] = self.listed("tokens", str)
        self.ids = {token: i for i, token in enumerate(self.tokens)}
        n_types = len(self.said.get("token_type", list, []))
        self.types: list[int] = self.listed("token_type", int) if n_types else [_NORMAL] * len(self.tokens)
        self.adds_bos = self.said.get("add_bos_token", bool, adds_bos)
        if len(self.types) != len(self.tokens):
            raise self.wrong(f"token_type has {len(self.types)} entries, tokens {len(self.tokens)}")
        table = file.entries.get("token_embd.weight")
        if table is not None and len(self.tokens) > table.shape[0]:
            raise self.wrong(f"it has {len(self.tokens)} tokens, token_embd.weight {table.shape[0]}")

    @abc.abstractmethod
    def model(self) -> models.BPE:
        """What merges letters to tokens."""

    @abc.abstractmethod
    def finish(self, tokenizer: tokenizers.Tokenizer) -> None:
        """Add what is done before and after the model."""

    def definition(self) -> str:
        """Of a tokenizer.json."""
        try:
            tokenizer = tokenizers.Tokenizer(self.model())
        except Exception as error:  # the library raises plain Exception
            raise self.wrong(" ".join(str(error).split())) from error
        self.finish(tokenizer)
        for kind, special in ((_CONTROL, True), (_USER_DEFINED, False)):
            listed = [token for token, of in zip(self.tokens, self.types, strict=True) if of == kind and token]
            added = [AddedToken(token, normalized=False, special=special) for token in listed]
            (tokenizer.add_special_tokens if special else tokenizer.add_tokens)(added)
        bos = self.special("bos")
        if self.adds_bos and bos is not None:
            tokenizer.post_processor = processors.TemplateProcessing(
                single=f"{bos} $A", pair=f"{bos} $A {bos}:1 $B:1", special_tokens=[(bos, self.ids[bos])]
            )
        text: str = tokenizer.to_str()
        return text

    def special_id(self, end: str) -> int | None:
        found: int | None = self.said.get(f"{end}_token_id", NotNegative[int], None)
        if found is not None and found >= len(self.tokens):
            raise self.wrong(f"{end}_token_id = {found:,} must be below the number of tokens, {len(self.tokens):,}")
        return found

    def special(self, end: str) -> str | None:
        """The token of that name, such as "bos"."""
        number = self.special_id(end)
        return None if number is None else self.tokens[number]

    def last_ids(self) -> list[int]:
        """Ids that end a text: of a document, of a turn, of a message that asks for a tool."""
        found = [self.special_id(end) for end in ("eos", "eot", "eom")]
        return list(dict.fromkeys(i for i in found if i is not None))

    def listed(self, key: str, kind: type) -> list[Any]:
        values: list[Any] = self.said.get(key, list)
        if not all(type(value) is kind for value in values):
            raise self.wrong(f"{key} must be a list of {kind.__name__}")
        return values

    def wrong(self, why: str) -> UserError:
        return UserError(f"{self.said.place}: no vocabulary that can be used ({why}); take another copy of the model")


class _SentencePiece(_Vocabulary):
    """`llama`."""

    def __init__(self, file: GgufFile) -> None:
        super().__init__(file, adds_bos=True)
        self._scores: list[float] = self.listed("scores", float)
        if len(self._scores) != len(self.tokens):
            raise self.wrong(f"scores has {len(self._scores)} entries, tokens {len(self.tokens)}")
        self._prefix = self.said.get("add_space_prefix", bool, True)

    def model(self) -> models.BPE:
        joined = []
        for i, (token, kind) in enumerate(zip(self.tokens, self.types, strict=True)):
            if kind not in (_NORMAL, _USER_DEFINED):
                continue
            for cut in range(1, len(token)):
                pair = token[:cut], token[cut:]
                if pair[0] in self.ids and pair[1] in self.ids:
                    joined.append((-self._scores[i], i, -cut, pair))
        unknown = self.special("unknown")
        if unknown is None:
            unknown = next((t for t, kind in zip(self.tokens, self.types, strict=True) if kind == _UNKNOWN), None)
        return models.BPE(
            vocab=self.ids,
            merges=[pair for *_, pair in sorted(joined)],
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )

    def finish(self, tokenizer: tokenizers.Tokenizer) -> None:
        replaced = normalizers.Replace(" ", _SPACE)
        before = [normalizers.Prepend(_SPACE), replaced] if self._prefix else [replaced]
        tokenizer.normalizer = normalizers.Sequence(before)
        after = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
        tokenizer.decoder = decoders.Sequence([*after, *([decoders.Strip(" ", 1, 0)] if self._prefix else [])])


class _ByteLevel(_Vocabulary):
    """`gpt2`."""

    def __init__(self, file: GgufFile) -> None:
        pre = file.metadata.get("tokenizer.ggml.pre", "default")
        if pre not in CUTS:
            raise UserError(f"{file.path}: tokenizer.ggml.pre = {pre!r} is not supported; it may be {', '.join(CUTS)}")
        self._cut = CUTS[pre]
        super().__init__(file, adds_bos=self._cut.bos)

    def model(self) -> models.BPE:
        merges: Sequence[str] = self.listed("merges", str)
        pairs = [(line[:at], line[at + 1 :]) for line in merges if (at := line.find(" ", 1)) > 0]
        if len(pairs) != len(merges):
            raise self.wrong("a line of merges has not two parts")
        return models.BPE(vocab=self.ids, merges=pairs, ignore_merges=self._cut.whole)

    def finish(self, tokenizer: tokenizers.Tokenizer) -> None:
        cuts = [pre_tokenizers.Split(tokenizers.Regex(one), "isolated") for one in self._cut.expressions]
        bytewise = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytewise])
        tokenizer.decoder = decoders.ByteLevel()


_KINDS: dict[str, type[_SentencePiece] | type[_ByteLevel]] = {"llama": _SentencePiece, "gpt2": _ByteLevel}
"""By `tokenizer.ggml.model`."""
