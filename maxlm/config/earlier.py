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
    """The words of a command line with today's keys, and a line for each that was an old one."""
    words = []
    for word in argv:
        option, equals, value = word.partition("=")
        key = option.removeprefix("--")
        renamed_key = new_key(key) if option.startswith("--") else key
        if renamed_key != key:
            tell(f"--{key}", f"--{renamed_key}")
            word = f"--{renamed_key}{equals}{value}"
        words.append(word)
    return words


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


FORMAT = 2
"""Of saved run configs. One that has no number is of format 1."""
_NEXT = {1: _second_format}


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
