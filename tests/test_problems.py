"""Problems made by rule: their answers are right, and those held out are in no other file."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from maxlm.config import Purpose, UserError
from maxlm.data.__main__ import main
from maxlm.data.conversation_formats import read
from maxlm.data.problems import ProblemKind, in_words, problems

SMALL = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen"""
TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
WORDS = {word: n for n, word in enumerate(SMALL.split())} | {word: 10 * n for n, word in enumerate(TENS.split(), 2)}


def number(text: str) -> int:
    """What English words or digits say, read from left to right."""
    if text.isdecimal():
        return int(text)
    done, part = 0, 0
    for word in re.split("[ -]", text):
        if word == "hundred":
            part *= 100
        elif word in ("thousand", "million", "billion"):
            done, part = done + part * {"thousand": 10**3, "million": 10**6, "billion": 10**9}[word], 0
        else:
            part += WORDS[word]
    return done + part


def built(out: Path, *words: str) -> list[dict[str, Any]]:
    assert main(["build", "problems", *words, "--out", str(out)]) == 0
    return [json.loads(line) for line in out.read_text().splitlines()]


def test_numbers_in_words_are_those_numbers() -> None:
    some = [*range(1200), 9_999, 10_000, 100_000, 905_021, 1_000_000, 10**9 - 1, 10**9, 120_000_000_305]
    assert [number(in_words(n)) for n in some] == some
    assert in_words(905_021) == "nine hundred five thousand twenty-one"


def test_each_answer_is_right_and_no_problem_comes_twice(tmp_path: Path) -> None:
    for digits in ("2", "6"):
        found = built(tmp_path / f"a{digits}", "addition", "--count", "300", "--digits", digits)
        asked = [re.fullmatch(r"What is (.+) (?:\+|plus) (.+)\?", one["prompt"]) for one in found]
        assert [int(one["answer"]) for one in found] == [sum(map(number, a.groups())) for a in asked if a]
        assert 50 < sum("plus" in one["prompt"] for one in found) < 250
        assert len({one["prompt"] for one in found}) == 300
    found = built(tmp_path / "s", "sort", "--count", "300")
    for one in found:
        digits = one["prompt"].removeprefix("Sort ").removesuffix(".")
        assert len(digits) == 6 and Counter(digits) == Counter(one["answer"])
        assert all(a <= b for a, b in itertools.pairwise(one["answer"]))
    assert len({one["prompt"] for one in found}) == 300


def test_a_record_is_for_sft_and_for_rewards(tmp_path: Path) -> None:
    [one] = built(tmp_path / "a", "addition", "--count", "1")
    said, asked = read(one, Purpose.SFT), read(one, Purpose.PROMPTS)
    assert said.prompt == asked.prompt == [{"role": "user", "content": one["prompt"]}]  # type: ignore[union-attr]
    assert said.answers[0].messages == [{"role": "assistant", "content": one["answer"]}]  # type: ignore[union-attr]
    [text] = built(tmp_path / "t", "addition", "--count", "1", "--as", "text")
    assert text == {"text": f"{one['prompt']} {one['answer']}"}


def test_what_is_held_out_comes_with_no_seed(tmp_path: Path) -> None:
    """A sum is one problem in digits, in words, and the other way round."""

    def sums(seed: int, held_out: bool) -> set[tuple[int, ...]]:
        found = problems(ProblemKind.ADDITION, 200, seed, held_out=held_out)
        asked = (re.fullmatch(r"What is (.+) (?:\+|plus) (.+)\?", one.prompt) for one in found)
        return {tuple(sorted(map(number, one.groups()))) for one in asked if one}

    trained = set.union(*(sums(seed, False) for seed in range(20)))
    held_out = set.union(*(sums(seed, True) for seed in range(20)))
    assert len(trained) > 1500 and len(held_out) > 200 and not trained & held_out
    assert 0.04 < len(held_out) / 5050 < 0.09  # of all sums of two numbers below 100: a sixteenth
    assert sums(0, False) != sums(1, False)


def test_the_same_words_give_the_same_file_and_too_many_are_one_line(tmp_path: Path) -> None:
    words = ["sort", "--count", "50", "--seed", "7", "--held_out"]
    assert built(tmp_path / "a", *words) == built(tmp_path / "b", *words)
    with pytest.raises(UserError, match=r"count = 11: (8|9|10) different problems were found; use fewer, or more digi"):
        main(["build", "problems", "sort", "--digits", "1", "--count", "11", "--out", str(tmp_path / "c")])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]
    with pytest.raises(UserError, match="is there already"):
        built(tmp_path / "a", *words)
