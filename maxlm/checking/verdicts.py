"""What a check says: a row with the number seen, the bound, and the verdict."""

from __future__ import annotations

import enum
from dataclasses import dataclass

from maxlm.config import Dtype


class Verdict(enum.Enum):
    """How a check ended."""

    PASSED = "passed"
    FAILED = "FAILED"
    NOT_HERE = "not here"


@dataclass(frozen=True, kw_only=True)
class CheckRow:
    """One line of the table."""

    name: str
    verdict: Verdict
    seen: float | None = None
    bound: float | None = None
    """What `seen` had to be, or to stay below."""
    at_least: bool = False
    """The bound is a lower one."""
    note: str = ""
    """Of what the numbers are; or why there are none."""

    @staticmethod
    def at_most(name: str, seen: float, bound: float, note: str) -> CheckRow:
        """Passed if the number is that small; NaN is not."""
        verdict = Verdict.PASSED if seen <= bound else Verdict.FAILED
        return CheckRow(name=name, verdict=verdict, seen=seen, bound=bound, note=note)

    @staticmethod
    def more_than(name: str, seen: float, bound: float, note: str) -> CheckRow:
        """Passed if the number is larger; NaN is not."""
        verdict = Verdict.PASSED if seen > bound else Verdict.FAILED
        return CheckRow(name=name, verdict=verdict, seen=seen, bound=bound, at_least=True, note=note)

    @staticmethod
    def not_here(name: str, reason: str) -> CheckRow:
        """Neither passed nor failed: this machine or this model cannot be asked."""
        return CheckRow(name=name, verdict=Verdict.NOT_HERE, note=reason)

    @staticmethod
    def broken(name: str, error: Exception) -> CheckRow:
        """Failed, as it raised."""
        words = " ".join(str(error).split())
        return CheckRow(name=name, verdict=Verdict.FAILED, note=f"{type(error).__name__}: {words}")

    def __str__(self) -> str:
        numbers = ""
        if self.seen is not None and self.bound is not None:
            numbers = f"{self.seen:.3g} {'>' if self.at_least else '<='} {self.bound:.3g}"
            if self.verdict is Verdict.FAILED:
                numbers = f"{self.seen:.3g}, not {'>' if self.at_least else '<='} {self.bound:.3g}"
        return f"{self.verdict.value:<8}  {self.name:<34}  {numbers:<24}  {self.note}".rstrip()


_FLOAT32 = {"cpu": 2e-5, "gpu": 5e-3, "tpu": 2e-2}
"""Of products of float32 as jax multiplies them: exactly, as TF32 with 11 bits, as bfloat16 with 8."""


def rounding(dtype: Dtype, platform: str) -> float:
    """How far two ways to sum the same numbers may lie apart, as a part of the largest of them.

    Args:
        dtype: of the numbers that are multiplied.
        platform: of the device, as jax calls it.
    """
    return 2e-2 if dtype is Dtype.BFLOAT16 else _FLOAT32.get(platform, _FLOAT32["tpu"])
