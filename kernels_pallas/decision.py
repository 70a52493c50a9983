"""What is chosen for a call, from what, and why: the answer of `explain`, and the recorded tables it comes from.

`tuning/<chip>.json` records two things of a chip: in which order the bodies are tried when the caller does not name one
("auto", with the reason), and block sizes for classes of shapes ("rows"). A row says where it comes from: "measured" on
that chip, with the microseconds of our kernel and of its best rival, or "compiled", which says that it compiles and
fits, and nothing of speed.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, assert_never

from kernels_pallas.attention.problem import AttentionBlocks, AttentionProblem
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem
from kernels_pallas.masks import count_visible
from kernels_pallas.paged.problem import PagedBlocks, PagedProblem
from kernels_pallas.targets import Target

TUNING = Path(__file__).parent / "tuning"

Problem = AttentionProblem | GluProblem | GroupedProblem | PagedProblem
Blocks = AttentionBlocks | GluBlocks | GroupedBlocks | PagedBlocks


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a call runs as. `str(plan)` is a table for people."""

    op: str
    problem: Problem
    target: Target
    backend: str
    blocks: Blocks | None
    """None: the body has no blocks of ours (cuDNN)."""
    on_chip_bytes: int
    """VMEM or shared memory of the largest of the call's kernels, by our model; 0 where the compiler decides."""
    provenance: str
    """Of the blocks: "measured", "compiled", "default" or "given"."""
    because: str
    refused: dict[str, str]
    """Every other body, and why it was not taken."""

    @property
    def flops(self) -> int:
        """Of the forward pass; attention counts visible scores, a grouped product takes all rows to be of a group, and
        paged attention all to stand at the end of full tables.

        The backward is 2.5 (attention) or 2 times it.
        """
        p = self.problem
        match p:
            case AttentionProblem():
                return 2 * p.B * p.N * count_visible(p.mask, p.T, p.S, p.q_offset or 0) * (p.H + p.Hv)
            case GluProblem():
                return 2 * p.M * p.D * p.F * 2 + (2 * p.M * p.F * p.down if p.down else 0)
            case GroupedProblem():
                return 2 * p.M * p.D * p.F
            case PagedProblem():
                return 2 * p.T * p.N * p.most_keys * (p.H + p.Hv)
            case _:
                assert_never(p)

    @property
    def hbm_bytes(self) -> int:
        """The least the forward pass can move: every argument read once and every result written once."""
        p = self.problem
        match p:
            case AttentionProblem():
                elements = p.B * (p.T * p.N * (p.H + p.Hv) + p.S * p.K * (p.H + p.Hv))
                return elements * p.dtype.itemsize + 4 * p.B * p.N * p.T
            case GluProblem():
                saved = 2 * p.M * p.F if p.save == "ag" else 0
                down = p.F * p.down + p.M * p.down if p.down else 0
                return (p.M * p.D + 2 * p.D * p.F + p.M * p.F + saved + down) * p.dtype.itemsize
            case GroupedProblem():
                return (p.M * p.D + p.E * p.D * p.F + p.M * p.F) * p.dtype.itemsize
            case PagedProblem():
                return p.T * (p.most_keys * p.K * p.bytes_of_key + p.N * (p.H + p.Hv) * p.dtype.itemsize)
            case _:
                assert_never(p)

    def __str__(self) -> str:
        blocks = "none" if self.blocks is None else ", ".join(f"{k} {v}" for k, v in vars(self.blocks).items())
        lines = [
            ("problem", _describe(self.problem)),
            ("target", self.target.name),
            ("runs as", f"{self.backend}: {self.because}"),
            ("blocks", f"{blocks} ({self.provenance})"),
            ("on chip", f"{self.on_chip_bytes / 2**20:.2f} MiB" if self.on_chip_bytes else "left to the compiler"),
            ("forward", f"{self.flops:.3g} FLOPs, at least {self.hbm_bytes / 2**20:.1f} MiB of memory traffic"),
            *((f"not {name}", why) for name, why in self.refused.items()),
        ]
        return "\n".join([self.op] + [f"  {name:<9} {text}" for name, text in lines])


def _describe(problem: Problem) -> str:
    parts = []
    for field in fields(problem):
        value = getattr(problem, field.name)
        if value is not None and value is not False:
            parts.append(field.name if value is True else f"{field.name} {value}")
    return ", ".join(parts)


@functools.cache
def load_table(chip: str) -> dict[str, Any]:
    """The tuning table of a chip; one without entries where none is recorded.

    Raises:
        ValueError: the file is damaged.
    """
    path = TUNING / f"{chip}.json"
    if not path.exists():
        return {"chip": chip, "auto": {}, "rows": []}
    try:
        table = json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: is not JSON ({error}); restore the file") from error
    for row in table["rows"]:
        if row["provenance"] not in ("measured", "compiled"):
            raise ValueError(f'{path}: provenance {row["provenance"]!r} must be "measured" or "compiled"')
    return table


def lookup(op: str, problem: Problem, target: Target, backend: str) -> dict[str, Any] | None:
    """The first recorded row whose conditions the problem meets."""
    for row in load_table(target.name)["rows"]:
        if row["op"] == op and row["backend"] == backend and meets(problem, row["match"]):
            return row
    return None


def meets(problem: Problem, conditions: dict[str, Any]) -> bool:
    """Whether fields of the problem equal the conditions; "min_X" and "max_X" bound the field X."""

    def holds(key: str, wanted: Any) -> bool:
        if key.startswith("min_"):
            return getattr(problem, key[4:]) >= wanted
        if key.startswith("max_"):
            return getattr(problem, key[4:]) <= wanted
        value = getattr(problem, key)
        return str(value) == wanted if isinstance(wanted, str) else value == wanted

    return all(holds(key, wanted) for key, wanted in conditions.items())


def is_faster(row: dict[str, Any] | None) -> bool:
    """Whether a row records that our kernel beat its best rival on the chip."""
    return row is not None and row["provenance"] == "measured" and row["microseconds"] < row["rival_microseconds"]
