"""Programs that a model wrote, run each alone in a sandbox that ends with it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.config import UserError
from maxlm.config.fields import Positive, config
from maxlm.evaluation import confined

_SYSTEM = ("/usr", "/bin", "/lib", "/lib64", "/etc/ld.so.cache", "/nix/store", "/dev/null", "/dev/urandom")
"""What a Python needs, where it is there."""
_GRACE_S = 30.0
"""For the sandbox around the program, on a busy machine."""
_TAIL = 400
"""Characters of what a program said of its end."""


@config("sandbox.")
class SandboxLimits:
    """What one program may take. Its time is the exam's."""

    memory_mb: Positive[int] = 1024
    """MiB of address space of each process."""
    file_mb: Positive[int] = 16
    """MiB of each file, and of all that it says on stderr."""
    disk_mb: Positive[int] = 64
    """MiB of all files."""
    processes: Positive[int] = 16
    """Processes and threads at one time."""
    open_files: Positive[int] = 64
    """Open files of each process."""


class Sandbox:
    """Runs programs; each sees nothing of the others and of this machine but Python, see `confined`."""

    def __init__(self, limits: SandboxLimits = SandboxLimits(), *, asked_by: str = "--allow_code") -> None:
        """Tries it.

        Args:
            limits: of each program.
            asked_by: what wants it, for messages.

        Raises:
            UserError: this machine does not let such a sandbox be built.
        """
        self._limits, self._asked_by = limits, asked_by
        if sys.platform != "linux":
            raise UserError(f"{asked_by} needs Linux, this is {sys.platform}; run it in a Linux container or machine")
        failure = self("import json, math, re, collections, typing, heapq", 30.0)
        if failure is not None:
            raise UserError(f"{asked_by}: Python does not run in the sandbox ({failure}); use one that all may read")

    def __call__(self, program: str, seconds: float) -> str | None:
        """None where the program comes to its end in time; else why it did not.

        Raises:
            UserError: the sandbox cannot be built.
        """
        word = secrets.token_hex(16)
        with contextlib.ExitStack() as stack:
            root = stack.enter_context(tempfile.TemporaryDirectory(prefix="maxlm-sandbox-"))
            said = stack.enter_context(tempfile.TemporaryFile())
            ended, end = os.pipe()
            stack.callback(os.close, ended)
            os.set_blocking(ended, False)
            try:
                # The program's own last line, which it does not reach by leaving early with code 0.
                whole = f"{program}\n__import__('os').write({end}, b'{word}')\n"
                found = self._run(whole.encode(errors="replace"), self._settings(root, seconds), end, said)
            finally:
                os.close(end)
            with contextlib.suppress(BlockingIOError):
                reached = os.read(ended, 2 * len(word)) == word.encode()
                if reached and not found["late"]:
                    return None
            if found["late"]:
                return f"took more than {seconds:g} s"
            said.seek(0, os.SEEK_END)
            said.seek(max(0, said.tell() - 4 * _TAIL))
            tail = said.read().decode(errors="replace").strip()[-_TAIL:]
            return f"ended with code {found['code']}: {tail}"

    def _run(self, program: bytes, settings: Mapping[str, Any], end: int, said: Any) -> dict[str, Any]:
        process = subprocess.Popen(
            [settings["python"], "-I", "-S", "-B", confined.__file__, json.dumps(settings)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=said,
            env={},
            cwd="/",
            pass_fds=(end,),
            start_new_session=True,
        )
        try:
            out, _ = process.communicate(program, timeout=settings["seconds"] + _GRACE_S)
        except BaseException as error:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the program has it that it dies with its parent
            process.wait()
            if isinstance(error, subprocess.TimeoutExpired):
                return {"late": True, "code": None}
            raise
        if process.returncode == confined.SETUP_FAILED:
            said.seek(0)
            reason = said.read().decode().strip()
            raise UserError(
                f"{self._asked_by}: this machine does not let a sandbox be built ({reason}); it takes "
                "Linux 5.12 and user namespaces (sysctl kernel.apparmor_restrict_unprivileged_userns=0), or root; in "
                "a container the options --privileged, or --cap-add SYS_ADMIN --security-opt seccomp=unconfined"
            )
        found: dict[str, Any] = json.loads(out)
        return found

    def _settings(self, root: str, seconds: float) -> dict[str, Any]:
        limits, python = self._limits, os.path.realpath(sys.executable)
        own = [os.path.realpath(sys.base_prefix), os.path.dirname(os.path.dirname(python))]
        shown = [place for place in _SYSTEM if os.path.lexists(place)]
        for place in own:
            if not any(Path(place).is_relative_to(one) for one in shown):
                shown.append(place)
        return {
            "root": root,
            "shown": shown,
            "python": python,
            "seconds": seconds,
            "disk": limits.disk_mb << 20,
            "limits": {
                "RLIMIT_CPU": math.ceil(seconds) + 1,  # of each process; the clock ends all of them
                "RLIMIT_AS": limits.memory_mb << 20,
                "RLIMIT_FSIZE": limits.file_mb << 20,
                "RLIMIT_NPROC": limits.processes,
                "RLIMIT_NOFILE": limits.open_files,
                "RLIMIT_CORE": 0,
            },
        }
