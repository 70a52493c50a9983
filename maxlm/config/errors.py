"""The one exception that users see as a line instead of a traceback."""


class UserError(Exception):
    """A mistake that the user can mend.

    The message is one line that names the key or file, the value seen, the value allowed, and what to do. Command
    lines print it after `error:` and exit with `exit_code`; `--debug` shows the traceback instead.
    """

    exit_code = 2
