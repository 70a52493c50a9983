"""What a decode step of large models moves, as compilers for TPUs and GPUs say; no chip is needed, no time is measured.

    make compilers
    PYTHONPATH=.venv/compilers .venv/bin/python -m benchmarks.decode_compiled [--json FILE] [--only llama2_7b]

The step is the engine's, in bfloat16, of the whole model, with a cache that holds exactly what the texts have, all of
it read. `moved` are the bytes that a device's instructions read from its large memory and write there, counted in the
compiled program's text: of a slice the slice, of what is updated in place the update, what a compiler keeps in its
small memory once. A kernel is given the cache of all layers, of which it reads one: so much is counted. On a GPU
attention is a loop of as many turns as the texts are long, which the program's text does not tell and this file does;
and nothing is tuned, as there is no GPU. `needed` are the bytes of the device's weights (of the table of tokens one row
a text) and of the keys and values. `temporary` is what the step allocates beyond its arguments.

The engine has the layers in a loop and their weights stacked; `written_out` is the same model with arrays of its own
for each layer. A model that does not fit the chips is compiled with two smaller numbers of layers, `compiled_layers`,
and counts of a layer what the second has more than the first. A cache of few layers is no stand-in for one of many: a
TPU's small memory may hold it, and the compiler then copies it there and back.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from importlib.metadata import version
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import CacheFormat, Dtype, ModelConfig, RunConfig
from maxlm.config.cli import load_config
from maxlm.config.sharding import ShardingConfig
from maxlm.inference.step import StepRows, compiler_chooses, empty_texts, jitted_step
from maxlm.models import Execution, abstract_parameters, declared
from maxlm.models.kv_cache import empty_cache
from maxlm.plan.compiled import target_devices
from maxlm.plan.hlo import ArrayShape, Computation, Instruction, Program
from maxlm.plan.machines import parse_machine
from maxlm.plan.serving import analyse_serving
from maxlm.plan.serving_load import ServingLoad
from maxlm.sharding import decoding_layout, make_layout

NOTHING = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call", "conditional", "copy-done",
    "slice-done",
    "async-start", "async-done", "after-all", "iota",
}  # fmt: skip
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcode -> which operand is the update."""
TILE = 128
"""Keys that attention without a kernel reads at once."""


@dataclasses.dataclass(frozen=True)
class Case:
    """What is compiled."""

    preset: str
    target: str
    texts: int = 8
    context: int = 1024
    """Tokens of each."""
    kv_cache: CacheFormat = CacheFormat.DTYPE
    written_out: bool = False
    """Every layer has arrays of its own, and there is no loop."""
    compiled_layers: tuple[int, int] | None = None
    """Of a model that does not fit; None: it does."""

    @property
    def block_size(self) -> int:
        """Such as kernels take."""
        return 16 if self.kv_cache is CacheFormat.DTYPE else 128


CASES = [
    Case("llama2_7b", "tpu:v5e:2x2"),
    Case("llama2_7b", "tpu:v5p:2x2x1"),
    Case("llama2_7b", "gpu:h200:1"),
    Case("llama2_7b", "gpu:h200:1", written_out=True),
    Case("llama2_7b", "tpu:v5e:2x2", kv_cache=CacheFormat.INT8),
    Case("llama2_7b", "tpu:v5p:2x2x1", kv_cache=CacheFormat.INT8),
    Case("llama2_70b", "tpu:v5e:2x4", compiled_layers=(60, 70)),
    Case("llama2_70b", "tpu:v5p:2x2x1"),
    Case("llama2_70b", "gpu:h200:4"),
    Case("llama2_70b", "gpu:h200:4", written_out=True),
    Case("llama2_70b", "tpu:v5p:2x2x1", kv_cache=CacheFormat.INT8),
]


