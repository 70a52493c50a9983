"""A model that gives vectors and no text, served without an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from maxlm.inference.engine import EngineStats
from maxlm.inference.request import BadRequest, Delta, Request


class VectorsOnly:
    """What the server has in place of an engine's loop."""

    failure: str | None = None

    def __init__(self, name: str) -> None:
        self._name = name

    def check(self, request: Request) -> None:
        """
        Raises:
            UserError: always.
        """
        raise BadRequest(f"{self._name} gives vectors and no text; ask /v1/embeddings")

    def submit(self, request: Request, on_delta: Callable[[Delta], None]) -> Any:
        """
        Raises:
            UserError: always.
        """
        self.check(request)

    def cancel(self, ticket: Any) -> None:
        """There is nothing to end."""

    @property
    def stats(self) -> EngineStats:
        """Of an engine that does nothing."""
        return EngineStats(**dict.fromkeys(EngineStats.__dataclass_fields__, 0))
