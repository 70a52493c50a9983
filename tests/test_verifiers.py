"""Answers that are right, and answers that only look so: what a model may find that is trained with a verifier."""

from __future__ import annotations

import contextlib
import json
import random
import signal
import threading
import time
from collections.abc import Callable
from decimal import Decimal
from fractions import Fraction
from typing import Any

import jsonschema
import pytest

from maxlm.config import UserError
from maxlm.evaluation.json_schema import CheckedSchema, json_value
from maxlm.evaluation.sandbox import Sandbox, SandboxLimits
from maxlm.evaluation.time_limit import TimeUp, within
from maxlm.evaluation.verifiers import (
    fits_schema,
    has_format,
    last_number,
    matches,
    overlong,
    part_after,
    passes,
    program_of,
    same_number,
)

GSM8K = "Natalia sold 48/2 = <<48/2=24>>24 clips in May.\nNatalia sold 48+24 = <<48+24=72>>72 clips.\n#### 72"


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("So she has 72 clips.", 72),
        (GSM8K, 72),
        ("72.", 72),
        ("1,234,567 in all", 1234567),
        ("$1,234.50", Decimal("1234.50")),
        ("-$3", -3),
        ("\u20ac-3.25", Decimal("-3.25")),
        ("\u22124", -4),
        ("x = -4", -4),
        ("7-4", 4),
        ("day-4", 4),
        ("f(2)-4", 4),
        ("3/4", Fraction(3, 4)),
        (r"\boxed{-\frac{3}{4}}", Fraction(3, 4)),
        (r"\boxed{\frac{-3}{4}}", Fraction(-3, 4)),
        (".5", Fraction(1, 2)),
        ("1e3", 1000),
        ("2.5E-2", Fraction(1, 40)),
        ("50%", 50),
        ("1,2", 2),
        ("12,3456", 3456),
        ("", None),
        ("seventy-two", None),
        ("1/0", None),
        (r"\frac{1}{0}", None),
        ("\u0667\u0662", None),  # 72 in Arabic digits
        ("\uff17\uff12", None),  # and in wide ones
        ("\u2167", None),
        ("7\u00b2", 7),
        ("inf", None),
        ("nan", None),
        ("1e99999999", None),
        ("9" * 5000, None),
    ],
)
def test_the_last_number(text: str, number: Any) -> None:
    assert last_number(text) == (None if number is None else Fraction(number))


def test_numbers_as_python_writes_them_are_read_back() -> None:
    rng = random.Random(1)
    for _ in range(500):
        value = rng.choice([rng.randint(-(10**9), 10**9), rng.uniform(-1e6, 1e6), rng.uniform(-1, 1) * 1e-9])
        text = rng.choice([repr, lambda x: f"{x:,}", lambda x: f"{x:e}"])(value)
        assert last_number(f"It is {text} now") == Fraction(text.replace(",", "")), text


def test_a_list_of_guesses_is_worth_its_last() -> None:
    guesses = " ".join(map(str, range(100)))
    assert not same_number(guesses, "#### 72")
    assert same_number(f"{guesses} 72", "#### 72")


def test_numbers_are_equal_exactly_or_within_a_tolerance() -> None:
    assert not same_number("0.3333333333333333", "1/3")
    assert same_number("0.333", "1/3", 1e-3)
    assert not same_number("0.33", "1/3", 1e-3)
    assert same_number("0.1", "1/10")
    assert not same_number("9007199254740993", "9007199254740992"), "both are one float"
    assert not same_number("no number", "no number either")


@pytest.mark.parametrize("text", ["1," * 100_000, "1" * 200_000, "-" * 200_000, r"\frac{" * 50_000, "1e" * 100_000])
def test_any_text_is_read_in_little_time(text: str) -> None:
    began = time.process_time()
    last_number(text)
    has_format(text, ("think",))
    assert time.process_time() - began < 1.0


def test_what_comes_after_the_last_mark() -> None:
    assert part_after("#### 1 #### 2", "####") == " 2"
    assert part_after("2", "####") is None
    assert part_after("2", "") == "2"


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("<think>so</think>42", True),
        (" <think>\nso\n</think>\n\n42\n", True),
        ("<think>so</think>", False),
        ("<think>so</think>  \n", False),
        ("<think> </think>42", False),
        ("42", False),
        ("42<think>so</think>42", False),
        ("<think>so<think>so</think>42", False),
        ("<think>a</think><think>b</think>42", False),
        ("<think>so</think>42</think>", False),
        ("</think>so<think>42", False),
        ("<THINK>so</THINK>42", False),
        ("", False),
    ],
)
def test_a_thought_and_then_an_answer(text: str, right: bool) -> None:
    assert has_format(text, ("think",)) is right
    if text.startswith("<think>"):
        assert has_format(text.removeprefix("<think>"), ("think",), begun=True) is right


