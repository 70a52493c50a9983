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
import math
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from maxlm.plan.hlo import Computation, Instruction, Program
from maxlm.plan.source_lines import SourceLines


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
class Refusal:
    """A compiler's message that HBM does not suffice."""

    message: str
    """Its first sentences."""
    wanted: int
    """Bytes a device; the compiler rounds them to a hundredth of their unit."""
    at_least: bool
    """`wanted` is a lower bound: the compiler gave up before it knew the whole, or in words that are not known."""
    available: int
    largest: tuple[Buffer, ...]
    """Its list, without source lines; empty if it gave none."""


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
_ALLOCATIONS = {"HLO temp": Allocation.TEMPORARY}

# Instructions whose results are others' memory. What a start makes counts where it is done.
_VIEWS = {
    "tuple", "get-tuple-element", "bitcast", "while", "conditional", "call", "opt-barrier", "dynamic-update-slice",
    "parameter", "async-update",
}  # fmt: skip
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


def parse_refusal(text: str, limit: int) -> Refusal | None:
    """What an error of the TPU's compiler says; None: it is not about HBM.

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
    return Refusal(
        message=head, wanted=wanted, at_least=exceeded is None, available=available, largest=tuple(_listed(text))
    )


def _is_hbm(message: str) -> bool:
    """And not the memory next to the cores, which a kernel exhausts."""
    words = set(re.findall(r"[a-z]+", message.lower()))
    return "CompileTimeHbmOom" in message or ("hbm" in words and not words & {"vmem", "smem"})


def largest_arrays(text: str, count: int = 10) -> tuple[Buffer, ...]:
    """The largest arrays in HBM that a compiled program (`compiled.as_text()`) takes or makes, largest first.

    Arrays inside fusions never exist; results that are written into their operand's memory are left out as far as the
    text shows it. Those alike in shape and origin are one buffer, with their number.
    """
    program, lines = Program(text), SourceLines(text)
    fused = {_called(instruction) for _, instruction, _ in program.running() if instruction.opcode == "fusion"}
    alike: Counter[Buffer] = Counter()
    for computation, instruction, _ in program.running():
        argument = computation.entry and instruction.opcode == "parameter"
        if computation.name in fused or (not argument and _is_view(program, instruction)):
            continue
        for shape, size in _arrays(instruction):
            buffer = Buffer(
                size=size,
                shape=shape,
                operation=instruction.operation,
                source=lines.of(instruction.attributes),
                allocation=Allocation.ARGUMENT if argument else Allocation.TEMPORARY,
            )
            alike[buffer] += 1
    found = sorted(alike, key=lambda buffer: -buffer.size)[:count]
    return tuple(dataclasses.replace(buffer, number=alike[buffer]) for buffer in found)


def with_sources(listed: Sequence[Buffer], text: str) -> tuple[Buffer, ...]:
    """A refusal's buffers with the source lines of the same instructions in a compiled program's text."""
    lines = SourceLines(text)
    sources = {
        instruction.operation: lines.of(instruction.attributes)
        for computation in Program(text).computations.values()
        for instruction in computation.instructions.values()
    }
    return tuple(
        dataclasses.replace(buffer, source=sources.get(buffer.operation, "") if buffer.operation else "")
        for buffer in listed
    )


def _bytes(number: str, unit: str) -> int:
    return round(float(number) * _UNITS[unit])


def _listed(text: str) -> Iterator[Buffer]:
    """The numbered entries of a message, largest first in each of its two lists."""
    for entry in re.split(r"\n\s*\d+\. (?=Size: \d)", text)[1:]:
        entry = entry.split("=====")[0]
        size = re.match(rf"Size: {_SIZE}", entry)
        assert size is not None  # the split is where one begins
        field = lambda pattern, entry=entry: (re.findall(pattern, entry) or [""])[0]
        label = field(r"XLA label: (.*)")
        match label.split(" ")[0]:
            case "Argument":
                allocation = Allocation.ARGUMENT
            case "Output":
                allocation = Allocation.OUTPUT
            case _:
                allocation = _ALLOCATIONS.get(field(r"Allocation type: (.*)").strip(), Allocation.PROGRAM)
        yield Buffer(
            size=_bytes(*size.groups()),
            shape=re.sub(r"\{[^}]*\}", "", field(r"Shape: (.*)")).strip(),
            operation=field(r'op_name="([^"]*)"'),
            source="",
            allocation=allocation,
        )


def _called(fusion: Instruction) -> str:
    return re.findall(r"\bcalls=%?([\w.-]+)", fusion.attributes)[0]


def _is_view(program: Program, instruction: Instruction) -> bool:
    if instruction.opcode == "fusion":  # one that ends in writing a slice into an operand
        inner = program.computations[_called(instruction)]
        return _behind_views(inner, inner.root).opcode == "dynamic-update-slice"
    return instruction.opcode in _VIEWS or instruction.opcode.endswith("-start")


def _behind_views(computation: Computation, instruction: Instruction) -> Instruction:
    while instruction.opcode in ("bitcast", "convert", "copy") and len(instruction.operands) == 1:
        instruction = computation.instructions[instruction.operands[0]]
    return instruction


def _arrays(instruction: Instruction) -> Iterator[tuple[str, int]]:
    """Shape and bytes of each array of an instruction's result that is in HBM: a layout's S(n) is another memory."""
    for dtype, sizes, order, tiles in _ARRAY.findall(instruction.shape):
        if re.search(r"S\([1-9]\)", tiles):
            continue
        bits = 8 if dtype == "pred" else int(re.findall(r"\d+", dtype)[0])
        dims = [int(size) for size in sizes.split(",") if size]
        yield f"{dtype}[{sizes}]", math.prod(_padded(dims, order, tiles)) * bits // 8


def _padded(dims: list[int], order: str, tiles: str) -> list[int]:
    """The dims as they are stored: the last of them, in the layout's order, are filled up to whole tiles."""
    stored = [dims[int(i)] for i in order.split(",") if i] if order else dims[::-1]  # fastest first
    tile = re.match(r"T\(([\d,]+)\)", tiles)
    for i, size in enumerate(reversed([int(size) for size in tile.group(1).split(",")]) if tile else ()):
        if i < len(stored):
            stored[i] = -(-stored[i] // size) * size
    return stored
