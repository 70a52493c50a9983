"""Training and decoding beside torch, on this machine's CPU: the same shape, the same work, turn by turn in one call.

    pip install -e '.[parity]'
    python -m benchmarks.compare_torch [--rounds 5] [--cores 1 2] [--torch eager sdpa] [--out FILE]

The rival is transformers' LlamaForCausalLM in eager mode, with its eager attention and with torch's fused one (sdpa).
Shape: 4 layers, d_model 256, 8 heads, d_ff 688, vocabulary 4096 untied, float32. Training: 8 sequences of 512 random
tokens, AdamW (torch's fused one), gradients clipped at norm 1, nothing recomputed on either side. Decoding: greedy,
with a cache of keys and values, 128 tokens after a prompt of 128.

Every figure comes from a process of its own. The sides take turns (A B C A B C ...), so that the load of the machine
meets all of them; a ratio is the median over the rounds of (maxlm / torch), with its range.

tokens_per_s       tokens for each second of the clock
tokens_per_cpu_s   tokens for each second that any core was busy: hardly changes with the load of the machine
first_step_s       from the start of the process to the end of its first step; maxlm also with programs kept from before
first_step_cpu_s   the same in seconds that any core was busy
peak_mb            most memory that the process had resident, up to then, in MiB
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

Figures = dict[str, float]

VOCAB, WIDTH, LAYERS, HEADS, D_FF, CONTEXT = 4096, 256, 4, 8, 688, 512
ROWS, STEPS = 8, 4
PROMPT, NEW, PASSES = 128, 128, 3
LEARNING_RATE, BETAS, WEIGHT_DECAY, CLIP = 3e-4, (0.9, 0.95), 0.1, 1.0

FIGURES = ("tokens_per_s", "tokens_per_cpu_s", "first_step_s", "first_step_cpu_s", "peak_mb")
TASKS = ("train", "decode 1", "decode 8")
RESULTS = Path(__file__).parent / "results" / "compare_torch.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    available = len(os.sched_getaffinity(0))
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side for each task")
    parser.add_argument("--cores", type=int, nargs="+", default=sorted({1, available}), help="numbers of cores")
    parser.add_argument(
        "--torch", nargs="+", default=["eager", "sdpa"], choices=["eager", "sdpa"], help="its attention"
    )
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=TASKS, help="what to measure")
    parser.add_argument("--remat", default="none", help="what maxlm's backward pass computes again (execution.remat)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="file for every run's figures, as JSON")
    parser.add_argument("--child", nargs=2, metavar=("SIDE", "TASK"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        side, task = options.child
        use_cores(options.cores[0])
        print(json.dumps(run(side, task, options)))
        return
    compare(options)


# ---- The parent: turns, ratios, the table ----------------------------------------------------------------------------


def compare(options: argparse.Namespace) -> None:
    rivals = [f"torch {attention}" for attention in options.torch]
    runs: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as kept:
        for number in range(options.rounds):
            for cores in options.cores:
                for task in options.tasks:
                    for side in ["maxlm", *rivals, *(["maxlm, cached"] if task == "train" else [])]:
                        if side == "maxlm, cached" and number == 0:
                            child(side, task, cores, options.remat, kept)  # fills the cache; not counted
                        figures = child(side, task, cores, options.remat, kept)
                        runs.append({"side": side, "task": task, "cores": cores, "round": number, **figures})
                        print(f"{cores} cores, {task}, {side}: {figures}", file=sys.stderr, flush=True)
            save(options.out, runs, rivals)  # what there is, should a later round be stopped
    report = json.loads(options.out.read_text())
    print(f"{report['cpu']}; Python {report['python']}; {report['versions']}")
    print_table(report["summary"], rivals)


def save(out: Path, runs: list[dict[str, Any]], rivals: list[str]) -> None:
    same_model(runs)
    report = {
        "date": time.strftime("%Y-%m-%d"),
        "command": " ".join(["python -m benchmarks.compare_torch", *sys.argv[1:]]),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in ("jax", "torch", "transformers", "numpy")},
        "summary": summarize(runs, rivals),
        "runs": runs,
    }
    out.write_text(json.dumps(report, indent=1) + "\n")


def child(side: str, task: str, cores: int, remat: str, kept: str) -> Figures:
    """One run in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.compare_torch", "--child", side, task]
    command += ["--cores", str(cores), "--remat", remat]
    environment = {name: value for name, value in os.environ.items() if name != "JAX_COMPILATION_CACHE_DIR"}
    environment |= {"OMP_NUM_THREADS": str(cores), "MKL_NUM_THREADS": str(cores)}
    if side == "maxlm, cached":
        environment["JAX_COMPILATION_CACHE_DIR"] = kept
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout
    return json.loads(output.splitlines()[-1])