def test_several_tags_and_nothing_after_them() -> None:
    tags = ("think", "answer")
    assert has_format("<think>a</think>\n<answer>b</answer>\n", tags, rest=False)
    assert not has_format("<think>a</think>\n<answer>b</answer>\n", tags)
    assert not has_format("<answer>b</answer><think>a</think>", tags, rest=False)
    assert not has_format("<think>a</think>and<answer>b</answer>", tags, rest=False)


def test_what_is_too_long_costs_as_in_the_paper() -> None:
    """Equation 13 of arXiv:2503.14476, with L_max = 100 and L_cache = 20."""

    def paper(length: int) -> float:
        if length <= 80:
            return 0.0
        return ((100 - 20) - length) / 20 if length <= 100 else -1.0

    for length in (0, 1, 79, 80, 81, 90, 99, 100, 101, 1000):
        assert overlong(length, 100, 20) == pytest.approx(paper(length), abs=1e-12)


# Expressions, and time


def test_an_expression_matches_the_whole() -> None:
    assert matches(" 2026-11-30\n", r"\d{4}-\d\d-\d\d", 1.0)
    assert not matches("on 2026-11-30", r"\d{4}-\d\d-\d\d", 1.0)


def test_an_expression_that_tries_for_ever_ends() -> None:
    began = time.monotonic()
    with pytest.raises(TimeUp, match=r"took more than 0\.2 s"):
        matches("a" * 60 + "b", r"(a+)+", 0.2)
    assert time.monotonic() - began < 2.0


def forgets() -> None:
    while True:
        with contextlib.suppress(Exception):
            time.sleep(0.01)


def catches_the_first() -> None:
    try:
        while True:
            pass
    except BaseException:
        while True:
            pass


@pytest.mark.parametrize("call", [forgets, catches_the_first, lambda: time.sleep(60)])
def test_a_call_that_hangs_ends(call: Callable[[], None]) -> None:
    with pytest.raises(TimeUp):
        within(0.2, call)
    time.sleep(0.15)  # no reminder comes later


def test_others_alarms_are_kept() -> None:
    rang: list[int] = []
    before = signal.signal(signal.SIGALRM, lambda *_: rang.append(1))
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.2)
        assert within(5.0, lambda: 3) == 3
        with pytest.raises(TimeUp):
            within(0.3, lambda: time.sleep(9))
        deadline = time.monotonic() + 2
        while not rang and time.monotonic() < deadline:
            time.sleep(0.01)
        assert rang == [1]
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def test_a_limit_inside_another() -> None:
    with pytest.raises(TimeUp, match=r"0\.3 s"):
        within(0.3, lambda: within(9.0, lambda: time.sleep(9)))
    with pytest.raises(TimeUp, match=r"0\.2 s"):
        within(9.0, lambda: within(0.2, lambda: time.sleep(9)))
    assert signal.getitimer(signal.ITIMER_REAL) == (0.0, 0.0)


def test_only_the_main_thread_can_be_interrupted() -> None:
    said: list[str] = []

    def other() -> None:
        try:
            within(1.0, lambda: None)
        except UserError as error:
            said.append(str(error))

    thread = threading.Thread(target=other)
    thread.start()
    thread.join()
    assert "main thread" in said[0]


# JSON


@pytest.mark.parametrize(
    "text",
    ["NaN", "[Infinity]", "-Infinity", "1e999", '{"a": 1, "a": 2}', "9" * 301, "[" * 100_000, "1 2", "", "'a'", "01"],
)
def test_what_is_no_json(text: str) -> None:
    with pytest.raises(ValueError):
        json_value(text)
    assert not fits_schema(text, CheckedSchema({}, "s"), 1.0)


SCHEMAS: list[Any] = [
    {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False},
    {"type": ["array", "null"], "items": {"type": "number", "minimum": 0}, "maxItems": 3, "uniqueItems": True},
    {"prefixItems": [{"const": 1}, {"enum": ["a", None]}], "items": False, "type": "array"},
    {"oneOf": [{"type": "integer"}, {"type": "number", "multipleOf": 0.5}]},
    {"anyOf": [{"type": "string", "pattern": "^a", "maxLength": 2}, {"type": "boolean"}]},
    {"not": {"type": "object"}, "exclusiveMaximum": 2, "exclusiveMinimum": -1},
    {
        "$defs": {"t": {"type": "object", "properties": {"n": {"$ref": "#/$defs/t"}}, "maxProperties": 1}},
        "$ref": "#/$defs/t",
    },
    {"patternProperties": {"^a": {"type": "integer"}}, "additionalProperties": {"type": "null"}, "minProperties": 1},
    {"if": {"type": "integer"}, "then": {"maximum": 1}, "else": {"type": ["string", "object"]}},
    {"contains": {"type": "integer"}, "minContains": 2, "maxContains": 2},
    {"propertyNames": {"minLength": 2}, "allOf": [{"type": "object"}, True]},
    {"const": {"a": [1, True]}},
    False,
]


