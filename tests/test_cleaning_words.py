"""What a word is: by hand in many scripts, in ASCII as ever, and one for rules, signatures and n-grams."""

from __future__ import annotations

import re
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from maxlm.data.cleaning.hashed_words import Punctuation, folded, words
from maxlm.data.cleaning.minhash import shingles
from maxlm.data.cleaning.word_splitting import WordForm, split_words

NFD_VIETNAMESE = unicodedata.normalize("NFD", "Tiếng Việt")
FAMILY = "\U0001f468\u200d\U0001f469\u200d\U0001f467"


def in_arrays(text: str, punctuation: Punctuation) -> list[str]:
    """The words that are hashed, in small letters."""
    found, content = words(text, punctuation), folded(text).encode(errors="surrogatepass")
    return [content[a:b].decode() for a, b in zip(found.starts, found.ends, strict=True)]


def seen(word: str) -> str:
    """What GPT-3's words have of a stretch of text that reaches from the first to the last byte of one."""
    return re.sub("[\u200c\u200d\xad]", "", word)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("हिन्दी की किताब", None),
        ("தமிழ் மொழி", None),
        ("كِتَابٌ جَدِيدٌ", None),  # with harakat
        ("שָׁלוֹם עוֹלָם", None),  # with niqqud
        ("می\u200cخو\u0627\u0647م کت\u0627ب\u200c\u0647\u0627", None),  # Persian, with ZWNJ
        ("ශ්\u200dරී ලංකා", None),  # Sinhala, with ZWJ
        ("ന്\u200d ക", None),  # a chillu of Malayalam before Unicode 5.1: ZWJ at the end
        ("한국어 문장", None),  # Korean has blanks
        (NFD_VIETNAMESE, None),
        ("co\xadop\xader\xadate now", None),  # soft hyphens
        ("ภาษาที่ ๒๕", "ภ า ษ า ที่ ๒๕"),  # no blanks: each letter with its marks; figures are a number
        ("東京タワー は\u3099", "東 京 タ ワ ー は\u3099"),
        ("葛\U000e0100城 iPhone15台", "葛\U000e0100 城 iPhone15 台"),  # a chosen shape of a character
        ("\U0001d49c\u0301b \U00020000一", "\U0001d49c\u0301b \U00020000 一"),
        ("\u0301a b", "a b"),  # a mark of nothing
    ],
)
def test_marks_and_joiners_stay_in_their_words(text: str, expected: str | None) -> None:
    found = (expected or text).split()
    assert list(split_words(text, WordForm.WRITTEN)) == list(split_words(text, WordForm.LETTERS)) == found
    small = [word.lower() for word in found]
    assert in_arrays(text, Punctuation.WORDS) == small
    assert [seen(word) for word in in_arrays(text, Punctuation.REMOVED)] == [seen(word) for word in small]


def test_signs_are_words_where_a_rule_counts_them() -> None:
    text = f"a {FAMILY} b{FAMILY} \u2764\ufe0f 1\ufe0f\u20e3 -"
    assert list(split_words(text, WordForm.WRITTEN)) == ["a", FAMILY, "b", "\u2764\ufe0f", "1\ufe0f\u20e3", "-"]
    assert list(split_words(text, WordForm.LETTERS)) == ["a", "b", "1\ufe0f\u20e3"]
    assert len(in_arrays(f"a{FAMILY}b", Punctuation.WORDS)) == 5  # each sign, with the joiner behind it
    assert in_arrays(f"a {FAMILY} b\u20ac \u2264", Punctuation.REMOVED) == ["a", "b"]


def test_what_is_not_seen_hides_nothing_from_decontamination() -> None:
    texts = "میخو\u0627\u0647م cooperate", "می\u200cخو\u0627\u0647م co\xadop\u2060erate\u2122"
    one, other = (words(text, Punctuation.REMOVED).hashes.tolist() for text in texts)
    assert one == other


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("don't 'quoted' rock'n\u2019roll", ["don't", "quoted", "rock'n\u2019roll"]),
        ("a''b c' 'd ' '' e'-f", ["a", "b", "c", "d", "'", "''", "e", "f"]),
        ("l'\u0301a n'\U0001d49c x'中", ["l", "a", "n'\U0001d49c", "x", "中"]),
    ],
)
def test_apostrophes_inside_are_of_a_word(text: str, expected: list[str]) -> None:
    assert list(split_words(text, WordForm.WRITTEN)) == expected


def test_words_that_differ_in_a_vowel_are_two() -> None:
    one, other = (shingles(f"क{vowel} ख", 1).tolist() for vowel in "\u093e\u0940")
    assert one[0] != other[0] and one[1] == other[1]


# ASCII: what it was before there were marks

_BEFORE = {
    WordForm.WRITTEN: re.compile(r"[^\W]+(?:'[^\W]+)*|(?<!\S)[^\w\s]+(?!\S)"),
    WordForm.LETTERS: re.compile(r"[^\W]+"),
}
_MARK = re.escape("!\"#$%&'()*+,-./:;<=>?@[\\]^_`{|}~")


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aZ_09'\"-.,#~| \t\n\r\x0b\x1c\x7f\0"), max_size=60))
def test_ascii_is_cut_as_ever(text: str) -> None:
    for form, before in _BEFORE.items():
        assert list(split_words(text, form)) == before.findall(text)
    small = text.lower()
    assert in_arrays(text, Punctuation.WORDS) == re.findall(rf"[{_MARK}]|[^\0-\x20\x7f{_MARK}]+", small)
    spelt = [re.sub(f"[{_MARK}]", "", word) for word in in_arrays(text, Punctuation.REMOVED)]
    assert spelt == re.findall(r"[^\0-\x20\x7f]+", re.sub(f"[{_MARK}]", "", small))


# One definition


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB1 \nक\u093e\u094d\u200d\u200cب\u064eก\u0e34中あ\u3099\u0301\U0001d49c\U000e0100")))
def test_letters_and_marks_make_the_same_words_everywhere(text: str) -> None:
    found = list(split_words(text, WordForm.LETTERS))
    assert in_arrays(text, Punctuation.WORDS) == [word.lower() for word in found]
    written = list(split_words(text, WordForm.WRITTEN))
    assert [word for word in written if any(map(str.isalnum, word))] == found


@settings(max_examples=100, deadline=None)
@given(st.text(st.characters()), st.sampled_from(Punctuation))
def test_no_letter_of_any_text_is_lost(text: str, punctuation: Punctuation) -> None:
    for form in WordForm:
        assert sum(map(str.isalnum, "".join(split_words(text, form)))) == sum(map(str.isalnum, text))
    assert len(folded(text)) == len(text)
    found = words(text, punctuation)
    assert (found.ends > found.starts).all() and (np.diff(found.starts) > 0).all()
    assert (found.starts[1:] >= found.ends[:-1]).all()
    small = folded(text)
    hashed = "".join(in_arrays(text, punctuation))
    assert sum(map(str.isalnum, hashed)) == sum(map(str.isalnum, small))


@settings(max_examples=200, deadline=None)
@given(st.text(st.sampled_from("aB1_'.,- \n\u200b\u3000नि\u200dع中\u0301\U0001d49c\x1c\0")), st.integers(1, 9))
def test_long_texts_are_cut_where_no_word_goes_on(text: str, size: int) -> None:
    with pytest.MonkeyPatch.context() as patch:
        whole = [list(split_words(text, form)) for form in WordForm]
        patch.setattr("maxlm.data.cleaning.word_splitting._PIECE", size)
        assert [list(split_words(text, form)) for form in WordForm] == whole
