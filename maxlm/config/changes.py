"""A run that goes on with another config than its checkpoint was trained with: what is told, and what is refused."""

from __future__ import annotations

import dataclasses
import difflib
import enum
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from maxlm.config.errors import UserError
from maxlm.config.fields import Changes, changes_of, is_config
from maxlm.config.run import RunConfig, StepRange
from maxlm.config.serialize import flatten

DATA_ORDER = ("data", "train.batch_size", "train.seq_len", "train.phases")
"""Keys and groups that decide which tokens a step reads; `--allow_change data` also lets other contents in."""


class Changed(NamedTuple):
    """A key with two values."""

    key: str
    old: str
    new: str
    """Both as a person reads them."""
    change: Changes

    def __str__(self) -> str:
        return f"{self.key}: {self.old} -> {self.new}"

    def within(self, keys: Sequence[str]) -> bool:
        """Whether it is one of these, or in one of these groups."""
        return any(self.key == key or self.key.startswith(f"{key}.") for key in keys)


def changes(old: Any, new: Any, prefix: str = "") -> Iterator[Changed]:
    """Every difference of two configs of the same class, key by key; of a group that has become another class, or has
    another number of entries, that alone."""
    cls: type = type(new)
    for name, change in changes_of(cls).items():
        assert change is not None, f"{cls.__name__}.{name} has no Changes; tests/test_changes.py finds it"
        yield from _differences(getattr(old, name), getattr(new, name), prefix + name, change)


def _differences(old: Any, new: Any, key: str, change: Changes) -> Iterator[Changed]:
    if is_config(type(new)) and type(old) is type(new) and not isinstance(new, StepRange):
        yield from changes(old, new, f"{key}.")
    elif _is_group(old) and _is_group(new) and len(old) == len(new):
        for i, (one, other) in enumerate(zip(old, new, strict=True)):
            yield from _differences(one, other, f"{key}.{i}", change)
    elif old != new:
        yield Changed(key, _words(old), _words(new), change)


def _is_group(value: Any) -> bool:
    return isinstance(value, tuple) and all(is_config(type(item)) for item in value)


def _words(value: Any) -> str:
    match value:
        case StepRange():
            return str(value)
        case enum.Enum():
            return str(value.value)
        case tuple() if value and _is_group(value):
            return "1 entry" if len(value) == 1 else f"{len(value)} entries"
        case _ if dataclasses.is_dataclass(value):
            return type(value).__name__
        case _:
            return repr(value)


def check_allowed(config: RunConfig, keys: Sequence[str]) -> None:
    """
    Raises:
        UserError: one is neither a key of the config nor a group of keys.
    """
    leaves = list(flatten(config))
    groups = {".".join(parts[:i]) for parts in (leaf.split(".") for leaf in leaves) for i in range(1, len(parts))}
    for key in keys:
        if key not in groups and key not in leaves:
            near = difflib.get_close_matches(key, [*leaves, *sorted(groups)], n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise UserError(f"--allow_change {key}: must be a key of the config, such as model.norm.eps{hint}")


def go_on(trained: RunConfig, config: RunConfig, allowed: Sequence[str], checkpoint: str, step: int) -> list[Changed]:
    """The differences that are to be told, and are no reason to stop.

    Args:
        trained: what `checkpoint` was trained with.
        config: what is to go on from there.
        allowed: keys and groups of which any change will do.
        checkpoint: how messages call it.
        step: steps that it had done. Phases that have begun may not change.

    Raises:
        UserError: a line for each key whose other value makes another model, state or order of the data.
    """
    found = list(changes(trained, config))
    begun, now_begun = ([one for one in run.train.phases if one.start < step] for run in (trained, config))
    if begun != now_begun:
        found = [one._replace(change=Changes.IDENTITY) if one.within(("train.phases",)) else one for one in found]
    refused = [one for one in found if one.change is Changes.IDENTITY and not one.within(allowed)]
    if refused:
        raise UserError(
            "\n".join(
                f"{one.key}: {checkpoint} was trained with {one.old}, the config says {one.new}, which makes another "
                f"{_makes(one)}; go back to {one.old}, set another run_dir, or, if no array changes its shape or "
                f"dtype, say --allow_change {one.key}"
                for one in refused
            )
        )
    return [one for one in found if one.change is not Changes.NOTHING]


def _makes(one: Changed) -> str:
    if one.within(DATA_ORDER):
        return "order of the data"
    return "model" if one.within(("model",)) else "state"
