"""Exams that come with the package: made from a seed, with known levels of chance, for models of any size.

Right answers stand at random places, and wrong ones look alike: of the same length where that can be, so that neither
a place nor a length gives more than chance.
"""

from __future__ import annotations

import ast
import string
from collections.abc import Callable
from random import Random

from maxlm.evaluation.exams import ChoiceExam, ChoiceQuestion, Exam, OpenExam, OpenQuestion, OpenSettings

_CHOICES = 4
_COPIED = 4
_SORTED = 5
_SNIPPETS = (
    "def {f}({x}, {y}):\n    return {x} {op} {y} * {n}\n",
    "for {x} in range({n}):\n    {f}({x}, [{n}, {x}])\n",
    "if {x} {op} {n} > {y}:\n    {x} = {{'{f}': {y}}}\n",
    "{x} = [{y} {op} {n} for {y} in {f}({n})]\n",
    "class {f}:\n    {x} = ({n}, {n})\n    {y} = {x}[0]\n",
    "while not {f}({x}):\n    {x}, {y} = {y}, {x} {op} {n}\n",
)
_BREAKS = "()[]{}:,="


def suite(seed: int = 0, size: int = 100) -> dict[str, Exam]:
    """Every exam by its name, each with `size` questions, the same for the same seed."""
    exams: dict[str, Exam] = {}
    for name, make in _CHOOSING.items():
        rng = Random(f"{seed} {name}")  # each exam is the same whatever the others are
        exams[name] = ChoiceExam(name=name, questions=tuple(make(rng) for _ in range(size)))
    rng = Random(f"{seed} copying")
    exams["copying"] = OpenExam(
        name="copying",
        settings=OpenSettings(max_new_tokens=4 * _COPIED),
        questions=tuple(_copying(rng) for _ in range(size)),
        chance=len(string.ascii_lowercase) ** -float(_COPIED),
    )
    return exams


def _arithmetic(rng: Random) -> ChoiceQuestion:
    """Sums of two numbers of two digits, after two that are solved."""
    sums = [(a, b) for a, b in ((rng.randint(10, 49), rng.randint(10, 49)) for _ in range(3))]
    *solved, (a, b) = sums
    shown = "".join(f"{x} + {y} = {x + y}\n" for x, y in solved)
    return _among(rng, f"{shown}{a} + {b} =", a + b, 20, 98)


def _linear(rng: Random) -> ChoiceQuestion:
    """A linear function of whole numbers, shown at four places and asked at a fifth (after arXiv:2208.01066)."""
    slope, offset = rng.randint(2, 5), rng.randint(1, 9)
    *shown, x = rng.sample(range(2, 18), 5)
    lines = "".join(f"{one} -> {slope * one + offset}\n" for one in shown)
    value = slope * x + offset
    return _among(rng, f"{lines}{x} ->", value, *((5, 9) if value < 10 else (10, 99)))


def _among(rng: Random, prompt: str, value: int, low: int, high: int) -> ChoiceQuestion:
    """The value among near ones with as many digits; it is the middle one no more often than the others."""
    first = max(low, min(value - rng.randint(0, 24), high - 24))
    near = [one for one in range(first, min(high, first + 24) + 1) if one != value]
    return _question(rng, prompt, f" {value}", [f" {one}" for one in rng.sample(near, _CHOICES - 1)])


def _sorting(rng: Random) -> ChoiceQuestion:
    """Five different digits in order, after two that are sorted."""
    rows = [rng.sample(string.digits, _SORTED) for _ in range(3)]
    shown = "".join(f"sort {' '.join(row)}: {' '.join(sorted(row))}\n" for row in rows[:-1])
    right = sorted(rows[-1])
    wrong: set[str] = set()
    while len(wrong) < _CHOICES - 1:
        first, second = rng.sample(range(_SORTED), 2)
        mixed = list(right)
        mixed[first], mixed[second] = mixed[second], mixed[first]
        wrong.add(f" {' '.join(mixed)}")
    return _question(rng, f"{shown}sort {' '.join(rows[-1])}:", f" {' '.join(right)}", sorted(wrong))


def _python(rng: Random) -> ChoiceQuestion:
    """Two or three lines that Python parses, against the same lines with one character changed that it does not."""
    while True:
        f, x, y = rng.sample(string.ascii_lowercase, 3)
        right = rng.choice(_SNIPPETS).format(f=f, x=x, y=y, n=rng.randint(2, 9), op=rng.choice("+-*"))
        place = rng.choice([i for i, letter in enumerate(right) if letter in _BREAKS])
        wrong = right[:place] + rng.choice(_BREAKS.replace(right[place], "")) + right[place + 1 :]
        if parses(right) and not parses(wrong):
            return _question(rng, "", right, [wrong])


def _copying(rng: Random) -> OpenQuestion:
    """Four random letters, after two rows that are copied."""
    rows = [" ".join(rng.choices(string.ascii_lowercase, k=_COPIED)) for _ in range(3)]
    shown = "".join(f"copy {row}: {row}\n" for row in rows[:-1])
    return OpenQuestion(prompt=f"{shown}copy {rows[-1]}:", answers=(rows[-1],))


def parses(text: str) -> bool:
    """Whether the text is Python, by its grammar alone."""
    try:
        ast.parse(text)
    except (SyntaxError, ValueError):
        return False
    return True


def _question(rng: Random, prompt: str, right: str, wrong: list[str]) -> ChoiceQuestion:
    answer = rng.randrange(len(wrong) + 1)
    return ChoiceQuestion(prompt=prompt, choices=(*wrong[:answer], right, *wrong[answer:]), answer=answer)


_CHOOSING: dict[str, Callable[[Random], ChoiceQuestion]] = {
    "arithmetic": _arithmetic,
    "sorting": _sorting,
    "linear": _linear,
    "python": _python,
}
"""Those in which a model chooses."""
