"""Memory of a step by arithmetic (`maxlm/plan/memory.py`) beside the peak that the target's own compiler tells.

    make compilers
    python -m benchmarks.plan_memory --json benchmarks/results/plan_memory.json
    python -m benchmarks.plan_memory --markdown

Each row is one `python -m maxlm.plan ... --compile` in a process of its own: some 10 seconds of processor time for a
GPU, 100 for a TPU. A row that the file has already is not compiled again; the file is written after each. `--predict`
brings the predictions up to date without compiling, and `--markdown` writes docs/plan_memory.md from the file.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from maxlm.config.cli import parse_run
from maxlm.plan.machines import installed, parse_machine
from maxlm.plan.memory import estimate_memory

RESULTS = Path(__file__).parent / "results" / "plan_memory.json"
DOCUMENT = Path(__file__).parents[1] / "docs" / "plan_memory.md"

_GIB = 2**30
_PACKAGES = ("jax", "jaxlib", "libtpu", "jax-cuda13-plugin")

ROWS = """
llama_5m tpu:v5p:2x2x1 fsdp=4
tiny_moe tpu:v5p:2x2x1 expert=4
llama7b tpu:v5p:4x4x4
llama7b tpu:v5e:16x16 fsdp=32
llama7b tpu:v5p:2x2x2 fsdp=2 tensor=4 batch_size=32 remat=names
llama7b tpu:v5p:2x2x1 fsdp=4 zero=gradients batch_size=16 n_layers=8
llama7b tpu:v5p:2x2x1 fsdp=2 stage=2 micro_batches=8 batch_size=64 n_layers=8
llama7b tpu:v5p:2x2x1 fsdp=4 zero=optimizer batch_size=16 n_layers=8
llama2_7b tpu:v5p:2x2x1 fsdp=4 batch_size=16 remat=full n_layers=4
llama2_7b tpu:v5p:2x2x1 fsdp=4 batch_size=16 remat=full
llama2_7b tpu:v5p:2x2x1 fsdp=4 batch_size=16 remat=names
llama2_7b tpu:v5p:2x2x1 fsdp=4 batch_size=16 remat=dots
llama2_7b tpu:v5p:4x4x4 fsdp=64 batch_size=256 remat=names
llama2_7b tpu:v5e:4x4 fsdp=16 batch_size=64 seq_len=2048 remat=full
llama2_7b tpu:v5e:16x16 fsdp=256 batch_size=1024 seq_len=2048 remat=names
llama3_8b tpu:v5p:4x4x4
llama2_13b tpu:v5p:4x4x8
llama3_70b tpu:v5p:8x8x8
mixtral8x7b tpu:v5p:4x4x8
llama_5m gpu:h200:8
tiny_moe gpu:h200:8 expert=4
tiny_moe gpu:h200:8 fsdp=8
llama7b gpu:h200:8 fsdp=8 batch_size=32
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=full
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=names
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=dots
llama7b gpu:h200:8 fsdp=8 batch_size=32 remat=none
llama7b gpu:h200:8 fsdp=8 batch_size=64 micro_batches=4 remat=names
llama7b gpu:h200:8 fsdp=8 zero=optimizer batch_size=32
llama7b gpu:h200:8 fsdp=8 zero=gradients batch_size=32
llama7b gpu:h200:8 fsdp=2 tensor=4 batch_size=32 remat=names
llama7b gpu:h200:8 fsdp=2 tensor=4 sequence_parallel=True batch_size=32 remat=names
llama7b gpu:h200:8 fsdp=2 seq=4 context=ring batch_size=32 remat=names
llama7b gpu:h200:8 fsdp=2 stage=4 micro_batches=8 batch_size=64 remat=names
llama7b gpu:h100:2x8 fsdp=16 batch_size=128
llama7b gpu:h100:8 fsdp=8 batch_size=32
llama7b gpu:h200:8 fsdp=8 batch_size=32 zero=optimizer micro_batches=4
llama7b gpu:h200:8 data=8 fsdp=1 batch_size=32
llama7b gpu:h200:8 fsdp=8 batch_size=8 seq_len=1024
llama7b gpu:h200:8 fsdp=8 batch_size=32 zero=gradients micro_batches=4
llama7b gpu:h200:8 fsdp=8 batch_size=32 n_layers=2 loss_chunk=8192
llama7b gpu:h200:8 fsdp=2 stage=4 micro_batches=8 batch_size=64 remat_stages=False remat=full
llama7b gpu:h200:8 fsdp=2 stage=4 micro_batches=8 batch_size=64 virtual_stages=2 remat=full
llama7b gpu:h200:8 fsdp=2 seq=4 context=ulysses batch_size=32 remat=names
llama7b gpu:h200:8 fsdp=2 seq=4 batch_size=32 remat=names
llama7b gpu:h200:8 fsdp=2 seq=4 batch_size=32 remat=full
llama7b gpu:h200:8 data=8 batch_size=32 fsdp=1 micro_batches=4
llama7b gpu:h200:8 fsdp=2 seq=4 batch_size=32 remat=dots
llama7b gpu:h200:8 fsdp=4 tensor=2 sequence_parallel=True batch_size=32 remat=full
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=offload
llama7b gpu:h100:8 fsdp=8 batch_size=64 dtype=float32
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=qkv
llama7b gpu:h200:8 fsdp=8 batch_size=64 remat=glu
llama3_8b gpu:h200:8 fsdp=8 batch_size=32 micro_batches=2
llama2_13b gpu:h200:2x8 fsdp=16 batch_size=64
llama2_70b gpu:h200:8x8 fsdp=8 tensor=8 batch_size=64 remat=full
llama3_70b gpu:h200:16x8 fsdp=128 batch_size=128 micro_batches=1
mixtral8x7b gpu:h200:16x8 seq_len=4096 batch_size=128
mixtral8x7b gpu:h200:4x8 seq_len=4096 batch_size=64 fsdp=4 remat=names
deepseek_moe16b gpu:h200:4x8 batch_size=64 micro_batches=1 fsdp=4
qwen3_30b_a3b gpu:h200:8x8 batch_size=64 micro_batches=1 fsdp=8
switch_base gpu:h200:2x8 batch_size=256
llama_5m cpu:8
llama_5m cpu:8 data=2 fsdp=4
llama_5m cpu:8 tensor=4 remat=full
tiny_moe cpu:8 expert=4
"""
"""Config, target and overrides of each row: those from which the rules of `maxlm/plan/memory.py` were learnt."""

UNSEEN = """
llama33b gpu:h200:4x8 fsdp=8 tensor=4 batch_size=64 micro_batches=2 remat=qkv
llama65b gpu:h200:8x8 fsdp=64 batch_size=128 micro_batches=2 remat=names
llama2_7b gpu:h100:2x8 data=2 fsdp=8 batch_size=64 remat=glu
llama3_8b gpu:h100:8 fsdp=4 seq=2 context=ring batch_size=16 micro_batches=1 remat=full
llama2_13b gpu:h200:8 fsdp=2 stage=4 micro_batches=4 batch_size=32 remat=full
llama3_70b gpu:h200:8x8 fsdp=16 tensor=4 batch_size=32 micro_batches=1 remat=full
mixtral8x7b gpu:h100:4x8 fsdp=32 expert=1 batch_size=32 seq_len=4096
llama7b gpu:h100:8 fsdp=8 float32_gradients=True batch_size=16
deepseek_moe16b gpu:h100:8x8 batch_size=128 micro_batches=2 remat=names
llama2_7b tpu:v5p:2x2x1 fsdp=4 batch_size=16 remat=glu
llama2_7b tpu:v5p:4x4x4 fsdp=64 batch_size=256 remat=glu
llama2_7b tpu:v5p:4x4x4 fsdp=64 batch_size=256 remat=dots
llama2_7b tpu:v5e:16x16 fsdp=256 batch_size=1024 seq_len=2048 remat=qkv
llama2_13b tpu:v6e:8x8 fsdp=32 batch_size=128 micro_batches=1
qwen3_30b_a3b tpu:v5p:4x4x8
deepseek_moe16b tpu:v5p:4x4x4
gpt2_124m gpu:a100:1
llama_125m gpu:a100:1
llama_350m tpu:v5e:2x4
llama_1b gpu:h200:1
llama_1b gpu:a100:1
"""
"""Rows that were compiled after the rules were written: they tell what a prediction is worth."""

_HEAD = """# Predicted and compiled memory

