"""Which collectives a compiled program runs: of what kind, over which mesh axes, how often, and how many bytes.

XLA's text names the devices of a collective's groups by their place in the mesh, in one of four notations; where a
place differs within a group, data move along that axis. Of a collective in another notation the axes are not known.
"""

from __future__ import annotations

import enum
import itertools
import math
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from maxlm.plan.hlo import Instruction, Program, Runs, numbers

MeshShape = Mapping[str, int]
"""Axis -> size, slowest first, as `mesh.shape`."""


class CollectiveKind(enum.Enum):
    """The collectives of XLA, by its names."""

    ALL_GATHER = "all-gather"
    REDUCE_SCATTER = "reduce-scatter"
    ALL_REDUCE = "all-reduce"
    ALL_TO_ALL = "all-to-all"
    RAGGED_ALL_TO_ALL = "ragged-all-to-all"
    PERMUTE = "collective-permute"
    BROADCAST = "collective-broadcast"


@dataclass(frozen=True)
class Collective:
    """One instruction of the program."""

    kind: CollectiveKind
    axes: tuple[str, ...]
    """Mesh axes along which it moves data; none if every group is one device, or a permute keeps what it has; UNKNOWN
    if the text has the groups in a notation that is not known."""
    group: int
    """Devices that take part together; of a permute, 2; all there are, if nobody knows."""
    runs: Runs
    bytes_each: int
    """Size of the whole array (or arrays): before a reduce-scatter, after an all-gather."""
    operation: str
    """Where in the traced program it comes from."""
    asynchronous: bool
    """The program goes on computing meanwhile: XLA has cut it into a start and a done."""

    @property
    def sent_each(self) -> int:
        """Bytes that a device sends, at the least, each time: those of the bandwidth-optimal ring algorithms (Patarasuk
        and Yuan 2009, doi:10.1016/j.jpdc.2008.09.002). Of a ragged all-to-all the most that fits its buffer."""
        others = self.bytes_each * (self.group - 1) // self.group
        match self.kind:
            case CollectiveKind.ALL_REDUCE:
                return 2 * others
            case CollectiveKind.PERMUTE | CollectiveKind.BROADCAST:
                return self.bytes_each if self.axes else 0
            case _:
                return others

    @property
    def sent(self) -> int:
        """Bytes that a device sends in a run of the program."""
        return self.sent_each * self.runs.count

    def to_json(self, number: int) -> dict[str, str | int | list[str]]:
        """As plain values; of so many that are alike."""
        return {
            "kind": self.kind.value,
            "axes": list(self.axes),
            "group": self.group,
            "number": number,
            "runs": self.runs.count,
            "runs_exact": self.runs.exact,
            "bytes_each": self.bytes_each,
            "bytes_sent": self.sent,
            "asynchronous": self.asynchronous,
            "operation": self.operation,
        }


_OPCODE = re.compile(rf"({'|'.join(kind.value for kind in CollectiveKind)})(-start)?$")
UNKNOWN = ("?",)
"""Axes that nobody knows."""


def collectives(program: Program, mesh: MeshShape) -> list[Collective]:
    """Every collective of a compiled program over a mesh, in the text's order."""
    found = []
    for computation, instruction, runs in program.running():
        if (opcode := _OPCODE.match(instruction.opcode)) is None:
            continue
        kind, starts = CollectiveKind(opcode.group(1)), opcode.group(2) is not None
        axes, group = _members(instruction, mesh)
        arrays = instruction.arrays
        # A start's shape holds operands, results and sometimes more, but an all-reduce's only the results.
        if starts and kind is not CollectiveKind.ALL_REDUCE and instruction.shape.startswith("("):
            number = len(instruction.operands)
            arrays = arrays[number : 2 * number]
        payload = sum(array.size for array in arrays)
        if kind is CollectiveKind.REDUCE_SCATTER:
            payload *= group
        # The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
        if kind is CollectiveKind.ALL_REDUCE and computation.name.startswith("all-reduce-scatter"):
            kind = CollectiveKind.REDUCE_SCATTER
        # A GPU's compiler cuts all of them, and notes which it waits for at once.
        overlaps = starts and '"is_sync":true' not in instruction.attributes
        overlaps |= computation.name.startswith("async_computation")
        found.append(Collective(kind, axes, group, runs, payload, instruction.operation, overlaps))
    return found


def summed(found: Sequence[Collective]) -> list[tuple[Collective, int]]:
    """Those alike in all but runs and place as one, with their number in the text; the most bytes first."""
    alike: dict[Collective, list[Collective]] = defaultdict(list)
    for one in found:
        alike[replace(one, runs=Runs(0), operation="")].append(one)
    merged = []
    for one, several in alike.items():
        runs, operations = sum((each.runs for each in several), Runs(0)), {each.operation for each in several} - {""}
        merged.append((replace(one, runs=runs, operation=" | ".join(sorted(operations))), len(several)))
    return sorted(merged, key=lambda pair: -pair[0].sent)


def _members(instruction: Instruction, mesh: MeshShape) -> tuple[tuple[str, ...], int]:
    """A collective's axes and the devices of a group."""
    n_devices = math.prod(mesh.values())
    try:
        groups = _groups(instruction.attributes, n_devices)
        places = np.unravel_index(groups, list(mesh.values()))
    except ValueError:  # another notation, groups of several sizes, devices that the mesh has not
        return UNKNOWN, n_devices
    moving = [(place != place[:, :1]).any() for place in places]
    return tuple(itertools.compress(mesh, moving)), groups.shape[1]


def _groups(text: str, n_devices: int) -> np.ndarray:
    """Devices that take part together: int [groups, devices of each]; of a permute, sources and targets [pairs, 2].

    Raises:
        ValueError: they are in a notation that is not known.
    """
    if "source_target_pairs={}" in text:
        return np.empty((0, 2), int)
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", text):
        return _listed(pairs.group(1) + "}")
    if listed := re.search(r"replica_groups=\{(\{\d.*?\})\}", text):
        return _listed(listed.group(1))
    if re.search(r"replica_groups=\{\}", text):
        return np.arange(n_devices)[None]
    if iota := re.search(r"replica_groups=(\[\S+\]<=\S+?\](?:T\([\d,]+\))?)", text):
        shape, order = iota.group(1).split("<=")
        return _order(order).reshape(numbers(shape))
    # mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}: a mesh of its own, and the axes, not parts of axes such as
    # 'b':(1)2, that a group spans.
    if named := re.search(r"replica_groups=mesh\[([^]]*)\](?:, device_ids=\(?([^ ]*?)\)?)? \{([^}:]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"'([^']*)'=(\d+)", named.group(1))}
        grid = _order(named.group(2) or f"[{math.prod(sizes.values())}]").reshape(list(sizes.values()))
        spanned = [list(sizes).index(axis) for axis in re.findall(r"'([^']*)'", named.group(3))]
        last = range(-len(spanned), 0)
        return np.moveaxis(grid, spanned, last).reshape(-1, math.prod(grid.shape[i] for i in spanned))
    raise ValueError(text)


def _listed(text: str) -> np.ndarray:
    return np.array([numbers(group) for group in re.findall(r"\{([^}]*)\}", text)])


def _order(text: str) -> np.ndarray:
    """`[4,2]T(1,0)`: the numbers from 0 on as an array of that shape, transposed, in a row."""
    shape, _, permutation = text.partition("T")
    ids = np.arange(math.prod(numbers(shape))).reshape(numbers(shape))
    return ids.transpose(numbers(permutation) or range(ids.ndim)).ravel()
