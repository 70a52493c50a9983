"""Command lines: load a config file, apply typed overrides, and turn mistakes into one line each."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import difflib
import enum
import functools
import io
import os
import re
import sys
import threading
import time
import traceback
import types
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, TypeVar

import tyro

from maxlm import surroundings
from maxlm.config.changes import check_allowed
from maxlm.config.complaints import one_line, option_names
from maxlm.config.data import DataConfig, Dataset
from maxlm.config.earlier import new_options
from maxlm.config.errors import UserError
from maxlm.config.families import llama
from maxlm.config.fields import field_kinds, help_of, is_config, require, shown
from maxlm.config.mlp import Nonlinearity
from maxlm.config.python_file import PythonConfig, run_python_file
from maxlm.config.run import RunConfig, StepRange, TrainConfig
from maxlm.config.serialize import flatten, load
from maxlm.config.speculation import Speculation, speculation

T = TypeVar("T")

_SUFFIXES = (".py", ".json")
"""Of files that `--config` takes."""

_CONFIGS = Path(__file__).resolve().parents[2] / "configs"
"""Beside the package in its checkout; an installation without the checkout has none."""

EXIT_CTRL_C = 130
"""128 + SIGINT, as shells say it."""

EXIT_BROKEN_PIPE = 141
"""128 + SIGPIPE."""
_LINGER_S = 5.0
"""What is left to a process that has said its error."""

_TYRO = (tyro.conf.AvoidSubcommands, tyro.conf.EnumChoicesFromValues)

_RULES = tyro.constructors.ConstructorRegistry()
"""How an option is read whose type is ours."""


def _said(parse: Callable[[str], T], word: str) -> T:
    try:
        return parse(word)
    except UserError as error:  # tyro adds the key
        raise ValueError(str(error)) from None


def _read_by(kind: Any, parse: Callable[[str], Any], metavar: str) -> None:
    """An option of this kind or None is one word, which `parse` understands."""

    @_RULES.primitive_rule
    def rule(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
        if info.type != kind | None:
            return None
        return tyro.constructors.PrimitiveConstructorSpec(
            nargs=1,
            metavar=f"{{None}}|{metavar}",
            instance_from_str=lambda words: None if words[0] == "None" else _said(parse, words[0]),
            is_instance=lambda value: isinstance(value, kind | None),
            str_from_instance=lambda value: [str(value)],
        )


_read_by(StepRange, StepRange.parse, "FIRST:LAST")
_read_by(Speculation, speculation, "lookup|draft:run=DIR|medusa")


@_RULES.primitive_rule
def _number(info: tyro.constructors.PrimitiveTypeInfo) -> tyro.constructors.PrimitiveConstructorSpec | None:
    """Numbers, and numbers or None: a whole one may be written 1e3."""
    union = typing.get_origin(info.type) in (typing.Union, types.UnionType)
    alternatives = [_plain(one) for one in (typing.get_args(info.type) if union else (info.type,))]
    optional = types.NoneType in alternatives
    numbers = [one for one in alternatives if one is not types.NoneType]
    if numbers not in ([int], [float]):
        return None
    convert, words = (_whole, "a whole number") if numbers == [int] else (float, "a number")

    def read(word: str) -> float | None:
        if optional and word == "None":
            return None
        try:
            return convert(word)
        except (ValueError, OverflowError):
            raise ValueError(f"{shown(word)} is not {words}{' or None' if optional else ''}") from None

    return tyro.constructors.PrimitiveConstructorSpec(
        nargs=1,
        metavar=("{None}|" if optional else "") + numbers[0].__name__.upper(),
        instance_from_str=lambda words: read(words[0]),
        is_instance=lambda value: isinstance(value, int | float) or (optional and value is None),
        str_from_instance=lambda value: [str(value)],
    )


def _plain(annotation: Any) -> Any:
    """Without its marks."""
    return typing.get_args(annotation)[0] if typing.get_origin(annotation) is typing.Annotated else annotation


def _whole(word: str) -> int:
    try:
        return int(word)
    except ValueError:
        if not float(word).is_integer():
            raise
        return int(float(word))


@_RULES.struct_rule
def _config_class(info: tyro.constructors.StructTypeInfo) -> tyro.constructors.StructConstructorSpec | None:
    """The classes of maxlm.config.fields: their help names ranges, and the classes of members."""
    if not is_config(info.type):
        return None
    hints = typing.get_type_hints(info.type, include_extras=True)
    fields = []
    for one in dataclasses.fields(info.type):
        default = one.default
        if isinstance(info.default, info.type):
            default = getattr(info.default, one.name)
        elif one.default_factory is not dataclasses.MISSING:
            default = one.default_factory()
        elif default is dataclasses.MISSING:
            default = tyro.constructors.MISSING_NONPROP
        text = functools.partial(_help, info.type, one.name, default)
        hint = hints[one.name]
        if hint == Nonlinearity:
            hint = type(
                default
            )  # words become other words here, and numbers other numbers; a class is chosen in a file
        if default is True:  # no bare name could switch it off
            hint = typing.Annotated[hint, tyro.conf.FlagConversionOff]
        fields.append(tyro.constructors.StructFieldSpec(one.name, hint, default, helptext=text))
    return tyro.constructors.StructConstructorSpec(instantiate=info.type, fields=tuple(fields))


def _help(cls: type, name: str, value: Any) -> str:
    """What --help says of a field; of one with keys of its own, its class too."""
    text = help_of(cls, name)
    if not dataclasses.is_dataclass(value):
        return text
    return f"{text} {type(value).__name__}: {' '.join((type(value).__doc__ or '').split())}".strip()


def _choices(config: Any, prefix: str = "") -> Iterator[str]:
    """A line for each field whose class is chosen in the file: the classes that it may have, the present one first."""
    cls: type = type(config)
    for one in field_kinds(cls):
        value, key = getattr(config, one.name), prefix + one.name
        kinds = [kind.cls for kind in one.kinds]
        on_command_line = not any(map(is_config, kinds)) or StepRange in kinds
        if len(kinds) > 1 and not on_command_line:
            names = ["None" if kind is types.NoneType else kind.__name__ for kind in kinds if kind is not type(value)]
            yield f"{key} = {'None' if value is None else type(value).__name__}, or {', '.join(names)}"
        for i, item in enumerate(value if isinstance(value, tuple) else ()):
            if is_config(type(item)):
                yield from _choices(item, f"{key}.{i}.")
        if is_config(type(value)):
            yield from _choices(value, f"{key}.")


@dataclass(frozen=True)
class Command:
    """What `python -m maxlm.train` was asked."""

    config: RunConfig
    file_config: RunConfig
    """The config as the file has it, before overrides."""
    print_config: bool
    functions: Mapping[str, Callable[..., Any]]
    """Of the file, see `PythonConfig`; a saved config.json has none."""
    allow_change: tuple[str, ...] = ()
    """Keys and groups that may differ from what the run's checkpoint was trained with."""


