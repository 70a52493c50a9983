"""`python -m maxlm.plan --config FILE --target tpu:v5p:4x4x4`: does it fit, what does it send, how fast can it be?
With `--serve`: the same of decoding.

Exit codes: 0 it fits; 3 it does not; 2 a mistake in config or command line, said in one line each; 1 anything else.
"""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from maxlm import surroundings
from maxlm.config import Reinforced, RunConfig, UserError
from maxlm.config.cli import describe_config, parse_known, parse_run, run_command
from maxlm.config.serialize import save
from maxlm.plan.advice import change_json, cheapest_changes
from maxlm.plan.analysis import CompilerReport, Json, Tier, analyse, mesh_text, to_json
from maxlm.plan.breaks import what_breaks_first
from maxlm.plan.machines import Machine, parse_machine, prepare_compiler
from maxlm.plan.picture import check_picture, write_picture
from maxlm.plan.search import Search, search, search_json
from maxlm.plan.serving_load import ServingLoad
from maxlm.plan.tables import (
    print_changes,
    print_compiled,
    print_report,
    print_search,
    print_targets,
    print_verdict,
)

EXIT_DOES_NOT_FIT = 3

VERIFIED = 3
MOST_COMPILED = 10
"""Candidates that a search compiles at the most, when the best of its arithmetic do not fit after all."""

_ENDLESS = 10_000
"""Characters in a line of a file."""

_EXAMPLES = {"--target": "gpu:h200:8", "--verify": "3", "--out": "my_run.json", "--picture": "memory.png"}
"""Of the options that take a value."""

_DESCRIPTION = """Before a machine is rented: does a run fit, what does it send, how fast can it be at best?

--target NAME      Machine: tpu:v5p:4x4x4, tpu:v6e:8x8, gpu:h200:8, gpu:h200:16x8 (hosts x GPUs), cpu:8; default: the
                   config's target.
--compile          Ask the machine's own compiler too; its word on memory decides.
--search           Find the fastest layout that fits: mesh, remat, micro-batches, ZeRO, optimizer.
--verify N         With --search --compile: how many of the best must fit by the compiler, 1 to 10 (3).
--out FILE.json    With --search: write the best as a config that --config takes.
--picture FILE     Draw where memory goes, as FILE.png or FILE.html.
--serve            Serve the model instead of training it; --serve --help lists what may then be said of texts.
--breaks           Also tell what stops this run from growing to 4,096 and to 65,536 devices.
--json             Print one JSON object instead of tables.
--targets          List the machines that there are, and nothing else."""


_SERVING = """Before a machine is rented: memory, FLOPs and the best speed of a model that is served there.

--config, --target, --json and overrides stand beside these; of the config model, sharding and execution.dtype count."""


def main(argv: list[str]) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    for option in _EXAMPLES:
        parser.add_argument(option, type=int if option == "--verify" else str)
    for option in ("--compile", "--search", "--serve", "--breaks", "--json", "--targets"):
        parser.add_argument(option, action="store_true")
    try:
        options, rest = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        name = str(error.argument_name)
        example = f"{name} {_EXAMPLES.get(name, '')}".strip()
        raise UserError(f"{name}: {error.message}; write {example}") from None
    if options.targets:
        if others := [word for word in argv if word not in ("--targets", "--debug")]:
            raise UserError(f"--targets stands alone; leave out {' '.join(others)}")
        print_targets(_console())
        return 0
    load: ServingLoad | None = None
    if options.serve:
        load, rest = parse_known(ServingLoad, rest, prog="python -m maxlm.plan --serve", description=_SERVING)
    asked = parse_run(rest, prog="python -m maxlm.plan", description=_DESCRIPTION)
    if asked.print_config:
        print(describe_config(asked.config, asked.file_config))
        return 0
    machine: str | None = asked.config.target if options.target is None else options.target
    if machine is None:
        raise UserError("--target is missing, and the config has none; name a machine, such as --target tpu:v5p:4x4x4")
    _check(options)
    target = parse_machine(machine)
    if load is not None:
        return _serve(asked.config, target, load, options)
    if options.compile:
        prepare_compiler(target)  # also to say at once that there is no compiler
    config = asked.config
    if config.train.phases:
        config = _largest_phase(config, target, options)
    return _search(config, target, options) if options.search else _plan(config, target, options)


