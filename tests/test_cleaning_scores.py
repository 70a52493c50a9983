"""Models that judge documents: words as numbers, an n-gram model against its formula, a classifier and its report."""

from __future__ import annotations

import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import scipy.sparse
from cleaning_scores_helpers import OneModel, before_of, through
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import UserError
from maxlm.config.cleaning.score_steps import (
    BitsPerByteFilter,
    ClassifierTraining,
    DomainTagger,
    HashedWords,
    LeastScore,
    NgramTraining,
    ParetoDraw,
    PerplexityFilter,
    PerplexityThird,
    QualityFilter,
    RunEmbeddings,
)
from maxlm.data.cleaning.classifier_training import ClassifierReport, fit, loss_and_gradient, train_classifier
from maxlm.data.cleaning.drawn import drawn
from maxlm.data.cleaning.findings import Page, broken
from maxlm.data.cleaning.hashed_words import Punctuation, folded, runs, words
from maxlm.data.cleaning.key_tables import KeyTable
from maxlm.data.cleaning.making import make_step
from maxlm.data.cleaning.ngram_model import NgramModel
from maxlm.data.cleaning.ngram_training import measure_thirds, train_ngram_model
from maxlm.data.cleaning.quality_classifier import Classifier, softmax
from maxlm.data.cleaning.score_filters import pareto

# Words


def by_regex(text: str, punctuation: Punctuation) -> list[str]:
    """The words of a text of the letters below, one at a time."""
    text = text.lower()
    if punctuation is Punctuation.REMOVED:
        return re.findall(r"[一-鿿]|[^\s一-鿿]+", re.sub(r"[.,'\u2019。]", "", text))
    return re.findall(r"[一-鿿]|[.,'\u2019。]|[^\s一-鿿.,'\u2019。]+", text)


@settings(max_examples=200, deadline=None)
@given(st.text("aBé1 \n.,'\u2019中文。İ"), st.sampled_from(Punctuation))
def test_words_are_those_that_a_regex_finds(text: str, punctuation: Punctuation) -> None:
    found = words(text, punctuation)
    content = folded(text).encode()
    spelt = [content[a:b].decode() for a, b in zip(found.starts, found.ends, strict=True)]
    small = text.replace("İ", "i")
    expected = by_regex(small, punctuation)
    marks = (
        str.maketrans("\u2019。", "..")
        if punctuation is Punctuation.WORDS
        else {ord(mark): None for mark in ".,'\u2019。"}
    )
    assert [word.translate(marks).replace("İ", "i") for word in spelt] == [word.translate(marks) for word in expected]
    same = {}
    for hash, word in zip(found.hashes.tolist(), spelt, strict=True):
        plain = word.translate(marks)
        assert same.setdefault(plain, hash) == hash
    assert len(set(same.values())) == len(same)


def test_a_hash_is_the_same_everywhere() -> None:
    """Saved models hold them."""
    assert words("The cat, 1999", Punctuation.WORDS).hashes.tolist() == HASHES
    digits = words("1999 2024", Punctuation.WORDS, one_digit=True).hashes
    assert digits[0] == digits[1]


HASHES = [16605363854327600655, 2710492934470311140, 3834739737442773786, 16301750477696186034]


def test_a_run_has_its_hash_wherever_it_stands() -> None:
    one, other = (words(text, Punctuation.REMOVED).hashes for text in ("a b c d e", "x x b C, d y b c"))
    assert runs(one, 3)[1] == runs(other, 3)[2]
    assert len({*runs(one, 3).tolist(), *runs(other, 3).tolist()}) == 3 + 6 - 1
    assert len(runs(one, 5)) == 1 and len(runs(one, 6)) == 0


def test_a_text_longer_than_a_chunk_has_the_words_of_its_parts() -> None:
    parts = [f"word{n} it's 中" for n in range(6_000)]
    whole = words(" ".join(parts), Punctuation.REMOVED)
    assert whole.hashes.tolist() == [h for part in parts for h in words(part, Punctuation.REMOVED).hashes.tolist()]
    content = folded(" ".join(parts)).encode()
    assert content[whole.starts[-3] : whole.ends[-3]] == b"word5999"
    many = np.tile(whole.hashes, 4)  # more words than powers are kept for
    assert runs(many, 2)[-1] == runs(whole.hashes[-2:], 2)[0]


