"""What must be the same on every rank, compared before anything is computed together."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from maxlm.config import UserError
from maxlm.processes.joining import ranks

_ROOT = Path(__file__).parent.parent.parent
_SHOWN = 4


def require_same(what: str, facts: Mapping[str, Any]) -> None:
    """Compare `facts`, of values that JSON has, with those of rank 0; on return all ranks have the same.

    Raises:
        UserError: they differ; it names the first keys that do, with the values here and on rank 0.
    """
    here = ranks()
    if here.size == 1:
        return
    own = {key: repr(value) for key, value in facts.items()}
    theirs: dict[str, str] = here.say(f"send its {what}", own)
    if different := [key for key in {**theirs, **own} if own.get(key) != theirs.get(key)]:
        shown = ", ".join(
            f"{key} = {own.get(key, 'absent')} here and {theirs.get(key, 'absent')} on rank 0"
            for key in different[:_SHOWN]
        )
        more = f", and {len(different) - _SHOWN} more" if len(different) > _SHOWN else ""
        raise UserError(f"{what} differ between ranks: {shown}{more}; start every rank with the same command and files")
    here.meet(f"compare its {what}")


@functools.cache
def code_fingerprint() -> dict[str, str]:
    """Versions, and the SHA-256 of the program's own source files."""
    digest = hashlib.sha256()
    for package in ("maxlm", "kernels_pallas"):
        for file in sorted(path for path in (_ROOT / package).rglob("*.py") if path.is_file()):  # editors leave links
            digest.update(file.relative_to(_ROOT).as_posix().encode() + b"\0" + file.read_bytes() + b"\0")
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "numpy")}
    return {"source code": digest.hexdigest()[:12], "python": platform.python_version(), **versions}