def _largest_phase(config: RunConfig, target: Machine, options: argparse.Namespace) -> RunConfig:
    """What is planned of a run with phases.

    Raises:
        UserError: a phase does not fit the machine's mesh; or `--out` would write one without the others.
    """
    if options.out is not None:
        raise UserError("--out would write one of train.phases alone; leave it out, and copy the sharding by hand")
    if not options.search:
        config.validate(target.devices)
    chosen = config.most_demanding
    parts, phases = chosen.train.micro_batches, len(config.train.phases) + 1
    _console(quiet=options.json).print(
        f"of {phases} phases, the one with the most tokens in a micro-batch (train.micro_batches = {parts}):"
    )
    return chosen


def _plan(config: RunConfig, target: Machine, options: argparse.Namespace) -> int:
    """One config, as it is."""
    console = _console(quiet=options.json)
    found = analyse(config, target)
    breaks = what_breaks_first(config, target) if options.breaks or options.json else []
    print_report(found, breaks, console)
    more: dict[str, Json] = {}
    if isinstance(config.task, Reinforced):
        from maxlm.plan.rollout_time import rollout_time  # these import jax: other plans do without
        from maxlm.plan.serving_tables import print_rollout

        if (time := rollout_time(found)) is not None:
            print_rollout(time, console)
            more["rollout"] = asdict(time)
    if options.compile:
        found = found.with_compiled(_ask_compiler(config, target, console))
        print_verdict(found, console)
    changes = [] if found.fits else cheapest_changes(config, target)
    if options.json:
        advice: dict[str, Json] = {} if found.fits else {"changes": [change_json(one) for one in changes]}
        print(json.dumps(to_json(found, breaks) | more | advice, indent=1))
    elif not found.fits:
        print_changes(changes, console)
    if options.picture is not None:
        write_picture(found, Path(options.picture))
    return 0 if found.fits else EXIT_DOES_NOT_FIT


def _serve(config: RunConfig, target: Machine, load: ServingLoad, options: argparse.Namespace) -> int:
    """The model, served."""
    from maxlm.plan.serving import analyse_serving, serving_json  # these import jax: other plans do without
    from maxlm.plan.serving_tables import print_serving

    found = analyse_serving(config, target, load)
    if options.json:
        print(json.dumps(serving_json(found), indent=1))
    else:
        print_serving(found, _console())
    return 0 if found.fits else EXIT_DOES_NOT_FIT


def _search(config: RunConfig, target: Machine, options: argparse.Namespace) -> int:
    """Every sensible layout; with the compiler, the best of them."""
    found, failed, wanted = search(config, target), dict[int, str](), options.verify or VERIFIED
    if options.compile:
        # A program that reads the JSON may read what is written to standard error as a failure.
        found, failed = _verify(found, wanted, _console(stderr=True, quiet=options.json))
    compiled = [one for one in found.preferred if one.compiled is not None]
    fitting = [one for one in compiled if one.fits] if options.compile else found.preferred
    chosen = next(iter(fitting), None)
    changes = [] if chosen is not None else cheapest_changes(config, target, searched=True)
    if options.json:
        values: dict[str, Json] = {
            "tier": (Tier.COMPILED if options.compile else Tier.ANALYTIC).value,
            **search_json(found, chosen),
            "changes": [change_json(one) for one in changes],
        }
        if options.compile:
            told: list[Json] = [{"place": place, "message": message} for place, message in failed.items()]
            values["verified"] = {"wanted": wanted, "fit": len(fitting), "compiled": len(compiled), "failed": told}
        print(json.dumps(values, indent=1))
    else:
        console = _console()
        print_search(found, chosen, console)
        if options.compile:
            console.print(f"verified {len(fitting)} of {wanted} by the compiler, which compiled {len(compiled)}")
        for place, message in failed.items():
            console.print(f"number {place + 1} cannot be compiled: {message}", style="yellow", markup=False)
        if chosen is None:
            print_changes(changes, console)
    if chosen is None:
        return EXIT_DOES_NOT_FIT
    if options.out is not None:
        save(replace(chosen.config, target=str(target)), Path(options.out))
    if options.picture is not None:
        write_picture(analyse(chosen.config, target), Path(options.picture))
    return 0