def some_value(rng: random.Random, depth: int = 0) -> Any:
    kind = rng.randrange(9 if depth < 3 else 7)
    if kind == 7:
        return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]
    if kind == 8:
        return {rng.choice(["n", "a", "ab", "b"]): some_value(rng, depth + 1) for _ in range(rng.randrange(3))}
    return [
        None,
        True,
        False,
        rng.randrange(-2, 3),
        rng.choice([0.0, 1.0, 0.5, -1.5]),
        rng.choice(["", "a", "abc"]),
        1,
    ][kind]


@pytest.mark.parametrize("schema", SCHEMAS)
def test_a_schema_is_read_as_jsonschema_reads_it(schema: Any) -> None:
    rng, ours, theirs = random.Random(2), CheckedSchema(schema, "s"), jsonschema.Draft202012Validator(schema)
    values = [some_value(rng) for _ in range(600)] + [{"a": [1, True]}, {"a": [1, 1]}, {"a": [1.0, True]}, [1, "a"]]
    answers = [theirs.is_valid(value) for value in values]
    assert [fits_schema(json.dumps(value), ours, 5.0) for value in values] == answers
    assert schema is False or 0 < sum(answers) < len(answers), "neither all nor nothing"


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "objekt"}, "holds 'objekt'"),
        ({"properties": {"a": {"minimun": 1}}}, "s/properties/a/minimun: this keyword is not known"),
        ({"unevaluatedProperties": False}, "is not known"),
        ({"minimum": True}, "not what this keyword takes"),
        ({"anyOf": []}, "must be a list of schemas"),
        ({"items": [1]}, "an object, True or False"),
        ({"$ref": "#/$defs/x"}, "leads nowhere"),
        ({"pattern": "("}, "is no regular expression"),
        ({"patternProperties": {"(": True}}, "is no regular expression"),
        ({"multipleOf": 0}, "must be positive"),
        ({"required": [["a"]]}, "must hold names"),
        ({"type": [["a"]]}, "holds"),
        ({"$ref": "http://example.org/s"}, "must begin with #/"),
        ([], "not list"),
    ],
)
def test_a_schema_that_would_check_less_than_it_says_is_refused(schema: Any, words: str) -> None:
    with pytest.raises(UserError, match=words.replace("$", r"\$")):
        CheckedSchema(schema, "s")


def test_a_schema_that_never_ends() -> None:
    with pytest.raises(UserError, match="without end"):
        CheckedSchema({"$ref": "#"}, "s").allows(1)
    with pytest.raises(TimeUp):
        fits_schema(json.dumps("a" * 60), CheckedSchema({"pattern": "(a+)+$x"}, "s"), 0.2)


def test_deep_values_are_compared_and_deeper_ones_refused() -> None:
    tree = CheckedSchema(
        {"$defs": {"t": {"anyOf": [{"items": {"$ref": "#/$defs/t"}}]}}, "allOf": [{"$ref": "#/$defs/t"}]}, "s"
    )
    nested = lambda depth, inner: "[" * depth + inner + "]" * depth
    assert fits_schema(nested(64, "1"), tree, 5.0) and not fits_schema(nested(65, "1"), tree, 5.0)
    assert not fits_schema(nested(900, "1"), tree, 5.0)


# Programs


def test_the_program_is_the_last_block() -> None:
    assert program_of("Try\n```python\na = 1\n```\nor better\n```\nb = 2\nc = 3\n```\nDone") == "b = 2\nc = 3"
    assert program_of("a = 1") == "a = 1"
    assert program_of("```python\na = 1") == "```python\na = 1"


@pytest.fixture(scope="module")
def sandbox() -> Sandbox:
    try:
        return Sandbox(SandboxLimits(memory_mb=256), asked_by="a test")
    except UserError as error:
        if "machine" not in str(error):
            raise
        pytest.skip(str(error))


RAISES = "try:\n    f(-1)\nexcept ValueError:\n    assert f(1) == set()"
SUMS = """class S:
    def __init__(self, n): self.n = n
    def add(self, x):
        self.n += x
        return self.n
"""
SQUARES = "assert f(2) == 4\nassert f(-3) == 9"


