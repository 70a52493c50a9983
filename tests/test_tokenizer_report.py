"""Tokenizers side by side, trained on a mixture, and with the tokens of others."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
import sentencepiece
import tokenizers
from hypothesis import given
from hypothesis import strategies as st

from maxlm.config import Files, PieceModel, TrainSentencePiece, UserError
from maxlm.data.__main__ import main
from maxlm.data.documents import Document, Unreadable
from maxlm.data.tokenizer_report import first_of_each, measure, short_names, tagged
from maxlm.data.tokenizers import Bytes, HuggingFace, SentencePiece, load_tokenizer
from maxlm.data.train_tokenizer import sample_mixture, train_sentencepiece
from maxlm.hub.token_sets import TokenSet

ENGLISH = ["the cat sat on the mat, and the dog saw that\n", "a house is a place where people live together\n"] * 8
RUSSIAN = ["дом и кошка на крыше\n", "привет мир и до встречи\n", "кошка и собака живут дома\n"] * 8


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """On English and on Russian."""
    folder = tmp_path_factory.mktemp("tokenizers")
    for name, texts in (("english", ENGLISH), ("russian", RUSSIAN)):
        train_sentencepiece(TrainSentencePiece(vocab_size=330), texts, folder / name)
    return folder / "english", folder / "russian"


def without_bytes(folder: Path) -> SentencePiece:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(ENGLISH), model_writer=model, vocab_size=40, model_type="bpe", minloglevel=2
    )
    (folder / "plain.model").write_bytes(model.getvalue())
    return SentencePiece(folder / "plain.model")


def words(folder: Path, kind: str) -> HuggingFace:
    """A tokenizer.json that knows two words."""
    known = {"[UNK]": 0, "[SEP]": 1, "the": 2, "cat": 3}
    if kind == "WordLevel":
        model = tokenizers.models.WordLevel(known, unk_token="[UNK]")
    else:
        model = tokenizers.models.Unigram([(word, -float(i)) for word, i in known.items()], unk_id=0)
    found = tokenizers.Tokenizer(model)
    found.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    found.save(str(folder / f"{kind}.json"))
    return HuggingFace(folder / f"{kind}.json")


def test_figures_are_counts_of_the_libraries(trained: tuple[Path, Path], tmp_path: Path) -> None:
    texts = {"en": "the cat sat\n", "ja": "猫 cat"}
    found = [load_tokenizer(trained[0]), Bytes(), without_bytes(tmp_path)]
    found += [words(tmp_path, kind) for kind in ("WordLevel", "Unigram")]
    measured = measure(found, [Document(text, "x", 1, kind) for kind, text in texts.items()])
    assert list(measured) == ["en", "ja", "all"]
    library = sentencepiece.SentencePieceProcessor(model_file=str(trained[0] / "tokenizer.model"))
    english = measured["en"][0]
    assert (english.text_bytes, english.words, english.tokens) == (12, 3, len(library.encode(texts["en"])))
    assert english.figures()["fertility"] == english.tokens / 3
    assert english.figures()["tokens_per_byte"] * english.figures()["bytes_per_token"] == pytest.approx(1)
    assert (measured["ja"][0].byte_tokens, measured["ja"][0].unknown_tokens) == (3, 0)
    one = measured["ja"][1]
    assert (one.words, one.tokens, one.byte_tokens, one.unknown_tokens) == (2, 7, 7, 0)
    plain = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "plain.model"))
    assert measured["ja"][2].unknown_tokens == plain.encode(texts["ja"]).count(plain.unk_id()) == 1
    assert [one.unknown_tokens for one in measured["ja"][3:]] == [1, 1]
    assert measured["all"][3].unknown_tokens == 2 and measured["all"][3].figures()["unknown_share"] == 2 / 5
    with pytest.raises(UserError, match="there is no text"):
        measure(found, [])


def test_tags_come_from_records(tmp_path: Path) -> None:
    file = tmp_path / "x.jsonl"
    records = [{"text": "a" * 10, "language": "en"}] * 3 + [{"text": "д", "language": "ru"}]
    records += [{"text": "x"}, {"language": "en"}]
    file.write_text("".join(json.dumps(one) + "\n" for one in records))
    unreadable = Unreadable()
    found = list(first_of_each(tagged(Files(paths=(str(file),)), "language", unreadable), 20))
    assert [(one.kind, len(one.text)) for one in found] == [("en", 10), ("en", 10), ("ru", 1)]
    assert unreadable.count == 2 and "no name under 'language'" in unreadable.examples[0]


def test_names_that_tell_apart() -> None:
    assert short_names(["data/a/tokenizer", "b.model", "bytes"]) == ["a", "b.model", "bytes"]
    assert short_names(["a/x", "b/x"]) == ["a/x", "b/x"]


def test_report_of_several(trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.txt").write_text("the cat\n")
    names = [*map(str, trained), "bytes"]
    assert main(["tokenizer", "report", str(tmp_path), "--json", "--tokenizer", *names]) == 0
    said = json.loads(capsys.readouterr().out)
    assert list(said["tokenizers"]) == ["english", "russian", "bytes"] and list(said["kinds"]) == [".txt"]
    assert said["kinds"][".txt"]["bytes"]["fertility"] == 4
    assert main(["tokenizer", "report", str(tmp_path), "--tokenizer", *names]) == 0
    text = capsys.readouterr().out
    assert "russian: vocabulary 330, bos 1, eos 2, fingerprint " in text and "100.00%" in text
    with pytest.raises(UserError, match="--by 'language' is a key of records in files"):
        main(["tokenizer", "report", "--by", "language", "--tokenizer", "bytes"])


@given(
    st.lists(st.lists(st.text("abé", min_size=1, max_size=9), min_size=1, max_size=30), min_size=1, max_size=3),
    st.lists(st.floats(0.1, 10), min_size=3, max_size=3),
    st.integers(1, 400),
)
def test_a_sample_has_the_shares(sets: list[list[str]], weights: list[float], limit: int) -> None:
    weights = weights[: len(sets)]
    texts = [["\n".join(lines)] for lines in sets]
    found = sample_mixture(texts, weights, limit, seed=3)
    assert found == sample_mixture(texts, weights, limit, seed=3)
    shares = [weight / sum(weights) for weight in weights]
    sizes = [len(text.encode()) for (text,) in texts]
    total = min([limit, *(size / share for size, share in zip(sizes, shares, strict=True))])
    for lines, (text,), share in zip(found, texts, shares, strict=True):
        longest = max(len(line.encode()) for line in lines)
        size = sum(len(line.encode()) for line in lines)
        assert share * total * (1 - 1e-9) <= size < share * total + longest
        rest = text
        for line in lines:  # in their order
            assert line in rest
            rest = rest[rest.index(line) + len(line) :]


def test_a_sample_is_even() -> None:
    """Of a thousand lines, half: as many of the first half as of the second, five deviations at most apart."""
    lines = [f"{i:03d}\n" for i in range(1000)]
    (found,) = sample_mixture([lines], [1.0], 2000, seed=0)
    assert len(found) == 500 and abs(sum(int(line) < 500 for line in found) - 250) < 5 * 8
    assert found != sample_mixture([lines], [1.0], 2000, seed=1)[0]


def test_training_on_a_mixture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, texts in (("english", ENGLISH), ("russian", RUSSIAN)):
        (tmp_path / f"{name}.txt").write_text("".join(texts))
    paths = [str(tmp_path / f"{name}.txt") for name in ("english", "russian")]
    words = ["--weights", "3", "1", "--sample_bytes", "400", "--vocab_size", "320"]
    for out in ("a", "b"):
        assert main(["tokenizer", "train", *paths, *words, "--out", str(tmp_path / out)]) == 0
    said = capsys.readouterr().out.splitlines()
    sizes = [int(line.split(": ")[1].split(" ")[0].replace(",", "")) for line in said[:2]]
    assert 300 <= sizes[0] < 346 and 100 <= sizes[1] < 147
    one, other = (load_tokenizer(tmp_path / out) for out in ("a", "b"))
    assert one.fingerprint == other.fingerprint
    with pytest.raises(UserError, match="--weights has 1 numbers for 2 PATHs"):
        main(["tokenizer", "train", *paths, "--weights", "1", "--out", str(tmp_path / "c")])
    with pytest.raises(UserError, match="is there already and not empty"):
        main(["tokenizer", "train", *paths, "--out", str(tmp_path / "a")])


def test_an_extended_tokenizer_keeps_its_ids(
    trained: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    english, russian = trained
    sums = [f"{i} + {i} = {2 * i} plus\n" for i in range(40)]
    train_sentencepiece(TrainSentencePiece(vocab_size=285), sums, tmp_path / "sums")
    out = tmp_path / "more"
    words = ["tokenizer", "extend", "--tokenizer", str(english), "--from", str(russian), str(tmp_path / "sums")]
    assert main([*words, "--out", str(out)]) == 0
    old, new, added = load_tokenizer(english), load_tokenizer(out), load_tokenizer(russian)
    assert f"330 ids stay, {new.vocab_size - 330} are new" in capsys.readouterr().out
    assert [new.name_of(i) for i in range(330)] == [old.name_of(i) for i in range(330)]
    for text in ENGLISH[:2]:
        assert new.encode(text) == old.encode(text)
    for text in RUSSIAN[:3]:
        assert new.decode(new.encode(text)) == text
        assert len(new.encode(text)) <= len(added.encode(text)) < len(old.encode(text))
    # What maxlm.convert --add_tokens_of makes of a model's tokenizer and this one is this one, id for id.
    assert TokenSet.read(english).extended(TokenSet.read(out)).definition == (out / "tokenizer.model").read_bytes()
    with pytest.raises(UserError, match="is there already and not empty"):
        main([*words, "--out", str(out)])
    unigram = tmp_path / "unigram"
    train_sentencepiece(TrainSentencePiece(vocab_size=286, model=PieceModel.UNIGRAM), RUSSIAN, unigram)
    with pytest.raises(UserError, match="one of the two models is bpe, the other unigram"):
        main(["tokenizer", "extend", "--tokenizer", str(english), "--from", str(unigram), "--out", str(tmp_path / "x")])


def test_an_extended_json_keeps_its_ends(tmp_path: Path) -> None:
    files = []
    for name, texts, special in (("en", ENGLISH, "<stop>"), ("ru", RUSSIAN, "</s>")):
        made = tokenizers.Tokenizer(tokenizers.models.BPE())
        made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = tokenizers.decoders.ByteLevel()
        alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
        trainer = tokenizers.trainers.BpeTrainer(vocab_size=320, special_tokens=[special], initial_alphabet=alphabet)
        made.train_from_iterator(texts, trainer)
        made.save(str(tmp_path / f"{name}.json"))
        files.append(str(tmp_path / f"{name}.json"))
    out = tmp_path / "more"
    asked = ["tokenizer", "extend", "--tokenizer", files[0], "--eos", "<stop>", "--from", files[1], "--out", str(out)]
    assert main(asked) == 0
    again = TokenSet.read(Path(files[0])).extended(TokenSet.read(out))  # as maxlm.convert --add_tokens_of does
    assert again.definition == (out / "tokenizer.json").read_bytes()
    old, new = HuggingFace(Path(files[0]), "<stop>"), load_tokenizer(out)
    assert (new.name_of(new.eos_id), new.bos_id, new.eos_id) == ("<stop>", None, old.eos_id)
    assert new.encode(ENGLISH[0]) == old.encode(ENGLISH[0])
    assert len(new.encode(RUSSIAN[0])) < len(old.encode(RUSSIAN[0]))
