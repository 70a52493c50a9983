"""The comparison of methods, for people and as JSON."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any

from rich.table import Table

from maxlm.quantization.comparing import Bounds, Fidelity

NAME = "quantization.json"
"""The file beside what was written."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class MethodRow:
    """Of one method."""

    method: str
    """As on the command line; `full`: the model as it was."""
    bytes: int
    """Of all arrays."""
    bits: float
    """For each number of products and tables, scales included."""
    errors: dict[str, list[float]]
    """As of `Quantisation`."""
    of_products: bool
    """Whether the errors are those of products on calibration text, or of weights."""
    fidelity: Fidelity | None
    """None: there was no text to measure on."""
    tokens_per_s: float | None
    """Decoding one text; None: there is no tokenizer."""
    seconds: float
    """That the method took."""


def to_json(rows: Sequence[MethodRow], said: dict[str, Any]) -> dict[str, Any]:
    """`said`: what else is to be known."""
    return {**said, "methods": [_plain(dataclasses.asdict(row)) for row in rows]}


def _plain(value: Any) -> Any:
    if isinstance(value, Bounds):
        return value._asdict()
    return {key: _plain(one) for key, one in value.items()} if isinstance(value, dict) else value


def as_table(rows: Sequence[MethodRow]) -> Table:
    """One row a method."""
    table = Table(title=None)
    for name in ("method", "MB", "bits", "error", "perplexity", "change", "KL, nats", "tokens/s", "s"):
        table.add_column(name, justify="left" if name == "method" else "right", no_wrap=True)
    for row in rows:
        errors = [error for layers in row.errors.values() for error in layers]
        known = row.fidelity
        table.add_row(
            row.method,
            f"{row.bytes / 1e6:.2f}",
            f"{row.bits:.2f}",
            f"{statistics.median(errors):.4f}{'*' if row.of_products else ''}" if errors else "",
            "" if known is None else _interval(known.perplexity, 1, ".3f"),
            "" if known is None or row.method == "full" else _interval(known.change, 100, "+.2f") + " %",
            "" if known is None or row.method == "full" else _interval(known.divergence, 1, ".4f"),
            "" if row.tokens_per_s is None else f"{row.tokens_per_s:.1f}",
            f"{row.seconds:.1f}" if errors else "",
        )
    table.caption = (
        "MB: of weights. bits: for each number of products and tables. error: median over arrays of the relative error "
        "of weights (*: of products on calibration text). +-: half of what holds 95 % over windows. s: of the method."
    )
    return table


def _interval(one: Bounds, factor: float, form: str) -> str:
    return f"{factor * one.value:{form}} +-{factor * (one.high - one.low) / 2:{form.lstrip('+')}}"
