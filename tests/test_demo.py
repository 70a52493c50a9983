"""What the demo's benchmark calls Python."""

from __future__ import annotations

import pytest

from benchmarks.demo import complete, parses

BODY = "def f(a):\n    return a\n"


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        (BODY + "x = 1", BODY),
        (BODY + "if a:\n", BODY),
        (BODY + "if a:  # why\n    # nothing\n", BODY),
        (BODY + "x = [\n    1,\n    2", BODY),
        (BODY + 'x = """one\ntwo\nthr', BODY),
        (BODY + "x = {1:\n    2}\ny", BODY + "x = {1:\n    2}\n"),
        ("def f(a):\n    ret", ""),
    ],
)
def test_a_text_ends_with_its_last_complete_statement(text: str, kept: str) -> None:
    assert complete(text) == kept


@pytest.mark.parametrize(
    ("text", "good"),
    [
        (BODY, True),
        ("class A:\n    b = 1\n    def", True),
        ("x = 1\ny = 2\n", False),
        ("def f(a):\n    ret", False),
        ("def f(a:\n    return a)\n" + BODY, False),
        (BODY + "   x = 1\n" + BODY, False),
        ("def f(a)\n    return a\n", False),
        (BODY + "x = )\n" + BODY, False),
    ],
)
def test_what_parses_is_a_function_or_a_class_without_a_mistake_before_its_end(text: str, good: bool) -> None:
    assert parses(text) is good