def same_model(runs: list[dict[str, Any]]) -> None:
    """Both sides have the same parameters and begin at the loss of a uniform guess."""
    trained = [run for run in runs if run["task"] == "train"]
    assert len({run["n_params"] for run in trained}) <= 1, "the two models have different numbers of parameters"
    assert all(abs(run["first_loss"] - math.log(VOCAB)) < 0.2 for run in trained), "a first loss is far from ln V"


def summarize(runs: list[dict[str, Any]], rivals: list[str]) -> list[dict[str, Any]]:
    """A row for each figure of a task on some cores: median, lowest, highest of each side and of each ratio."""
    rows: list[dict[str, Any]] = []
    seen: dict[tuple[int, str, str], dict[str, list[float]]] = {}
    for one in runs:
        for name in FIGURES:
            if name in one:
                sides = seen.setdefault((one["cores"], one["task"], name), {})
                sides.setdefault(one["side"], []).append(one[name])
    for (cores, task, name), sides in seen.items():
        row: dict[str, Any] = {"cores": cores, "task": task, "figure": name}
        row |= {side: spread(values) for side, values in sides.items()}
        for rival in rivals:
            pairs = zip(sides["maxlm"], sides[rival], strict=True)
            row[f"of {rival}"] = spread([ours / theirs for ours, theirs in pairs])
        rows.append(row)
    return rows


def spread(values: list[float]) -> tuple[float, float, float]:
    return statistics.median(values), min(values), max(values)


def print_table(summary: list[dict[str, Any]], rivals: list[str]) -> None:
    columns = ["maxlm", *rivals, *(f"of {rival}" for rival in rivals), "maxlm, cached"]
    print("| cores | task | figure | " + " | ".join(columns) + " |")
    print("| --- " * (3 + len(columns)) + "|")
    for row in summary:
        cells = [shown(row.get(column), column.startswith("of ")) for column in columns]
        print(f"| {row['cores']} | {row['task']} | {row['figure']} | " + " | ".join(cells) + " |")


def shown(values: list[float] | None, is_ratio: bool) -> str:
    if values is None:
        return ""
    median, low, high = (f"{value:.2f}" if is_ratio or value < 100 else f"{value:.0f}" for value in values)
    return f"{median} ({low} to {high})"


# ---- A child: one side, one task -------------------------------------------------------------------------------------


def run(side: str, task: str, options: argparse.Namespace) -> Figures:
    rows = None if task == "train" else int(task.split()[1])
    if side.startswith("torch"):
        attention = side.split()[1]
        return torch_training(attention) if rows is None else torch_decoding(attention, rows)
    return maxlm_training(options.remat) if rows is None else maxlm_decoding(rows)


def use_cores(cores: int) -> None:
    """Before a library starts its threads."""
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[:cores])


def training_figures(step: Callable[[], float], n_params: int) -> Figures:
    """`step` does one step and returns its loss once all of it is done; the first call compiles what is to compile."""
    first_loss = step()
    first_step_s, first_step_cpu_s = time.time() - process_start(), time.process_time()
    step()
    wall, cpu = time.perf_counter(), time.process_time()
    for _ in range(STEPS):
        step()
    wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    n_tokens = STEPS * ROWS * CONTEXT
    return {
        "tokens_per_s": n_tokens / wall,
        "tokens_per_cpu_s": n_tokens / cpu,
        "first_step_s": first_step_s,
        "first_step_cpu_s": first_step_cpu_s,
        "peak_mb": peak_mb(),
        "n_params": n_params,
        "first_loss": first_loss,
    }


def decoding_figures(rows: int, read_prompts: Callable[[], Callable[[], None]]) -> Figures:
    """`read_prompts` starts anew and returns what adds NEW tokens to each row; the clock runs for that alone."""
    read_prompts()()
    wall = cpu = 0.0
    for _ in range(PASSES):
        add = read_prompts()
        wall_before, cpu_before = time.perf_counter(), time.process_time()
        add()
        wall, cpu = wall + time.perf_counter() - wall_before, cpu + time.process_time() - cpu_before
    n_tokens = PASSES * rows * NEW
    return {"tokens_per_s": n_tokens / wall, "tokens_per_cpu_s": n_tokens / cpu, "peak_mb": peak_mb()}