What `python -m maxlm.plan` computes in milliseconds, and what the target's own compiler says of the same step: the
most that a device holds at one time, in GiB. `python -m benchmarks.plan_memory` makes both columns and this page;
figures and versions are in `benchmarks/results/plan_memory.json`. The rules behind the prediction, and to which
compiler each belongs, are in `maxlm/plan/memory.py`.

"""


_SECTIONS = {
    "model": ("n_layers",),
    "execution": ("remat", "dtype"),
    "train": ("batch_size", "seq_len", "micro_batches", "loss_chunk"),
}
"""Where the overrides' keys stand that are not in `sharding`."""


def rows() -> list[tuple[str, str, list[str]]]:
    """Config's name, target and overrides."""
    lines = [line.split() for line in [*ROWS.strip().splitlines(), *UNSEEN.strip().splitlines()]]
    return [(config, target, [word for text in rest for word in _override(text)]) for config, target, *rest in lines]


def _override(text: str) -> tuple[str, str]:
    """The two words of fsdp=8 on the command line."""
    key, value = text.split("=")
    section = next((section for section, keys in _SECTIONS.items() if key in keys), "sharding")
    return f"--{section}.{key}", value


def predicted(config: str, target: str, overrides: Sequence[str]) -> int:
    """Bytes, by arithmetic."""
    file = Path(__file__).parents[1] / "configs" / f"{config}.py"
    run = parse_run(["--config", str(file), *overrides], prog="plan_memory", description="").config
    machine = parse_machine(target)
    return estimate_memory(run, machine.devices, machine.platform).peak


