"""Vocabularies of GGUF files: the ids of `sentencepiece` and `tokenizers`; refused where they are not right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
import llama_cpp
import numpy as np
import published
import pytest
import sentencepiece
import tokenizers

from maxlm.config import UserError
from maxlm.data.text_ends import published_ends
from maxlm.hub import gguf_tokenizer
from maxlm.hub.gguf_file import GgufFile

TEXTS = (
    "Hello world", " two  spaces and\ttabs\n\nlines ", "I'VE 12345 apples, it's 3.14!", "déjà vu über 北京市 🙂 ы",
    "HelloWorld camelCase SHOUTING", "", "a", "   ", "<s> is text </s>", "٣٤٥ ½ Ⅷ", "x = [1, 22, 333]\r\n  return x",
)  # fmt: skip
TRAINED_ON = [*TEXTS, "the quick brown fox jumps over the lazy dog and the others " * 3, "12 123 1234 the then there"]


def vocabulary_file(path: Path, **said: Any) -> GgufFile:
    """A file without tensors."""
    writer = gguf.GGUFWriter(path, "llama")
    for key, value in said.items():
        getattr(writer, f"add_{key}")(value)
    llama_cpp.finish(writer)
    return GgufFile(path)


@pytest.mark.parametrize("prefix", [True, False])
def test_ids_of_sentencepiece(prefix: bool, tmp_path: Path) -> None:
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TRAINED_ON), model_prefix=str(tmp_path / "sp"), model_type="bpe", vocab_size=380,
        byte_fallback=True, add_dummy_prefix=prefix, remove_extra_whitespaces=False, minloglevel=2,
        normalization_rule_name="identity", character_coverage=0.98,
    )  # fmt: skip
    model = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "sp.model"))
    n = range(model.vocab_size())
    kinds = [2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else 1 for i in n]
    file = vocabulary_file(
        tmp_path / "model.gguf", tokenizer_model="llama", token_list=[model.id_to_piece(i) for i in n],
        token_scores=[model.get_score(i) for i in n], token_types=kinds, bos_token_id=1, eos_token_id=2,
        unk_token_id=0, add_space_prefix=prefix, eot_token_id=3,
    )  # fmt: skip
    tokenizer = gguf_tokenizer.find_tokenizer(file)
    assert tokenizer is not None
    for text in TEXTS:
        assert tokenizer.encode(text) == model.encode(text), text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, model.vocab_size())
    assert tokenizer.byte_ids == {i for i in n if model.is_byte(i)}
    assert tokenizer.prompt_ids("a") == [1, *model.encode("a")]
    assert gguf_tokenizer.find_ends(file, tokenizer) == ((1,), (2, 3))
    (tmp_path / "written").mkdir()
    gguf_tokenizer.write_tokenizer(file, tmp_path / "written")
    assert published_ends(tmp_path / "written", tokenizer) == ((1,), (2, 3))


def byte_level(pre: tokenizers.pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    """A small tokenizer, trained with the library's own way to cut a text."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre, tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=420, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], initial_alphabet=alphabet,
        show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(TRAINED_ON, trainer)
    return tokenizer


