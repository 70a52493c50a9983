"""Whether a value is what a JSON schema allows: the keywords of draft 2020-12 that say something of data.

A keyword that is not known is refused, where other readers pass over it: a schema that silently checks less would be a
reward that is easier to get than it looks.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Callable, Mapping
from fractions import Fraction
from typing import Any

from maxlm.config import UserError
from maxlm.config.json_file import MAX_DEPTH, MAX_DIGITS

_NOTES = frozenset(
    {"$schema", "$id", "$comment", "$anchor", "title", "description", "default", "examples", "deprecated"}
    | {"readOnly", "writeOnly", "format", "contentEncoding", "contentMediaType"}
)
"""Keywords that allow or forbid nothing."""
_TOO_DEEP = f"nested more than {MAX_DEPTH} deep"


def json_value(text: str) -> Any:
    """The one value in JSON that a text is, with blanks around it.

    Raises:
        ValueError: it is not JSON, a key stands twice in an object, a number is infinite, none or longer than 300
            digits, or it is nested more than 64 deep.
    """
    try:
        value = json.loads(
            text, parse_constant=_refused, parse_float=_float, parse_int=_integer, object_pairs_hook=_object
        )
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    rest = [(value, 0)]
    while rest:
        inner, depth = rest.pop()
        if depth > MAX_DEPTH:
            raise ValueError(_TOO_DEEP)
        members = inner.values() if isinstance(inner, dict) else inner if isinstance(inner, list) else ()
        rest += [(one, depth + 1) for one in members]
    return value


def check_schema(schema: Any, place: str) -> None:
    """
    Raises:
        UserError: a part of it is no schema, or has a keyword that is not known here.
    """
    if isinstance(schema, bool):
        return
    if not isinstance(schema, dict):
        raise UserError(f"{place}: a schema is an object, True or False, and not {type(schema).__name__}")
    for keyword, value in schema.items():
        where = f"{place}/{keyword}"
        if keyword in _SCHEMA:
            check_schema(value, where)
        elif keyword in _SCHEMAS:
            if not isinstance(value, list) or not value:
                raise UserError(f"{where}: must be a list of schemas")
            for i, one in enumerate(value):
                check_schema(one, f"{where}/{i}")
        elif keyword in _NAMED:
            if not isinstance(value, dict):
                raise UserError(f"{where}: must be an object of schemas")
            for name, one in value.items():
                check_schema(one, f"{where}/{name}")
                if keyword == "patternProperties":
                    _check_pattern(name, where)
        elif keyword in _RULES:
            _check_rule(keyword, value, where)
        elif keyword not in _NOTES:
            near = difflib.get_close_matches(keyword, _KNOWN, n=2)
            hint = f"; did you mean {' or '.join(near)}?" if near else "; leave it out, or write it in other keywords"
            raise UserError(f"{where}: this keyword is not known here{hint}")


def _check_rule(keyword: str, value: Any, where: str) -> None:
    kinds, _ = _RULES[keyword]
    fits: bool = isinstance(value, kinds) and (bool in kinds or not isinstance(value, bool))
    if not fits:
        raise UserError(f"{where} = {json.dumps(value)[:60]} is not what this keyword takes")
    match keyword:
        case "type":
            if wrong := [one for one in _listed(value) if one not in list(_TYPES)]:
                raise UserError(f"{where} holds {wrong[0]!r}; known are {', '.join(_TYPES)}")
        case "required":
            if not all(isinstance(one, str) for one in value):
                raise UserError(f"{where}: must hold names")
        case "multipleOf":
            if not value > 0:
                raise UserError(f"{where} = {value} must be positive")
        case "pattern":
            _check_pattern(value, where)


def _check_pattern(pattern: str, where: str) -> None:
    try:
        re.compile(pattern)
    except (re.error, RecursionError, OverflowError) as error:
        raise UserError(f"{where}: {pattern!r} is no regular expression of Python ({error})") from error


class EndlessSchema(UserError):
    """A schema that asks of a value what it asks of it."""


class CheckedSchema:
    """A schema that has been checked."""

    def __init__(self, schema: Any, place: str) -> None:
        """
        Args:
            schema: as JSON has it.
            place: where it stands, for messages.

        Raises:
            UserError: as `check_schema`; or a reference leads nowhere.
        """
        try:
            check_schema(schema, place)
        except RecursionError as error:
            raise UserError(f"{place}: is {_TOO_DEEP}") from error
        self._schema, self._place = schema, place
        for reference in _references(schema):
            self._at(reference)

    def allows(self, value: Any) -> bool:
        """Whether a value of `json_value` is one of the schema's.

        Raises:
            EndlessSchema: it refers to itself without end.
        """
        try:
            return self._fits(value, self._schema)
        except RecursionError as error:
            raise EndlessSchema(f"{self._place}: refers to itself without end") from error

    def _fits(self, value: Any, schema: Any) -> bool:
        if isinstance(schema, bool):
            return schema
        for keyword, given in schema.items():
            if keyword in _RULES and not _RULES[keyword][1](value, given):
                return False
        fits = lambda one: self._fits(value, one)
        if "$ref" in schema and not fits(self._at(schema["$ref"])):
            return False
        if not all(map(fits, schema.get("allOf", ()))):
            return False
        if "anyOf" in schema and not any(map(fits, schema["anyOf"])):
            return False
        if "oneOf" in schema and sum(map(fits, schema["oneOf"])) != 1:
            return False
        if "not" in schema and fits(schema["not"]):
            return False
        if "if" in schema and not fits(schema.get("then" if fits(schema["if"]) else "else", True)):
            return False
        if isinstance(value, dict):
            return self._fits_object(value, schema)
        return self._fits_list(value, schema) if isinstance(value, list) else True

    def _fits_object(self, value: dict[str, Any], schema: Mapping[str, Any]) -> bool:
        named, patterns = schema.get("properties", {}), schema.get("patternProperties", {})
        for name, inner in value.items():
            rules = [named[name]] if name in named else []
            rules += [rule for pattern, rule in patterns.items() if re.search(pattern, name)]
            if not all(self._fits(inner, rule) for rule in rules or [schema.get("additionalProperties", True)]):
                return False
            if not self._fits(name, schema.get("propertyNames", True)):
                return False
        return True

    def _fits_list(self, value: list[Any], schema: Mapping[str, Any]) -> bool:
        first = schema.get("prefixItems", [])
        rules = [*first, *[schema.get("items", True)] * (len(value) - len(first))]
        if not all(self._fits(inner, rule) for inner, rule in zip(value, rules, strict=False)):
            return False
        if "contains" not in schema:
            return True
        found = sum(self._fits(inner, schema["contains"]) for inner in value)
        return bool(schema.get("minContains", 1) <= found <= schema.get("maxContains", math.inf))

    def _at(self, reference: str) -> Any:
        """The part that `#/a/b` names."""
        found = self._schema
        if reference != "#" and not reference.startswith("#/"):
            raise UserError(f"{self._place}: $ref {reference!r} must begin with #/, for a part of the same schema")
        for word in reference.split("/")[1:]:
            name = word.replace("~1", "/").replace("~0", "~")
            try:
                found = found[int(name)] if isinstance(found, list) else found[name]
            except (KeyError, IndexError, ValueError, TypeError):
                raise UserError(f"{self._place}: $ref {reference!r} leads nowhere") from None
        return found


def _references(schema: Any) -> list[str]:
    if isinstance(schema, dict):
        own = [schema["$ref"]] if isinstance(schema.get("$ref"), str) else []
        return own + [one for inner in schema.values() for one in _references(inner)]
    return [one for inner in schema for one in _references(inner)] if isinstance(schema, list) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


_TYPES: dict[str, Callable[[Any], bool]] = {
    "null": lambda value: value is None,
    "boolean": lambda value: isinstance(value, bool),
    "integer": lambda value: _is_number(value) and value == int(value),
    "number": _is_number,
    "string": lambda value: isinstance(value, str),
    "array": lambda value: isinstance(value, list),
    "object": lambda value: isinstance(value, dict),
}


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _same_as(value: Any) -> Any:
    """Equal for values that are equal in JSON: 1 is 1.0, and not true."""
    if isinstance(value, dict):
        return frozenset((name, _same_as(inner)) for name, inner in value.items())
    return tuple(map(_same_as, value)) if isinstance(value, list) else (isinstance(value, bool), value)


def _of(kind: Callable[[Any], bool], holds: Callable[[Any, Any], bool]) -> Callable[[Any, Any], bool]:
    """A rule that says nothing of values of other kinds."""
    return lambda value, given: not kind(value) or holds(value, given)


_text, _list, _object_kind = _TYPES["string"], _TYPES["array"], _TYPES["object"]
_COUNT: tuple[type, ...] = (int,)
_NUMBER: tuple[type, ...] = (int, float)
_RULES: dict[str, tuple[tuple[type, ...], Callable[[Any, Any], bool]]] = {
    "type": ((str, list), lambda value, given: any(_TYPES[name](value) for name in _listed(given))),
    "enum": ((list,), lambda value, given: _same_as(value) in map(_same_as, given)),
    "const": (
        (type(None), bool, int, float, str, list, dict),
        lambda value, given: _same_as(value) == _same_as(given),
    ),
    "minimum": (_NUMBER, _of(_is_number, lambda value, given: value >= given)),
    "maximum": (_NUMBER, _of(_is_number, lambda value, given: value <= given)),
    "exclusiveMinimum": (_NUMBER, _of(_is_number, lambda value, given: value > given)),
    "exclusiveMaximum": (_NUMBER, _of(_is_number, lambda value, given: value < given)),
    "multipleOf": (
        _NUMBER,
        _of(_is_number, lambda value, given: (Fraction(str(value)) / Fraction(str(given))).denominator == 1),
    ),
    "minLength": (_COUNT, _of(_text, lambda value, given: len(value) >= given)),
    "maxLength": (_COUNT, _of(_text, lambda value, given: len(value) <= given)),
    "pattern": ((str,), _of(_text, lambda value, given: re.search(given, value) is not None)),
    "minItems": (_COUNT, _of(_list, lambda value, given: len(value) >= given)),
    "maxItems": (_COUNT, _of(_list, lambda value, given: len(value) <= given)),
    "uniqueItems": (
        (bool,),
        _of(_list, lambda value, given: not given or len(set(map(_same_as, value))) == len(value)),
    ),
    "minProperties": (_COUNT, _of(_object_kind, lambda value, given: len(value) >= given)),
    "maxProperties": (_COUNT, _of(_object_kind, lambda value, given: len(value) <= given)),
    "required": ((list,), _of(_object_kind, lambda value, given: all(name in value for name in given))),
    "minContains": (_COUNT, lambda value, given: True),
    "maxContains": (_COUNT, lambda value, given: True),
    "$ref": ((str,), lambda value, given: True),
}
"""Keyword -> what it takes, and whether it allows a value. Of three only the schema around it can say."""
_SCHEMA = frozenset({"not", "if", "then", "else", "items", "contains", "additionalProperties", "propertyNames"})
_SCHEMAS = frozenset({"allOf", "anyOf", "oneOf", "prefixItems"})
_NAMED = frozenset({"properties", "patternProperties", "$defs", "definitions"})
_KNOWN = _SCHEMA | _SCHEMAS | _NAMED | _RULES.keys()


def _refused(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")


def _float(digits: str) -> float:
    value = float(digits)
    if not math.isfinite(value):
        raise ValueError("a number is too large")
    return value


def _integer(digits: str) -> int:
    if len(digits) > MAX_DIGITS:
        raise ValueError("a number is too long")
    return int(digits)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key stands twice in an object")
    return found
