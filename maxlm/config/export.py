"""A config as a Python file that `--config` takes: every value that differs from its class's default, and no imports
but `maxlm.config`."""

from __future__ import annotations

import dataclasses
import enum
import json
import math

from maxlm.config.run import RunConfig

WIDTH = 120


def python_file(config: RunConfig, docstring: str) -> str:
    """Text of a file whose `get_config()` returns a config equal to `config`.

    Args:
        config: of any kind; what it says is written out, nothing is taken from another file.
        docstring: what stands at the top of the file; without quotes and backslashes.
    """
    names: set[str] = set()
    value = _written(config, 4, len("return "), names)
    imports = "".join(f"    {name},\n" for name in sorted(names))
    return (
        f'"""{docstring.strip()}\n"""\n\nfrom maxlm.config import (\n{imports})\n\n\n'
        f"def get_config() -> RunConfig:\n    return {value}\n"
    )


def _written(value: object, indent: int, before: int, names: set[str]) -> str:
    """The value as Python: on one line where it fits beside what stands before it, else one item a line.

    Classes that it uses are added to `names`.
    """
    match value:
        case enum.Enum():
            names.add(type(value).__name__)
            return f"{type(value).__name__}.{value.name}"
        case tuple():
            items = [("", item) for item in value]
            opening, closing = "(", ")"
        case _ if dataclasses.is_dataclass(value) and not isinstance(value, type):
            names.add(type(value).__name__)
            items = [(_keyword(value, field), getattr(value, field.name)) for field in _told(value)]
            opening, closing = f"{type(value).__name__}(", ")"
        case str():
            return json.dumps(value, ensure_ascii=False)
        case float() if not math.isfinite(value):
            return f'float("{value}")'
        case _:
            return repr(value)
    written = [name + _written(item, indent + 4, len(name), names) for name, item in items]
    only_one = "," if isinstance(value, tuple) and len(value) == 1 else ""
    line = f"{opening}{', '.join(written)}{only_one}{closing}"
    if "\n" not in line and indent + before + len(line) < WIDTH:
        return line
    lines = "".join(f"{' ' * (indent + 4)}{item},\n" for item in written)
    return f"{opening}\n{lines}{' ' * indent}{closing}"


def _keyword(value: object, field: dataclasses.Field[object]) -> str:
    return f"{field.name}=" if field.kw_only else ""


def _told(value: object) -> list[dataclasses.Field[object]]:
    """The fields that are not what the class would have anyway."""
    assert dataclasses.is_dataclass(value)
    return [field for field in dataclasses.fields(value) if getattr(value, field.name) != _default(field)]


def _default(field: dataclasses.Field[object]) -> object:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return field.default  # MISSING, which equals nothing else, where there is none
