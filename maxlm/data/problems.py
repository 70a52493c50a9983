"""Problems that are made by rule, so that anybody can say whether an answer is right."""

from __future__ import annotations

import enum
import random
from collections.abc import Iterator
from hashlib import blake2b
from typing import NamedTuple, assert_never

from maxlm.config import UserError

_HELD_OUT = 16
"""One of so many problems is held out."""
_TRIES = 64
"""Problems that are drawn for each that is wanted, before there are held to be no more."""
_SMALL = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_SCALES = ((10**9, "billion"), (10**6, "million"), (1000, "thousand"), (100, "hundred"))


class ProblemKind(enum.Enum):
    """What is to be done."""

    SORT = "sort"
    """Write the digits of a number in order: Sort 352914. 123459"""
    ADDITION = "addition"
    """Add two numbers in digits or in words: What is twelve plus seven? 19"""

    @property
    def digits(self) -> int:
        """Of a number, where nothing else is said."""
        match self:
            case ProblemKind.SORT:
                return 6
            case ProblemKind.ADDITION:
                return 2
            case _:
                assert_never(self)


class MadeProblem(NamedTuple):
    """A question, and the only right answer to it."""

    prompt: str
    answer: str
    key: str
    """What decides whether it is held out: the same for a sum in digits, in words, and the other way round."""


def problems(
    kind: ProblemKind, count: int, seed: int, *, held_out: bool = False, digits: int | None = None
) -> Iterator[MadeProblem]:
    """So many different ones, the same for the same arguments.

    One problem in sixteen, chosen by a hash of what it asks for, is held out: it comes only with `held_out`, and then
    no other does. So whatever the seeds, no problem of one part is in the other.

    Args:
        kind: of problems.
        count: how many.
        seed: which.
        held_out: whether they are those that are held out.
        digits: of each number, at most; None: as `ProblemKind.digits`.

    Raises:
        UserError: there are not so many.
    """
    draw, seen = random.Random(f"{kind.value}/{seed}"), set[str]()
    for _ in range(_TRIES * (count + _HELD_OUT)):
        if len(seen) == count:
            return
        problem = _drawn(kind, digits or kind.digits, draw)
        if problem.prompt not in seen and _is_held_out(problem) == held_out:
            seen.add(problem.prompt)
            yield problem
    if len(seen) < count:
        raise UserError(f"count = {count}: {len(seen)} different problems were found; use fewer, or more digits")


def in_words(number: int) -> str:
    """Of a number from 0 to 10^12 - 1, as in English: nine hundred five thousand twenty-one."""
    for scale, name in _SCALES:
        if number >= scale:
            rest = f" {in_words(number % scale)}" if number % scale else ""
            return f"{in_words(number // scale)} {name}{rest}"
    if number < len(_SMALL):
        return _SMALL[number]
    tens = _TENS[number // 10 - 2]
    return f"{tens}-{_SMALL[number % 10]}" if number % 10 else tens


def _drawn(kind: ProblemKind, digits: int, draw: random.Random) -> MadeProblem:
    match kind:
        case ProblemKind.SORT:
            number = "".join(draw.choices("0123456789", k=digits))
            return MadeProblem(f"Sort {number}.", "".join(sorted(number)), number)
        case ProblemKind.ADDITION:
            a, b = draw.randrange(10**digits), draw.randrange(10**digits)
            said = f"{in_words(a)} plus {in_words(b)}" if draw.random() < 0.5 else f"{a} + {b}"
            return MadeProblem(f"What is {said}?", str(a + b), f"{min(a, b)} + {max(a, b)}")
        case _:
            assert_never(kind)


def _is_held_out(problem: MadeProblem) -> bool:
    return blake2b(problem.key.encode(), digest_size=8).digest()[0] % _HELD_OUT == 0
