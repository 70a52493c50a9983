"""Answers that people have ranked, as lines of JSON."""

from __future__ import annotations

import itertools
import json
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from maxlm.config import UserError


class Preferences:
    """A file that grows: `{"messages": [...], "chosen": [...], "rejected": [...]}` for each pair of a ranking. All
    three are lists of messages; the last two have one, the assistant's."""

    def __init__(self, path: Path) -> None:
        """
        Raises:
            UserError: it cannot be written.
        """
        self._path, self._lock = path, threading.Lock()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("ab"):
                pass
        except OSError as error:
            raise UserError(f"--preferences {path}: cannot be written ({error.strerror}); name another file") from error

    def add(self, messages: Sequence[Mapping[str, Any]], ranking: Sequence[str]) -> int:
        """Write the pairs of a ranking, best first, and say how many they are. From any thread.

        Raises:
            OSError: they cannot be written.
        """
        said = lambda text: [{"role": "assistant", "content": text}]
        pairs = [
            {"messages": list(messages), "chosen": said(better), "rejected": said(worse)}
            for better, worse in itertools.combinations(ranking, 2)
        ]
        lines = "".join(json.dumps(pair, ensure_ascii=False) + "\n" for pair in pairs)
        with self._lock, self._path.open("a", encoding="utf-8") as file:
            file.write(lines)
        return len(pairs)
