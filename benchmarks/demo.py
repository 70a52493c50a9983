"""What `make train` costs and learns: processor time of the whole command, held-out bits a byte, Python that parses.

    python -m benchmarks.demo [--config configs/tiny.py] [--rounds 1] [--folder DIR] [--out FILE]

Each round trains the config anew in a folder of its own, data included, and counts the seconds that the command and
what it started kept any core busy. `python -m maxlm.evaluate` then measures the run on the whole held-out split. Of the
last run 20 texts of 200 tokens are drawn, half of functions, half of classes. A text is cut after its last whole line
of Python that opens no block; it parses if it has a `def` or a `class` and `ast.parse` takes it.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import os
import platform
import re
import resource
import subprocess
import sys
import tempfile
import time
import tokenize
from pathlib import Path
from typing import Any

import jax

from benchmarks.steps import cpu_name
from maxlm.config import SamplingConfig
from maxlm.inference.load import load_run

ROOT = Path(__file__).parent.parent
PROMPTS = "import os\n\n\ndef", "import os\n\n\nclass"
"""Without a blank at the end, which is part of the token that comes next."""
SAMPLES, NEW_TOKENS, SEED = 20, 200, 2
SAMPLING = SamplingConfig(temperature=0.2, repetition_penalty=1.1)
"""Chosen by texts of seeds 0 and 1. Without the penalty the model repeats itself, and no bracket is ever closed."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--config", type=Path, default=ROOT / "configs/tiny.py", help="what is trained")
    parser.add_argument("--rounds", type=int, default=1, help="trainings")
    parser.add_argument("--folder", type=Path, help="where the runs are kept; a new one")
    parser.add_argument("--out", type=Path, help="file for the figures, as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = [(options.folder or Path(scratch)) / str(number) for number in range(options.rounds)]
        rounds = [trained(options.config.resolve(), folder) for folder in folders]
        texts = samples(folders[-1] / "run")
    result = {
        "command": f"python -m benchmarks.demo --config {options.config.name} --rounds {options.rounds}",
        "rounds": rounds,
        "temperature": SAMPLING.temperature,
        "repetition_penalty": SAMPLING.repetition_penalty,
        "seed": SEED,
        "parse": f"{sum(map(parses, texts))} of {len(texts)}",
        "texts": texts,
        "cpu": cpu_name(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "jax": jax.__version__,
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "texts"}))


def trained(config: Path, folder: Path) -> dict[str, Any]:
    """A run in `folder`/run: what training it took, and what it knows."""
    folder.mkdir(parents=True)
    cpu, wall = _cpu_s(), time.perf_counter()
    _command(folder, "maxlm.train", "--config", str(config), "--run_dir", "run")
    cpu, wall = _cpu_s() - cpu, time.perf_counter() - wall
    last = json.loads((folder / "run/evals.jsonl").read_text().splitlines()[-1])
    found = json.loads(_command(folder, "maxlm.evaluate", "--run", "run", "--json"))
    return {
        "train_cpu_s": round(cpu, 1),
        "train_wall_s": round(wall, 1),
        "bits_per_byte": last["eval_bits_per_byte"],
        "evaluate_bits_per_byte": found["bits_per_byte"],
        "held_out_tokens": found["tokens"],
    }


def samples(run_dir: Path) -> list[str]:
    """What the run writes."""
    run = load_run(run_dir)
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(SAMPLES)]
    drawn = run.generate(prompts, max_new_tokens=NEW_TOKENS, sampling=SAMPLING, seed=SEED)
    return [prompt + one.text for prompt, one in zip(prompts, drawn, strict=True)]


def parses(text: str) -> bool:
    """Whether all up to the last complete statement is Python, with a function or a class."""
    try:
        tree = ast.parse(complete(text))
    except (SyntaxError, ValueError):
        return False
    return any(isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) for node in ast.walk(tree))


def complete(text: str) -> str:
    """The text up to its last whole logical line that opens no block; what comes after was cut off."""
    whole = re.sub(r"[^\n]*\Z", "", text)
    end, before = 0, ""
    try:
        for token in tokenize.generate_tokens(io.StringIO(whole).readline):
            if token.type == tokenize.NEWLINE and before != ":":
                end = token.start[0]
            if token.type not in (tokenize.COMMENT, tokenize.NL):
                before = token.string
    except (tokenize.TokenError, SyntaxError) as error:
        if isinstance(error, SyntaxError):  # not for want of an end
            return whole
    return "".join(whole.splitlines(keepends=True)[:end])


def _command(folder: Path, module: str, *words: str) -> str:
    path = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", module, *words], cwd=folder, env=os.environ | path, stdout=subprocess.PIPE, check=True
    )
    return done.stdout.decode()


def _cpu_s() -> float:
    """Of all processes that this one has started and waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


if __name__ == "__main__":
    main()
