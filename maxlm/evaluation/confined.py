"""Runs one Python program where it can do no harm. A program of its own, on the standard library, for sandbox.py.

The program sees a file system of a few folders that it can only read (Python, the system's libraries) and a small
`/tmp` of its own; no other process; no network; no user's rights, and no way to new ones. Its memory, processor time,
files and processes have limits. It is the first process of its own space, so that all that it leaves ends with it.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import resource
import signal
import sys
from typing import Any, NoReturn

SETUP_FAILED = 3
"""Exit code where the program was not started; stderr says why."""

_NEWNS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x00020000, 0x08000000, 0x10000000, 0x20000000, 0x40000000
_NOSUID, _NODEV, _BIND, _REC, _PRIVATE = 2, 4, 0x1000, 0x4000, 0x40000
_MOUNT_SETATTR = 442
"""Number of the system call, the same on every architecture since Linux 5.12."""
_AT_FDCWD, _AT_RECURSIVE = -100, 0x8000
_ATTR_READ_ONLY, _ATTR_NOSUID = 1, 2
_SET_PARENT_DEATH_SIGNAL, _SET_NO_NEW_PRIVILEGES = 1, 38
_FIRST_USER, _USERS = 61184, 4336
"""Numbers that no user has (systemd's for services that come and go): the limit on processes counts a user's."""

_libc = ctypes.CDLL(None, use_errno=True)


def _call(name: str, *arguments: Any) -> None:
    """A function of the C library.

    Raises:
        OSError: it failed.
    """
    values = [ctypes.c_char_p(one.encode()) if isinstance(one, str) else one for one in arguments]
    values = [ctypes.c_ulong(one) if isinstance(one, int) and one >= 0 else one for one in values]
    if getattr(_libc, name)(*values) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")


def main() -> int:
    """The settings are JSON in the first argument, the program comes on stdin; how it ended goes to stdout, as JSON."""
    settings = json.loads(sys.argv[1])
    program = sys.stdin.buffer.read()
    as_root = os.geteuid() == 0
    try:
        _call("prctl", _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        ids = os.geteuid(), os.getegid()
        _call("unshare", _NEWNS | _NEWIPC | _NEWPID | _NEWNET | (0 if as_root else _NEWUSER))
        if not as_root:
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/uid_map", f"{ids[0]} {ids[0]} 1")
            _write("/proc/self/gid_map", f"{ids[1]} {ids[1]} 1")
    except OSError as error:
        return _refused(str(error))
    told, tell = os.pipe()  # closed where the program starts
    user = _FIRST_USER + os.getpid() % _USERS if as_root else None
    child = os.fork()
    if not child:
        _become(settings, program, user, tell)
    os.close(tell)
    with os.fdopen(told) as stream:
        if refusal := stream.read():
            os.waitpid(child, 0)
            return _refused(refusal)
    late = False

    def end(*_: Any) -> None:
        nonlocal late
        late = True
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(child, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, settings["seconds"])
    _, status = os.waitpid(child, 0)
    signal.setitimer(signal.ITIMER_REAL, 0)
    print(json.dumps({"late": late, "code": os.waitstatus_to_exitcode(status)}))
    return 0


def _become(settings: dict[str, Any], program: bytes, user: int | None, tell: int) -> NoReturn:
    """Build what the program sees, give up what it must not have, and turn into it."""
    try:
        _mount_all(settings["root"], settings["shown"], settings["disk"])
        os.chroot(settings["root"])
        os.chdir("/tmp")
        with open("program.py", "wb") as file:
            file.write(program)
        os.chmod("program.py", 0o644)
        if user is not None:
            os.chown("program.py", user, user)  # it may hide itself from what it starts
        nothing = os.open(os.devnull, os.O_RDWR)
        os.dup2(nothing, 0)
        os.dup2(nothing, 1)
        for name, limit in settings["limits"].items():
            resource.setrlimit(getattr(resource, name), (limit, limit))
        if user is not None:
            os.setgroups([])
            os.setresgid(user, user, user)
            os.setresuid(user, user, user)
        _call("prctl", _SET_PARENT_DEATH_SIGNAL, signal.SIGKILL, 0, 0, 0)
        _call("prctl", _SET_NO_NEW_PRIVILEGES, 1, 0, 0, 0)
        python = settings["python"]
        os.execve(python, [python, "-I", "-B", "program.py"], {"PATH": "/usr/bin:/bin", "HOME": "/tmp"})
    except (OSError, ValueError) as error:
        os.write(tell, str(error).encode())
    os._exit(SETUP_FAILED)


def _mount_all(root: str, shown: list[str], disk: int) -> None:
    """A root of what is shown, for reading, and an empty `/tmp` of `disk` bytes."""
    _call("mount", "none", "/", "none", _REC | _PRIVATE, None)
    _call("mount", "tmpfs", root, "tmpfs", _NOSUID, "size=1m,mode=755")
    for place in shown:
        copy = root + place
        os.makedirs(os.path.dirname(copy), exist_ok=True)
        if os.path.islink(place):
            os.symlink(os.readlink(place), copy)
            continue
        if os.path.isdir(place):
            os.makedirs(copy, exist_ok=True)
        else:
            os.close(os.open(copy, os.O_CREAT))
        _call("mount", place, copy, "none", _BIND | _REC, None)
    os.mkdir(f"{root}/tmp")
    # struct mount_attr: set, clear, propagation, user namespace; four numbers of 64 bits.
    attributes = (ctypes.c_uint64 * 4)(_ATTR_READ_ONLY | _ATTR_NOSUID, 0, 0, 0)
    where = ctypes.c_char_p(root.encode())
    if _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, where, _AT_RECURSIVE, ctypes.byref(attributes), 32) != 0:
        code = ctypes.get_errno()
        raise OSError(code, f"mount_setattr: {os.strerror(code)}")
    _call("mount", "tmpfs", f"{root}/tmp", "tmpfs", _NOSUID | _NODEV, f"size={disk},mode=1777")


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


def _refused(reason: str) -> int:
    print(reason, file=sys.stderr)
    return SETUP_FAILED


if __name__ == "__main__":
    sys.exit(main())
