"""Which line of the sources an instruction of a compiled program comes from."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
"""Of this repository, to which paths are relative."""

_ROW = re.compile(r"(\d+) (.*)")


class SourceLines:
    """The tables of stack frames at the head of a compiled program's text.

    An instruction names one frame; each frame names its file and line, and the frame that called it. Only frames of
    the folder `maxlm` count: of a kernel or of another package, the line of the model that calls it says more.
    """

    def __init__(self, text: str, root: Path = ROOT):
        tables: dict[str, dict[int, str]] = {}
        table: dict[int, str] = {}
        for line in text.splitlines():
            if line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
                table = tables.setdefault(line, {})
            elif row := _ROW.fullmatch(line):
                table[int(row.group(1))] = row.group(2)
            elif line.startswith(("%", "ENTRY")):  # the instructions begin
                break
        self._tables, self._root = tables, root
        self._lines: dict[int, str] = {}

    def of(self, attributes: str) -> str:
        """The innermost line of an instruction, given the text behind it, as maxlm/models/block.py:49; or empty."""
        return self._line(_number("stack_frame_id", attributes))

    def _line(self, frame: int) -> str:
        if frame not in self._lines:
            self._lines[frame] = ""  # also for a frame that is its own caller
            if row := self._tables.get("StackFrames", {}).get(frame):
                location = self._tables["FileLocations"][_number("file_location_id", row)]
                file = self._tables["FileNames"][_number("file_name_id", location)].strip('"')
                own = f"{file.removeprefix(f'{self._root}/')}:{_number('line', location)}"
                # XLA prints the caller's number plus one.
                caller = _number("parent_frame_id", row) - 1
                self._lines[frame] = own if own.startswith("maxlm/") else self._line(caller)
        return self._lines[frame]


def _number(key: str, text: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", text)
    return int(found.group(1)) if found else 0