def compiled(config: str, target: str, overrides: Sequence[str]) -> dict[str, Any]:
    """Bytes by the compiler, and the processor time that it took; an error's last line where it fails.

    A TPU's compiler that refuses a step has not laid it out: what it wanted is no peak.
    """
    arguments = ["--config", f"configs/{config}.py", "--target", target, "--compile", "--json", *overrides]
    done = subprocess.run([sys.executable, "-m", "maxlm.plan", *arguments], capture_output=True, text=True, check=False)
    report = json.loads(done.stdout) if done.stdout.startswith("{") else {}
    refused = target.startswith("tpu:") and not report.get("fits")
    if refused or not (report.get("peak_bytes") or {}).get("compiled"):
        return {"error": report.get("message") or done.stderr.strip().splitlines()[-1:]}
    return {"compiled": report["peak_bytes"]["compiled"], "compile_cpu_seconds": report["compile_cpu_seconds"]}


def markdown(report: dict[str, Any]) -> str:
    """The page."""
    unseen = set(UNSEEN.strip().splitlines())
    seen_rows = [row for row in report["rows"] if _line(row) not in unseen]
    unseen_rows = [row for row in report["rows"] if _line(row) in unseen]
    return (
        f"{_HEAD}Compilers: {_versions(report)}.\n\n## Rows that the rules were learnt from\n\n{_table(seen_rows)}\n"
        f"## Rows compiled after the rules were written\n\n{_table(unseen_rows)}{_TAIL}"
    )


def _versions(report: dict[str, Any]) -> str:
    """Those of the file, which the rows have that name none, and of its rows."""
    found = [report["versions"], *(row.get("versions", {}) for row in report["rows"])]
    numbers = {name: dict.fromkeys(one[name] for one in found if name in one) for name in _PACKAGES}
    return ", ".join(f"{name} {' and '.join(several)}" for name, several in numbers.items() if several)


def _line(row: dict[str, Any]) -> str:
    """As in ROWS."""
    words = row["overrides"]
    short = [f"{key.split('.')[-1]}={value}" for key, value in zip(words[::2], words[1::2], strict=True)]
    return " ".join([row["config"], row["target"], *short])


def _table(rows: Sequence[dict[str, Any]]) -> str:
    lines = ["| config | target | overrides | predicted | compiled | error |", "| --- | --- | --- | --- | --- | --- |"]
    errors = []
    for row in rows:
        config, target, *overrides = _line(row).split()
        errors.append(row["predicted"] / row["compiled"] - 1)
        sizes = (f"{row[key] / _GIB:.2f}" if row[key] > _GIB else f"{row[key] / _GIB:.4f}" for key in _COLUMNS)
        lines.append(f"| {config} | {target} | {' '.join(overrides)} | {' | '.join(sizes)} | {errors[-1]:+.1%} |")
    sizes_of_errors = sorted(map(abs, errors))
    near = sum(error <= 0.15 for error in sizes_of_errors)
    middle, largest = sizes_of_errors[len(errors) // 2], sizes_of_errors[-1]
    summary = (
        f"{near} of {len(errors)} within 15 %; half of them within {middle:.1%}, the largest error is {largest:.1%}."
    )
    return f"{summary}\n\n" + "\n".join(lines) + "\n"


_COLUMNS = "predicted", "compiled"

_TAIL = """
## What the prediction leaves out

* Tiles: a TPU pads the last two dims of an array to 8 x 128 numbers. Configs of real size choose layouts that need no
  padding; `llama_5m`, with heads of 32, has 25 % more state than its numbers take.
* The embedding's own gradient, the gather of its float32 table, and what the first, not repeated, layers have at work:
  other moments of a step are fuller.
* Time: what a compiler would trade for it, as gathering weights earlier.

A GPU's peak is arguments and temporaries, gaps between arrays included. A TPU's is the compiler's own figure; the
program's code, some 0.07 GiB at 7B, is in it for `llama_5m`, `tiny_moe` and in the second table. In the first table
those of llama2_7b on TPUs, but for the one with four layers, were noted to 0.01 GiB.
"""


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--predict", action="store_true", help="compile nothing")
    parser.add_argument("--markdown", action="store_true", help="write docs/plan_memory.md from the file, no more")
    options = parser.parse_args()
    report: dict[str, Any] = {"command": "python -m benchmarks.plan_memory", "versions": {}, "rows": []}
    if options.json.exists():
        report |= json.loads(options.json.read_text())
    if options.markdown:
        DOCUMENT.write_text(markdown(report))
        return
    known = {(row["config"], row["target"], *row["overrides"]): row for row in report["rows"]}
    keys = [(config, target, *overrides) for config, target, overrides in rows()]
    for key, (config, target, overrides) in zip(keys, rows(), strict=True):
        if key not in known:
            if options.predict:
                continue
            row = {"config": config, "target": target, "overrides": overrides, **compiled(config, target, overrides)}
            if "error" in row:
                print(json.dumps(row), flush=True)
                continue
            have = installed()
            known[key] = row | {"versions": {name: have[name] for name in _PACKAGES if name in have}}
        known[key]["predicted"] = predicted(config, target, overrides)
        print(json.dumps(known[key]), flush=True)
        report["rows"] = [known[one] for one in keys if one in known]
        options.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
