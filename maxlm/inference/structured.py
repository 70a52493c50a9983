"""Text that fits a grammar: which tokens may come next, by llguidance (github.com/guidance-ai/llguidance)."""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import UserError
from maxlm.data.tokenizers import Tokenizer
from maxlm.inference.settings import mask_words

MAX_GRAMMAR_BYTES = 1 << 18
_LIMITS = {"max_grammar_size": 100_000, "initial_lexer_fuel": 500_000, "max_lexer_states": 50_000}
"""Of llguidance, a fifth to a half of its own: what they allow compiles in less than a second. Its limits for one mask
are left as they are, about 15 ms."""
_KEPT = 64
"""Compiled grammars that are kept: requests of one program mostly ask for the same."""


@dataclass(frozen=True)
class JsonSchema:
    """A value in JSON, without blanks between its parts."""

    schema: str
    """A JSON schema (json-schema.org, draft 2020-12) in JSON; `{}` takes every value."""


@dataclass(frozen=True)
class Regex:
    """A text that the whole of a regular expression matches."""

    pattern: str
    """In the syntax of the Rust crate `regex`: no look-around, no back references."""


@dataclass(frozen=True)
class Lark:
    """A text that a context-free grammar derives."""

    grammar: str
    """In llguidance's variant of Lark; its first rule is `start`."""


@dataclass(frozen=True)
class OneOf:
    """One of some texts."""

    choices: tuple[str, ...]


Grammar = JsonSchema | Regex | Lark | OneOf


class Constraint:
    """Where one text is in its grammar."""

    def __init__(self, matcher: Any, vocab: int) -> None:
        self._matcher, self._vocab = matcher, vocab

    def mask(self) -> npt.NDArray[np.uint32]:
        """uint32 [ceil(V / 32)]: bit i % 32 of word i // 32 says whether id i may come next.

        Where the text may end, the ids that end it are among them.

        Raises:
            UserError: the grammar takes too long here.
        """
        found = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        if self._matcher.is_error():
            raise UserError(f"the grammar: cannot go on ({_line(self._matcher.get_error())}); use a simpler one")
        mask = np.zeros(mask_words(self._vocab) * 4, np.uint8)
        mask[: len(found)] = found[: len(mask)]
        return mask.view("<u4")

    def accept(self, token: int) -> None:
        """Go on with an id.

        Raises:
            UserError: the mask does not have it, or the grammar grows too large behind it, as one without an end does.
        """
        if not self._matcher.consume_token(token):
            raise UserError(f"the grammar: id {token} cannot come here ({_line(self._matcher.get_error())})")

    @property
    def finished(self) -> bool:
        """Whether the text is complete and nothing but its end can follow."""
        return bool(self._matcher.is_stopped())


