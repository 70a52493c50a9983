"""Pictures of memory: their lengths are the report's bytes, and they need nothing from outside."""

from __future__ import annotations

import dataclasses
import re
import struct
import sys
from pathlib import Path

import pytest

from maxlm.config import UserError
from maxlm.config.cli import load_config
from maxlm.plan.analysis import CompilerReport, Forecast, analyse
from maxlm.plan.machines import parse_machine
from maxlm.plan.picture import bars, write_picture

ROOT = Path(__file__).parent.parent


def seven_b(target: str = "tpu:v5p:4x4x4") -> Forecast:
    return analyse(load_config(str(ROOT / "configs/llama7b.py")), parse_machine(target))


def test_the_parts_are_the_peak() -> None:
    report = seven_b()
    assert sum(one.size for one in bars(report)) == report.memory.peak


@pytest.mark.parametrize("target", ["tpu:v5p:4x4x4", "tpu:v5e:8x8", "cpu:64"])
def test_the_bars_of_a_page_are_as_long_as_their_bytes(target: str, tmp_path: Path) -> None:
    """Where it fits, where it does not, and where no limit is known."""
    report = seven_b(target).with_compiled(CompilerReport(fits=True, peak=20 * 2**30, details={}))
    write_picture(report, tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    widths = [float(width) for width in re.findall(r'class="part" style="width:([\d.]+)%', page)]
    sizes = [one.size for one in bars(report)]
    marks = dict(re.findall(r'class="mark( compiled)?" style="left:([\d.]+)%', page))
    per_byte = float(marks[" compiled"]) / (20 * 2**30)
    assert widths == pytest.approx([size * per_byte for size in sizes], abs=0.01)
    assert max(*map(float, marks.values()), sum(widths)) <= 100
    assert ("" in marks) == (report.limit is not None)
    if report.limit is not None:
        assert float(marks[""]) == pytest.approx(report.limit * per_byte, abs=0.01)


def test_a_page_needs_nothing_from_outside(tmp_path: Path) -> None:
    report = seven_b()
    write_picture(dataclasses.replace(report), tmp_path / "memory.html")
    page = (tmp_path / "memory.html").read_text(encoding="utf-8")
    assert not re.search(r"http|src=|<link|<script|@import|url\(", page)
    assert page.startswith("<!DOCTYPE html>") and page.endswith("</html>\n")


def test_a_png_is_a_picture(tmp_path: Path) -> None:
    write_picture(seven_b(), tmp_path / "memory.png")
    data = (tmp_path / "memory.png").read_bytes()
    assert data[:8] == b"\x89PNG\r\n\x1a\n"
    width, height = struct.unpack(">II", data[16:24])
    assert width > 800 and height > 300


def test_without_matplotlib_there_is_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("matplotlib")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(UserError, match=r"pip install 'maxlm\[viz\]'"):
        write_picture(seven_b(), tmp_path / "memory.png")


@pytest.mark.parametrize("name", ["memory.gif", "memory"])
def test_a_name_that_cannot_be_is_a_line(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--picture"):
        write_picture(seven_b(), tmp_path / name)