def said_of(trained: tokenizers.Tokenizer, **more: Any) -> dict[str, Any]:
    """As the converter writes it."""
    model = json.loads(trained.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].__getitem__)
    said = {
        "tokenizer_model": "gpt2",
        "token_list": tokens,
        "token_types": [3 if token.startswith("<|") else 1 for token in tokens],
        "token_merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return said | more


WAYS = {
    "gpt-2": tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": tokenizers.pre_tokenizers.Sequence(
        [tokenizers.pre_tokenizers.Digits(True), tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
}


@pytest.mark.parametrize("pre", WAYS)
def test_ids_of_bytes(pre: str, tmp_path: Path) -> None:
    trained = byte_level(WAYS[pre])
    file = vocabulary_file(tmp_path / "model.gguf", **said_of(trained, tokenizer_pre=pre))
    tokenizer = gguf_tokenizer.find_tokenizer(file)
    assert tokenizer is not None
    for text in TEXTS:
        assert tokenizer.encode(text) == trained.encode(text).ids, text
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert (tokenizer.bos_id, tokenizer.eos_id) == (None, 2)
    chat = "<|im_start|>user\nHello<|im_end|>"
    ids = tokenizers.Tokenizer.from_str(tokenizer._definition.decode()).encode(chat).ids
    assert ids == trained.encode(chat).ids and ids[0] == 1 and ids[-1] == 2


@pytest.mark.parametrize(
    ("pre", "pieces"),
    [
        ("gpt-2", ["I", "'", "VE", " 12345", " aB", ",", "\n\n ", " x"]),
        ("smollm", ["I", "'", "VE", " ", "1", "2", "3", "4", "5", " aB", ",", "\n\n ", " x"]),
        ("llama-bpe", ["I", "'VE", " ", "123", "45", " aB", ",\n\n", " ", " x"]),
        ("qwen2", ["I", "'VE", " ", "1", "2", "3", "4", "5", " aB", ",\n\n", " ", " x"]),
        ("tekken", ["I", "'VE", " ", "1", "2", "3", "4", "5", " a", "B", ",\n\n", " ", " x"]),
        ("gpt-4o", ["I'VE", " ", "123", "45", " a", "B", ",\n\n", " ", " x"]),
        ("default", ["I", "'", "VE", " ", "123", "45", " aB", ",", "\n\n ", " x"]),
    ],
)
def test_how_a_text_is_cut(pre: str, pieces: list[str], tmp_path: Path) -> None:
    said = said_of(byte_level(WAYS["gpt-2"]), tokenizer_pre=pre)
    tokenizer = gguf_tokenizer.find_tokenizer(vocabulary_file(tmp_path / "model.gguf", **said))
    assert tokenizer is not None
    made = tokenizers.Tokenizer.from_str(tokenizer._definition.decode())
    assert made.pre_tokenizer is not None and made.decoder is not None
    cut = [piece for piece, _ in made.pre_tokenizer.pre_tokenize_str("I'VE 12345 aB,\n\n  x")]
    assert [made.decoder.decode([piece]) for piece in cut] == pieces
    assert tokenizer.bos_id == (1 if pre in ("llama-bpe", "tekken") else None)


@pytest.mark.parametrize(
    ("more", "match"),
    [
        ({"tokenizer_model": "t5"}, r"tokenizer\.ggml\.model = 't5' is not supported; it may be llama, gpt2"),
        ({"tokenizer_pre": "new"}, r"tokenizer\.ggml\.pre = 'new' is not supported; it may be default, gpt-2, "),
        ({"token_types": [1]}, r"token_type has 1 entries, tokens \d+\); take another copy"),
        ({"eos_token_id": 420}, r"eos_token_id = 420 must be below the number of tokens, \d+"),
        ({"token_merges": ["ab"]}, "a line of merges has not two parts"),
        ({"token_merges": ["no such"]}, "no vocabulary that can be used"),
        ({"tokenizer_model": "llama"}, r"tokenizer\.ggml: has no scores; take another GGUF"),
    ],
)
def test_vocabularies_that_are_not_right(more: dict[str, Any], match: str, tmp_path: Path) -> None:
    said = said_of(byte_level(WAYS["gpt-2"]), **more)
    with pytest.raises(UserError, match=match) as caught:
        gguf_tokenizer.find_tokenizer(vocabulary_file(tmp_path / "model.gguf", **said))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_is_not_larger_than_the_tables(tmp_path: Path) -> None:
    def change(writer: gguf.GGUFWriter, tensors: dict[str, np.ndarray]) -> None:
        for key, value in said_of(byte_level(WAYS["gpt-2"])).items():
            getattr(writer, f"add_{key}")(value)

    published.write_model(published.MODELS["llama"], tmp_path / "hf")
    llama_cpp.write_gguf(tmp_path / "hf", tmp_path / "model.gguf", change=change)
    with pytest.raises(UserError, match=r"it has \d+ tokens, token_embd\.weight 64"):
        gguf_tokenizer.find_tokenizer(GgufFile(tmp_path / "model.gguf"))
