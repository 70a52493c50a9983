"""Several sources of rewards as one number a completion, each with a weight."""

from __future__ import annotations

import ast
import functools
import hashlib
import inspect
import json
import math
import numbers
import os
import re
import traceback
import types
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, assert_never

import numpy as np
import numpy.typing as npt

from maxlm.config import (
    BadReward,
    ExactReward,
    FormatReward,
    FunctionReward,
    JudgeReward,
    LengthReward,
    ModelReward,
    NumberReward,
    PatternReward,
    ProgramReward,
    RewardSource,
    SchemaReward,
    ShardingConfig,
    UserError,
)
from maxlm.config.fields import shown
from maxlm.config.json_file import read_object
from maxlm.config.rewards import SERVERS
from maxlm.evaluation import verifiers
from maxlm.evaluation.json_schema import CheckedSchema, EndlessSchema, json_value
from maxlm.evaluation.marking import exact_match, normalized_match
from maxlm.evaluation.sandbox import Sandbox, SandboxLimits
from maxlm.evaluation.time_limit import TimeUp, within
from maxlm.processes.joining import on_rank_0
from maxlm.recipes.completions import Completion, Score, Scoring, asked
from maxlm.recipes.judge import ModelJudge, ServerJudge
from maxlm.recipes.model_reward import RewardModel

RewardFunction = Callable[[str, str, Mapping[str, Any]], float]
"""Of a config file: what was said last before the completion, the completion, the record."""

_Floats = npt.NDArray[np.float64]


class Judged(NamedTuple):
    """What the sources say of n completions."""

    total: _Floats
    """[n]: the weighted sum; NaN where it is not usable."""
    parts: dict[str, _Floats]
    """By the name of each source, [n], without its weight; NaN where it has no number."""
    usable: npt.NDArray[np.bool_]
    """[n]: every source has a number."""


class _Source(NamedTuple):
    key: str
    name: str
    weight: float
    everywhere: bool
    """Whether every process must ask it, as a model lies on the devices of all; else the first asks for all."""
    score: Scoring
    fingerprint: str
    """Of what the config does not say; empty if it says all."""


