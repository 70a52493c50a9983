"""Why a step does not fit: what the compiler says of the memory it wanted, and the largest arrays of the program.

XLA:TPU refuses in two forms. Before it optimizes anything it adds up what must be there at the least, and says two
numbers, of which the first is therefore a lower bound. A program that passes, and yet finds no place when it is laid
out, comes with a list of its largest allocations, padding included. XLA:GPU never refuses. Neither lets the arrays that
are alive at the peak be read from a program that it compiled for a machine which is not there; `largest_arrays`
therefore gives the largest that the program's text makes, which need not all be alive at one time.
"""

from __future__ import annotations

import dataclasses
import enum
import itertools
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maxlm.plan.hlo import ArrayShape, Instruction, Program, numbers


class Allocation(enum.Enum):
    """What the memory is for."""

    ARGUMENT = "argument"
    """State or batch."""
    OUTPUT = "output"
    TEMPORARY = "temporary"
    PROGRAM = "program"
    """The compiler's own: code, stacks, constants."""


@dataclass(frozen=True, kw_only=True)
class Buffer:
    """A piece of a device's memory."""

    size: int
    """Bytes, the padding of the layout included."""
    shape: str
    """Of a device's part, as bf16[4,4096,11008]; empty if it is no array."""
    operation: str
    """Where in the traced program it comes from, as jit(step)/jvp(blocks)/while/body/...; empty if nobody knows."""
    source: str
    """Line of this repository, as maxlm/models/block.py:49; empty if nobody knows."""
    allocation: Allocation
    number: int = 1
    """Buffers that are alike in all of this; `size` is that of one."""


@dataclass(frozen=True, kw_only=True)
class DoesNotFit:
    """A step needs more memory than a program may have on a device."""

    message: str
    """The compiler's first sentences; where it refuses nothing, the same in our words."""
    wanted: int
    """Bytes a device; a compiler rounds them to a hundredth of their unit."""
    at_least: bool = False
    """`wanted` is a lower bound: the compiler gave up before it knew the whole, or in words that are not known."""
    available: int
    largest: tuple[Buffer, ...]
    """The largest first; those of the compiler's own list if it gave one, else of the program's text."""
    warnings: tuple[str, ...] = ()
    """Of jax, while it traced and compiled."""
    cpu_seconds: float = 0.0
    """Of processor time, to trace and compile."""


_UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
_SIZE = r"(\d+(?:\.\d+)?) ?([KMGT]?)i?B?"
_FORMS = (
    # Before optimization: no list.
    rf"required for HLO temporaries \({_SIZE}\) exceeds available HBM \({_SIZE}\)",
    rf"Requires {_SIZE}, has {_SIZE} available",
    # When memory is laid out: with a list. What is "used" ends where memory does; what is missing is said beside it.
    rf"memory space hbm\. Used {_SIZE} of {_SIZE} hbm",
)
_EXCEEDED = rf"Exceeded hbm capacity by {_SIZE}"
_ALLOCATIONS = {"Argument": Allocation.ARGUMENT, "Output": Allocation.OUTPUT, "HLO temp": Allocation.TEMPORARY}
"""By the first word of the compiler's label, else by its type."""

# Instructions whose results are others' memory. What a start makes counts where it is done.
_VIEWS = {
    "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "dynamic-update-slice",
    "parameter", "async-update",
}  # fmt: skip


def parse_refusal(text: str, limit: int) -> DoesNotFit | None:
    """What an error of the TPU's compiler says, with arrays as far as it lists them, without their source lines; None:
    it is not about HBM.

    In words that are not known it wants more than the `limit`: bytes that a program may have on the device.
    """
    head = re.split(r"\n|Largest program allocations|Total hbm usage", text)[0].strip()
    if found := next(filter(None, (re.search(form, text) for form in _FORMS)), None):
        wanted, available = _bytes(*found.group(1, 2)), _bytes(*found.group(3, 4))
    elif "RESOURCE_EXHAUSTED" in head and _is_hbm(head):
        wanted, available = limit + 1, limit
    else:
        return None
    if exceeded := re.search(_EXCEEDED, text):
        wanted = available + _bytes(*exceeded.groups())
    return DoesNotFit(
        message=head, wanted=wanted, at_least=exceeded is None, available=available, largest=tuple(_listed(text))
    )


