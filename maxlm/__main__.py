"""`python -m maxlm`: list the commands."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from maxlm import __version__
from maxlm.config import UserError
from maxlm.config.cli import run_command

_HELP = ("--help", "-h", "--debug")


def commands() -> Iterator[tuple[str, str]]:
    """Each command's module, and what it does, as the first line of its docstring says; nothing is imported."""
    folder = Path(__file__).parent
    for file in sorted({*folder.glob("*.py"), *folder.glob("*/__main__.py")} - {Path(__file__)}):
        line = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n")[0]
        if found := re.fullmatch(r"`python -m (maxlm\.\w+)[^`]*`: (.+)", line):
            yield found[1], found[2]


def main(argv: list[str]) -> None:
    """Print them.

    Raises:
        UserError: there are words after `python -m maxlm`.
    """
    if strange := [word for word in argv if word not in _HELP]:
        names, name = [module for module, _ in commands()], f"maxlm.{strange[0]}"
        raise UserError(
            f"python -m maxlm {strange[0]}: it only lists the commands; "
            + (f"write python -m {name}" if name in names else f"use one of {', '.join(names)}")
        )
    print(f"maxlm {__version__}. Each command lists its options with --help.\n")
    for module, does in commands():
        print(f"  python -m {module:<16}  {does}")


if __name__ == "__main__":
    run_command(main)