def _verify(found: Search, wanted: int, progress: Console) -> tuple[Search, dict[int, str]]:
    """The search with the compiler's word on its best, of MOST_COMPILED at the most, until so many fit. Of those that
    the compiler does not take at all: their place in the ranking, and why.

    Raises:
        UserError: it takes none of them.
    """
    ranked, fitting, failed = list(found.ranked), 0, dict[int, str]()
    for one in found.preferred[:MOST_COMPILED]:
        if fitting == wanted:
            break
        place = ranked.index(one)
        progress.print(
            f"compiling number {place + 1}: {mesh_text(one.mesh)} ({fitting} of {wanted} verified)", style="dim"
        )
        try:
            ranked[place] = one.with_compiled(_ask_compiler(one.config, found.target))
            fitting += ranked[place].fits
        except UserError as error:
            failed[place] = str(error)
    if failed and all(one.compiled is None for one in ranked):
        raise UserError(next(iter(failed.values())))
    return replace(found, ranked=tuple(ranked)), failed


def _ask_compiler(config: RunConfig, target: Machine, console: Console | None = None) -> CompilerReport:
    """The compiler's word, also on the console."""
    # They import jax, which must find what `prepare_compiler` has set.
    from maxlm.plan.cache import cached_compile
    from maxlm.plan.compiled import compiler_report

    result, cached = cached_compile(config, target)
    answer = compiler_report(result)
    if console is not None:
        print_compiled(answer, console, cached=cached)
    return answer


def _console(*, stderr: bool = False, quiet: bool = False) -> Console:
    """As wide as the terminal. In a pipe or a file nobody wants lines cut: what reads it can."""
    there = (sys.stderr if stderr else sys.stdout).isatty() or "COLUMNS" in os.environ
    return surroundings.console(stderr=stderr, highlight=False, quiet=quiet, width=None if there else _ENDLESS)


def _check(options: argparse.Namespace) -> None:
    """The options go together, and the files can be written; said before any work is done."""
    training = [f"--{name}" for name in ("compile", "search", "breaks", "verify", "out", "picture")
                if getattr(options, name) not in (None, False)]  # fmt: skip
    if options.serve and training:
        raise UserError(f"{training[0]} is of training; leave it out with --serve")
    if options.verify is not None:
        if not (options.search and options.compile):
            raise UserError(f"--verify {options.verify} is for a search that asks the compiler; add --search --compile")
        if not 1 <= options.verify <= MOST_COMPILED:
            raise UserError(f"--verify {options.verify} must be from 1 to {MOST_COMPILED}, for example --verify 3")
    if options.picture is not None:
        check_picture(Path(options.picture))
        _check_writable("--picture", Path(options.picture))
    if options.out is not None:
        out = Path(options.out)
        if not options.search:
            raise UserError(f"--out {out} is where --search writes what it finds; add --search")
        if out.suffix != ".json":
            raise UserError(f"--out {out} must end in .json, for example --out {out.with_suffix('.json')}")
        _check_writable("--out", out)


def _check_writable(option: str, file: Path) -> None:
    if not file.parent.is_dir():
        raise UserError(f"{option} {file}: there is no folder {file.parent}; make it, or name another file")
    if file.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UserError(f"{option} {file} cannot be written; name another file")


if __name__ == "__main__":
    run_command(main)