def compiled(config: RunConfig, model: ModelConfig, case: Case) -> jax.stages.Compiled:
    """The step in which each text has one row."""
    run, texts = dataclasses.replace(config, model=model), case.texts
    layout = make_layout(run.sharding, target_devices(parse_machine(case.target)))
    layout = decoding_layout(layout, model.d_model)
    how = Execution.of(run, layout).decoding(layout)
    everywhere = layout.sharding()
    placed = lambda x, where, dtype=None: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where)
    parameters = jax.tree.map(
        lambda array, x: placed(x, x.sharding, how.dtype if array.role.casts else x.dtype),
        declared(model),
        abstract_parameters(model, layout),
    )
    blocks = dict.fromkeys(shapes.windows(model), texts // layout.batch_shards * case.context // case.block_size + 1)
    make = jax.jit(lambda: empty_cache(model, blocks, case.block_size, how, case.kv_cache)).lower()
    cache = jax.tree.map(placed, make.out_info, make.compile().output_shardings)
    known = jax.tree.map(lambda x: placed(x, everywhere), jax.eval_shape(lambda: empty_texts(model, texts)))
    by_slot = layout.sharding(layout.activation("batch", None))
    width = -(-model.max_seq_len // case.block_size)
    tables = {window: jax.ShapeDtypeStruct((texts, width), jnp.int32, sharding=by_slot) for window in blocks}
    numbers = jax.ShapeDtypeStruct((texts,), jnp.int32)
    rows = StepRows(numbers, numbers, numbers, jax.ShapeDtypeStruct((texts,), jnp.bool_), numbers)
    jitted = jitted_step(model, how, cache, known, compiler_chooses(parameters), most_steps=1)
    parameters = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), parameters)
    return jitted.lower(parameters, cache, known, tables, rows, jax.ShapeDtypeStruct((), jnp.int32)).compile()


def temporaries(program: jax.stages.Compiled) -> int:
    """Bytes of a device."""
    memory = program.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def traffic(program: Program, n_layers: int, attention_turns: int) -> int:
    """Bytes between a device's large memory and what computes.

    Args:
        program: a step.
        n_layers: of the cache's arrays.
        attention_turns: of the loop over keys, where there is one.
    """
    run = dict[str, tuple[Computation, int]]()
    left = [(one, 1) for one in program.computations.values() if one.entry]
    while left:  # others are parts of one instruction
        computation, turns = left.pop()
        run[computation.name] = computation, turns
        for one in computation.instructions.values():
            if one.opcode in ("while", "call", "conditional", "async-start"):
                of_attention = one.opcode == "while" and one.operation.endswith("/attention/while")
                inner = turns * (attention_turns if of_attention else 1)
                names = re.findall(r"%([\w.-]+)", one.attributes)
                left += [(program.computations[name], inner) for name in names if name in program.computations]
    return sum(
        moved_by(program, n_layers, computation, one) * program.runs(computation.name).count * turns
        for computation, turns in run.values()
        for one in computation.instructions.values()
    )


