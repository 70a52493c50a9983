"""Names of earlier versions: they go on working, and each is told its new name in one line.

Three doors lead in. A config file calls a class with a keyword of old, or imports a class by its old name; a command
line sets an old key; a saved config has the keys of its format, and is brought from each format to the next.
"""

from __future__ import annotations

import functools
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from maxlm.config.errors import UserError

T = TypeVar("T")

CLASSES = {
    "GluConfig": "GatedMlp",
    "MoeConfig": "Experts",
    "FfnConfig": "MlpConfig",
    "AttentionConfig": "GroupedQuery",
    "RopeConfig": "Rope",
}
"""Old name in `maxlm.config` -> new name."""

_KEYS = (
    (r"model\.compute_dtype", "execution.dtype"),
    (r"model\.(remat|scan_layers|kernels\.\w+)", r"execution.\1"),
    (r"model\.norm_eps", "model.norm.eps"),
    (r"model\.tie_embeddings", "model.head.tied"),
    (r"(model\.(?:first_)?blocks\.\d+)\.ffn((?:\.\w+)*)", r"\1.mlp\2"),
    (r"(model\.(?:first_)?blocks\.\d+\.attention)\.rope((?:\.\w+)*)", r"\1.position\2"),
)
_VALUES = ((r"model\.(?:first_)?blocks\.\d+\.attention\.qk_norm", {"True": "heads", "False": "None"}),)
"""Of the command line: key -> old word for a value -> its word today."""
_told: set[str] = set()


def tell(old: str, new: str) -> None:
    """Say once in a process what has a new name."""
    if old not in _told:
        _told.add(old)
        print(f"note: {old} is now {new}", file=sys.stderr)


def new_key(key: str) -> str:
    """Today's name of a dotted key of the command line."""
    for old, new in _KEYS:
        if re.fullmatch(old, key):
            return re.sub(old, new, key)
    return key


def new_options(argv: Sequence[str]) -> list[str]:
    """The words of a command line with today's keys and values, and a line for each that was an old one."""
    words: list[str] = []
    for word in argv:
        option, equals, value = word.partition("=")
        if not option.startswith("--"):
            words.append(_new_word(words[-1], word) if words else word)
            continue
        renamed_option = f"--{new_key(option.removeprefix('--'))}"
        if renamed_option != option:
            tell(option, renamed_option)
        words.append(f"{renamed_option}{equals}{_new_word(renamed_option, value)}")
    return words


def _new_word(option: str, word: str) -> str:
    """Today's word for a value of the option before it."""
    for key, words in _VALUES:
        if word in words and re.fullmatch(f"--{key}", option):
            tell(f"{option}={word}", f"{option}={words[word]}")
            return words[word]
    return word


def _second_format(run: dict[str, Any]) -> dict[str, Any]:
    """Format 1 to 2: what runs a model apart from the model; a choice where there was one norm, position and head."""
    model = dict(run["model"])
    execution = {"dtype": model.pop("compute_dtype")}
    execution |= {key: model.pop(key) for key in ("remat", "kernels", "scan_layers")}
    model["norm"] = {"kind": "RmsNorm", "eps": model.pop("norm_eps")}
    model["head"] = {"kind": "LmHead", "tied": model.pop("tie_embeddings")}

    def block(old: dict[str, Any]) -> dict[str, Any]:
        attention, mlp = dict(old["attention"]), dict(old["ffn"])
        rope = attention.pop("rope")
        attention["position"] = None if rope is None else {"kind": "Rope"} | rope
        return {"attention": attention, "mlp": mlp | {"kind": CLASSES[mlp["kind"]]}}

    for key in ("blocks", "first_blocks"):
        model[key] = [block(old) for old in model.get(key, ())]
    return run | {"model": model, "execution": execution}


def _third_format(run: dict[str, Any]) -> dict[str, Any]:
    """Format 2 to 3: a choice where there were one attention, norms of queries and keys or none, and one stretching."""

    def block(old: dict[str, Any]) -> dict[str, Any]:
        attention = dict(old["attention"])
        attention["qk_norm"] = {True: "heads", False: None}[attention["qk_norm"]]
        position = attention["position"]
        if position is not None and position.get("scaling") is not None:
            scaling = {"kind": "Llama3RopeScaling"} | position["scaling"]
            attention["position"] = position | {"scaling": scaling}
        return old | {"attention": {"kind": "GroupedQuery"} | attention}

    model = {key: [block(old) for old in run["model"].get(key, ())] for key in ("blocks", "first_blocks")}
    return run | {"model": run["model"] | model}


def _fourth_format(run: dict[str, Any]) -> dict[str, Any]:
    """Format 3 to 4: a choice where there was one task."""
    return run | {"task": {"kind": "Pretrain"} | run.get("task", {})}


FORMAT = 4
"""Of saved run configs. One that has no number is of format 1."""
_NEXT = {1: _second_format, 2: _third_format, 3: _fourth_format}


def newest_format(run: dict[str, Any]) -> dict[str, Any]:
    """A saved run config of any format as one of today's.

    Raises:
        UserError: the format is not known, or the file has not the keys of its format.
    """
    found = run.get("format", 1)
    if type(found) is not int or found not in range(1, FORMAT + 1):
        raise UserError(
            f"format = {found!r} is not one that this version of maxlm reads (1 to {FORMAT}); read it with the version "
            "that wrote it"
        )
    run = {key: value for key, value in run.items() if key != "format"}
    for number in range(found, FORMAT):
        try:
            run = _NEXT[number](run)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"saved config of format {number} lacks or misuses {error}; restore the config.json that the run began "
                "with"
            ) from error
    return run


def renamed(
    moved: dict[str, str] | None = None, **names: str | Callable[[Any], dict[str, Any]]
) -> Callable[[type[T]], type[T]]:
    """A class decorator that lets keyword arguments of old names in.

    Args:
        moved: old keyword -> the key, elsewhere in a config, that has its value now. Values are kept in a keyword
            `moved`, under the last word of that key, for whoever owns it.
        names: old keyword -> new keyword, or what makes new keywords of the old value.
    """

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def accept(self: T, **values: Any) -> None:
            for old in [key for key in values if key in names]:
                change = names[old]
                new = change(values.pop(old)) if callable(change) else {change: values.pop(old)}
                tell(f"{cls.__name__}({old}=...)", " and ".join(f"{cls.__name__}({key}=...)" for key in new))
                values |= new
            for old in [key for key in values if key in (moved or {})]:
                assert moved is not None
                tell(f"{cls.__name__}({old}=...)", moved[old])
                values["moved"] = (values.get("moved") or {}) | {moved[old].rpartition(".")[2]: values.pop(old)}
            init(self, **values)

        type.__setattr__(cls, "__init__", accept)
        return cls

    return decorate


def revalued(**values: dict[Any, Any]) -> Callable[[type[T]], type[T]]:
    """A class decorator that lets old values of keyword arguments in: keyword -> bool of old -> today's value."""

    def decorate(cls: type[T]) -> type[T]:
        init = cls.__init__

        @functools.wraps(init)
        def accept(self: T, **given: Any) -> None:
            for key in values.keys() & given.keys():
                if isinstance(given[key], bool):
                    new = values[key][given[key]]
                    tell(f"{cls.__name__}({key}={given[key]})", f"{cls.__name__}({key}={new})")
                    given[key] = new
            init(self, **given)

        type.__setattr__(cls, "__init__", accept)
        return cls

    return decorate
