"""`python -m maxlm.train --config configs/tiny.py`: train a language model.

Exit codes: 0 finished; 75 stopped by SIGTERM or SIGINT with everything saved (run the same command to go on);
2 a mistake in config, data or run folder, said in one line each; 1 anything else.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import functools
import signal
from collections.abc import Mapping, Sequence
from types import FrameType, MappingProxyType
from typing import TYPE_CHECKING

from maxlm.config import RunConfig, UserError
from maxlm.config.cli import describe_config, parse_run, run_command
from maxlm.config.errors import EXIT_INTERRUPTED

if TYPE_CHECKING:
    from maxlm.inference.load import LoadedRun
    from maxlm.recipes.rewards import RewardFunction
    from maxlm.training.loop import Result


def main(
    config: RunConfig,
    *,
    allow_change: Sequence[str] = (),
    functions: Mapping[str, RewardFunction] = MappingProxyType({}),
) -> Result[LoadedRun]:
    """Run `config` to its last step, or until a signal; continues what `config.run_dir` holds. Also `maxlm.run`.

    Args:
        config: all of it.
        allow_change: see `maxlm.training.loop.run`.
        functions: by name, what a `FunctionReward` of the config calls; a command takes those of its config file.

    Returns:
        How it ended; its `run` is the model in its last state, as `maxlm.load_run` would read it, from memory.

    Raises:
        UserError: see `maxlm.training.loop.run`.
    """
    from maxlm.recipes import recipe  # jax is loaded only once there is something to run
    from maxlm.training.loop import run

    return run(config, functools.partial(recipe, functions=functions), allow_change=allow_change)


def command(argv: list[str]) -> int:
    """The command line."""
    asked = parse_run(argv, prog="python -m maxlm.train", description="Train a language model.")
    if asked.print_config:
        print(describe_config(asked.config, asked.file_config))
        return 0
    try:
        result = main(asked.config, allow_change=asked.allow_change, functions=asked.functions)
        return EXIT_INTERRUPTED if result.interrupted else 0
    except Exception as error:
        if (line := _out_of_memory(asked.config, error)) is None:
            raise
        raise OutOfMemory(line) from error


class OutOfMemory(UserError):
    """Of a device or of the host."""

    exit_code = 1


def _out_of_memory(config: RunConfig, error: Exception) -> str | None:
    """What takes the most memory, and which keys make it less; None: that is not what happened."""
    from maxlm.plan.exhausted import describe_exhausted, is_exhausted

    if isinstance(error, UserError) or not is_exhausted(error):
        return None
    return describe_exhausted(config.most_demanding, error)


def _stop(number: int, frame: FrameType | None) -> None:
    """Of SIGTERM while Python loads jax, which takes seconds; `Interruption` takes over from here. An exception could
    come up in one of jax's callbacks, which drop them."""
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _stop)
    run_command(command)
