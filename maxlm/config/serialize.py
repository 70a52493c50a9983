"""Configs as plain JSON values and back.

Where a field is a union, its object carries `"kind"`, the class's name; only the classes of that union are accepted,
so a file can never name anything else to be built. Words of an enum that are in the union are strings. A run config
carries the number of its format; older ones are brought up to date as they are read.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import json
import operator
import types
import typing
from pathlib import Path
from typing import Any, TypeVar

import cattrs
from cattrs.strategies import configure_tagged_union
from cattrs.v import format_exception

from maxlm.config.earlier import FORMAT, newest_format
from maxlm.config.errors import UserError
from maxlm.config.json_file import read_object
from maxlm.config.run import RunConfig, StepRange

T = TypeVar("T")


def to_dict(config: Any) -> dict[str, Any]:
    """The config as dicts, lists, strings, numbers and None."""
    values = _converter(type(config)).unstructure(config, unstructure_as=type(config))
    return {"format": FORMAT} | values if isinstance(config, RunConfig) else values


def from_dict(cls: type[T], values: dict[str, Any]) -> T:
    """The config of class `cls` that `to_dict` wrote.

    Raises:
        UserError: a key is unknown or missing, a value does not fit, or the format is not known.
    """
    if cls is RunConfig:
        values = newest_format(values)
    try:
        return _converter(cls).structure(values, cls)
    except cattrs.BaseValidationError as error:
        reasons = "; ".join(cattrs.transform_error(error, format_exception=_reason))
        raise UserError(f"saved config does not fit this version of maxlm: {reasons}") from error


def save(config: Any, path: Path) -> None:
    """Write the config as indented JSON."""
    path.write_text(json.dumps(to_dict(config), indent=2) + "\n")


def load(cls: type[T], path: Path) -> T:
    """Read what `save` wrote.

    Raises:
        UserError: the file is missing, `read_object` refuses it, or it does not fit `cls`.
    """
    hint = " (is this a run folder?)" if cls is RunConfig else ""
    values = read_object(path, f"the object of a saved {cls.__name__}{hint}")
    if cls is RunConfig and "model_type" in values:
        raise UserError(
            f"{path}: is of a published model, must be of a run; name its folder by --hf or hf:, or make a run of it "
            "with python -m maxlm.convert"
        )
    try:
        return from_dict(cls, values)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """The config's leaves by dotted key, as on the command line. Enums appear as their values."""
    leaves: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        _flatten_value(getattr(config, field.name), prefix + field.name, leaves)
    return leaves


def _flatten_value(value: Any, key: str, leaves: dict[str, Any]) -> None:
    match value:
        case StepRange():
            leaves[key] = str(value)
        case enum.Enum():
            leaves[key] = value.value
        case tuple() if any(dataclasses.is_dataclass(item) for item in value):
            for i, item in enumerate(value):
                _flatten_value(item, f"{key}.{i}", leaves)
        case _ if dataclasses.is_dataclass(value):
            leaves[key] = type(value).__name__
            leaves.update(flatten(value, key + "."))
        case _:
            leaves[key] = value


def _reason(error: BaseException, expected: type | None) -> str:
    """Why one value was refused; cattrs adds where it stands."""
    match error:
        case KeyError() if expected in _unions(expected, set()):
            kinds = [kind.__name__ for kind in typing.get_args(expected)]
            return f"kind is missing or {error.args[0]!r}; must be one of {', '.join(kinds)}"
        case UserError() | ValueError():
            return str(error)
        case _:
            return format_exception(error, expected)


def _converter(cls: type) -> cattrs.Converter:
    """A converter that refuses unknown keys and knows the unions below `cls`."""
    converter = cattrs.Converter(forbid_extra_keys=True)
    converter.register_unstructure_hook(StepRange, str)
    converter.register_structure_hook(StepRange, lambda value, _: StepRange.parse(str(value)))
    for plain in (bool, int, str):  # as they are, for the classes to judge: bool("False") is True
        converter.register_structure_hook(plain, lambda value, _: value)
    converter.register_structure_hook(float, lambda value, _: float(value) if type(value) is int else value)
    for union in _unions(cls, set()):
        _register(converter, union)
    return converter


def _register(converter: cattrs.Converter, union: Any) -> None:
    """Let the converter tell members of the union apart, and from None where that is one."""
    if _words(union):
        return _register_words(converter, union)
    some = functools.reduce(operator.or_, (kind for kind in typing.get_args(union) if kind is not types.NoneType))
    configure_tagged_union(some, converter, tag_name="kind")
    if some != union:
        converter.register_unstructure_hook(
            union, lambda value: None if value is None else converter.unstructure(value, unstructure_as=some)
        )
        converter.register_structure_hook(
            union, lambda value, _: None if value is None else converter.structure(value, some)
        )


def _register_words(converter: cattrs.Converter, union: Any) -> None:
    """As above, of an enum and classes; there is no None."""
    (words,) = _words(union)
    classes = {kind.__name__: kind for kind in typing.get_args(union) if kind is not words}

    def write(value: Any) -> Any:
        if isinstance(value, words):
            return value.value
        return {"kind": type(value).__name__} | converter.unstructure(value, unstructure_as=type(value))

    def read(value: Any, _: Any) -> Any:
        if isinstance(value, dict) and value.get("kind") in classes:
            rest = {key: one for key, one in value.items() if key != "kind"}
            return converter.structure(rest, classes[value["kind"]])
        known = [word.value for word in words]
        if value in known:
            return words(value)
        raise UserError(f"{value!r} must be one of {', '.join(known)}, or an object of kind {' or '.join(classes)}")

    converter.register_unstructure_hook(union, write)
    converter.register_structure_hook(union, read)


def _words(union: Any) -> list[type[enum.Enum]]:
    """The enums of a union."""
    return [kind for kind in typing.get_args(union) if isinstance(kind, type) and issubclass(kind, enum.Enum)]


def _unions(annotation: Any, seen: set[Any]) -> list[Any]:
    """Every union of two or more dataclasses, or of one and an enum, that is reachable from `annotation`, the inner
    ones first."""
    if annotation in seen:
        return []
    seen.add(annotation)
    args = typing.get_args(annotation)
    found = [union for arg in args for union in _unions(arg, seen)]
    classes = [arg for arg in args if dataclasses.is_dataclass(arg)]
    if isinstance(annotation, types.UnionType) and classes and len(classes) + len(_words(annotation)) > 1:
        found.append(annotation)
    if dataclasses.is_dataclass(annotation):
        found += [union for hint in typing.get_type_hints(annotation).values() for union in _unions(hint, seen)]
    return found
