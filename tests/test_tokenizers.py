"""Tokenizers: exact round trips, reproducible training, honest errors."""

import io
import json
import sysconfig
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import (
    ByteTokenizer,
    HuggingFaceTokenizer,
    PieceModel,
    SentencePieceTokenizer,
    TrainSentencePiece,
    UserError,
)
from maxlm.data.tokenizers import Bytes, SentencePiece, Tokenizer, load_tokenizer, open_tokenizer
from maxlm.data.train_tokenizer import sample_lines, train_sentencepiece

LIBRARY = Path(sysconfig.get_path("stdlib"))
CODE = [(LIBRARY / name).read_text(encoding="utf-8") for name in ("ast.py", "calendar.py", "textwrap.py", "heapq.py")]
AWKWARD = [
    "",
    " ",
    "\n\n\t x  y \r\n",
    "a\u2581b \u2581\u2581",
    "nul \0 here",
    "日本語 🙂 e\u0301",
    "</s><s><unk><0x0A>",
    "x" * 5000,
    "1234567890",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return train_sentencepiece(TrainSentencePiece(vocab_size=1000), CODE, tmp_path_factory.mktemp("sp") / "tokenizer")


def hugging_face(path: Path, special: list[str]) -> Path:
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    model.train_from_iterator(CODE, trainer)
    model.enable_truncation(max_length=7)
    model.save(str(path))
    return path


@pytest.mark.parametrize("text", [*CODE, *AWKWARD])
def test_sentencepiece_gives_back_every_text(trained: Tokenizer, text: str) -> None:
    ids = trained.encode(text)
    assert trained.decode(ids) == text
    assert all(0 <= i < trained.vocab_size for i in ids)
    assert not {trained.bos_id, trained.eos_id} & set(ids)


@settings(max_examples=200, deadline=None)
@given(st.text())
def test_every_tokenizer_gives_back_any_text(trained: Tokenizer, text: str) -> None:
    for tokenizer in (trained, Bytes()):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_sentencepiece_agrees_with_the_library(trained: Tokenizer, tmp_path: Path) -> None:
    assert (trained.name_of(trained.bos_id), trained.name_of(trained.eos_id)) == ("<s>", "</s>")
    trained.save(tmp_path / "t")
    library = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "t" / "tokenizer.model"))
    assert trained.encode(CODE[0]) == library.encode(CODE[0], out_type=int)
    assert (trained.bos_id, trained.eos_id, trained.vocab_size) == (library.bos_id(), library.eos_id(), 1000)
    spaces = max(len(library.id_to_piece(i)) for i in trained.encode("                x"))
    assert spaces >= 8  # indentation is one piece
    assert len(trained.encode("2024")) == 4  # digits are pieces of their own


@pytest.mark.parametrize("model", PieceModel)
def test_training_is_reproducible(model: PieceModel, tmp_path: Path) -> None:
    def train(name: str, seed: int) -> str:
        config = TrainSentencePiece(vocab_size=500, model=model, max_sentences=800, seed=seed)
        return train_sentencepiece(config, CODE, tmp_path / name).fingerprint

    assert train("a", 0) == train("b", 0) != train("c", 1)


def test_the_sample_is_even_and_keeps_lines_whole() -> None:
    text = "".join(f"line {i}\n\n" for i in range(100))
    counts = dict.fromkeys(range(100), 0)
    for seed in range(400):
        sample = sample_lines([text], 10, seed)
        assert len(sample) == 10
        for line in sample:
            assert line.endswith("\n\n")
            counts[int(line.split()[1])] += 1
    # Binomial(400, 0.1): mean 40, standard deviation 6
    assert all(40 - 5 * 6 < count < 40 + 5 * 6 for count in counts.values())
    assert "".join(sample_lines(CODE, 10**9, 0)) == "".join(CODE)


def test_user_symbols_are_one_piece(tmp_path: Path) -> None:
    config = TrainSentencePiece(vocab_size=500, user_symbols=("<|user|>", "a,b"))
    tokenizer = train_sentencepiece(config, CODE, tmp_path / "t")
    assert len(tokenizer.encode("<|user|>")) == len(tokenizer.encode("a,b")) == 1


def test_vocab_sizes_that_do_not_fit(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"vocab_size = 60000 is too large .* at most (\d+)") as caught:
        train_sentencepiece(TrainSentencePiece(vocab_size=60_000), CODE[:1], tmp_path / "t")
    limit = int(str(caught.value).split("at most ")[1].split()[0])
    train_sentencepiece(TrainSentencePiece(vocab_size=limit), CODE[:1], tmp_path / "t")
    with pytest.raises(UserError, match=r"vocab_size = 100 is too small .* at least \d+"):
        train_sentencepiece(TrainSentencePiece(vocab_size=100), CODE[:1], tmp_path / "t")
    with pytest.raises(UserError, match="no text"):
        train_sentencepiece(TrainSentencePiece(vocab_size=100), [], tmp_path / "t")
    assert capfd.readouterr() == ("", "")  # sentencepiece's own log stays off the terminal


def test_hugging_face(tmp_path: Path) -> None:
    file = hugging_face(tmp_path / "tokenizer.json", ["<|endoftext|>"])
    tokenizer = open_tokenizer(HuggingFaceTokenizer(path=str(file)))
    library = tokenizers.Tokenizer.from_file(str(file))
    assert tokenizer.eos_id == library.token_to_id("<|endoftext|>")
    assert tokenizer.bos_id is None
    for text in (*CODE, *AWKWARD):
        assert tokenizer.decode(tokenizer.encode(text)) == text  # the file's truncation to 7 is off
    assert tokenizer.eos_id not in tokenizer.encode("text that says <|endoftext|> is no end")
    assert tokenizer.document_ids([5]) == [5, tokenizer.eos_id]
    assert tokenizer.prompt_ids("") == [tokenizer.eos_id]
    with pytest.raises(
        UserError,
        match=r"none\.json: none of its tokens is known .*--eos.*'<pad>'",
    ):
        open_tokenizer(HuggingFaceTokenizer(path=str(hugging_face(tmp_path / "none.json", ["<pad>"]))))