class Constraints:
    """Makes constraints for the ids of one tokenizer. May be used by several threads."""

    def __init__(self, tokenizer: Tokenizer, *, ends: Sequence[int], vocab: int) -> None:
        """
        Args:
            tokenizer: whose ids the model gives.
            ends: ids that end a text.
            vocab: V, the width of the logits.

        Raises:
            UserError: llguidance is not installed, or the tokenizer's ids do not stand for bytes.
        """
        self._llguidance, self._vocab = _import_llguidance(), vocab
        words = self._llguidance.TokenizerWrapper(_Words(tokenizer, ends))
        self._vocabulary = self._llguidance.LLTokenizer(words, eos_token=list(ends))
        self._limits = self._llguidance.LLParserLimits(verbose_errors=False, **_LIMITS)
        self._compiled = functools.lru_cache(_KEPT)(self._compile)

    def start(self, grammar: Grammar) -> Constraint:
        """The beginning of a text.

        Raises:
            UserError: the grammar is not one, is too large, or asks for what llguidance does not have.
        """
        return Constraint(self._compiled(grammar).deep_copy(), self._vocab)

    def _compile(self, grammar: Grammar) -> Any:
        what, written = self._written(grammar)
        matcher = self._llguidance.LLMatcher(self._vocabulary, written, log_level=0, limits=self._limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some grammars have no beginning
        if matcher.is_error():
            raise UserError(f"{what}: {_line(matcher.get_error())}; use what llguidance {_VERSIONS} takes")
        return matcher

    def _written(self, grammar: Grammar) -> tuple[str, str]:
        """Its name for messages, and the grammar as llguidance reads it."""
        make = self._llguidance.LLMatcher
        match grammar:
            case JsonSchema(schema=text):
                _bounded("json_schema", text)
                return "json_schema", _json_grammar(make, text)
            case Regex(pattern=text):
                _bounded("regex", text)
                return "regex", make.grammar_from_regex(text)
            case Lark(grammar=text):
                _bounded("lark", text)
                return "lark", make.grammar_from_lark(text)
            case OneOf(choices=choices):
                _bounded("choices", "".join(choices))
                if not choices:
                    raise UserError("choices: must not be empty; name the texts that may come")
                return "choices", make.grammar_from_regex("|".join(map(_literal, choices)))
            case _:
                assert_never(grammar)


_VERSIONS = "1.x"
_JSON = {"whitespace_flexible": False, "lenient": False}
"""A model that may put blanks between values may go on with blanks for ever."""


class _Words:
    """What llguidance asks of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer, ends: Sequence[int]) -> None:
        words = tokenizer.token_bytes()
        special = {i for i, word in enumerate(words) if word is None} | set(ends)
        self.eos_token_id, self.bos_token_id = ends[0], tokenizer.bos_id
        self.tokens = [f"<|{i}|>".encode() if word is None or i in special else word for i, word in enumerate(words)]
        self.special_token_ids = sorted(special)
        self._encode = tokenizer.encode
        self._before = tokenizer.encode(_BEFORE)
        self._ids = {word: i for i, word in reversed([*enumerate(self.tokens)]) if i not in special}
        self._longest = max(map(len, self._ids))

    def __call__(self, text: str | bytes) -> list[int]:
        """How a text is written where the grammar leaves no choice: ids of exactly its bytes.

        The tokenizer's own where they are, which they are not at the beginning of a text where it puts a space.
        """
        plain = text.decode() if isinstance(text, bytes) else text
        n, ids = len(self._before), self._encode(_BEFORE + plain)
        if ids[:n] == self._before and b"".join(self.tokens[i] for i in ids[n:]) == plain.encode():
            return ids[n:]
        return self._longest_first(plain.encode())

    def _longest_first(self, text: bytes) -> list[int]:
        ids: list[int] = []
        while text:
            n = next((n for n in range(self._longest, 0, -1) if text[:n] in self._ids), None)
            if n is None:  # llguidance then leaves what comes to the mask
                return ids
            ids.append(self._ids[text[:n]])
            text = text[n:]
        return ids


_BEFORE = "\n"


def _json_grammar(make: Any, text: str) -> str:
    try:
        schema = json.loads(text, parse_constant=_refused)
        if not isinstance(schema, dict):
            raise UserError(f"json_schema: is {_short(text)}, must be an object; write {{}} for any value")
        if "x-guidance" in schema:
            raise UserError("json_schema: x-guidance would set how values are written; leave it out")
        grammar: str = make.grammar_from_json_schema(text, overrides=_JSON)
    except (ValueError, RecursionError) as error:  # of either reader
        raise UserError(f"json_schema: not JSON ({_line(str(error))}); write an object in JSON, nested less") from error
    return grammar


def _literal(text: str) -> str:
    """A regular expression that matches the text alone."""
    return "".join(c if c.isascii() and c.isalnum() else f"\\x{{{ord(c):x}}}" for c in text)


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is no number of JSON")


def _bounded(what: str, text: str) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError as error:
        raise UserError(f"{what}: has half a character, {text[error.start]!r}; leave it out") from error
    if size > MAX_GRAMMAR_BYTES:
        raise UserError(f"{what}: {size} bytes; use at most {MAX_GRAMMAR_BYTES}")


def _line(message: str) -> str:
    """A message of llguidance, which may draw pictures, in one line."""
    return _short(" ".join(message.replace("<non-verbose/>", "").split()), 300)


def _short(text: str, most: int = 60) -> str:
    return text if len(text) <= most else f"{text[:most]}..."


def _import_llguidance() -> Any:
    try:
        import llguidance
    except ImportError as error:
        raise UserError("grammars: need the package llguidance; install it: pip install -e '.[serve]'") from error
    return llguidance
