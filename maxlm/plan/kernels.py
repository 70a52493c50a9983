"""Which hand-written and library kernels a compiled program calls, how often, and whether their registers suffice.

Programs for GPUs are compiled here without autotuning, for want of a GPU to time candidates on: matrix products that
are Triton fusions here may be cuBLAS's on the machine.
"""

from __future__ import annotations

import enum
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from maxlm.plan.hlo import Instruction, Program, Runs


class Maker(enum.Enum):
    """Where the kernel's code comes from."""

    MOSAIC_TPU = "Mosaic TPU"
    MOSAIC_GPU = "Mosaic GPU"
    TRITON = "Triton"
    CUDNN = "cuDNN"
    CUBLAS = "cuBLAS"


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """A kernel, at all places of the program that call it."""

    maker: Maker
    name: str
    """As given to `pallas_call`; of a library, the function's; of XLA's own Triton fusions, what they are made of."""
    calls: int
    """Instructions that call it."""
    runs: Runs
    """Times that a run of the program runs it, loops counted."""
    source: str
    """The first line of this repository that calls it, as maxlm/models/block.py:49; empty if nobody knows."""

    def to_json(self) -> dict[str, str | int]:
        """As plain values."""
        runs = {"runs": self.runs.count, "runs_exact": self.runs.exact}
        return {"maker": self.maker.value, "name": self.name, "calls": self.calls, **runs, "source": self.source}


_TARGETS: Mapping[str, Maker] = {
    "tpu_custom_call": Maker.MOSAIC_TPU,
    "mosaic_gpu": Maker.MOSAIC_GPU,
    "__gpu$xla.gpu.triton": Maker.TRITON,
    "triton_kernel_call": Maker.TRITON,
    "__triton": Maker.TRITON,  # the kind of a fusion
    "__cudnn$": Maker.CUDNN,
    "__cublas$": Maker.CUBLAS,
}
"""How the targets of custom calls, and the kinds of fusions, begin."""


def kernels(program: Program) -> tuple[Kernel, ...]:
    """Every kernel of a compiled program; those that run most come first."""
    calls: dict[tuple[Maker, str], list[tuple[Runs, str]]] = defaultdict(list)
    for _, instruction, runs in program.running():
        target = _target(instruction)
        if maker := next((maker for prefix, maker in _TARGETS.items() if target.startswith(prefix)), None):
            calls[maker, _name(instruction, maker)].append((runs, program.source(instruction)))
    found = [
        Kernel(
            maker=maker,
            name=name,
            calls=len(several),
            runs=sum((runs for runs, _ in several), Runs(0)),
            source=next((source for _, source in several if source), ""),
        )
        for (maker, name), several in calls.items()
    ]
    return tuple(sorted(found, key=lambda kernel: -kernel.runs.count))


def spilled(log: str) -> dict[str, int]:
    """Kernel -> bytes of registers that it stores to memory and loads again, for want of room: the words of ptxas."""
    pattern = r"properties for (\S+?)(?:_mosaic_gpu_kernel)?\n.*? (\d+) bytes spill stores, (\d+) bytes spill loads"
    spills: dict[str, int] = {}
    for kernel, stores, loads in re.findall(pattern, log):
        spills[kernel] = max(spills.get(kernel, 0), int(stores) + int(loads))
    return spills


def total_spills(found: Sequence[Kernel], known: Mapping[str, int]) -> int | None:
    """Bytes spilled by all Mosaic GPU kernels of a program; None: there are none, or not all are known.

    The TPU's compiler tells of no spills, and XLA of none in its own GPU kernels.
    """
    names = [kernel.name for kernel in found if kernel.maker is Maker.MOSAIC_GPU]
    return sum(known[name] for name in names) if names and known.keys() >= set(names) else None


def _target(instruction: Instruction) -> str:
    """Of a custom call, or the kind of a fusion; empty if it has none."""
    pattern = r'"kind":"(__[^"]*)' if instruction.opcode == "fusion" else r'custom_call_target="([^"]*)'
    return next(iter(re.findall(pattern, instruction.attributes)), "")


def _name(instruction: Instruction, maker: Maker) -> str:
    match maker:
        case Maker.CUDNN | Maker.CUBLAS:
            return _target(instruction)
        case Maker.MOSAIC_TPU | Maker.MOSAIC_GPU | Maker.TRITON:
            # The operation's name ends in the kernel's: jit(step)/transpose(jvp(NAME))/pallas_call.
            if instruction.opcode != "fusion" and (named := re.search(r"(\w+)\)*/[^/]+$", instruction.operation)):
                return named.group(1)
            return re.sub(r"(\.\d+|\.clone|\.remat\d*)+$", "", instruction.name)  # XLA's own