class RewardSum:
    """The sources of a task, made once. To be called in the main thread, which alone can hold time limits."""

    def __init__(
        self,
        sources: Sequence[RewardSource],
        on_bad: BadReward,
        *,
        tokenizer: str,
        sharding: ShardingConfig,
        functions: Mapping[str, RewardFunction] = types.MappingProxyType({}),
    ) -> None:
        """Reads models and files, tries the sandbox, and greets servers.

        Args:
            sources: at least one.
            on_bad: what becomes of a completion for which one has no number.
            tokenizer: fingerprint of the policy's.
            sharding: how models are laid out, as the policy is.
            functions: those of the config file, by name.

        Raises:
            UserError: a model, file, server or function is not there or does not fit; or there is no sandbox.
        """
        self._on_bad, self._sources = on_bad, list[_Source]()
        for i, task in enumerate(sources):
            key = f"task.rewards.{i}"
            try:
                name, score, everywhere, fingerprint = _opened(task, tokenizer, sharding, functions)
            except UserError as error:
                raise UserError(f"{key} = {type(task).__name__}: {error}") from error
            taken = {one.name for one in self._sources}
            name = next(one for one in (name, *(f"{name}_{n}" for n in range(2, len(sources) + 2))) if one not in taken)
            self._sources.append(_Source(key, name, task.weight, everywhere, score, fingerprint))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the sources, in order; each once."""
        return tuple(one.name for one in self._sources)

    @property
    def fingerprint(self) -> str:
        """SHA-256 in hex of what decides rewards and is not in the config: parameters of models, files, the source text
        of functions. Of a server it is the address and the name of the model: what lies behind them nobody knows."""
        return hashlib.sha256(json.dumps([one.fingerprint for one in self._sources]).encode()).hexdigest()

    def __call__(self, completions: Sequence[Completion]) -> Judged:
        """All processes call it, with the same completions.

        Raises:
            UserError: a source has no number for one, and that stops the run; or a server does not answer.
        """
        parts = dict[str, _Floats]()
        total, usable = np.zeros(len(completions)), np.ones(len(completions), bool)
        for source in self._sources:
            ask = functools.partial(_scores, source, completions)
            scores = ask() if source.everywhere else on_rank_0(f"ask the reward {source.name}", ask)
            if self._on_bad is BadReward.STOP:
                for completion, score in zip(completions, scores, strict=True):
                    if isinstance(score, str):
                        raise UserError(_complaint(source, completion, score))
            values = np.array([math.nan if isinstance(score, str) else score for score in scores], np.float64)
            parts[source.name], usable = values, usable & ~np.isnan(values)
            total = total + source.weight * values
        return Judged(np.where(usable, total, math.nan), parts, usable)


def _scores(source: _Source, completions: Sequence[Completion]) -> list[Score]:
    """One for each; what is no finite number has become words."""
    scores = [_number(score) for score in source.score(completions)]
    if len(scores) != len(completions):
        raise UserError(f"{source.key}: {source.name} gives {len(scores)} rewards for {len(completions)} completions")
    return scores


def _number(value: Any) -> Score:
    if isinstance(value, str):
        return value
    try:
        number = float(value)
    except OverflowError:
        return f"gives {shown(value)}, which is too large"
    return number if math.isfinite(number) else f"gives {number}, must give a finite number"


def _complaint(source: _Source, completion: Completion, why: str) -> str:
    return (
        f"{source.key}: {source.name}, of prompt {completion.prompt.number} and the completion "
        f"{shown(completion.text)}: {why}; task.on_bad_reward = skip leaves such completions out"
    )


def _opened(
    task: RewardSource, tokenizer: str, sharding: ShardingConfig, functions: Mapping[str, RewardFunction]
) -> tuple[str, Scoring, bool, str]:
    """Name, score, whether every process asks, fingerprint."""
    match task:
        case ModelReward():
            model = RewardModel(task, tokenizer=tokenizer, sharding=sharding)
            return "model", model, True, model.fingerprint
        case JudgeReward() if task.judge.startswith(SERVERS):
            server = ServerJudge(task)
            return "judge", server, False, server.fingerprint
        case JudgeReward():
            judge = ModelJudge(task, sharding)
            return "judge", judge, True, judge.fingerprint
        case FunctionReward():
            function = _function(task.name, functions)
            return task.name, _each(functools.partial(_called, task, function)), False, source_hash(function)
        case ProgramReward():
            sandbox = Sandbox(SandboxLimits(memory_mb=task.memory_mb), asked_by="ProgramReward")
            return "program", functools.partial(_tested, task, sandbox), False, ""
        case SchemaReward():
            schema = None if task.path is None else read_object(Path(task.path), "a JSON schema")
            opened = None if schema is None else CheckedSchema(schema, str(task.path))
            contents = "" if schema is None else hashlib.sha256(json.dumps(schema).encode()).hexdigest()
            return "schema", _each(functools.partial(_fits, task, opened)), False, contents
        case NumberReward():
            return "number", _each(functools.partial(_same_number, task)), False, ""
        case ExactReward():
            return "exact", _each(functools.partial(_exact, task)), False, ""
        case PatternReward():
            return "pattern", _each(functools.partial(_matches, task)), False, ""
        case LengthReward():
            length = lambda one: verifiers.overlong(len(one.tokens) - one.heard, task.at_most, task.buffer)
            return "length", _each(length), False, ""
        case FormatReward():
            form = lambda one: verifiers.has_format(one.text, task.tags, rest=task.rest, begun=task.begun)
            return "format", _each(form), False, ""
        case _:
            assert_never(task)


class _NoNumber(Exception):
    """Why a source has none."""


def _each(score: Callable[[Completion], Any]) -> Scoring:
    """Of one completion after the other."""

    def one(completion: Completion) -> Score:
        try:
            value: Score = score(completion)
        except (_NoNumber, TimeUp) as error:
            return str(error)
        return value

    return lambda completions: list(map(one, completions))


def _of_record(completion: Completion, key: str) -> Any:
    record = completion.prompt.record
    if key not in record:
        raise _NoNumber(f"its record has no key {key!r}; it has {', '.join(map(str, record))}")
    return record[key]


def _words(value: Any, key: str) -> str:
    """A text or a number of the record, as text."""
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise _NoNumber(f"{key!r} of its record is {shown(value)}, must be a text or a number")
    return value if isinstance(value, str) else f"{value:,}" if abs(value) == math.inf else repr(value)


def _same_number(task: NumberReward, completion: Completion) -> float:
    wanted = _words(_of_record(completion, task.key), task.key)
    if verifiers.last_number(wanted) is None:
        raise _NoNumber(f"{task.key!r} of its record is {shown(wanted)}, which has no number")
    text = verifiers.part_after(completion.text, task.after)
    return float(text is not None and verifiers.same_number(text, wanted, task.tolerance))


def _exact(task: ExactReward, completion: Completion) -> float:
    found = _of_record(completion, task.key)
    wanted = [_words(one, task.key) for one in (found if isinstance(found, list) else [found])]
    text = verifiers.part_after(completion.text, task.after)
    if text is None:
        return 0.0
    return normalized_match(text, wanted) if task.normalized else exact_match(text, wanted)


def _matches(task: PatternReward, completion: Completion) -> float:
    pattern = task.pattern
    if pattern is None:
        pattern = _words(_of_record(completion, task.key), task.key)
    try:
        return float(verifiers.matches(completion.text, pattern, task.timeout_s))
    except (re.error, RecursionError, OverflowError) as error:
        raise _NoNumber(f"{task.key!r} of its record is no regular expression of Python ({error})") from error


def _fits(task: SchemaReward, opened: CheckedSchema | None, completion: Completion) -> float:
    schema = opened
    if schema is None:
        found = _of_record(completion, task.key)
        try:
            schema = CheckedSchema(
                json_value(found) if isinstance(found, str) else found, f"{task.key!r} of its record"
            )
        except (UserError, ValueError) as error:
            raise _NoNumber(str(error)) from error
    text = verifiers.part_after(completion.text, task.after)
    try:
        return float(text is not None and verifiers.fits_schema(text, schema, task.timeout_s))
    except EndlessSchema as error:
        raise _NoNumber(str(error)) from error


def _tested(task: ProgramReward, sandbox: Sandbox, completions: Sequence[Completion]) -> list[Score]:
    """Several at once: each waits for processes of its own."""

    def one(completion: Completion) -> float:
        found = _of_record(completion, task.key)
        tests = "\n".join(_words(line, task.key) for line in (found if isinstance(found, list) else [found]))
        try:
            empty = not ast.parse(tests).body
        except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
            raise _NoNumber(f"{task.key!r} of its record is no Python ({error})") from error
        if empty:
            raise _NoNumber(f"{task.key!r} of its record is empty, so that every program would pass")
        return float(verifiers.passes(completion.text, tests, sandbox, task.timeout_s))

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return [score for scores in pool.map(lambda each: _each(one)([each]), completions) for score in scores]


def _called(task: FunctionReward, function: RewardFunction, completion: Completion) -> float:
    record = types.MappingProxyType(dict(completion.prompt.record))
    try:
        value: Any = within(task.timeout_s, lambda: function(asked(completion), completion.text, record))
    except (Exception, SystemExit) as error:
        if isinstance(error, TimeUp | UserError):
            raise
        frame = traceback.extract_tb(error.__traceback__)[-1]
        words = " ".join(f"{type(error).__name__}: {error}".split())
        raise _NoNumber(f"raises {words} ({Path(frame.filename).name}:{frame.lineno})") from error
    if not isinstance(value, numbers.Real | np.bool_):
        raise _NoNumber(f"gives {shown(value)}, must give a number")
    return float(value) if isinstance(value, np.bool_) else value  # type: ignore[return-value]


def _function(name: str, functions: Mapping[str, RewardFunction]) -> RewardFunction:
    """
    Raises:
        UserError: there is none of that name.
    """
    if name in functions:
        return functions[name]
    if not functions:
        raise UserError(
            f"name = {name!r}: no function came with this config, as a saved config.json has none; give --config "
            f"the .py file that defines {name}, or call maxlm.run(config, functions={{{name!r}: {name}}})"
        )
    raise UserError(f"name = {name!r}: there is no such function; there are {', '.join(sorted(functions))}")


def source_hash(function: Callable[..., Any]) -> str:
    """SHA-256 in hex of a function's source text; where that is not to be had, of its compiled code. What it calls is
    not in it."""
    inner = inspect.unwrap(function)
    try:
        text = inspect.getsource(inner).encode()
    except (OSError, TypeError):
        code = getattr(inner, "__code__", None)
        text = repr(type(inner)).encode() if code is None else code.co_code + repr(code.co_consts).encode()
    return hashlib.sha256(text).hexdigest()
