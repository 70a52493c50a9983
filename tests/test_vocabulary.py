"""Tokenizers with more or fewer tokens: what texts become, by the libraries that tokenise."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from maxlm.hub.vocabularies import Vocabulary

ENGLISH = ["the cat sat on the mat, and the dog saw that", "a house is a place where people live together"] * 8
OTHER = ["дом и кошка на крыше", "привет мир и до встречи", "кошка и собака живут дома"] * 8
EVERY = [*ENGLISH[:2], *OTHER[:3], "the кошка sat дома, 42 \U0001f600\n\ttabs"]


def byte_level(texts: list[str], size: int) -> tokenizers.Tokenizer:
    """GPT-2's kind."""
    found = tokenizers.Tokenizer(models.BPE())
    found.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    found.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size, special_tokens=["<s>", "</s>"], initial_alphabet=pre_tokenizers.ByteLevel.alphabet()
    )
    found.train_from_iterator(texts, trainer)
    found.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", found.token_to_id("<s>"))]
    )
    return found


def unigram(texts: list[str], size: int) -> tokenizers.Tokenizer:
    found = tokenizers.Tokenizer(models.Unigram())
    found.pre_tokenizer = pre_tokenizers.Metaspace()
    found.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=size, special_tokens=["<unk>", "</s>"], unk_token="<unk>")
    found.train_from_iterator(texts, trainer)
    return found


def pieces(texts: list[str], size: int, kind: str) -> bytes:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(texts), model_writer=model, model_type=kind, vocab_size=size, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, num_threads=1,
    )  # fmt: skip
    return model.getvalue()


def as_vocabulary(tokenizer: tokenizers.Tokenizer | bytes, name: str = "tokenizer") -> Vocabulary:
    if isinstance(tokenizer, bytes):
        return Vocabulary(Path(f"{name}.model"), tokenizer)
    return Vocabulary(Path(f"{name}.json"), tokenizer.to_str().encode())


def encode(definition: bytes, is_json: bool, text: str) -> list[str]:
    """The tokens of a text, as the library gives them."""
    if is_json:
        return tokenizers.Tokenizer.from_buffer(definition).encode(text).tokens
    return sentencepiece.SentencePieceProcessor(model_proto=definition).encode(text, out_type=str)


def ids(definition: bytes, is_json: bool, text: str) -> list[int]:
    if is_json:
        return tokenizers.Tokenizer.from_buffer(definition).encode(text).ids
    return sentencepiece.SentencePieceProcessor(model_proto=definition).encode(text)


def decode(definition: bytes, is_json: bool, tokens: list[int]) -> str:
    if is_json:
        return tokenizers.Tokenizer.from_buffer(definition).decode(tokens)
    return sentencepiece.SentencePieceProcessor(model_proto=definition).decode(tokens)


def size(vocabulary: Vocabulary) -> int:
    if vocabulary.is_json:
        return tokenizers.Tokenizer.from_buffer(vocabulary.definition).get_vocab_size()
    return sentencepiece.SentencePieceProcessor(model_proto=vocabulary.definition).vocab_size()


KINDS = {
    "bytes": lambda texts: byte_level(texts, 320),
    "unigram": lambda texts: unigram(texts, 90),
    "sentencepiece bpe": lambda texts: pieces(texts, 330, "bpe"),
    "sentencepiece unigram": lambda texts: pieces(texts, 310, "unigram"),
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_stays_is_tokenised_as_before(kind: str) -> None:
    vocabulary = as_vocabulary(KINDS[kind](ENGLISH + OTHER))
    used = {i for text in ENGLISH for i in ids(vocabulary.definition, vocabulary.is_json, text)}
    edited = vocabulary.kept(used)
    assert len(edited.sources) < size(vocabulary)
    for text in ENGLISH[:2]:
        before, after = (ids(one, vocabulary.is_json, text) for one in (vocabulary.definition, edited.definition))
        assert [edited.sources[i] for i in after] == [(i,) for i in before]
        assert encode(edited.definition, vocabulary.is_json, text) == encode(
            vocabulary.definition, vocabulary.is_json, text
        )


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_every_text_can_be_written_in_bytes(kind: str) -> None:
    vocabulary = as_vocabulary(KINDS[kind](ENGLISH + OTHER))
    edited = vocabulary.kept(set())
    for text in EVERY:
        before, after = (ids(one, vocabulary.is_json, text) for one in (vocabulary.definition, edited.definition))
        assert decode(edited.definition, vocabulary.is_json, after) == decode(
            vocabulary.definition, vocabulary.is_json, before
        )


@pytest.mark.parametrize("kind", KINDS)
def test_new_tokens_come_after_the_old_ones(kind: str) -> None:
    """In shorter texts of the other language, and with the same ids of the first."""
    vocabulary, other = as_vocabulary(KINDS[kind](ENGLISH)), as_vocabulary(KINDS[kind](OTHER), "other")
    edited = vocabulary.extended(other)
    old = size(vocabulary)
    assert edited.sources[:old] == tuple((i,) for i in range(old)) and len(edited.sources) > old + 20
    for text in ENGLISH[:2]:
        assert ids(edited.definition, vocabulary.is_json, text) == ids(vocabulary.definition, vocabulary.is_json, text)
    for text in OTHER[:3]:
        before, after = (ids(one, vocabulary.is_json, text) for one in (vocabulary.definition, edited.definition))
        if kind == "unigram":  # it knew none of the letters, and spells in no bytes
            assert 0 in before and 0 not in after
            continue
        assert len(after) < len(before) - 3
        assert decode(edited.definition, vocabulary.is_json, after) == text
        if kind == "bytes":
            assert [i for one in after for i in edited.sources[one]] == before
