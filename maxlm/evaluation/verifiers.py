"""What can be said of an answer without a model: rewards that cannot be argued with.

Each is a function of texts and gives True or False, or a number. A model that is trained with one looks for any way to
get it that is not the one that was meant, so that each says at its function what it does about that.
"""

from __future__ import annotations

import collections
import functools
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

from maxlm.evaluation import asked
from maxlm.evaluation.json_schema import CheckedSchema, json_value
from maxlm.evaluation.time_limit import LONGEST_S, within

_MAX_DIGITS = 1000
"""Of a number: reading one takes time with the square of its digits."""
_NUMBER = re.compile(
    r"\\[dt]?frac\{(?P<top>[-\u2212]?[0-9]+)\}\{(?P<bottom>[0-9]+)\}"
    r"|(?P<sign>(?<![0-9A-Za-z)\]])[-\u2212])?(?:[$\u20ac\u00a3\u00a5](?P<signed>[-\u2212])?)?"
    r"(?P<whole>[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+|(?<![0-9])(?=\.[0-9]))"
    r"(?:\.(?P<decimals>[0-9]+))?(?:[eE](?P<exponent>[-+]?[0-9]+))?(?:/(?P<over>[0-9]+))?"
)
"""Digits are those of ASCII: others look like numbers to Python, and to nobody who wrote the answer. A minus behind a
digit, a letter or a bracket is one of a difference. Each character is looked at a bounded number of times."""


def last_number(text: str) -> Fraction | None:
    """The last number that stands in a text, exactly; None: there is none, or it cannot be one.

    Only the last counts: a list of guesses is worth no more than its last.
    """
    found = collections.deque(_NUMBER.finditer(text), maxlen=1)
    return _value(found[0]) if found else None


def _value(found: re.Match[str]) -> Fraction | None:
    if found.end() - found.start() > _MAX_DIGITS:
        return None
    part = lambda name: (found[name] or "").replace(",", "").replace("\u2212", "-")
    if found["top"] is not None:
        return Fraction(int(part("top")), int(part("bottom"))) if int(part("bottom")) else None
    whole, decimals, exponent = part("whole"), part("decimals"), int(part("exponent") or 0)
    if abs(exponent) > _MAX_DIGITS:
        return None
    value = Fraction(int(f"{whole}{decimals}"), 10 ** len(decimals))
    value *= Fraction(10) ** exponent
    if found["over"] is not None:
        if not int(part("over")):
            return None
        value /= int(part("over"))
    return -value if part("sign") or part("signed") else value


def same_number(text: str, wanted: str, tolerance: float = 0.0) -> bool:
    """Whether both texts have the same last number, at most `tolerance` apart; not where one has none."""
    found, right = last_number(text), last_number(wanted)
    return found is not None and right is not None and abs(found - right) <= Fraction(tolerance)


def part_after(text: str, mark: str) -> str | None:
    """What comes after the last `mark`; None: it does not stand there. All of the text after an empty one."""
    _, there, rest = text.rpartition(mark) if mark else ("", "all", text)
    return rest if there else None


def matches(text: str, pattern: str, seconds: float) -> bool:
    """Whether a regular expression of Python matches the whole text, without blanks around it.

    It is interrupted in this process: no other is started.

    Raises:
        TimeUp: it takes longer, as expressions may that repeat what repeats.
        UserError: as `within`.
    """
    return within(seconds, lambda: re.fullmatch(pattern, text.strip()) is not None)


def fits_schema(text: str, schema: CheckedSchema, seconds: float) -> bool:
    """Whether the text is one value in JSON, with nothing around it, that the schema allows. NaN, infinite numbers,
    keys that stand twice and numbers of more than 300 digits are none of JSON.

    Raises:
        TimeUp: an expression in the schema takes longer.
        UserError: as `within`, or as `CheckedSchema.allows`.
    """
    try:
        value = json_value(text)
    except ValueError:
        return False
    return within(seconds, lambda: schema.allows(value))


def has_format(text: str, tags: Sequence[str], *, rest: bool = True, begun: bool = False) -> bool:
    """Whether the text is `<tag>...</tag>` for each tag in turn, with nothing between, and then an answer, or with
    `rest=False` nothing. Nothing of it may be blank, and no tag may stand there twice.

    Args:
        text: a completion.
        tags: at least one.
        rest: whether an answer follows.
        begun: whether the prompt has the first opening tag already.
    """
    left = f"<{tags[0]}>{text}" if begun else text
    if any(left.count(name) != 1 for tag in tags for name in (f"<{tag}>", f"</{tag}>")):
        return False
    for tag in tags:
        before, _, after_open = left.partition(f"<{tag}>")
        inner, close, left = after_open.partition(f"</{tag}>")
        if before.strip() or not close or not inner.strip():
            return False
    return bool(left.strip()) == rest


def overlong(tokens: int, at_most: int, buffer: int) -> float:
    """0 up to `at_most - buffer` tokens, then falling to -1 at `at_most` (DAPO, arXiv:2503.14476, equation 13)."""
    return -min(max(tokens - (at_most - buffer), 0), buffer) / buffer


def program_of(completion: str) -> str:
    """The inside of the last block between lines that begin with ```; the whole text, if there is none."""
    blocks, lines = list[list[str]](), None  # type: list[list[str]], list[str] | None
    for line in completion.splitlines():
        if line.lstrip().startswith("```"):
            if lines is not None:
                blocks.append(lines)
            lines = [] if lines is None else None
        elif lines is not None:
            lines.append(line)
    return "\n".join(blocks[-1]) if blocks else completion


@functools.cache
def _asking() -> str:
    return Path(asked.__file__).read_text(encoding="utf-8")


def tested(program: str, tests: str) -> str:
    """One program for the sandbox: the tests, which call the functions of `program` in a process of its own.

    What they get is data, see `asked`: a `__eq__` of the program's own comes to nothing, and so does a function by the
    name of one of Python's. Leaving early (`sys.exit(0)`) ends the program, and not its tests. The tests are in no file
    that the program could read, and their process cannot be looked into.
    """
    return (
        "import os, sys\n"
        "os.unlink(__file__)\n"
        f"open('asked.py', 'w', encoding='utf-8').write({_asking()!r})\n"
        "sys.path.insert(0, os.getcwd())\n"
        "import asked\n"
        "sys.path.pop(0)\n"  # what the program writes there is no module of the tests
        f"globals().update(asked.start({program!r}))\n"
        "del os, sys, asked\n"
        f"{tests}\n"
    )


RunProgram = Callable[[str, float], str | None]
"""`Sandbox`: None where a program comes to its end in so many seconds, else why it did not."""


def passes(completion: str, tests: str, run: RunProgram, seconds: float) -> bool:
    """Whether the program of a completion passes its tests in the sandbox; not where it is empty, late or killed.

    Raises:
        UserError: the sandbox cannot be built.
    """
    program = program_of(completion)
    return bool(program.strip()) and run(tested(program, tests), min(seconds, LONGEST_S)) is None
