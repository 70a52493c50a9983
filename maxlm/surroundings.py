"""What the user's environment decides: where things may be kept, and whether somebody looks at a terminal."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import rich.console


def cache_folder(name: str) -> Path | None:
    """Where this user's `name` may be kept between runs: `$XDG_CACHE_HOME/maxlm/NAME`, or below ~/.cache.

    None: there is no home, as in a container that runs under a number without a name.
    """
    places = os.environ.get("XDG_CACHE_HOME", ""), os.path.expanduser("~/.cache")
    # A relative one would be another folder for each command (the XDG specification says to pass it over).
    return next((Path(place, "maxlm", name) for place in places if os.path.isabs(place)), None)


def console(*, stderr: bool = False, **options: Any) -> rich.console.Console:
    """Output with colours and moving lines on a terminal, and without a control code anywhere else.

    rich alone would put them into files too, where FORCE_COLOR, TTY_COMPATIBLE or TTY_INTERACTIVE are set, as CI does.
    """
    import rich.console  # imported where something is shown: --help stays instant

    there = (sys.stderr if stderr else sys.stdout).isatty()
    return rich.console.Console(
        stderr=stderr, force_terminal=there, force_interactive=None if there else False, **options
    )