def test_an_html_tag_is_not_the_end_of_a_document(tmp_path: Path) -> None:
    file = hugging_face(tmp_path / "tokenizer.json", ["<eos>", "<bos>"])
    library = tokenizers.Tokenizer.from_file(str(file))
    library.add_tokens(["<s>", "</s>"])
    library.save(str(file))
    tokenizer = open_tokenizer(HuggingFaceTokenizer(path=str(file)))
    assert (tokenizer.eos_id, tokenizer.bos_id) == (library.token_to_id("<eos>"), library.token_to_id("<bos>"))


def test_models_that_put_a_space_before_a_text_are_left_as_they_are(tmp_path: Path) -> None:
    file = tmp_path / "llama.model"
    with file.open("wb") as model:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(CODE[0].splitlines()), model_writer=model, vocab_size=400, byte_fallback=True,
            minloglevel=2,
        )  # fmt: skip
    library = sentencepiece.SentencePieceProcessor(model_file=str(file))
    for text in AWKWARD:
        assert SentencePiece(file).encode(text) == library.encode(text, out_type=int)


def test_prompts_start_as_documents_do(trained: Tokenizer) -> None:
    for tokenizer in (trained, Bytes()):
        ids = tokenizer.encode("def f")
        assert tokenizer.document_ids(ids) == [tokenizer.bos_id, *ids, tokenizer.eos_id]
        assert tokenizer.prompt_ids("def f") == [tokenizer.bos_id, *ids]
        assert tokenizer.prompt_ids("") == [tokenizer.bos_id]
        assert tokenizer.decode(tokenizer.document_ids(ids)) == "def f"


def test_special_tokens_are_no_text(tmp_path: Path) -> None:
    names = ("[MASK]", "<extra_id_0>")
    trained = train_sentencepiece(TrainSentencePiece(vocab_size=500, special_tokens=names), CODE, tmp_path / "trained")
    Bytes(names).save(tmp_path / "bytes")
    for tokenizer in (trained, load_tokenizer(tmp_path / "trained"), load_tokenizer(tmp_path / "bytes")):
        ids = [tokenizer.specials[name] for name in names]
        assert len({*ids, tokenizer.bos_id, tokenizer.eos_id}) == 4 and max(ids) < tokenizer.vocab_size
        text = "a [MASK] and <extra_id_0>"
        assert not {*tokenizer.encode(text)} & {*ids} and tokenizer.decode(tokenizer.encode(text)) == text
        assert tokenizer.decode(ids) == "" and [tokenizer.token_bytes()[i] for i in ids] == [None, None]
    assert Bytes(names).fingerprint != Bytes().fingerprint != Bytes(names[:1]).fingerprint
    file = tmp_path / "bytes" / "config.json"
    file.write_text(file.read_text().replace('"[MASK]"', "3"))
    with pytest.raises(UserError, match=r"not a tokenizer's descriptor: its special_tokens = .* must be strings"):
        load_tokenizer(tmp_path / "bytes")


def test_bytes() -> None:
    tokenizer = open_tokenizer(ByteTokenizer())
    assert tokenizer.encode("aé") == [97, 0xC3, 0xA9]
    assert tokenizer.decode([97, 0xC3, 256, 257]) == "a\ufffd"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (256, 257, 258)


def test_saved_tokenizers_load_and_changes_are_noticed(trained: Tokenizer, tmp_path: Path) -> None:
    face = open_tokenizer(HuggingFaceTokenizer(path=str(hugging_face(tmp_path / "t.json", ["<s>", "</s>"]))))
    for name, tokenizer in (("sp", trained), ("bytes", Bytes()), ("hf", face)):
        tokenizer.save(tmp_path / name)
        again = load_tokenizer(tmp_path / name)
        assert type(again) is type(tokenizer)
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode_batch(CODE) == tokenizer.encode_batch(CODE)
    other = tmp_path / "other"
    train_sentencepiece(TrainSentencePiece(vocab_size=600), CODE, other)
    (tmp_path / "sp" / "tokenizer.model").write_bytes((other / "tokenizer.model").read_bytes())
    with pytest.raises(UserError, match=r"sp/tokenizer\.model: has changed"):
        load_tokenizer(tmp_path / "sp")
    (other / "config.json").write_text(json.dumps({"kind": "os.system", "fingerprint": ""}))
    with pytest.raises(UserError, match=r"other/config\.json: not a tokenizer's descriptor: .*name the file itself"):
        load_tokenizer(other)


def test_wrong_files(tmp_path: Path) -> None:
    junk = tmp_path / "junk"
    junk.write_bytes(b"\x00junk")
    for config in (SentencePieceTokenizer(path=str(junk)), HuggingFaceTokenizer(path=str(junk))):
        with pytest.raises(UserError, match="junk: not a"):
            open_tokenizer(config)
    with pytest.raises(UserError, match="missing: cannot be read"):
        open_tokenizer(SentencePieceTokenizer(path=str(tmp_path / "missing")))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CODE[0].splitlines()), model_writer=model, vocab_size=300, eos_id=-1, minloglevel=2
    )
    junk.write_bytes(model.getvalue())
    with pytest.raises(UserError, match="no end-of-document piece"):
        SentencePiece(junk)
