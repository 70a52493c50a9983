"""`python -m maxlm.launch --target gke --config configs/llama7b.py --print`: start a training run somewhere else.

The templates are in `launch/`; each works by hand, too, and ends in the same `python -m maxlm.train` line. What is
filled in are quoted words, never pieces of a program. Nothing is rendered for a mesh that does not fit the devices.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import argparse
from collections.abc import Sequence

from maxlm.config import UserError
from maxlm.config.cli import config_file, parse_known, parse_run, run_command
from maxlm.launching.destinations import DESTINATIONS, Gke, SkyPilot, SlurmClean, TpuPod
from maxlm.launching.render import ROOT, render
from maxlm.launching.request import Launch, check
from maxlm.launching.start import start

_PROG = "python -m maxlm.launch"
_USAGE = f"""\
{_PROG} --target TARGET --config FILE [--print] [options of the target] [overrides]

Start `python -m maxlm.train --config FILE [overrides]` somewhere. docs/launch.md has a section for each target.
`--target slurm-clean` starts `python -m maxlm.data clean` and takes its options instead.

--target TARGET    One of {", ".join(DESTINATIONS)}; with --help: the options of that target.
--config FILE      Python file with get_config(), or a saved config.json.
--print            Show the script or manifest, and start nothing. Needs no credentials and no network.
--debug            Show tracebacks.
"""


def parse_launch(argv: Sequence[str]) -> tuple[Launch, bool]:
    """Read `--target TARGET --config FILE [--print] [options of the target] [overrides]`; also whether to print only.

    Raises:
        UserError: something is missing, unknown or of the wrong type, in words of the command line.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--target")
    parser.add_argument("--config")
    parser.add_argument("--print", action="store_true")
    parser.add_argument("--debug", action="store_true")
    try:
        options, rest = parser.parse_known_args(list(argv))
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}") from None
    if options.target is None and ({"-h", "--help"} & set(rest)):
        print(_USAGE)
        sys.exit(0)
    if options.target not in DESTINATIONS:
        known = ", ".join(DESTINATIONS)
        raise UserError(f"--target {options.target or 'is missing'}: choose one of {known} (--help says what they are)")
    prog = f"{_PROG} --target {options.target}"
    target, overrides = parse_known(DESTINATIONS[options.target], rest, prog=prog, description=_USAGE)
    if isinstance(target, SlurmClean):
        if options.config is not None:
            raise UserError(f"--config {options.config} belongs to training; --target slurm-clean has a --pipeline")
        from maxlm.data.clean import checked_for_slurm  # here, so that a training run is launched without it

        return Launch(target=target, config=None, arguments=checked_for_slurm(overrides)), options.print
    if options.config is None:
        raise UserError("--config is missing; name a file, for example --config configs/llama7b.py")
    asked = parse_run(["--config", options.config, *overrides], prog=_PROG, description="")
    if asked.print_config:
        raise UserError("--print_config belongs to maxlm.train; here --print shows what would be launched")
    file = config_file(options.config).resolve()
    if file.is_relative_to(ROOT):  # where every target runs the command
        file = file.relative_to(ROOT)
    elif isinstance(target, TpuPod | Gke | SkyPilot):
        raise UserError(
            f"--config {options.config}: is outside {ROOT}, which is all that the machines get; move it there"
        )
    return Launch(target=target, config=asked.config, arguments=(str(file), *overrides)), options.print


def main(argv: list[str]) -> int:
    """The command line."""
    launch, only_print = parse_launch(argv)
    check(launch)
    if only_print:
        print(render(launch), end="")
        return 0
    return start(launch)


if __name__ == "__main__":
    run_command(main)
