"""Texts drawn under a grammar parse, whatever the model says; a grammar that cannot be had is refused in one line."""

from __future__ import annotations

import io
import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jsonschema
import numpy as np
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from maxlm.config import HuggingFaceTokenizer, SamplingConfig, SentencePieceTokenizer, UserError
from maxlm.data.tokenizers import Bytes, Tokenizer, open_tokenizer
from maxlm.inference.logits_rules import History
from maxlm.inference.sampling import choose
from maxlm.inference.settings import Settings, settings_row
from maxlm.inference.structured import (
    MAX_GRAMMAR_BYTES,
    Constraint,
    Constraints,
    Grammar,
    JsonSchema,
    Lark,
    OneOf,
    Regex,
)

V, ROWS = 576, 8
TEXTS = [
    '{"name": "value", "n": [1, 22, 333.5e-7], "b": true, "a": null}',
    "déjà vu über 北京市 🙂 ы",
    " two  spaces and\ttabs\n\nlines ",
    "a\u2581b <0x41> </s> Ġ",
    "the quick brown fox jumps over the lazy dog " * 3,
]


def pieces(folder: Path) -> Tokenizer:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, model_type="bpe", vocab_size=340, byte_fallback=True,
        minloglevel=2, normalization_rule_name="identity", remove_extra_whitespaces=False, num_threads=1,
        user_defined_symbols=["<tool>"],
    )  # fmt: skip
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    return open_tokenizer(SentencePieceTokenizer(path=str(folder / "tokenizer.model")))


def bytes_of_gpt2(folder: Path) -> Tokenizer:
    model = tokenizers.Tokenizer(models.BPE())
    model.pre_tokenizer, model.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(TEXTS, trainer)
    model.add_tokens(["naïve token"])
    return saved(model, folder)


def pieces_of_llama(folder: Path) -> Tokenizer:
    """As tokenizer.json has them: bytes for what is no piece, a mark for a space."""
    spelled = [f"<0x{byte:02X}>" for byte in range(256)]
    words = ["</s>", "<unk>", *spelled, *string.printable[:95], "\u2581", "é", "\u2581th", "e\u2581"]
    ids = {word: i for i, word in enumerate(dict.fromkeys(words))}
    model = tokenizers.Tokenizer(models.BPE(ids, [], byte_fallback=True, unk_token="<unk>", ignore_merges=True))
    model.add_special_tokens(["</s>", "<unk>"])
    model.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)
    model.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return saved(model, folder)


def saved(model: tokenizers.Tokenizer, folder: Path) -> Tokenizer:
    model.save(str(folder / "tokenizer.json"))
    return open_tokenizer(HuggingFaceTokenizer(path=str(folder / "tokenizer.json")))


