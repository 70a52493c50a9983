"""Rules of cleaning: each at its limit and just beyond it, and n-grams against counting by hand."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections import Counter
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.config import UserError
from maxlm.config.cleaning.cleaning_pipeline import CleaningStep, RuleStep
from maxlm.config.cleaning.cleaning_recipes import RECIPES, cleaning_recipe
from maxlm.config.cleaning.rule_steps import (
    ChineseQuality,
    CodeQuality,
    FineWebQuality,
    GopherQuality,
    GopherRepetition,
    Languages,
    Licences,
)
from maxlm.config.cleaning.text_steps import C4Lines, WebLines
from maxlm.data.cleaning.findings import DocumentStep, Finding, Page, broken
from maxlm.data.cleaning.making import make_step
from maxlm.data.cleaning.text_features import TextFeatures
from maxlm.data.cleaning.word_splitting import WordForm, split_words


class NoModel:
    """These steps ask none."""

    def scorer(self, run: str) -> Any:
        raise AssertionError(run)

    embedder = scorer


def step_of(config: CleaningStep) -> DocumentStep:
    made = make_step(config, NoModel())
    assert isinstance(made.limits, tuple)  # type: ignore[union-attr]
    return made  # type: ignore[return-value]


def found(config: CleaningStep, text: str, **tags: Any) -> Finding:
    return step_of(config)(Page("a", text, tags))


def rule_of(config: CleaningStep, text: str, **tags: Any) -> str | None:
    """The rule that drops the document; None: it is kept."""
    step = step_of(config)
    limit = broken(step.limits, step(Page("a", text, tags)))
    return limit.rule if limit else None


def nothing_else(cls: type, **own: Any) -> Any:
    """The step with limits that nothing reaches, but for `own`."""
    open_ = {}
    for one in dataclasses.fields(cls):
        low = one.name.startswith(("least", "shortest"))
        if low or one.name.startswith(("most", "longest")):
            open_[one.name] = 0 if low else 1.0 if isinstance(one.default, float) and one.default < 1 else 10**6
    return cls(**{**open_, **own})


def allowed(config: Any, rule: str, text: str) -> bool:
    """What this rule alone says, whatever the others do."""
    limits = step_of(config).limits
    (number,) = (i for i, limit in enumerate(limits) if limit.rule == rule)
    return limits[number].allows(found(nothing_else(type(config)), text).values[number])


WORDS = [f"{a}{b}{c}" for a, b, c in itertools.product("bdfgk", "aeiou", "lmnrst")]  # 150 words of 3 letters


# Words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (
            "Don't stop, it\u2019s 3.5 well-known_things!",
            ["Don't", "stop", "it\u2019s", "3", "5", "well", "known_things"],
        ),
        ("a - b | c -- d... (e)", ["a", "-", "b", "|", "c", "--", "d", "e"]),
        ("\u4f60\u597d world\u3002\u30ab\u30bf", ["\u4f60", "\u597d", "world", "\u30ab", "\u30bf"]),
        ("", []),
        ("\n\t ", []),
        ("'quoted'", ["quoted"]),
    ],
)
def test_what_a_word_is(text: str, words: list[str]) -> None:
    assert list(split_words(text, WordForm.WRITTEN)) == words


def test_paragraphs_are_parted_by_empty_lines() -> None:
    assert TextFeatures("\n a \nb\n \n\n\nc\n").paragraphs == ["a\nb", "c"]
    assert TextFeatures("\n a \nb\n \n\n\nc\n").lines == ["a", "b", "c"]


# Gopher's repetition, against counting in sets of tuples


def top_share(words: list[str], n: int) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    counts = Counter(grams)
    often = max(counts.values(), default=1)
    if often == 1:
        return 0.0
    longest = max(sum(map(len, gram)) for gram, count in counts.items() if count == often)
    candidates = [gram for gram in grams if counts[gram] == often and sum(map(len, gram)) == longest]
    covered = {i + k for i, gram in enumerate(grams) if gram == candidates[0] for k in range(n)}
    return sum(len(words[i]) for i in covered) / sum(map(len, words))


def duplicate_share(words: list[str], n: int) -> float:
    stood: set[tuple[str, ...]] = set()
    covered: set[int] = set()
    for i in range(len(words) - n + 1):
        gram = tuple(words[i : i + n])
        if gram in stood:
            covered.update(range(i, i + n))
        stood.add(gram)
    return sum(len(words[i]) for i in covered) / max(1, sum(map(len, words)))


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from(["a", "bb", "ccc", "dd"]), max_size=60), st.integers(0, 40), st.integers(0, 3))
def test_repetition_is_what_counting_finds(words: list[str], cut: int, times: int) -> None:
    words = words + words[cut:] * times
    text = " ".join(words)
    values = found(nothing_else(GopherRepetition), text).values
    expected = [0.0] * 4 + [top_share(words, n) for n in (2, 3, 4)] + [duplicate_share(words, n) for n in range(5, 11)]
    assert values == pytest.approx(expected)


def test_lines_and_paragraphs_by_hand() -> None:
    text = "aaaa\nbb\n\naaaa\nbb\n\nccc"  # lines 4 2 4 2 3: 2 of 5, 6 of 15; paragraphs 7 7 3: 1 of 3, 7 of 17
    values = found(nothing_else(GopherRepetition), text).values
    assert values[:4] == pytest.approx((2 / 5, 1 / 3, 6 / 15, 7 / 17))


@pytest.mark.parametrize(
    ("name", "rule", "share", "text"),
    [
        ("most_duplicate_lines", "duplicate lines", 0.3, "\n".join([*WORDS[:7], *WORDS[:3]])),
        ("most_duplicate_paragraphs", "duplicate paragraphs", 0.3, "\n\n".join([*WORDS[:7], *WORDS[:3]])),
        ("most_duplicate_line_characters", "characters of duplicate lines", 0.2, "\n".join([*WORDS[:4], WORDS[0]])),
        ("most_top_2gram", "most frequent 2-gram", 0.2, " ".join([*WORDS[:14], "xxx yyy", "zzz", "xxx yyy", "vvv"])),
        ("most_duplicate_5grams", "duplicate 5-grams", 0.25, " ".join([*WORDS[:15], *WORDS[:5]])),
        ("most_duplicate_10grams", "duplicate 10-grams", 0.5, " ".join([*WORDS[:10], *WORDS[:10]])),
    ],
)
def test_repetition_at_its_limit(name: str, rule: str, share: float, text: str) -> None:
    step = step_of(nothing_else(GopherRepetition))
    value = step(Page("a", text)).values[[limit.rule for limit in step.limits].index(rule)]
    assert value == pytest.approx(share)
    assert rule_of(nothing_else(GopherRepetition, **{name: value}), text) is None
    assert rule_of(nothing_else(GopherRepetition, **{name: math.nextafter(value, 0)}), text) == rule


# Gopher's quality


def prose(n: int) -> str:
    return " ".join(itertools.islice(itertools.cycle(["the", "sea", "and", "ship", "sails"]), n))


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("words", prose(50), prose(49)),
        ("words", prose(100_000), prose(100_001)),
        ("mean word length", "the and " + "abc " * 48, "the and " + "ab " * 48),
        ("mean word length", "the and have " + "abcdefghij " * 60, "the and have " + "abcdefghijk " * 60),
        ("# to words", prose(100) + "#" * 10, prose(100) + "#" * 11),
        ("ellipses to words", prose(100) + ".\u2026" * 10, prose(100) + ".\u2026" * 11),
        ("lines with a bullet", (prose(10) + "\n- ") * 9 + prose(9), (prose(10) + "\n\u2022") * 19 + prose(9)),
        (
            "lines that end in an ellipsis",
            (prose(20) + "...\n") * 3 + (prose(20) + "\n") * 7,
            (prose(20) + "\u2026\n") * 4 + (prose(20) + "\n") * 6,
        ),
        ("words with a letter", prose(80) + " 1234" * 20, prose(79) + " 1234" * 20),
        ("stop words", "The " + "sea " * 59 + "AND", "the " + "sea " * 59 + "the"),
    ],
)
def test_gopher_quality_at_its_limits(rule: str, kept: str, dropped: str) -> None:
    assert allowed(GopherQuality(), rule, kept) and not allowed(GopherQuality(), rule, dropped)


def test_gopher_keeps_prose() -> None:
    assert rule_of(GopherQuality(), prose(60)) is None
    assert rule_of(GopherQuality(), prose(49)) == "words"


# FineWeb


def lines(*kinds: tuple[int, str]) -> str:
    """So many lines of each ending, all different, of 40 characters and more."""
    number = itertools.count()
    return "\n".join(f"{next(number):05} {'word ' * 7}{end}" for count, end in kinds for _ in range(count))


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("lines that end in punctuation", lines((12, "."), (88, "x")), lines((11, "!"), (89, "x"))),
        (
            "short lines",
            lines((33, ".")) + "".join(f"\n{i:029}." for i in range(67)),
            lines((32, ".")) + "".join(f"\n{i:029}." for i in range(68)),
        ),
        (
            "characters of duplicate lines",
            f"{'x' * 980}\n{'c' * 10}\n{'c' * 10}",
            f"{'x' * 979}\n{'c' * 10}\n{'c' * 10}",
        ),
        ("line ends to words", "a b\n\n\nc d e f g h i j", "a b\n\n\nc d e f g h i"),
    ],
)
def test_fineweb_at_its_limits(rule: str, kept: str, dropped: str) -> None:
    assert allowed(FineWebQuality(), rule, kept) and not allowed(FineWebQuality(), rule, dropped)


def test_fineweb_keeps_prose() -> None:
    assert rule_of(FineWebQuality(), lines((3, "."))) is None
    assert rule_of(FineWebQuality(), lines((3, ""))) == "lines that end in punctuation"


def test_newlines_to_words_by_hand() -> None:
    assert found(nothing_else(FineWebQuality), "one two\nthree four\n\nfive.").values[-1] == 3 / 5


# C4


SENTENCES = "The ship sails. The wind is fair!\nIs it so, he asked? Yes it is.\nAll is very well"


def test_sentences_are_counted_by_their_ends() -> None:
    assert found(C4Lines(), SENTENCES).values == (0, 0, 5)
    assert rule_of(C4Lines(), SENTENCES) is None
    assert rule_of(C4Lines(), SENTENCES.replace("sails. The", "sails, the")) == "sentences"
    assert found(C4Lines(), "Of 3.5 things, e.g. this one\n" * 2).values[-1] == 2


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("two words", "too few words"),
        ("Please enable JavaScript to go on.", "JavaScript"),
        ("This site uses cookies for everything.", "policy"),
        ("read our Privacy Policy and weep", "policy"),
        ("a long word " + "x" * 1001, "too long a word"),
    ],
)
def test_c4_takes_lines_out(line: str, reason: str) -> None:
    finding = found(C4Lines(), f"{SENTENCES}\n\n{line}\n\nOne more line here")
    assert finding.text == f"{SENTENCES}\n\nOne more line here" and finding.changes == {reason: 1}


def test_c4_leaves_a_good_text_alone() -> None:
    for text in (SENTENCES, f"  {SENTENCES}\n\n\n\n", f"{SENTENCES}\nthree words here {'x' * 1000}"):
        assert found(C4Lines(), text).text is None


def test_c4_drops_fillers_and_programs() -> None:
    assert rule_of(C4Lines(), SENTENCES + "\nLorem Ipsum dolor sit") == "lorem ipsum"
    assert rule_of(C4Lines(), SENTENCES + "\nint main() {") == "curly brackets"
    assert rule_of(C4Lines(lorem_ipsum=False, curly_bracket=False), SENTENCES + "\nLorem Ipsum {") is None


def test_c4_cuts_citations_and_as_an_option_lines_without_an_end() -> None:
    text = f"{SENTENCES}\nIt was so [3][edit] in those days [citation needed] a [b]"
    assert found(C4Lines(), text).text == f"{SENTENCES}\nIt was so  in those days  a [b]"
    step = C4Lines(terminal_punctuation=True, least_sentences=0)
    finding = found(step, "It ends here.\nIt does not end\nNor does this...\nBut \u201cthis one does.\u201d")
    assert finding.text == "It ends here.\nBut \u201cthis one does.\u201d"
    assert finding.changes == {"no punctuation at the end": 2}


# RefinedWeb


@pytest.mark.parametrize(
    ("line", "reason", "left"),
    [
        ("3 likes", "counter", ""),
        ("1.2K Comments", "counter", ""),
        ("No comments", "counter", ""),
        ("SUBSCRIBE NOW to us", "capitals", ""),
        ("12/03/2021 - 18:00", "no letters", ""),
        ("Menu", "one word", ""),
        ("Sign in to see the whole story", "phrase", "to see the whole story"),
        ("The sea was calm. Read more...", "phrase", "The sea was calm."),
        ("You have 3 items in cart today", "phrase", "You have 3 today"),
    ],
)
def test_refinedweb_takes_lines_out(line: str, reason: str, left: str) -> None:
    text = f"{prose(500)}.\n{line}"
    finding = found(WebLines(), text)
    assert finding.text == f"{prose(500)}.\n{left}".rstrip("\n") and finding.changes == {reason: 1}
    assert finding.values == (len(line.split()) / (500 + len(line.split())),)


def test_refinedweb_leaves_lines_of_the_text() -> None:
    for line in (
        "He likes 3 ships.",
        "NASA and the ESA met",
        f"{prose(9)} then read more",
        "I read more books",
        "5 of us",
    ):
        assert found(WebLines(), f"{prose(50)}\n{line}").text is None


def test_refinedweb_drops_a_document_of_which_more_than_a_twentieth_would_go() -> None:
    assert rule_of(WebLines(), f"{prose(38)}\n3 likes") is None
    assert rule_of(WebLines(), f"{prose(37)}\n3 likes") == "words in removed lines"


# Code


def code(line: str, n: int = 100) -> str:
    return "\n".join([line] * n)


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("lines", "ab\n" * 99_999, "ab\n" * 100_000),
        ("mean line length", code("x" * 99 + ";"), code("x" * 100 + ";")),
        ("longest line", code("x = 1") + "\n" + "x " * 500, code("x = 1") + "\n" + "x " * 500 + ";"),
        ("letters and figures", "a+++" * 50, "a+++" * 50 + "+"),
        (
            "says that it is generated",
            "\n" * 5 + "# Do not edit\n" + "x = 1\n" * 9,
            "# AutoGenerated\n" + "x = 1\n" * 9,
        ),
        ("longest run of encoded data", "\n" + "aB3/" * 256 + "\n", "\n" + "aB3/" * 256 + "=\n"),
        ("encoded data", "x = 12; " * 6 + "\\u00e9" * 8, "x = 12; " * 6 + "\\u00e9" * 9),
    ],
)
def test_code_at_its_limits(rule: str, kept: str, dropped: str) -> None:
    assert allowed(CodeQuality(), rule, kept) and not allowed(CodeQuality(), rule, dropped)


def test_code_is_kept() -> None:
    assert rule_of(CodeQuality(), code("x = f(1)")) is None
    assert rule_of(CodeQuality(), "") == "letters and figures"


def test_words_and_numbers_are_not_encoded_data() -> None:
    for text in ("\n".join(WORDS * 3), "1 2 3 4 55 66 " * 50, "self.some_long_name(another_name)\n" * 50):
        assert found(nothing_else(CodeQuality), text).values[-1] == 0
    assert found(nothing_else(CodeQuality), "0x1f, 0x2e, " * 8).values[-1] == 1


def test_licences_are_compared_without_capitals() -> None:
    assert rule_of(Licences(), "x", license="mit") is None
    assert rule_of(Licences(), "x", license="GPL-3.0") == "allowed licence"
    assert rule_of(Licences(), "x") == "allowed licence"
    assert rule_of(Licences(unknown=True), "x") is None
    assert rule_of(Licences(allowed=("WTFPL",), tag="licence"), "x", licence="wtfpl", license="mit") is None


# Chinese


SEA = "\u8fd9\u662f\u4e00\u8258\u5728\u5927\u6d77\u4e0a\u822a\u884c\u7684\u8239\u3002"
"""Of 12 Chinese characters and a mark."""


@pytest.mark.parametrize(
    ("rule", "kept", "dropped"),
    [
        ("Chinese characters", SEA[:9] + SEA[:1] + "\u3002", SEA[:9] + "\u3002\u3002"),
        ("share of Chinese characters", SEA[:12] + "abcdefg " * 4, SEA[:12] + "abcdefg " * 4 + "x"),
        ("mean line length", SEA[:9] + "\u3002\n" + SEA[2:11] + "\uff01", SEA[:9] + "\u3002\n" + SEA[2:10] + "\uff01"),
        ("lines that end in punctuation", lines((12, SEA), (88, SEA[:12])), lines((11, SEA), (89, SEA[:12]))),
        ("duplicate 13-grams", (SEA[:12] + "x\n") * 2, (SEA[:12] + "x\n") * 3),
    ],
)
def test_chinese_at_its_limits(rule: str, kept: str, dropped: str) -> None:
    assert allowed(ChineseQuality(), rule, kept) and not allowed(ChineseQuality(), rule, dropped)


def test_chinese_is_kept() -> None:
    assert rule_of(ChineseQuality(), SEA) is None
    assert rule_of(ChineseQuality(), prose(60)) == "Chinese characters"


# Languages


@pytest.mark.parametrize(
    ("language", "text"),
    [
        ("en", "The ship sails over the sea, and the wind is fair for all of us today."),
        ("de", "Das Schiff segelt \u00fcber das Meer, und der Wind steht heute g\u00fcnstig f\u00fcr uns alle."),
        ("zh", SEA * 3),
        ("fr", "Le navire traverse la mer, et le vent nous est favorable aujourd'hui."),
    ],
)
def test_languages_are_told(language: str, text: str) -> None:
    finding = found(Languages(languages=()), text)
    assert finding.tags["language"] == language and broken(step_of(Languages(languages=())).limits, finding) is None
    assert rule_of(Languages(languages=(language,)), text) is None
    other = "es" if language != "es" else "en"
    assert rule_of(Languages(languages=(other,)), text) == "wanted language"
    score = finding.tags["language_score"]
    assert isinstance(score, float) and rule_of(Languages(languages=(language,), least=score), text) is None
    if score < 1:
        assert rule_of(Languages(languages=(language,), least=score + 1e-6), text) == "language score"


def test_languages_are_codes() -> None:
    with pytest.raises(
        UserError, match=r"steps\[\]\.languages = 'English' must be a code of ISO 639, such as en or ceb"
    ):
        Languages(languages=("en", "English"))


@pytest.mark.parametrize("limits", [{"least_words": 9, "most_words": 8}, {"shortest_mean_word": 11.0}])
def test_limits_that_keep_nothing_are_refused(limits: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=r"steps\[\]\.\w+ = \w+.* must be at most \w+ = .*, or no document is kept"):
        GopherQuality(**limits)


# All of them


DROPPING: tuple[RuleStep, ...] = (
    GopherQuality(),
    GopherRepetition(),
    FineWebQuality(),
    ChineseQuality(),
    CodeQuality(),
    Licences(),
    Languages(),
)


@settings(max_examples=40, deadline=None)
@given(st.text(st.characters(), max_size=80))
def test_rules_never_change_text_and_say_the_same_again(text: str) -> None:
    for config in DROPPING:
        step = step_of(config) if not isinstance(config, Languages) else LANGUAGES
        first = step(Page("a", text))
        step(Page("b", "something else"))
        assert first.text is None and step(Page("c", text)) == first
        assert len(first.values) <= len(step.limits) and not any(map(math.isnan, first.values))


LANGUAGES = step_of(Languages())


def test_recipes_are_known_by_name() -> None:
    for name in RECIPES:
        steps = [make_step(config, NoModel()) for config in cleaning_recipe(name).steps]
        assert all(isinstance(step(Page("a", "")), Finding) for step in steps if callable(step))
    with pytest.raises(UserError, match=r"--recipe finweb: must be one of fineweb, .*; did you mean fineweb"):
        cleaning_recipe("finweb")


def test_fineweb_is_in_the_order_of_its_code() -> None:
    names = [type(step).__name__ for step in cleaning_recipe("fineweb").steps]
    first = names.index("GopherRepetition")
    assert names[first : first + 4] == ["GopherRepetition", "GopherQuality", "C4Lines", "FineWebQuality"]
