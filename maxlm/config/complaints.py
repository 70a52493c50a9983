"""What is wrong with a command line, in one line, with what was probably meant."""

from __future__ import annotations

import dataclasses
import difflib
import re
import typing
from collections.abc import Iterator

import tyro


def one_line(complaint: str, known: list[str], prog: str) -> str:
    """tyro's framed complaint as one line, with the nearest key for one that is not known."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", complaint)
    words = " ".join(re.sub(r"[─-╿]|^[-+| ]*-{9}[-+| ]*$", " ", plain, flags=re.MULTILINE).split())
    words = re.sub(r"(\S{40})(?:\S{60,}|\S{10,}(?: \S{60,}))(?: \S{60,})*", r"\1...", words)
    see_help = f"({prog} --help lists all keys)"
    if unknown := re.search(r"Unrecognized options: ([^\s=,]+)", words):
        word = unknown.group(1)
        if not word.startswith("--"):
            return f"stray word {word}; overrides are written --key=value {see_help}"
        key = word.removeprefix("--")
        if inner := [name for name in known if name.startswith(f"{key}.")]:
            remedy = f"set its keys, such as --{inner[0]}, or choose its class in the config file"
            return f"--{key} is a group; {remedy} {see_help}"
        if lacking := _past_the_end(key, known) or _left_out(key, known):
            return f"--{key}: {lacking} {see_help}"
        alike = [name for name in known if name.rpartition(".")[2] == key.rpartition(".")[2]]
        near = difflib.get_close_matches(key, alike, n=1, cutoff=0) or difflib.get_close_matches(
            key, known, n=1, cutoff=0.5
        )
        hint = f"; did you mean --{near[0]}?" if near else ""
        return f"unknown key --{key}{hint} {see_help}"
    absent = words.partition(f"Missing from {prog}: ")[2]
    if missing := re.findall(r"(--[\w.]+ \S+|[A-Z_]+) (.*?)\.? ?\(required\)", absent):
        return f"missing: {'; '.join(f'{option}: {text}' for option, text in missing)} {see_help}"
    words = re.sub(r"^(Value error|Invalid choice|Missing argument|Required options) ", "", words)
    words = re.split(r" Argument helptext:| For full helptext", words)[0].strip()
    if bare := re.match(r"Missing value for argument '(--[\w.]+)'", words):
        words += f" One that begins with - is given as {bare[1]}=-..."
    return f"{words} {see_help}"


def _past_the_end(key: str, known: list[str]) -> str | None:
    """What to say of `data.datasets.1.path` where there is one data set alone; None: the key is wrong otherwise."""
    for number in re.finditer(r"(?<=\.)\d+(?=\.|$)", key):
        items = key[: number.start()]
        there = {name.removeprefix(items).partition(".")[0] for name in known if name.startswith(items)}
        if there and all(word.isdecimal() for word in there) and number.group() not in there:
            entries = "1 entry, number 0" if len(there) == 1 else f"{len(there)} entries, 0 to {len(there) - 1}"
            return f"{items[:-1]} has {entries}; add more in the config file"
    return None


def _left_out(key: str, known: list[str]) -> str | None:
    """What to say of `model.adapter` and of `model.adapter.kind.rank` where the config has none."""
    names = key.split(".")
    found = [name for n in range(1, len(names) + 1) if (name := ".".join(names[:n])) in known]
    if not found or any(name.startswith(f"{found[-1]}.") for name in known):
        return None
    return f"{found[-1]} has no keys here; a class, where it takes one, is chosen in the config file"


def option_names(cls: type, prefix: str = "") -> Iterator[str]:
    """The dotted options that tyro makes of a dataclass."""
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        inner, *marks = typing.get_args(hint) if typing.get_origin(hint) is typing.Annotated else (hint,)
        if dataclasses.is_dataclass(inner) and isinstance(inner, type):
            yield from option_names(inner, prefix if tyro.conf.OmitArgPrefixes in marks else f"{prefix}{name}.")
        elif tyro.conf.Positional not in marks:
            yield prefix + name
