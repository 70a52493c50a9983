"""More or fewer tokens: what texts become, by the libraries that tokenise, and what a model says of them."""

from __future__ import annotations

import io
import json
from pathlib import Path

import numpy as np
import published
import pytest
import sentencepiece
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from maxlm import convert
from maxlm.config import UserError
from maxlm.hub.models import load_model
from maxlm.hub.token_sets import TokenSet

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


def as_vocabulary(tokenizer: tokenizers.Tokenizer | bytes, name: str = "tokenizer") -> TokenSet:
    if isinstance(tokenizer, bytes):
        return TokenSet(Path(f"{name}.model"), tokenizer)
    return TokenSet(Path(f"{name}.json"), tokenizer.to_str().encode())


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


def size(vocabulary: TokenSet) -> int:
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


def tiny(folder: Path, *, tied: bool = False, rows: int = 330) -> tuple[Path, TokenSet]:
    """A model with more rows than its tokenizer has ids, and files beside it that name ids."""
    published.write_model({**published.MODELS["llama"], "vocab_size": rows, "tie_word_embeddings": tied}, folder)
    tokenizer = byte_level(ENGLISH + OTHER, 320)
    tokenizer.save(str(folder / "tokenizer.json"))
    eos = tokenizer.token_to_id("</s>")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [eos], "bos_token_id": 0, "top_k": 7}))
    added = {str(eos): {"content": "</s>", "special": True}}
    (folder / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": added, "eos_token": "</s>"}))
    return folder, as_vocabulary(tokenizer)


def change(folder: Path, target: Path, *words: str) -> None:
    convert.main(["--from", f"hf:{folder}", "--to", f"hf:{target}", *words])


@pytest.mark.parametrize("tied", [False, True])
def test_a_pruned_model_says_the_same_among_what_is_left(tied: bool, tmp_path: Path) -> None:
    folder, vocabulary = tiny(tmp_path / "hf", tied=tied)
    (tmp_path / "text.txt").write_text("\n".join(ENGLISH[:2]))
    change(folder, tmp_path / "less", "--keep_tokens_of", str(tmp_path / "text.txt"))
    less = (tmp_path / "less/tokenizer.json").read_bytes()
    before = np.array(ids(vocabulary.definition, True, ENGLISH[0]))
    after = np.array(ids(less, True, ENGLISH[0]))
    names = {i: token for token, i in tokenizers.Tokenizer.from_buffer(less).get_vocab().items()}
    kept = [tokenizers.Tokenizer.from_buffer(vocabulary.definition).token_to_id(names[i]) for i in range(len(names))]
    assert len(kept) < 310 and [kept[i] for i in after] == before.tolist()
    old, new = load_model(folder)[0], load_model(tmp_path / "less")[0]
    np.testing.assert_array_equal(new(after), np.asarray(old(before))[:, kept])
    eos = kept.index(tokenizers.Tokenizer.from_buffer(vocabulary.definition).token_to_id("</s>"))
    assert json.loads((tmp_path / "less/generation_config.json").read_text()) == {
        "eos_token_id": [eos], "bos_token_id": kept.index(0), "top_k": 7
    }  # fmt: skip
    assert list(json.loads((tmp_path / "less/tokenizer_config.json").read_text())["added_tokens_decoder"]) == [str(eos)]


def test_listed_tokens_go(tmp_path: Path) -> None:
    folder, vocabulary = tiny(tmp_path / "hf")
    token = tokenizers.Tokenizer.from_buffer(vocabulary.definition).id_to_token(319)  # the last merge: part of no other
    (tmp_path / "list").write_text(f"{token}\n")
    change(folder, tmp_path / "less", "--drop_tokens", str(tmp_path / "list"), "--vocab_multiple", "64")
    left = tokenizers.Tokenizer.from_file(str(tmp_path / "less/tokenizer.json"))
    assert left.get_vocab_size() == 319 and left.token_to_id(token) is None
    assert load_model(tmp_path / "less")[1].vocab_size == 320
    (tmp_path / "list").write_text("no such token\n")
    with pytest.raises(UserError, match="has no token 'no such token'"):
        change(folder, tmp_path / "none", "--drop_tokens", str(tmp_path / "list"))
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("rows", ["subwords", "mean"])
def test_a_grown_model_says_the_same_with_new_rows(rows: str, tmp_path: Path) -> None:
    folder, vocabulary = tiny(tmp_path / "hf")
    byte_level(["новые слова для модели и для словаря"] * 8, 330).save(str(tmp_path / "more.json"))
    change(folder, tmp_path / "more", "--add_tokens_of", str(tmp_path / "more.json"), "--new_rows", rows)
    (old, _), (new, config) = load_model(folder), load_model(tmp_path / "more")
    grown = tokenizers.Tokenizer.from_file(str(tmp_path / "more/tokenizer.json"))
    assert config.vocab_size == grown.get_vocab_size() > 330
    text = np.array(ids(vocabulary.definition, True, ENGLISH[0]))
    assert grown.encode(ENGLISH[0]).ids == text.tolist()
    np.testing.assert_allclose(np.asarray(new(text))[:, :320], np.asarray(old(text))[:, :320], atol=5e-6)
    for name in ("embed", "unembed"):
        before, after = (np.asarray(model.parameters[name], np.float64) for model in (old, new))
        np.testing.assert_array_equal(after[:320], before[:320])
        for i in range(320, config.vocab_size):
            spelled = vocabulary_spelling(vocabulary, grown.id_to_token(i))
            want = before[spelled if rows == "subwords" else slice(0, 320)].mean(0)
            np.testing.assert_allclose(after[i], want, rtol=1e-6, atol=1e-7)


def vocabulary_spelling(vocabulary: TokenSet, token: str) -> list[int]:
    """By the library's own encoding of the text, where the token is whole characters; else of its bytes by merging."""
    tokenizer = tokenizers.Tokenizer.from_buffer(vocabulary.definition)
    return [one.id for one in tokenizer.model.tokenize(token)]


def test_what_does_not_fit_is_refused(tmp_path: Path) -> None:
    folder, _ = tiny(tmp_path / "hf", rows=300)
    (tmp_path / "text.txt").write_text(ENGLISH[0])
    with pytest.raises(UserError, match="its tokenizer has ids up to 319, the model 300 rows"):
        change(folder, tmp_path / "less", "--keep_tokens_of", str(tmp_path / "text.txt"))
    folder, _ = tiny(tmp_path / "good")
    (tmp_path / "other.model").write_bytes(pieces(ENGLISH, 330, "bpe"))
    for add, message in (
        ("other.model", "is of another kind"),
        ("text.txt", "is no tokenizer.json, no sentencepiece .model"),
    ):
        with pytest.raises(UserError, match=message):
            change(folder, tmp_path / "more", "--add_tokens_of", str(tmp_path / add))
    with pytest.raises(UserError, match="--add_tokens_of and --drop_tokens change the vocabulary both"):
        change(folder, tmp_path / "more", "--add_tokens_of", "x", "--drop_tokens", "y")
    unigram(OTHER, 90).save(str(tmp_path / "unigram.json"))
    with pytest.raises(UserError, match="train one of the same kind, with the same pre-tokenizer"):
        change(folder, tmp_path / "more", "--add_tokens_of", str(tmp_path / "unigram.json"))
    (tmp_path / "broken.model").write_bytes(b"\xff\xff\xff no protobuf")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        TokenSet.read(tmp_path / "broken.model").kept(set())
    assert not list(tmp_path.glob("more*/")) and not list(tmp_path.glob("less*/"))
