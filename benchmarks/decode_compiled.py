"""What a decode step of large models moves, as compilers for TPUs and GPUs say; no chip is needed, no time is measured.

    make compilers
    PYTHONPATH=.venv/compilers .venv/bin/python -m benchmarks.decode_compiled [--json FILE] [--only llama2_7b]

The step is the engine's, in bfloat16, with a cache that holds exactly what the texts have, all of it read. `moved` are
the bytes that a device's instructions read from its large memory and write there, counted in the compiled program's
text: of a slice the slice, of what is updated in place the update, what a compiler keeps in its small memory once. A
kernel counts with its whole arguments, and so models are compiled with one layer and with two, written out; what the
second adds counts for each layer. On a GPU attention is a loop of as many turns as the texts are long, which the text
of the program does not tell: there nothing is counted. `needed` are the bytes of the device's weights (of the table of
tokens one row a text) and of the keys and values. `temporary` is what the step allocates beyond its arguments, of the
whole model with `--whole` (minutes for TPUs).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import re
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost"}

import jax
import jax.numpy as jnp

from maxlm import shapes
from maxlm.config import Dtype, ModelConfig, RunConfig
from maxlm.config.cli import load_config
from maxlm.config.sharding import ShardingConfig
from maxlm.inference.step import StepRows, compiler_chooses, empty_texts, jitted_step
from maxlm.models import Execution, abstract_parameters, declared
from maxlm.models.kv_cache import empty_cache
from maxlm.plan.compiled import target_devices
from maxlm.plan.hlo import ArrayShape, Computation, Instruction, Program
from maxlm.plan.machines import GpuMachine, parse_machine
from maxlm.plan.serving import analyse_serving
from maxlm.plan.serving_load import ServingLoad
from maxlm.sharding import decoding_layout, make_layout

BLOCK = 16
NOTHING = {
    "parameter", "get-tuple-element", "tuple", "bitcast", "constant", "while", "call", "conditional", "copy-done",
    "slice-done",
    "async-start", "async-done", "after-all", "iota",
}  # fmt: skip
IN_PLACE = {"dynamic-update-slice": 1, "scatter": 2}
"""Opcode -> which operand is the update."""
CASES = [  # preset, target, texts, tokens of each
    ("llama2_7b", "tpu:v5e:2x2", 8, 1024),
    ("llama2_7b", "tpu:v5p:2x2x1", 8, 1024),
    ("llama2_7b", "gpu:h200:1", 8, 1024),
    ("llama2_70b", "tpu:v5e:4x4", 8, 1024),
    ("llama2_70b", "tpu:v5p:2x2x1", 8, 1024),
    ("llama2_70b", "gpu:h200:4", 8, 1024),
]


def compiled(config: RunConfig, model: ModelConfig, target: str, texts: int, context: int) -> jax.stages.Compiled:
    """The step in which each text has one row."""
    run = dataclasses.replace(config, model=model)
    layout = make_layout(run.sharding, target_devices(parse_machine(target)))
    layout = decoding_layout(layout, model.d_model)
    how = Execution.of(run, layout).decoding(layout)
    everywhere = layout.sharding()
    placed = lambda x, where, dtype=None: jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=where)
    parameters = jax.tree.map(
        lambda array, x: placed(x, x.sharding, how.dtype if array.role.casts else x.dtype),
        declared(model),
        abstract_parameters(model, layout),
    )
    blocks = dict.fromkeys(shapes.windows(model), texts // layout.batch_shards * context // BLOCK + 1)
    make = jax.jit(lambda: empty_cache(model, blocks, BLOCK, how)).lower()
    cache = jax.tree.map(placed, make.out_info, make.compile().output_shardings)
    known = jax.tree.map(lambda x: placed(x, everywhere), jax.eval_shape(lambda: empty_texts(model, texts)))
    by_slot = layout.sharding(layout.activation("batch", None))
    width = -(-model.max_seq_len // BLOCK)
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


def traffic(program: Program) -> int:
    """Bytes between a device's large memory and what computes."""
    run, left = dict[str, Computation](), [one for one in program.computations.values() if one.entry]
    while left:  # others are parts of one instruction
        computation = left.pop()
        run[computation.name] = computation
        for one in computation.instructions.values():
            if one.opcode in ("while", "call", "conditional", "async-start"):
                names = re.findall(r"%([\w.-]+)", one.attributes)
                left += [program.computations[name] for name in names if name in program.computations]
    return sum(
        moved_by(program, computation, one) * program.runs(computation.name).count
        for computation in run.values()
        for one in computation.instructions.values()
    )


