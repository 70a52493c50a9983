"""Which body a call runs as: a pure function of the target, the problem and the caller's wishes.

A backend that is named wins, and raises when it cannot do the call. "auto" takes the first body in the chip's recorded
order (`tuning/<chip>.json`) that can; a body of ours that was measured faster than its rivals for this class of shapes
comes before them. Nothing falls back silently: `explain` gives the whole decision, and the
logger "kernels_pallas" one line of each.
"""

from __future__ import annotations

import contextvars
import importlib
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from types import ModuleType
from typing import Any, assert_never

import jax

from kernels_pallas.attention.problem import AttentionBlocks, AttentionProblem
from kernels_pallas.decision import Blocks, Plan, Problem, is_faster, load_table, lookup, meets
from kernels_pallas.glu.problem import GluBlocks, GluProblem
from kernels_pallas.grouped.problem import GroupedBlocks, GroupedProblem
from kernels_pallas.paged.problem import PagedBlocks, PagedProblem
from kernels_pallas.targets import Family, Target, assume, current_target, named


class _Bodies(Mapping[str, ModuleType]):
    """An operation's bodies by name, each imported when it is asked for: a run on a CPU never waits for Pallas."""

    def __init__(self, package: str, *names: str) -> None:
        self._modules = {name: f"kernels_pallas.{package}.{name}" for name in names}

    def __getitem__(self, name: str) -> ModuleType:
        return importlib.import_module(self._modules[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)


ATTENTION = _Bodies("attention", "tpu", "gpu", "cudnn", "xla")
GLU = _Bodies("glu", "tpu", "gpu", "xla")
GROUPED = _Bodies("grouped", "tpu", "loop", "xla")
PAGED = _Bodies("paged", "tpu", "gpu", "xla")

# Where the interpreter stands in for a chip that is not there, the chip whose limits it follows.
_STAND_INS = {"tpu": Target("tpu_v5p", Family.TPU), "gpu": Target("h200", Family.GPU, hopper=True)}

_explaining: contextvars.ContextVar[bool] = contextvars.ContextVar("explaining", default=False)

_log = logging.getLogger("kernels_pallas")


class _Decision(Exception):
    """Carries a plan out of the call that `explain` asks about, before anything is traced."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan


def explain(function: Callable[..., Any], *args: Any, target: str | Target | None = None, **kwargs: Any) -> Plan:
    """What a call of an operation (`flash_attention`, `paged_attention`, `fused_glu`...) runs as, and why; print it.

    Takes the arguments of the call, whose arrays may be jax.ShapeDtypeStruct. Nothing is computed. Of a function that
    makes several calls this is the first.

    Args:
        target: a chip's short name ("tpu_v5p", "h200", "cpu"); by default the one that jax would run on.

    Raises:
        ValueError: the call itself is wrong, or the function makes none.
    """
    is_array = lambda x: all(hasattr(leaf, "shape") for leaf in jax.tree.leaves(x)) and jax.tree.leaves(x)
    arrays = {name: value for name, value in kwargs.items() if is_array(value)}
    static = {name: value for name, value in kwargs.items() if name not in arrays}
    token = _explaining.set(True)
    try:
        with assume(named(target) if isinstance(target, str) else target):
            jax.eval_shape(lambda args, arrays: function(*args, **arrays, **static), args, arrays)
    except _Decision as decision:
        return decision.plan
    finally:
        _explaining.reset(token)
    raise ValueError(
        f"explain: {function} calls none of flash_attention, paged_attention, fused_glu, fused_glu_mlp and "
        "grouped_matmul, or is a jax.jit that has run before; give the function itself"
    )


def operation(problem: Problem) -> tuple[Mapping[str, ModuleType], type[Blocks]]:
    """The bodies of the operation that this is a problem of, in the order in which they are named, and their blocks."""
    match problem:
        case AttentionProblem():
            return ATTENTION, AttentionBlocks
        case GluProblem():
            return GLU, GluBlocks
        case GroupedProblem():
            return GROUPED, GroupedBlocks
        case PagedProblem():
            return PAGED, PagedBlocks
        case _:
            assert_never(problem)


def decide(op: str, problem: Problem, *, backend: str, blocks: Blocks | None, interpret: Any) -> Plan:
    """How a call that is being made runs, on the chip that it is traced for; logged, or given to `explain`.

    Raises:
        ValueError: as `choose`.
    """
    plan = choose(op, problem, current_target(), backend=backend, blocks=blocks, interpret=interpret)
    if _explaining.get():
        raise _Decision(plan)
    _log.info("%s runs as %s on %s: %s", op, plan.backend, plan.target.name, plan.because)
    return plan


def choose(
    op: str,
    problem: Problem,
    target: Target,
    *,
    backend: str = "auto",
    blocks: Blocks | None = None,
    interpret: Any = None,
) -> Plan:
    """How a call would run: a function of its arguments and the chip's table alone.

    Raises:
        ValueError: the named backend is unknown or cannot do this.
    """
    bodies, kind = operation(problem)
    if backend != "auto" and backend not in bodies:
        raise ValueError(f"backend = {backend!r} is unknown to {op}; use auto, {', '.join(bodies)}")
    if interpret and backend not in _STAND_INS:
        raise ValueError(f"interpret = {interpret!r} is for kernels; name backend 'tpu' or 'gpu', or leave it out")
    if blocks is not None and not isinstance(blocks, kind):
        raise ValueError(f"blocks = {blocks!r} must be of kernels_pallas.{kind.__name__}, or None")
    if blocks is not None and (wrong := {name: size for name, size in vars(blocks).items() if not size > 0}):
        raise ValueError(f"blocks = {wrong}: every size must be a positive integer")
    if interpret:
        target = _STAND_INS[backend] if target.family.value != backend else target
    refused = {name: why for name in bodies if (why := _refusal(bodies, name, problem, target))}
    if backend != "auto":
        if backend in refused:
            able = ", ".join(name for name in bodies if name not in refused)
            foreign = backend in _STAND_INS and target.family.value != backend
            hint = " (or interpret=True, slowly)" if foreign else ""
            raise ValueError(f"backend = {backend!r} cannot run this {op}: {refused[backend]}; use {able}{hint}")
        chosen, because = backend, "named by the caller"
        refused |= {name: "another was named" for name in bodies if name not in refused and name != chosen}
    else:
        chosen, because, passed = _automatic(op, problem, target, [name for name in bodies if name not in refused])
        refused |= passed
    return _plan(op, problem, target, chosen, because, refused, blocks, bodies[chosen])


def _refusal(bodies: Mapping[str, ModuleType], name: str, problem: Problem, target: Target) -> str | None:
    """Why a body cannot run this here, or None."""
    if target.family is Family.CPU and name in _STAND_INS:  # known without the module
        return f"target {target.name} is no {'TPU' if name == 'tpu' else 'NVIDIA Hopper'}"
    if name in _STAND_INS and jax.config.values["jax_enable_x64"]:
        return "it is written for 32 bits, and jax_enable_x64 is on"
    return bodies[name].unsupported(problem, target)


def _automatic(op: str, problem: Problem, target: Target, able: list[str]) -> tuple[str, str, dict[str, str]]:
    """The body that "auto" takes, why, and why not the others that could."""
    for name in able:
        row = lookup(op, problem, target, name)
        if row is not None and is_faster(row):
            because = f"measured {row['rival_microseconds'] / row['microseconds']:.2f} times as fast as its best rival"
            return name, because, {other: "measured slower" for other in able if other != name}
    passed = {}
    order = load_table(target.name)["auto"].get(
        op, [{"backend": "xla", "because": "no order is recorded for this chip"}]
    )
    for entry in order:
        name = entry["backend"]
        if name not in able:
            continue
        if not meets(problem, entry.get("match", {})):
            passed[name] = f"recorded for {entry['match']} only"
            continue
        return (
            name,
            entry["because"],
            {other: "later in the recorded order" for other in able if other != name} | passed,
        )
    raise AssertionError(
        f"the order recorded for {op} on {target.name} does not end with a body that can do everything"
    )


def _plan(
    op: str,
    problem: Problem,
    target: Target,
    chosen: str,
    because: str,
    refused: dict[str, str],
    blocks: Blocks | None,
    body: ModuleType,
) -> Plan:
    provenance, default = "given", body.default_blocks(problem, target)
    if blocks is None:
        row = lookup(op, problem, target, chosen)
        provenance = "default" if row is None else row["provenance"]
        blocks = default if row is None else replace(default, **row["blocks"])
    elif default is None:
        raise ValueError(f"blocks are given, but {op} runs as {chosen}, which has none; name a backend that has")
    on_chip = 0 if blocks is None else body.on_chip_bytes(problem, blocks)
    return Plan(
        op=op,
        problem=problem,
        target=target,
        backend=chosen,
        blocks=blocks,
        on_chip_bytes=on_chip,
        provenance=provenance,
        because=because,
        refused={name: why for name, why in refused.items() if name != chosen},
    )
