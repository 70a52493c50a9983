"""`python -m maxlm.check --config FILE`: test the kinds of a config on this machine, in about a minute.

Exit codes: 0 all checks passed; 1 one failed; 2 a mistake in config or command line, said in one line each.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import argparse
import dataclasses
import json
import time
from pathlib import Path
from typing import Any

from maxlm.checking.shrinking import Shrunk, shrink
from maxlm.checking.verdicts import CheckRow, Verdict
from maxlm.config import RunConfig, UserError
from maxlm.config.cli import describe_config, parse_run, run_command
from maxlm.plan.machines import parse_machine

EXIT_FAILED = 1

_DESCRIPTION = """Does this machine compute what the config means? A small model of the same kinds is checked.

--json FILE        Write the table as JSON too."""

_FORCED = "--xla_force_host_platform_device_count"


def main(argv: list[str]) -> int:
    """The command line.

    Raises:
        UserError: a mistake in the config or the options.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--json")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(f"{error.argument_name}: {error.message}; write --json check.json") from None
    asked = parse_run(rest, prog="python -m maxlm.check", description=_DESCRIPTION)
    if asked.print_config:
        print(describe_config(asked.config, asked.file_config))
        return 0
    out = None if options.json is None else Path(options.json)
    try:
        if out is not None:
            out.touch()
    except OSError as error:
        raise UserError(f"--json {out}: {error.strerror}; name a file that can be written") from error
    target = asked.config.target
    small = shrink(asked.config, None if target is None else parse_machine(target).devices)
    _force_devices(small.devices)
    return _run(asked.config, small, out)


def _force_devices(count: int) -> None:
    """As many devices of this machine's processor, should jax run there; before jax is imported."""
    flags = os.environ.get("XLA_FLAGS", "")
    if _FORCED not in flags:
        os.environ["XLA_FLAGS"] = f"{flags} {_FORCED}={count}".strip()


def _run(config: RunConfig, small: Shrunk, out: Path | None) -> int:
    began = time.perf_counter()
    from maxlm.checking.checklist import check, this_machine  # these import jax, which was told of devices first
    from maxlm.compile_cache import enable_compilation_cache

    enable_compilation_cache()
    machine = this_machine()
    print(f"checking on {machine}; shrunk: {', '.join(small.changes)}\n")
    rows: list[CheckRow] = []
    for row in check(small.config, config.data):
        print(row, flush=True)
        rows.append(row)
    wall, count = time.perf_counter() - began, {kind: sum(row.verdict is kind for row in rows) for kind in Verdict}
    print(f"\n{', '.join(f'{n} {kind.value}' for kind, n in count.items())}; {wall:.0f} s")
    if out is not None:
        told = {"machine": machine, "shrunk": small.changes, "rows": [_json(row) for row in rows], "wall_s": wall}
        out.write_text(json.dumps(told, indent=1) + "\n")
    return EXIT_FAILED if count[Verdict.FAILED] else 0


def _json(row: CheckRow) -> dict[str, Any]:
    """NaN, which JSON has not, as text."""
    values = dataclasses.asdict(row) | {"verdict": row.verdict.name.lower()}
    return {key: str(value) if value != value else value for key, value in values.items()}


if __name__ == "__main__":
    run_command(main)