def parse_run(argv: Sequence[str], *, prog: str, description: str) -> Command:
    """Read `--config FILE [--print_config] [--debug] [overrides]`.

    Raises:
        UserError: no file, a file without `get_config()`, an unknown key, or a value of the wrong type.
    """
    parser = argparse.ArgumentParser(prog=prog, add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config")
    parser.add_argument("--print_config", action="store_true")
    parser.add_argument("--debug", action="store_true")
    parser.add_argument("--allow_change", action="append", default=[])
    try:
        options, overrides = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        example = "model.norm.eps" if error.argument_name == "--allow_change" else "configs/tiny.py"
        raise UserError(
            f"{error.argument_name}: {error.message}, for example {error.argument_name} {example}"
        ) from None
    asks_help = "--help" in overrides or "-h" in overrides
    if options.config is not None:
        file_config, functions = _load_file(options.config)
    elif asks_help:
        file_config, functions = PythonConfig(_EXAMPLE, {})
    else:
        named = next((word for word in overrides if word.endswith(_SUFFIXES) and not word.startswith("-")), None)
        example = named or "configs/tiny.py"
        raise UserError(f"--config is missing; name a file, for example --config {example} (--help lists all keys)")
    usage = (
        f"{description}\n\n--config FILE      Python file with get_config(), tiny for configs/tiny.py, or a saved "
        f"config.json; the defaults below are those of {options.config or 'a small example'}.\n"
        "--print_config     Show the resolved config and what differs from the file, then stop.\n"
        "--debug            Show tracebacks.\n"
        "--allow_change KEY Go on with another value of a key that a run may not change (docs/checkpoints.md).\n\n"
    )
    usage += "Chosen in the file alone, as a class of maxlm.config:\n  " + "\n  ".join(_choices(file_config))
    default, words = _leave_out_groups(file_config, new_options(overrides))
    config = parse(RunConfig, words, prog=prog, description=usage, default=default)
    check_allowed(config, options.allow_change)
    return Command(
        config=config,
        file_config=file_config,
        print_config=options.print_config,
        allow_change=tuple(options.allow_change),
        functions=functions,
    )


def _leave_out_groups(config: RunConfig, words: Sequence[str]) -> tuple[RunConfig, list[str]]:
    """The config without the groups that are set to None (`--data.datasets.0.prepare None`), which tyro takes for the
    choice of a class; and the other words."""
    rest, left = [], list(words)
    while left:
        word = left.pop(0)
        key, equals, value = word.partition("=")
        if not equals and left and word.startswith("--"):
            value = left[0]
        changed = _with_none(config, key.removeprefix("--").split(".")) if value == "None" else None
        if changed is None:
            rest.append(word)
            continue
        config = changed
        if not equals:
            left.pop(0)
    return config, rest


def _with_none(value: Any, path: Sequence[str]) -> Any:
    """The value with None for the group at a path of names; None if there is no group, or it must be there."""
    name, *inner = path
    if isinstance(value, tuple):
        place = int(name) if name.isdecimal() else len(value)
        item = _with_none(value[place], inner) if inner and place < len(value) else None
        return None if item is None else (*value[:place], item, *value[place + 1 :])
    cls: type = type(value)
    kinds = next((one.kinds for one in field_kinds(cls) if one.name == name), ()) if is_config(cls) else ()
    if inner and kinds:
        new = _with_none(getattr(value, name), inner)
        return None if new is None else dataclasses.replace(value, **{name: new})
    classes = {kind.cls for kind in kinds}
    may_go = types.NoneType in classes and any(map(is_config, classes))
    return dataclasses.replace(value, **{name: None}) if may_go else None


def parse(
    cls: type[T], argv: Sequence[str], *, prog: str, description: str, default: T | None = None, flags: bool = False
) -> T:
    """An object of the dataclass `cls` from dotted options.

    `flags`: a bool that is off is switched on by its bare name (`--verify`), as small commands want; else it takes a
    value.

    Raises:
        UserError: an option is unknown, missing or of the wrong type.
    """
    return _parse(cls, argv, prog, description, flags, default)[0]


def parse_known(cls: type[T], argv: Sequence[str], *, prog: str, description: str) -> tuple[T, list[str]]:
    """As `parse` with `flags`, and the words that are none of its options, in their order.

    Raises:
        UserError: an option is missing or of the wrong type.
    """
    return _parse(cls, argv, prog, description, True, None, keep_unknown=True)


def _parse(
    cls: type[T], argv: Sequence[str], prog: str, description: str, flags: bool, default: T | None,
    keep_unknown: bool = False,
) -> tuple[T, list[str]]:  # fmt: skip
    kwargs: dict[str, Any] = {} if default is None else {"default": default}
    kwargs["config"] = (*_TYRO, tyro.conf.FlagCreatePairsOff if flags else tyro.conf.FlagConversionOff)
    kwargs |= {
        "args": list(argv),
        "prog": prog,
        "description": description,
        "use_underscores": True,
        "registry": _RULES,
    }
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            return tyro.cli(cls, return_unknown_args=True, **kwargs) if keep_unknown else (tyro.cli(cls, **kwargs), [])
    except SystemExit as stop:
        if stop.code == 0:  # --help has been printed
            raise
        known = list(option_names(cls) if default is None else flatten(default))
        raise UserError(one_line(complaint.getvalue(), known, prog)) from None


def config_file(name: str | Path) -> Path:
    """The file that `--config` means: a path, or a bare name, as `tiny`, of a file in the checkout's `configs/`.

    A file of that very name in the current folder comes first. What is neither stays as it is, and is no file.
    """
    file = Path(name)
    beside = _CONFIGS / f"{name}.py"
    return beside if _is_bare(file) and not file.exists() and beside.is_file() else file


def load_config(path: str | Path, overrides: Mapping[str, Any] | None = None) -> RunConfig:
    """The `get_config()` of a Python file, or what stands in a saved `config.json`, with some values changed.

    `configs/x.py` may say `from configs.y import get_config`: that is the file beside it, wherever the command is run.

    Args:
        path: see `config_file`.
        overrides: dotted key -> value, as on the command line: `{"train.steps": 20}`. The class of a union is chosen
            in the file, or with `dataclasses.replace` on the config.

    Raises:
        UserError: no such file, a mistake in it, the JSON is not a saved RunConfig, an override's key is unknown, or
            its value does not fit.
    """
    config = _load_file(path).config
    if not overrides:
        return config
    for key, value in overrides.items():
        if not isinstance(value, str | int | float | enum.Enum | os.PathLike | StepRange | None):
            _require_at(config, key, value)
    words = new_options([word for key, value in overrides.items() for word in _option(key, value)])
    config, words = _leave_out_groups(config, words)
    return parse(RunConfig, words, prog="python -m maxlm.train", description="", default=config)


def _require_at(config: Any, key: str, value: Any) -> None:
    """Compare a value that no word stands for with the annotation at a dotted key, if there is one.

    Raises:
        UserError: it does not fit.
    """
    owner, (*groups, name) = config, key.split(".")
    for group in groups:
        known = isinstance(owner, tuple) and group.isdecimal() and int(group) < len(owner)
        owner = owner[int(group)] if known else getattr(owner, group, None)
    if is_config(type(owner)) and name in (hints := typing.get_type_hints(type(owner), include_extras=True)):
        require(key, tuple(value) if isinstance(value, list) else value, hints[name])


def _is_bare(file: Path) -> bool:
    return re.fullmatch(r"\w+", str(file)) is not None


def _option(key: str, value: Any) -> list[str]:
    """An override as words of a command line."""
    match value:
        case list() | tuple():
            return [f"--{key}", *map(str, value)]
        case enum.Enum():
            return [f"--{key}={value.value}"]
        case _:
            return [f"--{key}={value}"]


def _load_file(path: str | Path) -> PythonConfig:
    file = config_file(path)
    if file.is_dir():
        raise UserError(f"--config {path}: is a folder; name a file in it, as the config.json of a run folder")
    if not file.is_file():
        known = [p.name for p in file.parent.glob("*.*") if p.suffix in _SUFFIXES]
        known += [p.stem for p in _CONFIGS.glob("*.py")] if _is_bare(file) else []
        near = difflib.get_close_matches(file.name, known, n=3)
        hint = f"; did you mean {', '.join(str(file.parent / n) for n in near)}?" if near else ""
        raise UserError(f"--config {path}: no such file{hint}")
    if file.suffix == ".json":
        try:
            return PythonConfig(load(RunConfig, file), {})
        except UserError as error:
            raise UserError(f"--config {error}") from error
    return run_python_file(str(file))


def describe_config(config: RunConfig, file_config: RunConfig) -> str:
    """The resolved config, one `key = value` a line, with what the file says where that differs."""
    before, lines = flatten(file_config), []
    for key, value in flatten(config).items():
        note = "" if key in before and before[key] == value else f"    # the file says {before.get(key)!r}"
        lines.append(f"{key} = {value!r}{note}")
    return "\n".join(lines)


def run_command(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Call `main(argv)` and leave the process: its exit code, or one line for each mistake and a non-zero code."""
    argv = sys.argv[1:]
    # Without a standard output (`>&-`) Python has None, and the next file that is opened gets its number.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # LC_ALL=C, and names of files that are no text, end no command
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int | str | None = main(argv)
    except SystemExit as stop:
        # rich makes one of the other
        code = EXIT_BROKEN_PIPE if isinstance(stop.__context__, BrokenPipeError) else stop.code
    except BrokenPipeError:  # `| head` has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python writes the rest when it ends
        code = EXIT_BROKEN_PIPE
    except KeyboardInterrupt as error:
        _complain(error, ["interrupted"], argv)
        code = EXIT_CTRL_C
    except Exception as error:
        if isinstance(error, UserError):
            lines = str(error).splitlines()
        elif isinstance(error, OSError) and error.filename:
            lines = [f"{error.filename}: {error.strerror} (--debug shows the traceback)"]
        else:
            message = " ".join(str(error).split())
            lines = [f"{type(error).__name__}: {message} (--debug shows the traceback)"]
        _complain(error, lines, argv)
        code = error.exit_code if isinstance(error, UserError) else 1
        threading.Thread(target=_leave, args=(code,), daemon=True).start()
    if surroundings.unread and not surroundings.flush_at_once():  # Python would crash
        os._exit(code if isinstance(code, int) else int(code is not None))
    sys.exit(code)


def _complain(error: BaseException, lines: list[str], argv: list[str]) -> None:
    if "--debug" in argv:
        write = functools.partial(traceback.print_exception, error)
    else:
        write = functools.partial(print, "\n".join(f"error: {line}" for line in lines), file=sys.stderr)
    surroundings.patiently(write, _LINGER_S)


def _leave(code: int) -> None:
    """Once the main thread has ended, end the process, for which Python would let any thread of a library wait."""
    while threading.main_thread().is_alive():
        time.sleep(0.1)
    time.sleep(_LINGER_S)
    os._exit(code)


_EXAMPLE = RunConfig(
    model=llama(vocab_size=4096, d_model=256, n_layers=4, n_heads=8, d_ff=688, max_seq_len=512),
    data=DataConfig(datasets=(Dataset(path="data/example"),)),
    train=TrainConfig(steps=100, batch_size=8, seq_len=512),
)
