"""The one exception that users see as a line instead of a traceback."""

from __future__ import annotations

import shlex
import sys


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the key or file, the value seen, the value allowed, and what to do. Command
    lines print it after `error:` and exit with `exit_code`; `--debug` shows the traceback instead.
    """

    exit_code = 2


class MachineFailure(UserError):
    """What broke by itself, such as a disk or a process, and may go well when it is tried again."""

    exit_code = 1


def pip_install(*packages: str) -> str:
    """The command that installs packages where this program runs, to be pasted into a shell."""
    return shlex.join([sys.executable, "-m", "pip", "install", *packages])


EXIT_INTERRUPTED = 75
"""A run was stopped by a signal, with everything saved: EX_TEMPFAIL of sysexits.h, try again later."""
