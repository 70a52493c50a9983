"""What a field of a config takes: its annotation says it, one checker reads it whenever an object is made.

    @config("train.", changes=Changes.TRAINING)
    class TrainConfig:
        steps: Positive[int]
        \"\"\"Optimizer steps in all.\"\"\"
        log_every: Annotated[Positive[int], Changes.NOTHING] = 10
        \"\"\"Steps between rows.\"\"\"

Types are those of the annotation, exactly: a float takes ints too, nothing else is converted. Ints fit 32 bits and
floats are finite in float32, as that is what devices hold, unless a `Range` says otherwise. `--help` shows the text
below a field, and its range. `Changes` says what another value does to a run that goes on.
"""

from __future__ import annotations

import ast
import dataclasses
import enum
import functools
import inspect
import itertools
import os
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, TypeVar, dataclass_transform

from maxlm.config.errors import UserError

T = TypeVar("T")

INT_MAX = 2**31 - 1
FLOAT_MAX = float.fromhex("0x1.fffffep+127")
"""The largest of float32."""


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that a field takes: all that satisfy every bound which is not None, and those of `also`."""

    ge: float | None = None
    gt: float | None = None
    le: float | None = None
    lt: float | None = None
    also: tuple[int, ...] = ()
    note: str = ""
    """What a special value means, told with every mistake."""

    def problem(self, value: float) -> str | None:
        """What the value must do or be, and does not; None: nothing."""
        inside = (
            (self.ge is None or value >= self.ge)
            and (self.gt is None or value > self.gt)
            and (self.le is None or value <= self.le)
            and (self.lt is None or value < self.lt)
        )  # not so for NaN
        return None if inside or value in self.also else f"be {self}"

    @property
    def bounded(self) -> bool:
        """Whether it has a largest number."""
        return self.le is not None or self.lt is not None

    def __str__(self) -> str:
        low, high = self.ge if self.gt is None else self.gt, self.le if self.lt is None else self.lt
        if low is not None and high is not None:
            words = f"in {'[' if self.gt is None else '('}{low}, {high}{']' if self.lt is None else ')'}"
        elif self.gt == 0:
            words = "positive"
        elif low is not None:
            words = f"at least {low}" if self.gt is None else f"more than {low}"
        else:
            words = f"at most {high}" if self.lt is None else f"less than {high}"
        return ", or ".join([words, *map(str, self.also)])


@dataclass(frozen=True, kw_only=True)
class Filled:
    """A string or tuple that is not empty."""

    note: str = ""

    def problem(self, value: Any) -> str | None:
        """What the value must do or be, and does not; None: nothing."""
        return None if value else "not be empty"


@dataclass(frozen=True, kw_only=True)
class FileName(Filled):
    """A file or folder. `~` is refused: it would be a folder of that name here, and another folder on the machine to
    which the config is sent."""

    def problem(self, value: Any) -> str | None:
        """What the value must do or be, and does not; None: nothing."""
        if value.startswith("~"):
            home = os.path.expanduser(value)
            meant = f"./{value}" if home == value else home
            return f"be a path without ~, which only a shell knows; use {meant}"
        return super().problem(value)


Rule = Range | Filled


class Changes(enum.Enum):
    """What another value of a field changes of a run that goes on. A class has one for its fields, a field may
    have its own as a mark of its annotation; what is done about it is in `config/changes.py`."""

    NOTHING = enum.auto()
    """Nothing that is trained depends on it: paths, rhythms, limits."""
    TRAINING = enum.auto()
    """The rest of the training is another: told, and the earlier config is kept."""
    IDENTITY = enum.auto()
    """Another model, state or order of the data: refused, unless it is allowed by name."""


Positive = Annotated[T, Range(gt=0)]
NotNegative = Annotated[T, Range(ge=0)]
Fraction = Annotated[float, Range(ge=0, le=1)]
BelowOne = Annotated[float, Range(ge=0, lt=1)]
Seed = Annotated[int, Range(ge=0, lt=2**32)]
NotEmpty = Annotated[T, Filled()]
PathName = Annotated[str, FileName()]


@dataclass_transform(frozen_default=True, kw_only_default=True, field_specifiers=(field,))
def config(prefix: str, *, changes: Changes | None = None, kw_only: bool = True) -> Callable[[type[T]], type[T]]:
    """A frozen dataclass whose values are checked, before its own `__post_init__`.

    Args:
        prefix: what stands before a field's name in messages: `train.`, or `--` for options of a small command.
        changes: of every field without a mark of its own; None: the class is no part of a RunConfig.
        kw_only: as of `dataclass`.
    """

    def decorate(cls: type[T]) -> type[T]:
        own = getattr(cls, "__post_init__", None)  # also a parent's

        def check_then_own(self: T, *init_only: Any) -> None:
            check(self)
            if own is not None:
                own(self, *init_only)

        setattr(cls, "__post_init__", check_then_own)  # noqa: B010
        setattr(cls, "__config_prefix__", prefix)  # noqa: B010
        setattr(cls, "__config_changes__", changes)  # noqa: B010
        return dataclass(frozen=True, kw_only=kw_only)(cls)

    return decorate


@functools.cache
def changes_of(cls: Any) -> dict[str, Changes | None]:
    """Field of a `config` class -> what another value of it means; for a group of fields: another class, another number
    of entries, or None."""
    hints = typing.get_type_hints(cls, include_extras=True)
    return {
        one.name: next(
            (mark for mark in getattr(hints[one.name], "__metadata__", ()) if isinstance(mark, Changes)),
            cls.__config_changes__,
        )
        for one in dataclasses.fields(cls)
    }


def is_config(cls: Any) -> bool:
    """Whether `config` made this class."""
    return hasattr(cls, "__config_prefix__")


def check(values: Any) -> None:
    """Compare every field of an object of a `config` class with its annotation.

    Raises:
        UserError: one does not fit.
    """
    prefix = values.__config_prefix__
    cls: type = type(values)
    for one in field_kinds(cls):
        value = getattr(values, one.name)
        if type(value) not in one.plain:  # a search makes many configs
            _require(prefix, one.name, value, one.kinds, one.default)


def require(key: str, value: Any, annotation: Any) -> None:
    """Compare one value, such as a function's argument, with an annotation.

    Raises:
        UserError: it does not fit.
    """
    _require("", key, value, _kinds(annotation), None)


class Kind(typing.NamedTuple):
    """One alternative of an annotation."""

    cls: type
    rule: Rule | None
    items: tuple[Kind, ...]
    """Of a tuple."""

    def holds(self, value: Any) -> bool:
        """Whether the value is of this type, whatever its size."""
        if isinstance(value, bool):
            return self.cls in (bool, object)
        return type(value) is self.cls or isinstance(value, (int, float) if self.cls is float else self.cls)

    def problem(self, value: Any) -> str | None:
        """What a value of this type must do or be, and does not; None: nothing."""
        if self.rule is not None and (problem := self.rule.problem(value)):
            return problem
        bounded = isinstance(self.rule, Range) and self.rule.bounded
        if self.cls is int and not bounded and abs(value) > INT_MAX:
            return f"be at most {INT_MAX}, as devices hold it in 32 bits"
        if self.cls is float and not abs(value) <= FLOAT_MAX:  # so for NaN too
            return "be finite, in float32"
        return None

    def __str__(self) -> str:
        match self.cls:
            case types.NoneType:
                return "None"
            case _ if self.cls in _WORDS:
                return _WORDS[self.cls]
            case _ if issubclass(self.cls, enum.Enum):
                return _either(str(member) for member in self.cls)
            case _:
                return f"{self.cls.__name__}(...)"


class FieldKinds(typing.NamedTuple):
    """A field and what it takes."""

    name: str
    kinds: tuple[Kind, ...]
    plain: frozenset[type]
    """Types of which every value will do."""
    default: float | None
    """A number that works; None: there is none."""


_WORDS: dict[type, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    tuple: "a tuple",
}


@functools.cache
def field_kinds(cls: type) -> tuple[FieldKinds, ...]:
    """The fields of a `config` class with what they take."""
    hints = typing.get_type_hints(cls, include_extras=True)
    found = []
    for one in dataclasses.fields(cls):
        kinds = _kinds(hints[one.name])
        plain = frozenset(kind.cls for kind in kinds if kind.rule is None and kind.cls not in (int, float, tuple))
        default = None if isinstance(one.default, bool) else one.default
        found.append(FieldKinds(one.name, kinds, plain, default if isinstance(default, int | float) else None))
    return tuple(found)


def _kinds(annotation: Any, rule: Rule | None = None) -> tuple[Kind, ...]:
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        rules = [mark for mark in annotation.__metadata__ if isinstance(mark, Rule)]
        return _kinds(args[0], rules[0] if rules else rule)
    if origin in (typing.Union, types.UnionType):
        return tuple(kind for arg in args for kind in _kinds(arg, rule))
    if origin is tuple:
        item, rest = args
        assert rest is ..., f"{annotation}: tuples of configs have any length"
        return (Kind(tuple, rule, _kinds(item)),)
    return (Kind(object if annotation is Any else annotation, None if annotation is types.NoneType else rule, ()),)


def _require(prefix: str, name: str, value: Any, kinds: tuple[Kind, ...], default: float | None) -> None:
    fitting = next((kind for kind in kinds if kind.holds(value)), None)
    if fitting is None:
        must, advice = f"be {_either(map(str, kinds))}", _advice(value, kinds)
    else:
        for i, item in enumerate(value if fitting.items else ()):
            _require(prefix, f"{name}.{i}", item, fitting.items, None)
        problem = fitting.problem(value)
        if problem is None:
            return
        must, advice = problem, "" if fitting.rule is None else fitting.rule.note
    if not advice and default is not None:
        advice = f"use for example {default}"
    raise UserError(f"{prefix}{name} = {shown(value)} must {must}{advice and f'; {advice}'}")


def _either(words: Iterable[str]) -> str:
    *others, last = words
    return f"{', '.join(others)} or {last}" if others else last


def shown(value: Any) -> str:
    """In a word or two."""
    if isinstance(value, type):
        return value.__name__
    if dataclasses.is_dataclass(value):
        return f"{type(value).__name__}(...)"
    if isinstance(value, enum.Enum):
        return str(value)
    if isinstance(value, int) and value.bit_length() > 128:  # Python writes no more than 4300 digits
        return f"{'-' if value < 0 else ''}2^{value.bit_length() - 1}..."
    text = " ".join((repr(value) if isinstance(value, int | float) else reprlib.repr(value)).split())
    return text if len(text) <= 60 else f"{text[:40]}..."


def _advice(value: Any, kinds: tuple[Kind, ...]) -> str:
    """What was probably meant by a value of the wrong type."""
    for kind in kinds:
        if kind.cls is tuple and isinstance(value, list):
            return "write (a, b) or (a,) instead of [a, b]"
        if kind.cls is tuple and any(item.holds(value) for item in kind.items):
            return f"write ({shown(value)},)"
        if kind.cls is value:
            return f"write {value.__name__}(...)"
        if kind.cls is int and isinstance(value, float) and value.is_integer() and abs(value) <= INT_MAX:
            return f"use {int(value)}"
        if kind.cls in (int, float) and hasattr(value, "dtype"):
            return f"write {kind.cls.__name__}(...) around it"
        if kind.cls in (int, float) and isinstance(value, str):
            return "write it without quotes" if _is_number(value) else ""
        if kind.cls is str and isinstance(value, os.PathLike):
            return f"use {os.fspath(value)!r}"
        if issubclass(kind.cls, enum.Enum) and isinstance(value, str):
            return f"use {kind.cls(value)}" if value in [member.value for member in kind.cls] else ""
    return ""


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


# What --help shows


def text_of(cls: type, name: str) -> str:
    """The string below a field in its class; empty if there is none."""
    classes = [one for one in cls.__mro__ if name in vars(one).get("__annotations__", {})]
    return _texts(classes[0].__module__).get((classes[0].__qualname__, name), "") if classes else ""


def help_of(cls: type, name: str) -> str:
    """The text of a field and its range."""
    rules = {kind.rule: None for one in field_kinds(cls) if one.name == name for kind in one.kinds}
    return " ".join([text_of(cls, name), *(f"({rule})" for rule in rules if isinstance(rule, Range))])


@functools.cache
def _texts(module: str) -> dict[tuple[str, str], str]:
    """(class, field) -> the string below the field, of every class of a module."""
    found = {}
    for node in ast.parse(inspect.getsource(sys.modules[module])).body:
        if isinstance(node, ast.ClassDef):
            for above, below in itertools.pairwise(node.body):
                match above, below:
                    case (
                        ast.AnnAssign(target=ast.Name(id=name)),
                        ast.Expr(value=ast.Constant(value=str(text))),
                    ):
                        found[node.name, name] = " ".join(text.split())
    return found
