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
        self._lines: dict[int, str] = {}
        for frame, row_text in sorted(tables.get("StackFrames", {}).items()):
            location = tables["FileLocations"][_number("file_location_id", row_text)]
            file = tables["FileNames"][_number("file_name_id", location)].strip('"')
            # XLA prints the caller's number plus one; callers stand before those they call.
            caller = self._lines.get(_number("parent_frame_id", row_text) - 1, "")
            own = f"{file.removeprefix(f'{root}/')}:{_number('line', location)}"
            self._lines[frame] = own if own.startswith("maxlm/") else caller

    def of(self, attributes: str) -> str:
        """The innermost line of an instruction, given the text behind it, as maxlm/models/block.py:49; or empty."""
        return self._lines.get(_number("stack_frame_id", attributes), "")


def _number(key: str, text: str) -> int:
    found = re.search(rf"\b{key}=(\d+)", text)
    return int(found.group(1)) if found else 0