def _is_hbm(message: str) -> bool:
    """And not the memory next to the cores, which a kernel exhausts."""
    words = set(re.findall(r"[a-z]+", message.lower()))
    return "CompileTimeHbmOom" in message or ("hbm" in words and not words & {"vmem", "smem"})


def largest_arrays(program: Program, count: int = 10) -> tuple[Buffer, ...]:
    """The largest arrays in HBM that a compiled program takes or makes, largest first.

    Arrays inside fusions never exist; results that are written into their operand's memory are left out as far as the
    text shows it. Those alike in shape and origin are one buffer, with their number.
    """
    fused = {one.attribute("calls") for _, one, _ in program.running() if one.opcode == "fusion"}
    alike: Counter[Buffer] = Counter()
    for computation, instruction, _ in program.running():
        argument = computation.entry and instruction.opcode == "parameter"
        if computation.name in fused or (not argument and _is_view(program, instruction)):
            continue
        alike.update(
            Buffer(
                size=math.prod(_padded(array)) * array.bits // 8,
                shape=array.name,
                operation=instruction.operation,
                source=program.source(instruction),
                allocation=Allocation.ARGUMENT if argument else Allocation.TEMPORARY,
            )
            for array in instruction.arrays
            if not re.search(r"S\([1-9]\)", array.tiles)  # S(n) is another memory
        )
    found = sorted(alike, key=lambda buffer: -buffer.size)[:count]
    return tuple(dataclasses.replace(buffer, number=alike[buffer]) for buffer in found)


def with_sources(listed: Sequence[Buffer], program: Program) -> tuple[Buffer, ...]:
    """A refusal's buffers with the source lines of the same instructions in a compiled program."""
    sources = {
        instruction.operation: program.source(instruction)
        for computation in program.computations.values()
        for instruction in computation.instructions.values()
    } | {"": ""}
    return tuple(dataclasses.replace(buffer, source=sources.get(buffer.operation, "")) for buffer in listed)


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _listed(text: str) -> Iterator[Buffer]:
    """The numbered entries of a message, largest first in each of its two lists."""
    for entry in re.split(r"\n\s*\d+\. (?=Size: \d)", text)[1:]:
        entry = entry.split("=====")[0]
        size = re.match(rf"Size: {_SIZE}", entry)
        assert size is not None  # the split is where one begins
        field = lambda pattern, entry=entry: (re.findall(pattern, entry) or [""])[0].strip()
        by_type = _ALLOCATIONS.get(field(r"Allocation type: (.*)"), Allocation.PROGRAM)
        yield Buffer(
            size=_bytes(*size.groups()),
            shape=re.sub(r"\{[^}]*\}", "", field(r"Shape: (.*)")),
            operation=field(r'op_name="([^"]*)"'),
            source="",
            allocation=_ALLOCATIONS.get(field(r"XLA label: (\w*)"), by_type),
        )


def _is_view(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":  # one that ends in writing a slice into an operand
        inner = program.computations[instruction.attribute("calls")]
        return inner.source(inner.root.name).opcode == "dynamic-update-slice"
    return instruction.opcode in _VIEWS or instruction.opcode.endswith("-start")


def _padded(array: ArrayShape) -> list[int]:
    """The dims as they are stored, the fastest first: filled up to whole tiles."""
    stored = [array.dims[i] for i in array.order] or array.dims[::-1]
    tile = re.match(r"T\(([\d,]+)\)", array.tiles)
    sizes = numbers(tile.group(1))[::-1] if tile else []
    return [-(-dim // size) * size for dim, size in itertools.zip_longest(stored, sizes[: len(stored)], fillvalue=1)]
