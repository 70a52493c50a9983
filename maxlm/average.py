"""`python -m maxlm.average RUN_DIR ... --out DIR`: one model of several checkpoints: the mean of their parameters."""

from __future__ import annotations

import os
import sys

if not __package__:  # run by its path: Python then looks in this file's folder first, where inspect.py is not its own
    sys.path[0] = os.path.abspath(__file__).rpartition(f"{os.sep}maxlm{os.sep}")[0]

from pathlib import Path
from typing import Annotated

import tyro

from maxlm.config import UserError
from maxlm.config.cli import parse, run_command
from maxlm.config.fields import Filled, NotNegative, PathName, Positive, config

_DESCRIPTION = """One model of several checkpoints: the mean of their parameters.

Of the last steps of a run (as Llama 3 was made, arXiv:2407.21783, section 3.4.3), of runs that began alike (model
soups, arXiv:2203.05482), or the average that a run keeps as it goes (optimizer.average). Writes a run folder that
generate, evaluate, convert and checkpoint.init_from take. Exit code 2: one line says what was wrong."""


@config("--")
class AverageOptions:
    """Which checkpoints, and what of them."""

    runs: tyro.conf.Positional[Annotated[tuple[PathName, ...], Filled(note="name run folders")]]
    """Run folders, of which the newest checkpoint is taken, if nothing else is said; or checkpoints in them,
    RUN_DIR/checkpoints/STEP."""
    out: Annotated[PathName, tyro.conf.arg(metavar="DIR")]
    """A new folder."""
    steps: Annotated[tuple[Positive[int], ...], tyro.conf.arg(metavar="STEP ...")] = ()
    """These checkpoints of each run."""
    last: Annotated[Positive[int] | None, tyro.conf.arg(metavar="N")] = None
    """Or so many of the newest ones."""
    weights: Annotated[tuple[NotNegative[float], ...], tyro.conf.arg(metavar="X ...")] = ()
    """Of the checkpoints in order, divided by their sum; none: all weigh the same."""
    ema: bool = False
    """The averages that the runs kept (optimizer.average), in place of the parameters."""
    debug: bool = False
    """Show tracebacks."""

    def __post_init__(self) -> None:
        if self.steps and self.last is not None:
            raise UserError(f"--steps and --last {self.last} both choose checkpoints; use one")
        if self.weights and not any(self.weights):
            raise UserError(f"--weights {self.weights} are all 0; use at least one that is more")


def main(argv: list[str]) -> None:
    """Run the command.

    Raises:
        UserError: a run or an option does not fit.
    """
    options = parse(AverageOptions, argv, prog="python -m maxlm.average", description=_DESCRIPTION, flags=True)

    from maxlm.hub.averaging import checkpoints, write_mean  # these import jax: --help stays instant
    from maxlm.hub.folder import require_new

    out = Path(options.out)
    require_new(out)
    places = checkpoints(options.runs, steps=options.steps, last=options.last)
    if twice := [place for place in places if places.count(place) > 1]:
        raise UserError(f"{twice[0]} is named twice; name each checkpoint once, and say more with --weights")
    if len(places) == 1 and not options.ema:
        raise UserError(f"{places[0]} alone is its own mean; name more runs, or use --steps, --last or --ema")
    if options.weights and len(options.weights) != len(places):
        raise UserError(
            f"--weights has {len(options.weights)} numbers for {len(places)} checkpoints; give one for each"
        )
    write_mean(places, out, weights=options.weights, ema=options.ema)
    what = "the average kept in" if options.ema else "the mean of"
    print(f"{out} is written: {what} {', '.join(map(str, places))}")


if __name__ == "__main__":
    run_command(main)
