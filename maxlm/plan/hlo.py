"""A compiled program's text as computations and instructions, and how many times a run executes each of them.

XLA prints every loop's body once. What a body does happens as many times as the loop turns, times the turns of the
loops around it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from maxlm.plan.source_lines import SourceLines

_COMPUTATION = re.compile(r"(ENTRY )?%?([\w.-]+) \(.*\{$")
_NAMED = re.compile(r"\s+(ROOT )?%?([\w.-]+) = (.*)$")
_KNOWN_TRIPS = re.compile(r'known_trip_count"?[:=]\{"?n"?[:=]"?(\d+)')
_CALLERS = ("fusion", "call", "async-start", "custom-call", "conditional")  # of computations that run once a call
_COPIES = ("copy", "bitcast", "convert", "reshape", "opt-barrier")
_ARRAY = re.compile(r"\b(pred|[a-z]+\d+\w*)\[([\d,]*)\](?:\{([\d,]*)(?::([^}]*))?\})?")


class ArrayShape(NamedTuple):
    """An array's shape, as bf16[16,512]{1,0:T(8,128)S(1)}."""

    name: str
    """Without its layout."""
    dims: list[int]
    bits: int
    """Of one number."""
    order: list[int]
    """Its dims, the fastest first; empty: the last is the fastest."""
    tiles: str
    """And memory."""

    @property
    def size(self) -> int:
        """Bytes, without the padding of the layout."""
        return math.prod(self.dims) * self.bits // 8


