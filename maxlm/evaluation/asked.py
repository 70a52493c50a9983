"""Tests ask a program that they do not trust. A module of its own, on the standard library, for verifiers.py.

Both run in the sandbox of sandbox.py, in two processes: the tests import this module and call `start`; the program is
read by this file as a script, which calls what it is asked for. Between them there is text that `ast.literal_eval`
reads, so that the tests get plain data and nothing else: no object whose `__eq__` says yes to everything.
"""

from __future__ import annotations

import ast
import builtins
import collections
import ctypes
import itertools
import os
import runpy
import subprocess
import sys
from typing import Any, BinaryIO

_SET_DUMPABLE = 4
"""Of prctl: whether processes of the same user may look into this one."""
_PROGRAM = "solution.py"
_LISTED: tuple[Any, ...] = (
    list,
    tuple,
    set,
    frozenset,
    range,
    collections.deque,
    collections.abc.Iterator,
    collections.abc.MappingView,
)
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, str, bytes, type(None))


def written(value: Any) -> str:
    """A value that is data, as `ast.literal_eval` reads it; of subclasses what they hold, of iterators a list.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return "1e999" if value > 0 else "-1e999"
    if type(value) in _SCALARS:
        return repr(value)
    for kind in _SCALARS[1:-1]:
        if isinstance(value, kind):
            return written(kind(value))
    if isinstance(value, dict):
        return f"{{{', '.join(f'{written(key)}: {written(inner)}' for key, inner in value.items())}}}"
    if not isinstance(value, _LISTED):
        raise TypeError(f"{type(value).__name__} is no data")
    inner = "".join(f"{written(one)}, " for one in value)
    if isinstance(value, tuple):
        return f"({inner})"
    if isinstance(value, set | frozenset):
        return f"{{{inner}}}" if inner else "set()"
    return f"[{inner}]"


class _Program:
    """The other process, for the tests."""

    def __init__(self) -> None:
        (theirs, tell), (told, answer) = os.pipe(), os.pipe()
        words = [sys.executable, "-I", "-B", __file__, str(theirs), str(answer)]
        subprocess.Popen(words, stdin=subprocess.DEVNULL, pass_fds=(theirs, answer))
        os.close(theirs)
        os.close(answer)
        self._tell, self._told = os.fdopen(tell, "wb"), os.fdopen(told, "rb")

    def ask(self, thing: int | None, name: str, args: Any, kwargs: Any) -> Any:
        """What a function gives, or a method of a thing, which the program made before."""
        self._tell.write(f"{written((thing, name, args, kwargs))}\n".encode())
        self._tell.flush()
        line = self._told.readline().decode()
        kind, text = line[:1], line[1:].strip()
        if kind == "=":
            return ast.literal_eval(text)
        if kind == "*":
            return _Thing(self, int(text))
        error = getattr(builtins, text, None) if kind == "!" else None
        if not (isinstance(error, type) and issubclass(error, Exception)):
            error = RuntimeError
        raise error(f"the program: {text or 'has ended'}")


class _Thing:
    """An object of one of the program's classes."""

    def __init__(self, program: _Program, number: int) -> None:
        self._program, self._number = program, number

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *args, **kwargs: self._program.ask(self._number, name, args, kwargs)


def start(program: str) -> dict[str, Any]:
    """The functions and classes that a program defines, by name, to be called by tests. What Python calls by the same
    name is none of them: tests compare with it.

    Raises:
        SyntaxError: it is no Python.
    """
    names = [one.name for one in ast.parse(program).body if isinstance(one, ast.FunctionDef | ast.ClassDef)]
    for node in ast.parse(program).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Lambda):
            names += [target.id for target in node.targets if isinstance(target, ast.Name)]
    with open(_PROGRAM, "w", encoding="utf-8") as file:
        file.write(program)
    if ctypes.CDLL(None).prctl(_SET_DUMPABLE, 0, 0, 0, 0) != 0:
        raise OSError("prctl: this process cannot be hidden from the program")
    other = _Program()

    def call(name: str) -> Any:
        return lambda *args, **kwargs: other.ask(None, name, args, kwargs)

    return {name: call(name) for name in names if not (hasattr(builtins, name) or name.startswith("__"))}


def serve(asked: BinaryIO, answers: BinaryIO) -> None:
    """Run the program, and call what comes in lines."""
    known = runpy.run_path(_PROGRAM, run_name="solution")
    things, numbers = dict[int, Any](), itertools.count()
    for line in asked:
        try:
            thing, name, args, kwargs = ast.literal_eval(line.decode())
            found = (known[name] if thing is None else getattr(things[thing], name))(*args, **kwargs)
            if isinstance(known.get(name), type) and thing is None:
                number = next(numbers)
                things[number], answer = found, f"*{number}"
            else:
                answer = f"={written(found)}"
        except Exception as error:
            answer = f"!{type(error).__name__}"
        answers.write(f"{answer}\n".encode())
        answers.flush()


if __name__ == "__main__":
    serve(os.fdopen(int(sys.argv[1]), "rb"), os.fdopen(int(sys.argv[2]), "wb"))