def test_one_word_of_a_megabyte_and_nothing() -> None:
    for text in ("a" * 1_000_000, "中" * 300_000, "." * 1_000_000, "", " "):
        for punctuation in Punctuation:
            found = words(text, punctuation)
            assert len(found.hashes) == len(found.starts) == len(found.ends) <= len(text)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 2**64 - 1), max_size=40), st.lists(st.integers(0, 2**64 - 1)), st.integers(1, 16))
def test_a_table_finds_what_is_in_it(keys: set[int], others: list[int], spread: int) -> None:
    table = KeyTable.of(np.array(sorted(keys), np.uint64), spread)
    wanted = [*sorted(keys), *others]
    place = {key: i for i, key in enumerate(sorted(keys))}
    assert table.find(np.array(wanted, np.uint64)).tolist() == [place.get(key, -1) for key in wanted]


# The n-gram model

CORPUS = [
    "the cat sat on the mat",
    "the dog sat on the log",
    "a cat and a dog sat",
    "the cat saw the dog and the dog saw the cat",
    "on the mat the cat slept and on the log the dog slept",
    "one two three one two four one three",
]


class BruteForce:
    """Interpolated modified Kneser-Ney by its definition, in dictionaries of words, without pruning or with."""

    def __init__(self, texts: Sequence[str], order: int, least: int = 1) -> None:
        self.order = order
        raw: dict[int, Counter[tuple[str, ...]]] = {n: Counter() for n in range(1, order + 1)}
        for text in texts:
            stream = ["<s>"] * (order - 1) + text.split()
            for n in raw:
                raw[n].update(tuple(stream[i - n + 1 : i + 1]) for i in range(order - 1, len(stream)))
        self.counts = {order: raw[order]}
        for n in range(order - 1, 0, -1):
            self.counts[n] = Counter(gram[1:] for gram in raw[n + 1])  # each once: after how many words
        self.kept = {n: {g for g in raw[n] if n <= 2 or raw[n][g] >= least} for n in raw}
        self.vocabulary = sorted({gram[0] for gram in raw[1]})
        self.discount = {n: self.discounts(list(counts.values())) for n, counts in self.counts.items()}

    @staticmethod
    def discounts(counts: list[int]) -> dict[int, float]:
        n = [counts.count(k) for k in range(5)]
        if not (n[1] and n[2] and n[3]):
            return {1: 0.5, 2: 1.0, 3: 1.5}
        y = n[1] / (n[1] + 2 * n[2])
        found = {k: k - (k + 1) * y * n[k + 1] / n[k] for k in (1, 2, 3)}
        return found if all(0 <= d <= k for k, d in found.items()) else {1: 0.5, 2: 1.0, 3: 1.5}

    def probability(self, word: str, context: tuple[str, ...]) -> float:
        n = len(context) + 1
        counts, levels = self.counts[n], self.discount[n]
        lower = 1 / (len(self.vocabulary) + 1) if n == 1 else self.probability(word, context[1:])
        of_context = {g: c for g, c in counts.items() if g[:-1] == context}
        total = sum(of_context.values())
        if not total:
            return lower
        kept = {g: c - levels[min(c, 3)] for g, c in of_context.items() if g in self.kept[n]}
        return (kept.get((*context, word), 0.0) + (total - sum(kept.values())) * lower) / total