def moved_by(program: Program, computation: Computation, one: Instruction) -> int:
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
    if one.opcode != "fusion":
        return touched(one, operands)
    inner = program.computations[one.attribute("calls")]
    places = {int(x.arguments): x for x in inner.instructions.values() if x.opcode == "parameter"}
    read = sum(min(in_memory(x.arrays), used(inner, places[n])) for n, x in enumerate(operands) if n in places)
    root = inner.root
    while root.opcode in ("bitcast", "copy", "convert") and len(root.operands) == 1:
        root = inner.instructions[root.operands[0]]
    if root.opcode in IN_PLACE:
        return read + in_memory([inner.instructions[root.operands[IN_PLACE[root.opcode]]].arrays[0]])
    return read + in_memory(one.arrays)


def used(inner: Computation, parameter: Instruction) -> int:
    """Bytes of a fusion's parameter that it looks at."""
    users = [x for x in inner.instructions.values() if parameter.name in x.operands]
    found = 0
    for x in users:
        first = x.operands[0] == parameter.name
        if x.opcode in ("dynamic-slice", "gather", "slice") and first:
            found += x.arrays[0].size
        elif x.opcode == "bitcast":
            found += used(inner, x)
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


def figures(preset: str, target: str, texts: int, context: int, *, whole: bool) -> dict[str, Any]:
    """MB that a device of the target moves for one token of each text."""
    machine = parse_machine(target)
    sharding = ShardingConfig(data=1, fsdp=1, tensor=machine.devices)
    config = load_config(f"configs/{preset}.py")
    execution = dataclasses.replace(config.execution, dtype=Dtype.BFLOAT16)
    config = dataclasses.replace(config, sharding=sharding, execution=execution)
    model = dataclasses.replace(config.model, max_seq_len=context)
    (block,) = model.blocks
    counts = []
    for n_layers in (1, 2):
        few = dataclasses.replace(model, n_layers=n_layers, blocks=(block,) * n_layers)
        program = compiled(config, few, target, texts, context)
        count = None if isinstance(machine, GpuMachine) else traffic(Program(program.as_text() or ""))
        counts.append((count, temporaries(program)))
    (one, _), (two, of_two) = counts
    moved = None if one is None or two is None else one + (model.n_layers - 1) * (two - one)
    found = analyse_serving(
        dataclasses.replace(config, model=model), machine, ServingLoad(slots=texts, context=context)
    ).step
    needed = found.weight_bytes + found.cache_bytes
    temporary = temporaries(compiled(config, model, target, texts, context)) if whole else None
    return {
        "preset": preset,
        "target": target,
        "texts": texts,
        "context": context,
        "moved_mb": None if moved is None else round(moved / 1e6, 1),
        "weights_mb": round(found.weight_bytes / 1e6, 1),
        "cache_mb": round(found.cache_bytes / 1e6, 1),
        "moved_over_needed": None if moved is None else round(moved / needed, 3),
        "temporary_of_two_layers_mb": round(of_two / 1e6, 1),
        "temporary_mb": None if temporary is None else round(temporary / 1e6, 1),
    }


def main() -> None:
    """Print a line for each case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", nargs="*", default=[], help="words that a case's preset or target must have")
    parser.add_argument("--whole", action="store_true", help="compile the whole models too")
    options = parser.parse_args()
    found = []
    for case in CASES:
        if all(word in case for word in options.only):
            found.append(figures(*case, whole=options.whole))
            print(json.dumps(found[-1]), flush=True)
    if options.json is not None:
        about = {"command": "python -m benchmarks.decode_compiled", "jax": jax.__version__, "cases": found}
        options.json.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
