"""Every key with every nonsense value: taken with a sound meaning, or refused in one line that names the key."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import math
import sys
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from faults.case import Case
from faults.tools import ROOT, command
from maxlm.config import ChosenModel, HasDim, RunConfig, SamplingConfig, StepRange, UserError, serialize
from maxlm.config.cli import load_config, parse, parse_run
from maxlm.data.__main__ import Prepare, TokenizerReport, Train
from maxlm.evaluate import EvaluateOptions
from maxlm.generate import GenerateOptions
from maxlm.inspect import InspectOptions
from maxlm.launching.destinations import DESTINATIONS

WORDS = (
    "", " ", "nan", "inf", "-inf", "1e400", "-1", "0", "1.5", "1e3", "2147483648", "18446744073709551616", "9" * 5000,
    "0x10", "1_0", "٣", "True", "true", "None", "none", "[]", "()", "{}", "~", "~/x", "~nobody/x", "a\nb", "a\0b",
    "\x1b[2J", "x" * 100_000, "\udcff", "é", "3:2", "2:3", "-1:3", "1:99999999999", "1:2:3", "float32", "--", "=", "%s",
)  # fmt: skip
"""As a command line has them."""

VALUES = (
    math.nan, math.inf, -math.inf, -1, 0, 1, 0.5, 2**31, 2**64, 10**400, 1e300, True, False, None, "", "~", "~/x",
    "a\nb", "a\0b", "x" * 100_000, "\udcff", "3", [], [1], (), (1,), ("",), ("~",), ("a\0b",), {}, set(), b"x", int,
    object(), np.float32(1), np.int64(3), np.bool_(True), np.zeros(2), Path("x"), StepRange(0, 2), len,
)  # fmt: skip
"""As Python has them."""

_KNOWN = {"accelerator": "v5e-8", "bucket": "gs://mine"}

_ONE_OF_SEVERAL: dict[type, dict[str, Any]] = {ChosenModel: {"run": "runs/x"}, HasDim: {"dim": "vocab"}}
"""Of options that are optional each, and not all of them; and of texts that not any will do for."""

SMALL = (GenerateOptions, EvaluateOptions, InspectOptions, Prepare, Train, TokenizerReport, *DESTINATIONS.values())


def alternatives(hint: Any) -> list[Any]:
    union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return list(typing.get_args(hint)) if union else [hint]


def classes(cls: type, seen: set[type]) -> Iterator[type]:
    """The class and all classes that its fields may have."""
    if cls in seen:
        return
    seen.add(cls)
    yield cls
    for hint in typing.get_type_hints(cls).values():
        for kind in alternatives(hint):
            for inner in alternatives(typing.get_args(kind)[0]) if typing.get_origin(kind) is tuple else [kind]:
                if dataclasses.is_dataclass(inner):
                    yield from classes(typing.cast(type, inner), seen)


def some(hint: Any) -> Any:
    """A value that fits."""
    kind = alternatives(hint)[0]
    if typing.get_origin(kind) is tuple:
        return (some(typing.get_args(kind)[0]),)
    if kind is StepRange:
        return StepRange(0, 2)
    if dataclasses.is_dataclass(kind):
        return an(typing.cast(type, kind))
    return {int: 2, float: 0.5, str: "x", bool: True}.get(kind) or next(iter(kind))


def an(cls: type) -> Any:
    """An object of the class."""
    hints = typing.get_type_hints(cls)
    fields = [one for one in dataclasses.fields(cls) if one.default is one.default_factory]  # both missing
    needed = {one.name: _KNOWN.get(one.name) or some(hints[one.name]) for one in fields}
    return cls(**needed | _ONE_OF_SEVERAL.get(cls, {}))


def refusal(attempt: Callable[[], Any], key: str, value: str) -> Any:
    """What the attempt gives; None if it is refused as promised."""
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            return attempt()
    except UserError as error:
        message = str(error)
        assert "\n" not in message and len(message) < 400, f"{key} = {value}: {message[:300]!r}"
        assert key.rpartition(".")[2] in message, f"{key} = {value}: {message!r} does not name the key"
    except SystemExit as stop:
        raise AssertionError(f"{key} = {value}: exit {stop.code}") from stop
    except BaseException as error:
        raise AssertionError(f"{key} = {value}: {type(error).__name__}: {error}"[:300]) from error
    return None


def is_sound(made: Any, key: str, value: str) -> None:
    """What was taken may be saved and read again, and is then the same."""
    again = serialize.from_dict(type(made), json.loads(json.dumps(serialize.to_dict(made))))
    assert again == made, f"{key} = {value}: saved and read again it is another"


def try_all(pairs: Iterator[tuple[str, str, Callable[[], Any]]]) -> str:
    n, taken, broken = 0, 0, list[str]()
    for key, value, attempt in pairs:
        n += 1
        try:
            made = refusal(attempt, key, value)
            if made is not None:
                taken += 1
                is_sound(made, key, value)
        except AssertionError as error:
            broken.append(str(error))
    assert not broken, f"{len(broken)} of {n}:\n" + "\n".join(broken[:40])
    return f"{n} tried, {taken} taken"


def constructed() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    seen: set[type] = set()
    for cls in (one for root in (RunConfig, SamplingConfig, *SMALL) for one in classes(root, seen)):
        base = None if cls is StepRange else an(cls)
        for one in dataclasses.fields(cls):
            for value in VALUES:
                if cls is StepRange:
                    attempt: Callable[[], Any] = lambda name=one.name, value=value: StepRange(
                        **{"first": 0, "last": 2, name: value}
                    )
                else:
                    attempt = lambda base=base, name=one.name, value=value: dataclasses.replace(base, **{name: value})
                yield f"{cls.__name__}.{one.name}", f"{value!r:.60}", attempt


def on_a_command_line() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """Of each class by itself, which is what a whole config is parsed of."""
    seen: set[type] = set()
    for root in (RunConfig, SamplingConfig, *SMALL):
        for cls in classes(root, seen):
            if cls is StepRange or cls in (RunConfig,):
                continue
            base = an(cls)
            for one in dataclasses.fields(cls):
                if dataclasses.is_dataclass(getattr(base, one.name)) or isinstance(getattr(base, one.name), tuple):
                    continue
                for word in WORDS:
                    words = [f"--{one.name}={word}"]
                    attempt = lambda cls=cls, base=base, words=words: parse(
                        cls, words, prog="x", description="", default=base
                    )
                    yield f"{cls.__name__}.{one.name}", f"{word!r:.60}", attempt


def of_a_run() -> Iterator[tuple[str, str, Callable[[], Any]]]:
    """The whole command line and `load_config`, some values for each key."""
    for i, key in enumerate(serialize.flatten(load_config("tiny_moe"))):
        for k in range(2):
            word = WORDS[(2 * i + k) % len(WORDS)]
            argv = ["--config", "tiny_moe", f"--{key}={word}"]
            yield key, f"{word!r:.60}", lambda argv=argv: parse_run(argv, prog="x", description="").config
            value = VALUES[(2 * i + k) % len(VALUES)]
            yield key, f"{value!r:.60}", lambda key=key, value=value: load_config("tiny_moe", {key: value})


TABLES = {
    "every key with every nonsense in Python": constructed,
    "every key with every nonsense on a command line": on_a_command_line,
    "keys of a whole run with nonsense": of_a_run,
}


def in_a_process(name: str) -> str:
    """Standard output and error, which each attempt looks at, are a whole process's."""
    done = command("faults.values", name, environment={"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"}, timeout=1800)
    assert done.code == 0, done.out + done.err
    return done.out


def cases() -> Iterator[Case]:
    for name in TABLES:
        yield Case(
            name=f"values: {name}",
            expected="taken with a sound meaning, or one line with the key",
            check=lambda folder, name=name: in_a_process(name),
            short=name.endswith("in Python"),
        )


if __name__ == "__main__":
    try:
        print(try_all(TABLES[sys.argv[1]]()))
    except AssertionError as error:
        sys.exit(str(error))