@pytest.fixture(scope="module", params=[(2, 1), (3, 1), (4, 1), (4, 2)], ids=str)
def ngrams(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[NgramModel, BruteForce]:
    order, least = request.param
    out = tmp_path_factory.mktemp("ngrams") / "model"
    summary = train_ngram_model(CORPUS, NgramTraining(order=order, least_count=least, held_out=0.0), out)
    assert summary.words == sum(len(text.split()) for text in CORPUS) and summary.held_out == 0
    expected = BruteForce(CORPUS, order, least)
    assert summary.ngrams == tuple(len(expected.kept[n]) for n in range(1, order + 1))
    return NgramModel.open(out), expected


@pytest.mark.parametrize(
    "text", [*CORPUS, "the cat sat on a log", "dog dog dog", "an unknown cat slept on the mat", "zebra"]
)
def test_each_word_has_the_probability_of_the_formula(ngrams: tuple[NgramModel, BruteForce], text: str) -> None:
    model, expected = ngrams
    stream = ["<s>"] * (expected.order - 1) + text.split()
    formula = [
        -math.log2(expected.probability(stream[i], tuple(stream[i - expected.order + 1 : i])))
        for i in range(expected.order - 1, len(stream))
    ]
    np.testing.assert_allclose(model.bits(text), formula, rtol=2e-6)
    assert model.perplexity(text) == pytest.approx(2 ** np.mean(formula), rel=1e-5)


@pytest.mark.parametrize("context", ["", "the", "on the", "sat on the", "the cat saw", "zebra the", "zebra"])
def test_probabilities_add_up_to_one(ngrams: tuple[NgramModel, BruteForce], context: str) -> None:
    model, expected = ngrams
    total = sum(2.0 ** -model.bits(f"{context} {word}")[-1] for word in [*expected.vocabulary, "neverseen"])
    assert total == pytest.approx(1, abs=1e-6)


def test_no_more_words_are_read_than_asked_for(tmp_path: Path) -> None:
    summary = train_ngram_model(CORPUS, NgramTraining(max_words=10, held_out=0.0), tmp_path / "model")
    assert summary.words == 10
    first = NgramModel.open(tmp_path / "model")
    assert summary.ngrams[0] == 6
    assert first.bits("log")[0] == first.bits("zebra")[0] > first.bits("dog")[0]


def test_a_corpus_large_enough_has_discounts_of_its_own() -> None:
    assert BruteForce(CORPUS, 2).discount[1] != {1: 0.5, 2: 1.0, 3: 1.5}


def sentences(of: str, count: int, start: int = 0) -> Iterator[str]:
    """Texts whose words go round one of two circles, so that one model foretells them and the other does not."""
    circle = {"up": "one two three four five six seven", "down": "seven six five four three two one"}[of].split()
    for n in range(start, start + count):
        yield f"{of}{n} " + " ".join(itertools.islice(itertools.cycle(circle), n % 7, n % 7 + 20))


@pytest.fixture(scope="module")
def up(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("ngrams") / "up"
    summary = train_ngram_model(sentences("up", 60), NgramTraining(held_out=0.3), out)
    assert 5 < summary.held_out < 40 and summary.perplexity < 3
    return out


def test_the_same_texts_make_the_same_files(up: Path, tmp_path: Path) -> None:
    train_ngram_model(sentences("up", 60), NgramTraining(held_out=0.3), tmp_path / "again")
    for file in up.iterdir():
        if file.name != "perplexity_thirds.json":
            assert (tmp_path / "again" / file.name).read_bytes() == file.read_bytes(), file.name


def test_thirds_are_thirds_of_the_documents_that_set_them(up: Path) -> None:
    documents = [text.replace("four", f"x{n}", n % 5) for n, text in enumerate(sentences("up", 90))]
    head, middle = measure_thirds(up, documents)
    assert head < middle
    step = make_step(PerplexityFilter(model=str(up)), OneModel())
    thirds = Counter(through(step, [Page("x", text)])[0].tags["perplexity_third"] for text in documents)
    assert all(abs(thirds[third.value] - 30) <= 2 for third in PerplexityThird)


@pytest.mark.parametrize("worst", PerplexityThird)
def test_documents_are_dropped_from_the_third_or_the_number_on(up: Path, worst: PerplexityThird) -> None:
    values = json.loads((up / "perplexity_thirds.json").read_text())
    step = make_step(PerplexityFilter(model=str(up), worst=worst), OneModel())
    assert step.limits[0].most == values.get(worst.value, math.inf)
    page = Page("x", next(iter(sentences("down", 1))))
    finding = through(step, [page])[0]
    assert finding.text is None and (finding.tags["perplexity_third"], finding.seen) == ("tail", "tail")
    assert (broken(step.limits, finding) is None) == (worst is PerplexityThird.TAIL)
    value = finding.values[0]
    assert value == pytest.approx(finding.tags["perplexity"], abs=0.01)
    for most, kept in ((math.nextafter(value, 0), False), (value, True), (math.nextafter(value, math.inf), True)):
        step = make_step(PerplexityFilter(model=str(up), most=most), OneModel())
        assert (broken(step.limits, through(step, [page])[0]) is None) == kept


def test_a_document_without_words_is_in_the_tail(up: Path) -> None:
    step = make_step(PerplexityFilter(model=str(up)), OneModel())
    for text in ("", " \n"):
        assert through(step, [Page("x", text)])[0].tags == {"perplexity": None, "perplexity_third": "tail"}


def test_mistakes_with_n_gram_models_are_told(up: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already; name a new folder"):
        train_ngram_model(CORPUS, NgramTraining(), up)
    with pytest.raises(UserError, match="there is no word to train on"):
        train_ngram_model([" ", ""], NgramTraining(), tmp_path / "x")
    with pytest.raises(UserError, match=r"ngram_model.json: cannot be read"):
        NgramModel.open(tmp_path)
    train_ngram_model(CORPUS, NgramTraining(held_out=0.0), tmp_path / "bare")
    with pytest.raises(UserError, match="no document was held out; measure the thirds first"):
        make_step(PerplexityFilter(model=str(tmp_path / "bare")), OneModel())
    (tmp_path / "bare" / "ngrams2.bits.npy").unlink()
    with pytest.raises(UserError, match="is not a whole n-gram model"):
        NgramModel.open(tmp_path / "bare")
    with pytest.raises(UserError, match="no document has a word"):
        measure_thirds(up, ["", " "])


# The classifier


def test_the_gradient_is_the_slope_of_the_loss() -> None:
    random = np.random.default_rng(0)
    x = scipy.sparse.csr_array(random.random((9, 5)) * (random.random((9, 5)) < 0.6))
    y, values = random.integers(0, 3, 9), random.normal(size=18)
    f = lambda v: loss_and_gradient(v, x, x.T.tocsr(), y, 3, 0.1)
    slope = [(f(values + e)[0] - f(values - e)[0]) / 2e-6 for e in 1e-6 * np.eye(18)]
    np.testing.assert_allclose(f(values)[1], slope, atol=1e-8)


@pytest.mark.parametrize("classes", [2, 3])
def test_weights_have_the_least_loss(classes: int) -> None:
    """It is convex: where the slope is 0."""
    random = np.random.default_rng(classes)
    x = scipy.sparse.csr_array(np.pad(random.normal(size=(60, 4)), ((0, 0), (1, 2))))
    y = random.integers(0, classes, 60)
    weights, bias, _, loss = fit(x, y, classes, 0.02, 500)
    least, slope = loss_and_gradient(np.vstack([weights, bias]).ravel(), x, x.T.tocsr(), y, classes, 0.02)
    assert loss == pytest.approx(least) and abs(slope).max() < 1e-5
    assert not weights[[0, 5, 6]].any() and weights[1:5].all()


@pytest.mark.nightly
def test_weights_are_those_of_scikit_learn() -> None:
    """Its C is 1 / (l2 n) for a mean over n rows."""
    from sklearn.linear_model import LogisticRegression

    random = np.random.default_rng(3)
    x, y = random.normal(size=(60, 4)), random.integers(0, 3, 60)
    weights, bias, _, _ = fit(scipy.sparse.csr_array(x), y, 3, 0.02, 500)
    other = LogisticRegression(C=1 / (0.02 * 60), tol=1e-8, max_iter=1000).fit(x, y)
    np.testing.assert_allclose(softmax(x @ weights + bias), other.predict_proba(x), atol=2e-4)


GOOD = "we show that the proof of the theorem follows from the lemma and how it compares"
BAD = "click here buy cheap pills now free offer best price subscribe login cookie of the and"


def of_words(vocabulary: str, count: int, seed: int) -> list[str]:
    random = np.random.default_rng(seed)
    return [" ".join(random.choice(vocabulary.split(), 12)) for _ in range(count)]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ClassifierReport]:
    out = tmp_path_factory.mktemp("classifier") / "quality"
    texts = {"good": of_words(GOOD, 120, 1), "bad": of_words(BAD, 150, 2)}
    config = ClassifierTraining(features=HashedWords(bucket_bits=12), held_out=0.3)
    return out, train_classifier(texts, config, out, OneModel())


def test_held_out_texts_are_told_apart_and_the_report_is_right(trained: tuple[Path, ClassifierReport]) -> None:
    """Its figures counted again, from the saved classifier's probabilities."""
    out, report = trained
    classifier = Classifier.open(out)
    assert report.trained + report.held_out == 270 and report.accuracy > 0.95
    texts = [(text, 0) for text in of_words(GOOD, 120, 1)] + [(text, 1) for text in of_words(BAD, 150, 2)]
    held = [(classifier.of_text(text), label) for text, label in texts if drawn(text) < 0.3]
    p, y = np.array([one for one, _ in held]), np.array([label for _, label in held])
    assert len(held) == report.held_out
    for i, one in enumerate(report.classes):
        said, own = p.argmax(axis=1) == i, y == i
        assert one.documents == own.sum() and 0 < own.sum() < len(y)
        assert one.precision == pytest.approx((said & own).sum() / said.sum())
        assert one.recall == pytest.approx((said & own).sum() / own.sum())
        pairs = [(a > b) + (a == b) / 2 for a in p[own, i] for b in p[~own, i]]
        assert one.auc == pytest.approx(np.mean(pairs), abs=1e-3)
        at = p[:, i] >= one.threshold - 1e-6
        assert one.f1 == pytest.approx(2 * (at & (y == i)).sum() / (at.sum() + (y == i).sum()))
        assert one.roc[0] == (0.0, 1.0, 1.0)
        assert one.roc[50][2] == pytest.approx((p[y == i, i] >= 0.5).mean(), abs=0.02)
    assert json.loads((out / "classifier_report.json").read_text())["accuracy"] == report.accuracy
    assert "held out; accuracy" in str(report) and "good" in str(report)


def test_the_same_texts_make_the_same_weights(trained: tuple[Path, ClassifierReport], tmp_path: Path) -> None:
    texts = {"good": of_words(GOOD, 120, 1), "bad": of_words(BAD, 150, 2)}
    config = ClassifierTraining(features=HashedWords(bucket_bits=12), held_out=0.3)
    train_classifier(texts, config, tmp_path / "again", OneModel())
    for name in ("weights.npy", "bias.npy", "classifier.json"):
        assert (tmp_path / "again" / name).read_bytes() == (trained[0] / name).read_bytes()


def test_a_document_stays_from_the_least_score_on(trained: tuple[Path, ClassifierReport]) -> None:
    page = Page("x", "the proof and the price")
    score = float(Classifier.open(trained[0]).of_text(page.text)[0])
    assert 0 < score < 1
    for least, kept in ((math.nextafter(score, 0), True), (score, True), (math.nextafter(score, 1), False)):
        step = make_step(QualityFilter(model=str(trained[0]), selection=LeastScore(least=least)), OneModel())
        finding = through(step, [page])[0]
        assert (broken(step.limits, finding) is None) == kept
        assert finding.text is None and finding.tags == {"quality": pytest.approx(score, abs=1e-6)}


def test_texts_without_words_have_a_score(trained: tuple[Path, ClassifierReport]) -> None:
    step = make_step(QualityFilter(model=str(trained[0])), OneModel())
    for text in ("", "\n", "a"):
        assert 0 < through(step, [Page("x", text)])[0].tags["quality"] < 1


def test_pareto_draws_keep_the_share_that_gpt3_s_rule_keeps() -> None:
    """P(draw > 1 - score) = (2 - score)^-alpha for numpy's Pareto, whose samples it is compared with, too."""
    drawn = np.array([pareto(f"file:{n}", ParetoDraw()) for n in range(20_000)])
    other = np.random.default_rng(0).pareto(9, 20_000)
    for score in (0.2, 0.8, 0.95):
        expected = (2 - score) ** -9.0
        assert (drawn > 1 - score).mean() == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
        assert (other > 1 - score).mean() == pytest.approx(expected, abs=4 * math.sqrt(expected / 20_000))
    assert pareto("a", ParetoDraw()) == pareto("a", ParetoDraw()) != pareto("a", ParetoDraw(seed=1))


def test_the_draw_decides_by_the_id(trained: tuple[Path, ClassifierReport]) -> None:
    step = make_step(QualityFilter(model=str(trained[0]), selection=ParetoDraw()), OneModel())
    text = "the offer of the method"
    for n in range(50):
        finding = through(step, [Page(f"a:{n}", text)])[0]
        score = finding.values[0] - pareto(f"a:{n}", ParetoDraw())
        assert score == pytest.approx(finding.tags["quality"], abs=1e-6)
        assert (broken(step.limits, finding) is None) == (pareto(f"a:{n}", ParetoDraw()) >= 1 - score)


def test_domains_are_tags_that_name_the_class(tmp_path: Path) -> None:
    topics = {name: [f"{name} {a} {b}" for a in "xyz" for b in "uvwst"] for name in ("law", "code", "prose")}
    config = ClassifierTraining(features=HashedWords(bucket_bits=10), held_out=0.3, l2=1e-4)
    train_classifier(topics, config, tmp_path / "domains", OneModel())
    step = make_step(DomainTagger(model=str(tmp_path / "domains")), OneModel())
    for name in topics:
        finding = through(step, [Page("x", f"{name} x v")])[0]
        assert finding.tags == {"domain": name} and finding.values == () and finding.text is None
    strict = make_step(DomainTagger(model=str(tmp_path / "domains"), least=0.9), OneModel())
    assert through(strict, [Page("x", "of nothing known")])[0].tags == {"domain": "other"}


def test_a_model_s_vectors_are_features_too(tmp_path: Path) -> None:
    """In batches, part by part, with the same verdicts for any size of a batch."""
    texts = {"good": of_words(GOOD, 60, 1), "bad": of_words(BAD, 60, 2)}
    models = OneModel()
    pages = [
        [Page(f"{part}:{n}", text) for n, text in enumerate(of_words(f"{GOOD} {BAD}", 7, part))] for part in range(3)
    ]
    found = []
    for batch in (2, 50):
        out = tmp_path / f"by{batch}"
        config = ClassifierTraining(features=RunEmbeddings(run="run", batch=batch), held_out=0.3, l2=1e-3)
        assert train_classifier(texts, config, out, models).accuracy > 0.9
        step = make_step(QualityFilter(model=str(out), selection=LeastScore(least=0.5)), models)
        before = before_of(tmp_path / f"work{batch}", pages)
        found.append([finding for part in (2, 0, 1) for finding in through(step, pages[part], before, part)])
    assert found[0] == found[1]
    assert models.largest == 50 and {finding.values[0] > 0.5 for finding in found[0]} == {True, False}


@pytest.mark.parametrize(("least", "most"), [(2.0, None), (0.0, 4.0), (2.0, 4.0)])
def test_bits_per_byte_may_lie_between_two_numbers(tmp_path: Path, least: float, most: float | None) -> None:
    pages = [[Page(f"a:{n}", f"{bits}") for n, bits in enumerate((1.999, 2.0, 2.001, 3.999, 4.0, 4.001))], []]
    step = make_step(BitsPerByteFilter(run="run", least=least, most=most, batch=4), OneModel())
    findings = through(step, pages[0], before_of(tmp_path, pages), 0)
    assert [finding.tags["bits_per_byte"] for finding in findings] == [float(page.text) for page in pages[0]]
    limits = step.step(before_of(tmp_path, pages, write=False), 0).limits
    kept = [broken(limits, finding) is None for finding in findings]
    assert kept == [least <= float(page.text) <= (most or 99) for page in pages[0]]
    assert through(step, pages[1], before_of(tmp_path, pages), 1) == []


def test_mistakes_with_classifiers_are_told(trained: tuple[Path, ClassifierReport], tmp_path: Path) -> None:
    texts = {"good": of_words(GOOD, 30, 1), "bad": of_words(BAD, 30, 2)}
    with pytest.raises(UserError, match="is there already"):
        train_classifier(texts, ClassifierTraining(), trained[0], OneModel())
    with pytest.raises(UserError, match="classes = good must be at least two"):
        train_classifier({"good": texts["good"]}, ClassifierTraining(), tmp_path / "x", OneModel())
    with pytest.raises(UserError, match=r"bad: 1 documents, . of them held out, are too few; add "):
        train_classifier({**texts, "bad": ["a"]}, ClassifierTraining(held_out=0.5), tmp_path / "x", OneModel())
    with pytest.raises(UserError, match=r"good = 'fine' must be a class of .*: good, bad"):
        make_step(QualityFilter(model=str(trained[0]), good="fine"), OneModel())
    with pytest.raises(UserError, match="cannot be read"):
        make_step(DomainTagger(model=str(tmp_path)), OneModel())