KINDS: dict[str, Callable[[Path], Tokenizer]] = {
    "bytes": lambda _: Bytes(),
    "sentencepiece": pieces,
    "byte level": bytes_of_gpt2,
    "metaspace": pieces_of_llama,
}


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return KINDS[request.param](tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def constraints(tokenizer: Tokenizer) -> Constraints:
    return Constraints(tokenizer, ends=[tokenizer.eos_id], vocab=V)


def test_the_bytes_of_tokens_are_their_text(tokenizer: Tokenizer) -> None:
    words = tokenizer.token_bytes()
    assert len(words) == tokenizer.vocab_size <= V
    before = tokenizer.encode("x")
    start = tokenizer.decode(before)
    for i, word in enumerate(words):
        after = tokenizer.decode([*before, i])
        assert after.startswith(start)
        if word is None:
            assert after == start or "\u2047" in after  # sentencepiece shows what it does not know
        else:
            part = word.decode(errors="ignore").encode() != word  # of a character
            assert part or after[len(start) :] == word.decode()
    for text in TEXTS:
        ids = tokenizer.encode(text)
        joined = b"".join(words[i] or b"" for i in ids).decode()
        assert joined in (tokenizer.decode(ids), " " + tokenizer.decode(ids))
    assert words[tokenizer.eos_id] is None


def allowed(mask: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist())


_choose = jax.jit(choose)


def drawn(constraints: Constraints, grammars: list[Grammar], tokenizer: Tokenizer, seed: int) -> list[str]:
    """Texts that a model which knows nothing writes at temperature 2."""
    assert len(grammars) == ROWS
    rng, sampling = np.random.default_rng(seed), SamplingConfig(temperature=2.0)
    rows = [settings_row(sampling, vocab=V, tokens=tokenizer.vocab_size, seed=seed + i) for i in range(ROWS)]
    settings = Settings(*(np.stack(column) for column in zip(*rows, strict=True)))
    texts: list[list[int]] = [[] for _ in grammars]
    running: dict[int, Constraint] = {row: constraints.start(grammar) for row, grammar in enumerate(grammars)}
    none, zeros = np.zeros((ROWS, 1), np.int32), np.zeros(ROWS, np.int32)
    for position in range(600):
        for row, constraint in running.items():
            settings.allowed[row] = constraint.mask()
        logits = rng.normal(0, 3, (ROWS, V)).astype(np.float32)
        logits[:, tokenizer.eos_id] += 3
        tokens = np.asarray(_choose(logits, settings, History(none, np.arange(ROWS), zeros, zeros + position)).tokens)
        for row in list(running):
            running[row].accept(int(tokens[row]))
            if tokens[row] == tokenizer.eos_id:
                del running[row]
            else:
                texts[row].append(int(tokens[row]))
                if running[row].finished:
                    del running[row]
        if not running:
            break
    assert not running, [tokenizer.decode(texts[row])[-80:] for row in running]
    words = tokenizer.token_bytes()
    return [b"".join(words[i] or b"" for i in ids).decode() for ids in texts]


PATTERNS = ["^[a-z]{1,4}$", '^(x|é|\\\\|")[0-9]{2}$', "^A-\\d{3}\\.$"]


def schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    """One that lets no text go on for ever."""
    kinds = ["string", "pattern", "integer", "enum", "const", "boolean", "null", "date"]
    match rng.choice([*kinds, *["object", "array", "anyOf"] * 3] if depth else kinds):
        case "string":
            least = rng.randrange(3)
            return {"type": "string", "minLength": least, "maxLength": least + rng.randrange(6)}
        case "pattern":
            return {
                "type": "string",
                "pattern": rng.choice(PATTERNS),
            }
        case "integer":
            low = rng.randrange(-200, 200)
            return {"type": "integer", "minimum": low, "maximum": low + rng.randrange(300)}
        case "enum":
            return {"enum": rng.sample(["a", "b c", 1, 2.5, None, True, ["x", {}], '\u00e9\n"'], 3)}
        case "const":
            return {"const": rng.choice([{"k": [1, "z"]}, "\t", -3])}
        case "date":
            return {"type": "string", "format": "date"}
        case "object":
            names = rng.sample(["a", "b", "long name", '\u00e4"', "0"], rng.randrange(1, 4))
            return {
                "type": "object",
                "properties": {name: schema(rng, depth - 1) for name in names},
                "required": [name for name in names if rng.random() < 0.5],
                "additionalProperties": False,
            }
        case "array":
            least = rng.randrange(3)
            more = {"minItems": least, "maxItems": least + rng.randrange(3)}
            return {"type": "array", "items": schema(rng, depth - 1), **more}
        case "anyOf":
            return {"anyOf": [schema(rng, depth - 1) for _ in range(2)]}
        case plain:
            return {"type": plain}


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 12))])
def test_json_of_a_schema_parses(constraints: Constraints, tokenizer: Tokenizer, seed: int) -> None:
    rng = random.Random(seed)
    for _ in range(2):
        schemas = [schema(rng) for _ in range(ROWS)]
        grammars: list[Grammar] = [JsonSchema(json.dumps(one)) for one in schemas]
        for one, text in zip(schemas, drawn(constraints, grammars, tokenizer, seed), strict=True):
            value = json.loads(text)
            jsonschema.validate(value, one, jsonschema.Draft202012Validator)
            compact = json.dumps(value, separators=(",", ":"), ensure_ascii=False)
            assert len(text) - text.count("\\") * 6 <= len(compact)  # no blanks between values


EXPRESSION = r"(\d{2}|[à-ÿ]+x)?;{1,3}"