def moved_by(program: Program, n_layers: int, computation: Computation, one: Instruction) -> int:
    """What an instruction reads and writes."""
    if one.opcode in NOTHING:
        return 0
    operands = [computation.instructions[name] for name in one.operands if name in computation.instructions]
    if one.opcode == "copy-start":
        target, source, *_ = one.arrays
        return in_memory([source]) + in_memory([target])
    if one.opcode == "slice-start":
        target = one.arrays[1]
        return target.size + in_memory([target])
    if one.opcode == "custom-call" and "paged_attention" in one.operation:
        given = [array for x in operands for array in x.arrays]
        layers = lambda array: n_layers if len(array.dims) >= 4 and array.dims[0] == n_layers else 1
        return in_memory(one.arrays) + sum(in_memory([array]) // layers(array) for array in given)
    if one.opcode != "fusion":
        return touched(one, operands)
    inner = program.computations[one.attribute("calls")]
    places = parameters_of(inner)
    read = sum(min(in_memory(x.arrays), used(program, inner, places[n])) for n, x in enumerate(operands) if n in places)
    root = inner.root
    while root.opcode in ("bitcast", "copy", "convert") and len(root.operands) == 1:
        root = inner.instructions[root.operands[0]]
    if root.opcode in IN_PLACE:
        return read + in_memory([inner.instructions[root.operands[IN_PLACE[root.opcode]]].arrays[0]])
    return read + in_memory(one.arrays)


def parameters_of(computation: Computation) -> dict[int, Instruction]:
    """By number."""
    return {int(x.arguments): x for x in computation.instructions.values() if x.opcode == "parameter"}


def used(program: Program, inner: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that it looks at."""
    users = [x for x in inner.instructions.values() if parameter.name in x.operands]
    found = 0
    for x in users:
        first = x.operands[0] == parameter.name
        if x.opcode in ("dynamic-slice", "gather", "slice") and first:
            found += x.arrays[0].size
        elif x.opcode == "bitcast":
            found += used(program, inner, x)
        elif x.opcode == "fusion":
            called = program.computations[x.attribute("calls")]
            places = [n for n, name in enumerate(x.operands) if name == parameter.name]
            found += sum(used(program, called, parameters_of(called)[n]) for n in places)
        elif not (x.opcode in IN_PLACE and first):
            return parameter.arrays[0].size
    return found


def touched(one: Instruction, operands: list[Instruction]) -> int:
    """Of an instruction that is no fusion."""
    if one.opcode in ("dynamic-slice", "gather", "slice"):
        return 2 * in_memory(one.arrays)
    if one.opcode in IN_PLACE:
        return 2 * in_memory(operands[IN_PLACE[one.opcode]].arrays)
    return in_memory(one.arrays) + sum(in_memory(x.arrays) for x in operands)


def in_memory(arrays: list[ArrayShape]) -> int:
    """Bytes of those that are not in the small memory."""
    return sum(array.size for array in arrays if "S(1)" not in array.tiles)


def figures(case: Case) -> dict[str, Any]:
    """MB that a device of the target moves for one token of each text."""
    machine = parse_machine(case.target)
    sharding = ShardingConfig(data=1, fsdp=1, tensor=machine.devices)
    config = load_config(f"configs/{case.preset}.py")
    execution = dataclasses.replace(config.execution, dtype=Dtype.BFLOAT16)
    config = dataclasses.replace(config, sharding=sharding, execution=execution)
    model = dataclasses.replace(config.model, max_seq_len=case.context)
    counts = []
    for n_layers in case.compiled_layers or (model.n_layers,):
        blocks = model.blocks * n_layers if case.written_out else model.blocks
        program = compiled(config, dataclasses.replace(model, n_layers=n_layers, blocks=blocks), case)
        of_cache, turns = 1 if case.written_out else n_layers, -(-case.context // TILE)
        counts.append((n_layers, traffic(Program(program.as_text() or ""), of_cache, turns), temporaries(program)))
    (few, of_few, _), (many, moved, temporary) = counts[0], counts[-1]
    if many > few:
        moved += (model.n_layers - many) * (moved - of_few) // (many - few)
    load = ServingLoad(slots=case.texts, context=case.context, kv_cache=case.kv_cache, block_size=case.block_size)
    found = analyse_serving(dataclasses.replace(config, model=model), machine, load).step
    return {
        "preset": case.preset,
        "target": case.target,
        "texts": case.texts,
        "context": case.context,
        "kv_cache": case.kv_cache.value,
        "written_out": case.written_out,
        "compiled_layers": [n_layers for n_layers, _, _ in counts],
        "moved_mb": round(moved / 1e6, 1),
        "weights_mb": round(found.weight_bytes / 1e6, 1),
        "cache_mb": round(found.cache_bytes / 1e6, 1),
        "moved_over_needed": round(moved / (found.weight_bytes + found.cache_bytes), 3),
        "temporary_mb": round(temporary / 1e6, 1),
    }


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="preset, target or kv_cache of the wanted cases")
    options = parser.parse_args()
    found = []
    for case in CASES:
        if all(word in (case.preset, case.target, case.kv_cache.value) for word in options.only):
            found.append(figures(case))
            print(json.dumps(found[-1]), flush=True)
    if options.json is not None:
        words = " ".join(["python -m benchmarks.decode_compiled", *(["--only", *options.only] if options.only else [])])
        versions = {name: version(name) for name in ("jax", "libtpu", "jax-cuda13-plugin")}
        about = {"command": words, **versions, "cases": found}
        options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
