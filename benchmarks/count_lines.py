"""Lines of the core path: what runs when the tiny config trains, from the command to the loss.

    python -m benchmarks.count_lines

With prose are all lines; without, those that are neither blank nor comment nor docstring.
"""

from __future__ import annotations

import ast
import io
import json
import tokenize
from pathlib import Path

ROOT = Path(__file__).parents[1]
CORE = [
    "maxlm/train.py",
    "maxlm/sharding.py",
    "maxlm/training/loop.py",
    "maxlm/training/objective.py",
    "maxlm/training/step.py",
    "maxlm/training/losses.py",
    "maxlm/training/optimizers.py",
    "maxlm/training/schedules.py",
    "maxlm/training/state.py",
    "maxlm/recipes/__init__.py",
    "maxlm/recipes/pretrain.py",
    "maxlm/shapes/arrays.py",
    "maxlm/models/decoder.py",
    "maxlm/models/block.py",
    "maxlm/models/attention.py",
    "maxlm/models/mlp.py",
    "maxlm/models/norms.py",
    "maxlm/models/positions.py",
    "maxlm/models/parameters.py",
    "maxlm/models/execution.py",
    "maxlm/models/tokens.py",
    "maxlm/models/ops/dense.py",
    "maxlm/models/ops/attention.py",
    "maxlm/data/loader.py",
    "maxlm/data/packing.py",
    "maxlm/checkpoint/checkpointer.py",
    "maxlm/config/run.py",
    "maxlm/config/model.py",
    "maxlm/config/attention.py",
    "maxlm/config/position.py",
    "maxlm/config/norm.py",
    "maxlm/config/mlp.py",
    "maxlm/config/execution.py",
    "maxlm/config/optimizer.py",
    "maxlm/config/sharding.py",
    "maxlm/config/dims.py",
]
"""`maxlm/models/ops/dense.py` and `attention.py` are this path's linear layers; mixtures, pipelines and rings are not
on it."""


def code_lines(text: str) -> int:
    """Lines that hold code: no blank lines, comments, or strings that stand alone."""
    prose = {
        line
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)
        for line in range(node.lineno, (node.end_lineno or node.lineno) + 1)
    }
    blank = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in blank:
            lines.update(range(token.start[0], token.end[0] + 1))
    return len(lines - prose)


def main() -> None:
    """The command line: one JSON line."""
    texts = {name: (ROOT / name).read_text() for name in CORE}
    total = {
        "files": len(texts),
        "with_prose": sum(text.count("\n") for text in texts.values()),
        "without": sum(map(code_lines, texts.values())),
    }
    print(json.dumps(total))


if __name__ == "__main__":
    main()
