"""Which kernels a run takes, said once each."""

from __future__ import annotations

import logging
from collections.abc import Callable
from types import TracebackType
from typing import Self


class KernelChoices(logging.Handler):
    """While entered, passes each new line that kernels_pallas logs of its decisions to `say`."""

    def __init__(self, say: Callable[[str], None]) -> None:
        super().__init__(logging.INFO)
        self._say = say
        self._said: set[str] = set()
        self._logger = logging.getLogger("kernels_pallas")

    def emit(self, record: logging.LogRecord) -> None:
        line = record.getMessage()
        if line not in self._said:
            self._said.add(line)
            self._say(line)

    def __enter__(self) -> Self:
        self._before = self._logger.level, self._logger.propagate
        self._logger.propagate = False  # some libraries print whatever reaches the root
        self._logger.setLevel(logging.INFO)
        self._logger.addHandler(self)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._logger.removeHandler(self)
        level, self._logger.propagate = self._before
        self._logger.setLevel(level)
