"""The cases that every change must pass; `make faults` does all."""

from __future__ import annotations

from pathlib import Path

import pytest

from faults.case import Case
from faults.groups import all_cases


@pytest.mark.parametrize("case", [pytest.param(case, id=case.name) for case in all_cases() if case.short])
def test_what_is_promised(case: Case, tmp_path: Path) -> None:
    case.check(tmp_path)