def test_other_grammars_hold(constraints: Constraints, tokenizer: Tokenizer) -> None:
    choices = ('say "no"\\', "é\n", "ab", "abc", "\x00\x7f", "</s>")
    sums = 'start: part ("+" part){0,3}\npart: /[0-9]{1,3}/ | "(" part "*" part ")"'
    grammars: list[Grammar] = [OneOf(choices), Regex(EXPRESSION), Lark(sums), OneOf(("only",))] * 2
    got = drawn(constraints, grammars, tokenizer, 3)
    for start in (0, 4):
        one, expression, added, only = got[start : start + 4]
        assert one in choices and only == "only"
        assert re.fullmatch(EXPRESSION, expression)
        assert re.fullmatch(r"[0-9+*()]+", added) and added.count("(") == added.count(")")


def test_a_text_ends_only_where_it_may(constraints: Constraints, tokenizer: Tokenizer) -> None:
    text = constraints.start(OneOf(("ab", "abc")))
    words = tokenizer.token_bytes()
    for byte in b"ab":
        assert tokenizer.eos_id not in allowed(text.mask()) and not text.finished
        assert all((words[i] or b"-")[:1] == bytes([byte]) for i in allowed(text.mask()))
        text.accept(words.index(bytes([byte])))
    assert {words[i] for i in allowed(text.mask())} == {None, b"c"} and not text.finished
    with pytest.raises(UserError, match="cannot come here"):
        text.accept(words.index(b"x"))
    other = constraints.start(OneOf(("ab", "abc")))  # the first has not changed the kept one
    for byte in b"abc":
        other.accept(words.index(bytes([byte])))
    assert other.finished and allowed(other.mask()) == {tokenizer.eos_id}


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        (JsonSchema("["), "json_schema: not JSON (Expecting value"),
        (JsonSchema("[]"), "json_schema: is [], must be an object"),
        (JsonSchema("true"), "must be an object"),
        (JsonSchema('{"minimum": NaN}'), "NaN is no number of JSON"),
        (JsonSchema('{"type": "strin"}'), "json_schema: Invalid type: strin"),
        (JsonSchema('{"not": {"type": "null"}}'), 'Unimplemented keys: ["not"]'),
        (JsonSchema('{"$ref": "http://x/y"}'), "json_schema: Resource 'http://x/y'"),
        (JsonSchema('{"type": "array", "minItems": 3, "maxItems": 1}'), "minItems (3) is greater than maxItems (1)"),
        (JsonSchema('{"type": "string", "pattern": "(?=a)b"}'), "look-around"),
        (JsonSchema('{"x-guidance": {"whitespace_pattern": " +"}}'), "x-guidance would set"),
        (JsonSchema('{"items":' * 400 + "{}" + "}" * 400), "nested less"),
        (JsonSchema('{"$ref":"#/$defs/a","$defs":{"a":{"$ref":"#/$defs/a"}}}'), "json_schema: "),
        (JsonSchema(json.dumps({"allOf": [{"anyOf": [{"required": [f"{i}{j}"]} for j in "ab"]} for i in range(16)]})),
         "schema too large"),
        (Regex("("), "regex: at 1(8): invalid regex"),
        (Regex("(" * 5000 + ")" * 5000), "regex: "),
        (Regex("\ud800"), "regex: has half a character"),
        (Regex("a" * (MAX_GRAMMAR_BYTES + 1)), f"use at most {MAX_GRAMMAR_BYTES}"),
        (Lark("start: foo"), 'lark: at 1(8): unknown name: "foo"'),
        (Lark("start: " + "(" * 20000 + '"a"' + ")" * 20000), "too deeply nested"),
        (OneOf(()), "choices: must not be empty"),
    ],
    ids=lambda value: value[:30] if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_had_is_refused_in_a_line(grammar: Grammar, words: str) -> None:
    constraints = Constraints(Bytes(), ends=[Bytes.eos_id], vocab=V)
    with pytest.raises(UserError) as error:
        constraints.start(grammar)
    assert words in str(error.value)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


def test_a_tokenizer_whose_tokens_are_no_bytes_is_refused(tmp_path: Path) -> None:
    for decoder, words in ((decoders.WordPiece(), "decoder WordPiece"), (None, "has no decoder")):
        model = tokenizers.Tokenizer(models.WordPiece({"</s>": 0, "a": 1, "##b": 2}, unk_token="</s>"))
        if decoder is not None:
            model.decoder = decoder
        with pytest.raises(UserError, match=words):
            saved(model, tmp_path).token_bytes()