def maxlm_training(remat: str) -> Figures:
    import jax

    from benchmarks.steps import random_batch
    from maxlm.compile_cache import enable_compilation_cache, release_compiler_memory
    from maxlm.config import AdamW, DataConfig, Dataset, Dtype, ExecutionConfig, Remat, RunConfig, TrainConfig, llama
    from maxlm.sharding import make_layout
    from maxlm.training import make_trainer

    model = llama(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=D_FF, max_seq_len=CONTEXT)
    config = RunConfig(
        model=model,
        execution=ExecutionConfig(dtype=Dtype.FLOAT32, remat=Remat(remat)),
        data=DataConfig(datasets=(Dataset(path="none: the tokens are random"),)),
        train=TrainConfig(steps=1000, batch_size=ROWS, seq_len=CONTEXT),
        optimizer=AdamW(
            learning_rate=LEARNING_RATE, b1=BETAS[0], b2=BETAS[1], weight_decay=WEIGHT_DECAY, clip_norm=CLIP
        ),
    )
    if jax.config.values["jax_compilation_cache_dir"] is not None:
        enable_compilation_cache()
    trainer = make_trainer(config, make_layout(config.sharding, jax.devices()[:1]))
    batch = random_batch(trainer, VOCAB)
    program, state = trainer.start()
    release_compiler_memory()

    def step() -> float:
        nonlocal state
        state, output = program(state, batch)
        jax.block_until_ready(state)
        return float(output.figures["loss"])

    return training_figures(step, sum(leaf.size for leaf in jax.tree.leaves(state.parameters)))


def maxlm_decoding(rows: int) -> Figures:
    """The engine of `maxlm.generate`, with everything it does between steps."""
    import jax
    import numpy as np

    from maxlm.config import (
        DataConfig,
        Dataset,
        Dtype,
        EngineConfig,
        ExecutionConfig,
        RunConfig,
        SamplingConfig,
        TrainConfig,
        llama,
    )
    from maxlm.data.tokenizers import Bytes
    from maxlm.inference.engine import Engine
    from maxlm.inference.load import LoadedRun
    from maxlm.inference.request import Request
    from maxlm.models import init_parameters
    from maxlm.sharding import make_layout

    config = RunConfig(
        model=llama(vocab_size=VOCAB, d_model=WIDTH, n_layers=LAYERS, n_heads=HEADS, d_ff=D_FF, max_seq_len=CONTEXT),
        execution=ExecutionConfig(dtype=Dtype.FLOAT32),
        data=DataConfig(datasets=(Dataset(path="none: the prompts are random"),)),
        train=TrainConfig(steps=1, batch_size=ROWS, seq_len=CONTEXT),
    )
    parameters = jax.jit(lambda: init_parameters(config.model, jax.random.key(0)))()
    layout = make_layout(config.sharding, jax.devices()[:1])
    run = LoadedRun(config=config, layout=layout, parameters=parameters, tokenizer=Bytes(), step=0)
    engine = Engine(run, EngineConfig(slots=rows))
    tokens = np.random.default_rng(0).integers(0, VOCAB, (rows, PROMPT + 1))

    def answer(new: int) -> None:
        for prompt in tokens.tolist():  # no id ends a text
            engine.submit(Request(prompt=tuple(prompt), max_new_tokens=new, sampling=SamplingConfig(temperature=0.0)))
        while not engine.idle:
            engine.step()

    def read_prompts() -> Callable[[], None]:
        """Into blocks of the cache, where they are found again: what is left to read is the last token."""
        answer(1)
        return lambda: answer(NEW)

    return decoding_figures(rows, read_prompts)


def torch_model(attention: str) -> Any:
    import torch
    import transformers

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=D_FF,
        num_hidden_layers=LAYERS,
        num_attention_heads=HEADS,
        num_key_value_heads=HEADS,
        max_position_embeddings=CONTEXT,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        attn_implementation=attention,
    )
    return transformers.LlamaForCausalLM(config)


def torch_training(attention: str) -> Figures:
    import numpy as np
    import torch

    model = torch_model(attention).train()
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=BETAS, weight_decay=WEIGHT_DECAY, fused=True)
    tokens = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (ROWS, CONTEXT + 1)))

    def step() -> float:
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, VOCAB), tokens[:, 1:].reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return training_figures(step, sum(parameter.numel() for parameter in model.parameters()))


def torch_decoding(attention: str, rows: int) -> Figures:
    import numpy as np
    import torch

    model = torch_model(attention).eval()
    prompt = torch.from_numpy(np.random.default_rng(0).integers(0, VOCAB, (rows, PROMPT)))

    def read_prompts() -> Callable[[], None]:
        with torch.inference_mode():
            output = model(input_ids=prompt, use_cache=True, logits_to_keep=1)

        def add() -> None:
            nonlocal output
            with torch.inference_mode():
                for _ in range(NEW):
                    token = output.logits[:, -1].argmax(-1, keepdim=True)
                    output = model(input_ids=token, cache=output.cache, use_cache=True)

        return add

    return decoding_figures(rows, read_prompts)


# ---- What the system knows of a process (Linux) ----------------------------------------------------------------------


def process_start() -> float:
    """When this process began, in seconds since the epoch."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def peak_mb() -> float:
    """Most memory resident so far, in MiB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def cpu_name() -> str:
    """As the kernel calls it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
