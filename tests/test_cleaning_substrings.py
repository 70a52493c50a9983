"""Stretches of text that stand earlier, against every window of every document looked up in a dict."""

from __future__ import annotations

import itertools
import random
from pathlib import Path

import numpy as np
import pytest
from cleaning_helpers import in_parts, outcome
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from maxlm.config.cleaning.duplicate_steps import ExactSubstrings
from maxlm.data.cleaning import substrings
from maxlm.data.cleaning.findings import Page
from maxlm.data.cleaning.substrings import SubstringCutter, anchors

SIZE = 16


def expected(texts: list[str], size: int) -> list[str]:
    """What is left, by the rule as it is said: windows of so many bytes, each character with a byte that stays."""
    first: dict[bytes, tuple[int, int]] = {}
    left = []
    for number, text in enumerate(texts):
        encoded = text.encode()
        gone = [False] * len(encoded)
        for at in range(len(encoded) - size + 1):
            document, place = first.setdefault(encoded[at : at + size], (number, at))
            if document < number or at - place >= size:
                gone[at : at + size] = [True] * size
        kept, at = "", 0
        for character in text:
            width = len(character.encode())
            kept += "" if all(gone[at : at + width]) else character
            at += width
        left.append(kept)
    return left


def cut(texts: list[str], parts: int, folder: Path, size: int = SIZE) -> list[str]:
    pages = [Page(f"f{i}", text) for i, text in enumerate(texts)]
    step = SubstringCutter(ExactSubstrings(least_bytes=size, least_words=0))
    left = outcome(step, in_parts(pages, parts, folder))
    return [left.get(page.id, "") for page in pages]


def stripped(texts: list[str]) -> list[str]:
    """With nothing for what is dropped."""
    return [text if text.strip() else "" for text in texts]


def with_copies(alphabet: str, seed: int) -> list[str]:
    """Texts in which stretches of others come again, some of them one character shorter than what counts."""
    chance = random.Random(seed)
    pool = ["".join(chance.choices(alphabet, k=chance.choice([SIZE - 1, SIZE, SIZE + 1, 40, 90]))) for _ in range(4)]
    texts = []
    for _ in range(chance.randrange(1, 7)):
        pieces = [chance.choice(pool) if chance.random() < 0.6 else chance.choice(alphabet) * chance.randrange(40)]
        pieces += ["".join(chance.choices(alphabet, k=chance.randrange(30))) for _ in range(chance.randrange(3))]
        chance.shuffle(pieces)
        texts.append("".join(pieces))
    return texts


@pytest.mark.parametrize("alphabet", ["ab", "aé𝄞", "abcdefghijklmnopqrstuvwxyz é"])
@pytest.mark.parametrize("stride", [5, 1 << 17])
@settings(max_examples=20, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(seed=st.integers(0, 2**32), parts=st.integers(1, 4))
def test_what_is_left_is_what_the_rule_leaves(
    alphabet: str, stride: int, seed: int, parts: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(substrings, "_STRIDE", stride)
        texts = with_copies(alphabet, seed)
        assert cut(texts, parts, tmp_path_factory.mktemp("work")) == stripped(expected(texts, SIZE))


def test_examples_have_what_they_are_to_show() -> None:
    """Guards the test above: a good share of its texts are cut, and not all of them."""
    examples = [with_copies("ab", seed) for seed in range(50)]
    were_cut = [a != b for texts in examples for a, b in zip(texts, expected(texts, SIZE), strict=True)]
    share = sum(were_cut) / len(were_cut)
    assert 0.2 < share < 0.9


def test_a_copy_one_byte_short_stays_and_characters_stay_whole(tmp_path: Path) -> None:
    text = "0123456789abcdef"
    assert cut([text, f"({text[1:]})", f"<{text}>"], 2, tmp_path / "a") == [text, f"({text[1:]})", "<>"]
    # The 16 bytes that both have begin and end inside of a character each: é is C3 A9, ã is C3 A3, and ĩ is C4 A9.
    assert cut(["é0123456789abcdã", "ĩ0123456789abcdé"], 1, tmp_path / "b") == ["é0123456789abcdã", "ĩé"]


def test_a_run_of_one_character_keeps_its_first_window(tmp_path: Path) -> None:
    assert cut(["-" * 5000, "x" + "-" * 40], 2, tmp_path) == ["-" * SIZE, "x"]


@pytest.mark.parametrize("size", [16, 17, 200])
def test_each_window_inside_a_document_has_one_anchor_and_equal_ones_have_equal_anchors(size: int) -> None:
    chance = np.random.default_rng(size)
    text = chance.integers(97, 99, 3000).astype(np.uint8)
    text[2000:2600] = text[100:700]
    ends = np.array([0, 5, 900, 900, 2100, 3000])
    found = anchors(text, ends, size)
    of_window = {}
    for hash, begin, windows, ahead in found.tolist():
        for i in range(windows):
            assert begin + i not in of_window
            of_window[begin + i] = (hash, ahead - i)
    assert sorted(of_window) == [p for a, b in itertools.pairwise(ends) for p in range(a, b - size + 1)]
    anchor_of: dict[bytes, tuple[int, int]] = {}
    for place, anchor in of_window.items():
        assert anchor == anchor_of.setdefault(text[place : place + size].tobytes(), anchor)
    assert len(anchor_of) < len(of_window)  # there are equal windows


def test_most_windows_share_their_anchor() -> None:
    """On which memory and disk depend: about one anchor in a quarter of a window."""
    text = np.random.default_rng(0).integers(0, 256, 100_000).astype(np.uint8)
    assert len(anchors(text, np.array([0, len(text)]), 200)) < 1.2 * len(text) / 50