@pytest.mark.parametrize(
    ("program", "tests"),
    [
        ("def f(x):\n    return x * x", SQUARES),
        ("f = lambda x: x**2", SQUARES),
        ("from math import *\ndef g(x): return x\ndef f(x):\n    print('x')\n    return g(x) ** 2", SQUARES),
        ("def f(x): return x * x\nif __name__ == '__main__': input()", SQUARES),
        ("def f(x): return {'a': [(x, None, {x}, b'1')]}", "assert f(2) == {'a': [(2, None, {2}, b'1')]}"),
        ("def f(*x, **y): yield from [*x, *y]", "assert list(f(1, b=2)) == [1, 'b']"),
        ("def f(x): return float(x)", "import math\nassert math.isinf(f('-inf')) and f('1.5') == 1.5"),
        ("def f(x):\n    if x < 0: raise ValueError\n    return set()", RAISES),
        ("def f(x): return x", "def check(g):\n    assert g([1, (2,)]) == [1, (2,)]\ncheck(f)"),
        (SUMS, "s = S(1)\ns.add(1)\nassert s.add(x=2) == 4"),
        ("from collections import Counter\ndef f(x): return Counter(x)", "assert f('aab') == {'a': 2, 'b': 1}"),
    ],
)  # fmt: skip
def test_a_right_program_passes(sandbox: Sandbox, program: str, tests: str) -> None:
    assert passes(f"Here:\n```python\n{program}\n```", tests, sandbox, 10.0)


EQUAL = "    def __eq__(self, other): return True\n    __hash__ = None\n"
KILLS = """import os, signal
for pid in range(1, 9):
    try: os.kill(pid, signal.SIGTERM)
    except OSError: pass
def f(x): return 7
"""
READS = """import glob, re
def f(x):
    text = ''.join(open(name, errors='replace').read() for name in glob.glob('/tmp/*') + glob.glob('*'))
    return int((re.findall(rf'assert f.{x}. == (.)', text) or [7])[0])
"""
ANSWERS_UNASKED = """import os
for n in range(3, 64):
    try: os.write(n, b'*0\\n=True\\n' * 9)
    except OSError: pass
def f(x): return 7
"""
FAKES_MODULES = """for name in ('ast', 'builtins', 'asked'):
    open(f'/tmp/{name}.py', 'w').write('def literal_eval(x): return 4')
def f(x): return 7
"""
SAYS_YES = "class A:\n" + EQUAL


@pytest.mark.parametrize(
    "program",
    [
        "",
        "   \n",
        "no Python",
        "def f(x): return x + 2",
        "def f(x):\n    while True: pass",
        "while True: pass",
        "import sys\nsys.exit(0)",
        "def f(x):\n    import sys\n    sys.exit(0)",
        "import os\ndef f(x): os._exit(0)",
        f"{SAYS_YES}def f(x): return A()",
        f"class A(int):\n{EQUAL}def f(x): return A(7)",
        f"{SAYS_YES}import builtins\nbuiltins.AssertionError = A\nbuiltins.int = A\ndef f(x): return 7",
        "import atexit, os\natexit.register(os._exit, 0)\ndef f(x): raise SystemExit(0)",
        KILLS,
        "import os\ndef f(x): return eval(os.popen('grep -ho \"f(.*\" *.py').read().split('==')[1].split()[0])",
        READS,
        ANSWERS_UNASKED,
        FAKES_MODULES,
        "def f(x): return [f] * 4",
        "def f(x): return " + "9" * 100_000,
        "def f(x):\n    y = []\n    for _ in range(5000): y = [y]\n    return y",
    ],
)  # fmt: skip
def test_no_trick_passes(sandbox: Sandbox, program: str) -> None:
    assert not passes(program, "assert f(2) == 4\nassert f(-3) == 9", sandbox, 2.0)


def test_a_function_called_as_one_of_pythons_is_not_what_tests_compare_with(sandbox: Sandbox) -> None:
    program = "def sorted(x): return 1\ndef set(x): return 1\ndef f(x): return [7]"
    assert not passes(program, "assert sorted(f(2)) == sorted([4]) or set(f(2)) == set([4])", sandbox, 10.0)


def test_a_program_cannot_look_into_its_tests(sandbox: Sandbox) -> None:
    program = (
        "import ctypes\n"
        "def f(x):\n"
        "    attach = ctypes.CDLL(None, use_errno=True).ptrace\n"
        "    return [pid for pid in range(1, 4) if attach(16, pid, 0, 0) == 0]"
    )
    assert passes(program, "assert f(1) == []", sandbox, 10.0)
