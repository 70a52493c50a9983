"""Kernels that the config names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from maxlm.config import Backend, UserError


@contextlib.contextmanager
def blaming(key: str, backend: Backend) -> Iterator[None]:
    """Say which key of the config named a backend that cannot do this."""
    try:
        yield
    except ValueError as error:
        if backend is Backend.AUTO:
            raise
        raise UserError(f"execution.kernels.{key} = {backend.value}, but {error}") from error