@dataclass(frozen=True)
class Instruction:
    """One line of a computation: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    arguments: str
    """The text between the parentheses."""
    attributes: str
    root: bool

    @property
    def operands(self) -> list[str]:
        """Names of the instructions it takes."""
        return re.findall(r"%([\w.-]+)", self.arguments)

    def attribute(self, key: str) -> str:
        """The name behind `key=`, as of a computation that it calls."""
        return re.findall(rf"\b{key}=%?([\w.-]+)", self.attributes)[0]

    @property
    def operation(self) -> str:
        """Where it comes from in the traced program, as jit(step)/jvp(blocks)/while/body/...; empty if nobody knows."""
        return next(iter(re.findall(r'op_name="([^"]*)"', self.attributes)), "")

    @property
    def arrays(self) -> list[ArrayShape]:
        """Of its result: one, or those of a tuple."""
        return [
            ArrayShape(
                f"{dtype}[{dims}]", numbers(dims), 8 if dtype == "pred" else numbers(dtype)[0], numbers(order), tiles
            )
            for dtype, dims, order, tiles in _ARRAY.findall(self.shape)
        ]


@dataclass(frozen=True)
class Runs:
    """How often something happens in one run of the program."""

    count: int
    exact: bool = True
    """False: some loop around it turns a number of times that the text does not tell, and counts once."""

    def __add__(self, other: Runs) -> Runs:
        return Runs(self.count + other.count, self.exact and other.exact)

    def __mul__(self, other: Runs) -> Runs:
        return Runs(self.count * other.count, self.exact and other.exact)


@dataclass(frozen=True)
class Computation:
    """A list of instructions that others call."""

    name: str
    entry: bool
    instructions: Mapping[str, Instruction]

    @property
    def root(self) -> Instruction:
        return next(instruction for instruction in self.instructions.values() if instruction.root)

    def source(self, name: str, opcode: str | None = None) -> Instruction:
        """The instruction of that name, seen through copies.

        Raises:
            LookupError: there is none, or none of that opcode.
        """
        found = self.instructions[name]
        while found.opcode in _COPIES and len(found.operands) == 1:
            found = self.instructions[found.operands[0]]
        if opcode not in (None, found.opcode):
            raise LookupError(f"{found.opcode} {found.name} is no {opcode}")
        return found


class Program:
    """The text of a compiled program (`compiled.as_text()`), taken apart."""

    def __init__(self, text: str):
        self.computations = {computation.name: computation for computation in _computations(text)}
        self._lines = SourceLines(text)
        self._callers: dict[str, list[tuple[str, Runs]]] = {name: [] for name in self.computations}
        self._runs: dict[str, Runs] = {}
        for computation in self.computations.values():
            for instruction in computation.instructions.values():
                for called, runs in self._calls(computation, instruction):
                    self._callers[called].append((computation.name, runs))

    def running(self) -> Iterator[tuple[Computation, Instruction, Runs]]:
        """Every instruction that a run executes, in the text's order, and how often."""
        for computation in self.computations.values():
            if (runs := self.runs(computation.name)).count:
                for instruction in computation.instructions.values():
                    yield computation, instruction, runs

    def runs(self, computation: str) -> Runs:
        """How often a run of the program runs this computation."""
        if computation not in self._runs:
            calls = (self.runs(caller) * each for caller, each in self._callers[computation])
            self._runs[computation] = sum(calls, Runs(int(self.computations[computation].entry)))
        return self._runs[computation]

    def source(self, instruction: Instruction) -> str:
        """The line of this repository that it comes from, as maxlm/models/block.py:49; empty if nobody knows."""
        return self._lines.of(instruction.attributes)

    def _calls(self, computation: Computation, instruction: Instruction) -> Iterator[tuple[str, Runs]]:
        """Computations that an instruction runs, and how often."""
        if instruction.opcode == "while":
            body, condition = instruction.attribute("body"), instruction.attribute("condition")
            turns = self._turns(computation, instruction, body, condition)
            yield body, turns
            yield condition, turns
        elif instruction.opcode in _CALLERS:
            # Of a conditional's branches one runs; each counts as if it did.
            pattern = (
                r"(?:calls|to_apply|true_computation|false_computation)=%?([\w.-]+)|branch_computations=\{([^}]*)\}"
            )
            for one, several in re.findall(pattern, instruction.attributes):
                for called in [one] if one else re.findall(r"%?([\w.-]+)", several):
                    if called in self.computations:
                        yield called, Runs(1)

    def _turns(self, around: Computation, loop: Instruction, body: str, condition: str) -> Runs:
        """Of a while loop: what XLA notes beside it, else from a counter that is compared with a constant."""
        if known := _KNOWN_TRIPS.search(loop.attributes):
            return Runs(int(known.group(1)))
        try:
            test, steps = self.computations[condition], self.computations[body]
            compare = self._unwrapped(test.root)
            counter, bound = compare.operands[:: {"LT": 1, "GT": -1}[compare.attribute("direction")]]
            index = int(test.source(counter, "get-tuple-element").attribute("index"))
            start = around.source(around.source(loop.operands[0], "tuple").operands[index], "constant")
            end = test.source(bound, "constant")
            advance = self._unwrapped(steps.instructions[steps.source(steps.root.name, "tuple").operands[index]])
            (by,) = (one for one in map(steps.source, advance.operands) if one.opcode == "constant")
            if (compare.opcode, advance.opcode) != ("compare", "add") or int(by.arguments) <= 0:
                raise LookupError("counted in another way")
            return Runs(max(0, -(-(int(end.arguments) - int(start.arguments)) // int(by.arguments))))
        except (LookupError, ValueError):
            return Runs(1, exact=False)

    def _unwrapped(self, instruction: Instruction) -> Instruction:
        """What a fusion of one operation does, with the fusion's operands; anything else as it is."""
        if instruction.opcode != "fusion":
            return instruction
        inner = self.computations[instruction.attribute("calls")]
        places = {one.name: int(one.arguments) for one in inner.instructions.values() if one.opcode == "parameter"}
        if any(name not in places for name in inner.root.operands):
            return instruction
        operands = [f"%{instruction.operands[places[name]]}" for name in inner.root.operands]
        return replace(inner.root, arguments=", ".join(operands))


def numbers(text: str) -> list[int]:
    """Those in a text."""
    return [int(digits) for digits in re.findall(r"\d+", text)]


def _computations(text: str) -> Iterator[Computation]:
    name, entry = "", False
    instructions: dict[str, Instruction] = {}
    for line in text.splitlines():
        if line.startswith("}"):
            if name:
                yield Computation(name, entry, instructions)
            name, instructions = "", {}
        elif header := _COMPUTATION.match(line):
            name, entry, instructions = header.group(2), header.group(1) is not None, {}
        elif name and (found := _NAMED.match(line)):
            instructions[found.group(2)] = _instruction(found.group(2), found.group(3), found.group(1) is not None)


def _instruction(name: str, rest: str, root: bool) -> Instruction:
    end = _closing(rest, 0) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opening = rest.index("(")
    end = _closing(rest, opening)
    return Instruction(name, shape, rest[:opening], rest[opening + 1 : end], rest[end + 1 :], root)


def _closing(text: str, opening: int) -> int:
    """Where the parenthesis that opens at `opening` closes."""
    depth = 0
    for found in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if found.group() == "(" else -1
        if depth == 0:
            return found.start()
    raise ValueError(f"a parenthesis is not closed in {text[:80]!r}")
