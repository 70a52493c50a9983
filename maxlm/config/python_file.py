"""Run a file in Python that makes a config; a mistake in it is one line: `file:line: what is wrong; what was meant`."""

from __future__ import annotations

import builtins
import contextlib
import difflib
import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, NamedTuple, TypeVar

from maxlm.config.errors import UserError
from maxlm.config.run import RunConfig

T = TypeVar("T")


class PythonConfig(NamedTuple):
    """What a config file says."""

    config: RunConfig
    functions: Mapping[str, Callable[..., Any]]
    """The public functions at its top, its own and imported ones, by name; what a config cannot hold, such as
    rewards."""


def run_python_file(path: str) -> PythonConfig:
    """What `get_config()` of the file returns, and the other functions of the file.

    Raises:
        UserError: see `value_of`.
    """
    config, module = value_of(path, "get_config", RunConfig, "--config")
    functions = {name: one for name, one in vars(module).items() if inspect.isfunction(one) and name[0] != "_"}
    functions.pop("get_config", None)
    return PythonConfig(config, functions)


def value_of(path: str, function: str, cls: type[T], option: str) -> tuple[T, ModuleType]:
    """What the function of that name in the file returns, an object of `cls`; and the file as a module.

    `option`: by which the file is named.

    Raises:
        UserError: it has no such function, the function wants arguments or returns something else, or the file or the
            function raises anything.
    """
    spec = importlib.util.spec_from_file_location(f"_maxlm_config_{Path(path).stem}", path)
    if spec is None or spec.loader is None:
        raise UserError(f"{option} {path}: neither a Python file nor a saved config.json")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    with _beside(Path(path).resolve()):
        try:
            spec.loader.exec_module(module)
        except (Exception, SystemExit) as error:
            raise _told(error, path) from error
        make = _function(module, path, function, cls, option)
        try:
            value = make()
        except (Exception, SystemExit) as error:
            raise _told(error, path) from error
    if not isinstance(value, cls):
        found = f"None; is its last line `return {cls.__name__}(...)`?" if value is None else type(value).__name__
        raise UserError(f"{_place(make, path, option)}: {function}() must return a {cls.__name__}, it returns {found}")
    return value, module


@contextlib.contextmanager
def _beside(file: Path) -> Iterator[None]:
    """Lets `from configs.y import get_config` find the file beside this one, as it is now: not one of that name in the
    current folder, nor what was imported under that name before."""
    root, folder = str(file.parent.parent), file.parent.name
    named = lambda: [name for name in sys.modules if name == folder or name.startswith(f"{folder}.")]
    # A package with an __init__.py, such as maxlm itself, is no folder of configs.
    others = {} if getattr(sys.modules.get(folder), "__file__", None) else {name: sys.modules[name] for name in named()}
    for name in others:
        del sys.modules[name]
    sys.path.insert(0, root)
    try:
        yield
    finally:
        sys.path.remove(root)
        if folder not in sys.modules or getattr(sys.modules[folder], "__file__", None) is None:
            for name in named():
                del sys.modules[name]
        sys.modules.update(others)


def _function(module: ModuleType, path: str, name: str, cls: type, option: str) -> Any:
    """The function, of which is known that it can be called without arguments."""
    function = getattr(module, name, None)
    if function is None:
        own = [name for name, value in vars(module).items() if inspect.isfunction(value)]
        raise UserError(f"{option} {path}: has no function {name}(){_did_you_mean(name, own)}")
    if not callable(function):
        raise UserError(
            f"{option} {path}: {name} must be a function, it is {type(function).__name__}; "
            f"write def {name}() -> {cls.__name__}:"
        )
    wants = [
        str(one.name)
        for one in inspect.signature(function).parameters.values()
        if one.default is one.empty and one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD)
    ]
    if wants:
        place, listed = _place(function, path, option), ", ".join(wants)
        raise UserError(f"{place}: {name}({listed}) must take no arguments; give {wants[0]} a default")
    return function


def _place(function: Any, path: str, option: str) -> str:
    code = getattr(inspect.unwrap(function), "__code__", None)
    return f"{option} {path}" if code is None else f"{_shown(code.co_filename, path)}:{code.co_firstlineno}"


def _shown(filename: str, path: str) -> str:
    """The config file, or one beside it, as the user writes it."""
    return str(Path(path).parent / Path(filename).name)


def _told(error: BaseException, path: str) -> UserError:
    """The exception in one line that begins with its place: the innermost frame of the config file, or, where there is
    none, of a file beside it."""
    file = Path(path).resolve()
    frames = [(frame, line, Path(frame.f_code.co_filename)) for frame, line in traceback.walk_tb(error.__traceback__)]
    within = [found for found in frames if found[2].resolve() == file]
    within = within or [found for found in frames if found[2].resolve().parent == file.parent]
    place, words = path, f"{type(error).__name__}: {' '.join(str(error).split())}"
    if within:
        frame, line, name = within[-1]
        place = f"{_shown(str(name), path)}:{line}"
        words = _meant(error, frame, file) or words
    if isinstance(error, SyntaxError) and error.lineno is not None:
        place = f"{_shown(error.filename or path, path)}:{error.lineno}"
        words = f"not valid Python ({error.msg})"
    if isinstance(error, UserError):
        return UserError("\n".join(f"{place}: {line}" for line in str(error).splitlines()))
    return UserError(f"{place}: {words}")


_KEYWORD = r"(\w+)(?:\.__init__)?\(\) got an unexpected keyword argument '(\w+)'"


def _meant(error: BaseException, frame: FrameType, file: Path) -> str | None:
    """The exception's words with the nearest right names; None: no name is wrong."""
    here = {**vars(builtins), **frame.f_globals, **frame.f_locals}
    match error:
        case TypeError() if found := re.search(_KEYWORD, str(error)):
            name, wrong = found.groups()
            function = here.get(name) or getattr(sys.modules["maxlm.config"], name, None)
            known = list(inspect.signature(function).parameters) if callable(function) else []
            near = _did_you_mean(wrong, known) or (f"; it takes {', '.join(known)}" if known else "")
            return f"TypeError: {name}() got an unexpected keyword argument '{wrong}'{near}"
        case ModuleNotFoundError(name=str(wrong)):
            folder, _, last = wrong.rpartition(".")
            beside = [one.stem for one in file.parent.glob("*.py")] if folder == file.parent.name else []
            return f"ModuleNotFoundError: no module {wrong}{_did_you_mean(last, beside)}"
        case ImportError(name=str(module)) if found := re.search(r"cannot import name '(\w+)'", str(error)):
            wrong = found.group(1)
            return f"ImportError: {module} has no {wrong}{_did_you_mean(wrong, dir(sys.modules.get(module)))}"
        case NameError(name=str(wrong)):
            return f"NameError: {wrong} is not defined{_did_you_mean(wrong, here)}"
        case AttributeError(name=str(wrong), obj=owner) if owner is not None:
            what = owner.__name__ if isinstance(owner, ModuleType | type) else type(owner).__name__
            return f"AttributeError: {what} has no {wrong}{_did_you_mean(wrong, dir(owner))}"
        case _:
            return None


def _did_you_mean(wrong: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(wrong, [name for name in known if not name.startswith("_")], n=3)
    return f"; did you mean {' or '.join(near)}?" if near else ""
