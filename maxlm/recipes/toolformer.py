"""Toolformer's data (arXiv:2302.04761): a model puts calls of tools into texts; those that help it to go on stay."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

_WEIGHTS = (1 / 3, 4 / 15, 1 / 5, 2 / 15, 1 / 15)
"""Of the tokens after a call: max(0, 1 - 0.2 t), made to sum to 1 (section 2, "Filtering API Calls")."""
_BORDER = re.compile(r"(?<=\S)(?=\s)")
"""Between words: where a call may stand."""


class Model(Protocol):
    """A model as the builder sees it."""

    def log_probs(self, pairs: Sequence[tuple[str, str]]) -> list[Sequence[float]]:
        """Of a context and its continuation: the natural logarithm of each of the continuation's tokens."""

    def texts(self, prompts: Sequence[str], stop: Sequence[str], seed: int) -> list[str]:
        """A continuation of each prompt, without the first of the `stop` strings and what follows it."""


class UsefulCall(NamedTuple):
    """A call that helps."""

    place: int
    """In characters of the text."""
    said: str
    """With its result, as it stands in the text."""
    gain: float
    """By how much it makes the weighted loss of what follows smaller."""


def with_calls(text: str, calls: Sequence[UsefulCall]) -> str:
    """The text with the calls in it."""
    for call in sorted(calls, key=lambda call: -call.place):
        text = f"{text[: call.place]} {call.said}{text[call.place :]}"
    return text


def useful_calls(
    text: str,
    model: Model,
    tools: Mapping[str, Callable[[str], str | None]],
    prompt: str,
    *,
    places: int = 5,
    samples: int = 5,
    sampling_threshold: float = 0.05,
    filter_threshold: float = 1.0,
    seed: int = 0,
) -> list[UsefulCall]:
    """Calls for a text, at most one a place, in the order of their places.

    A call may stand between words, at the `places` where the model, after `prompt`, most probably begins one with
    " [", if that is at least `sampling_threshold` probable. There it writes `samples` calls; those of a known tool that
    answers are carried out. With L(z) the weighted loss of what follows the place, after the prefix z before the whole
    text, a call c with result r stays if min(L(), L([c])) - L([c -> r]) is at least `filter_threshold`; of several at a
    place the one that gains most.

    Args:
        text: of a document.
        model: that is to learn.
        tools: by name.
        prompt: examples of texts with calls; `{text}` in it is the text, after which the same with calls begins.
        places: of calls, tau_s's k in the paper.
        samples: of calls at a place, m in the paper.
        sampling_threshold: tau_s.
        filter_threshold: tau_f.
        seed: of the model's drawing.
    """
    asked = prompt.replace("{text}", text)
    borders = [found.start() for found in _BORDER.finditer(text)]
    begins = model.log_probs([(asked + text[:place], " [") for place in borders])
    likely = [(math.fsum(found), place) for found, place in zip(begins, borders, strict=True)]
    likely = [one for one in likely if one[0] >= math.log(sampling_threshold)]
    chosen = sorted(place for _, place in sorted(likely, key=lambda one: (-one[0], one[1]))[:places])
    prompts = [f"{asked}{text[:place]} [" for place in chosen for _ in range(samples)]
    written = model.texts(prompts, ["]", "->"], seed) if prompts else []
    found: dict[int, UsefulCall] = {}
    tried = set[tuple[int, str]]()
    for n, said in enumerate(written):
        place, call = chosen[n // samples], said.strip()
        result = None if (place, call) in tried else _result(call, tools)
        tried.add((place, call))
        if result is None:
            continue
        told = f"[{call} -> {result}]"
        gain = _gain(model, text, place, f"[{call}]", told)
        if gain >= filter_threshold and (place not in found or gain > found[place].gain):
            found[place] = UsefulCall(place, told, gain)
    return [found[place] for place in sorted(found)]


def weighted_loss(log_probs: Sequence[float]) -> float:
    """Of the tokens after a place: the nearer, the heavier; five of them count."""
    return -math.fsum(weight * one for weight, one in zip(_WEIGHTS, log_probs, strict=False))


def _gain(model: Model, text: str, place: int, bare: str, told: str) -> float:
    prefixes = ("", f"{bare} ", f"{told} ")
    nothing, without, with_result = map(
        weighted_loss, model.log_probs([(prefix + text[:place], text[place:]) for prefix in prefixes])
    )
    return min(nothing, without) - with_result


def _result(call: str, tools: Mapping[str, Callable[[str], str | None]]) -> str | None:
    named = re.fullmatch(r"(\w+)\((.*)\)", call, re.DOTALL)
    if named is None or named[1] not in tools:
        return None
    result = tools[named[1]](named[2])
    return None if result is None or not result.strip() or "]" in result else result.strip()


_SIGNS: dict[str, Callable[[float, float], float]] = {
    "+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv,
}  # fmt: skip
_TOKEN = re.compile(r"\s*(?:(\d+(?:\.\d+)?)|([-+*/()]))")
_DEEPEST = 50


def calculator(argument: str) -> str | None:
    """Numbers with + - * / and brackets, rounded to two places as in the paper; None: it is something else."""
    tokens, at = list[str](), 0
    argument = argument.strip()
    while at < len(argument):
        if (found := _TOKEN.match(argument, at)) is None:
            return None
        tokens.append(found[1] or found[2])
        at = found.end()
    try:
        value = _sum(_Tokens(tokens), 0)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return f"{value:.2f}".rstrip("0").rstrip(".") if math.isfinite(value) else None


class _Tokens:
    """Read one after the other."""

    def __init__(self, tokens: list[str]) -> None:
        self._left: Iterator[str] = iter([*tokens, ""])
        self.next = next(self._left)

    def take(self) -> str:
        """The next one; empty at the end."""
        taken, self.next = self.next, next(self._left, "")
        return taken


def _sum(tokens: _Tokens, depth: int) -> float:
    value = _product(tokens, depth)
    while tokens.next in ("+", "-"):
        value = _SIGNS[tokens.take()](value, _product(tokens, depth))
    if tokens.next and not (depth and tokens.next == ")"):
        raise ValueError("not a sum")
    return value


def _product(tokens: _Tokens, depth: int) -> float:
    value = _factor(tokens, depth)
    while tokens.next in ("*", "/"):
        value = _SIGNS[tokens.take()](value, _factor(tokens, depth))
    return value


def _factor(tokens: _Tokens, depth: int) -> float:
    taken = tokens.take()
    if depth > _DEEPEST:
        raise ValueError("too deep")
    if taken == "-":
        return -_factor(tokens, depth + 1)
    if taken == "(":
        value = _sum(tokens, depth + 1)
        if tokens.take() != ")":
            raise ValueError("an open bracket")
        return value
    return float(taken)
