"""Where a device's memory goes, as a picture: a PNG by matplotlib, or a page of HTML that needs nothing else."""

from __future__ import annotations

import html
from pathlib import Path
from typing import NamedTuple

from maxlm.config import UserError
from maxlm.config.errors import pip_install
from maxlm.plan.analysis import Forecast, gib, mesh_text
from maxlm.plan.tables import micro_batches, verdict

PARTS = {
    "parameters": ("parameters", "#1f4e9c"),
    "reference": ("parameters of the reference", "#3b7d4f"),
    "critic": ("parameters and optimizer state of the critic", "#6fae84"),
    "gradients": ("gradients", "#5b8bd0"),
    "optimizer": ("optimizer state", "#9db4d3"),
    "activations": ("activations saved for the backward pass", "#c8501e"),
    "logits": ("the loss at work: logits, and gradient of the table", "#e39a6f"),
    "working": ("a layer at work: gathered weights, intermediates", "#d8b13c"),
    "batch": ("batch", "#7a7a7a"),
    "copies": ("copies of parameters in another format", "#b79ad6"),
    "engine": ("weights and cache of the engine that writes", "#8c564b"),
}
"""What each part of a device's memory is, and its colour."""


class Bar(NamedTuple):
    """A part of a device's memory."""

    meaning: str
    colour: str
    size: int
    """Bytes."""


def write_picture(found: Forecast, path: Path) -> None:
    """Draw what a forecast says of memory; the file's suffix says how.

    Raises:
        UserError: the suffix is neither .png nor .html, or matplotlib is absent and .png needs it.
    """
    check_picture(path)
    if path.suffix == ".html":
        path.write_text(_page(found), encoding="utf-8")
    else:
        _draw(found, path)


def check_picture(path: Path) -> None:
    """Raise what `write_picture` would for this name, before any work is done."""
    if path.suffix not in (".png", ".html"):
        raise UserError(f"--picture {path} ends in {path.suffix or 'nothing'}; use a name that ends in .png or .html")


def bars(found: Forecast) -> list[Bar]:
    """The parts of a device's memory at the peak; none of size 0."""
    at_peak = found.memory.at_peak
    return [Bar(*words, at_peak[name]) for name, words in PARTS.items() if at_peak.get(name)]


def _head(found: Forecast) -> tuple[str, str, str]:
    """Title, facts and verdict."""
    train, of = found.config.train, "" if found.limit is None else f" of {gib(found.limit)}"
    return (
        f"Memory of a device: {found.parameters.total / 1e9:,.2f} billion parameters on {found.target}",
        f"{mesh_text(found.mesh)}; {train.batch_size:,} sequences of {train.seq_len:,} tokens in "
        f"{micro_batches(found)}; remat {found.config.execution.remat.value}; {type(found.config.optimizer).__name__}",
        f"{verdict(found)} ({gib(found.peak)}{of})",
    )


def _marks(found: Forecast) -> list[tuple[str, int]]:
    """Lines across the bar."""
    marks = [] if found.limit is None else [("limit", found.limit)]
    if (compiled := found.compiled) is not None:
        marks.append((f"compiler's peak{', at least' if compiled.at_least else ''}", found.peak))
    return marks


def _scale(found: Forecast) -> float:
    """Bytes from one end of the picture to the other."""
    return 1.04 * max([found.memory.peak, *(size for _, size in _marks(found))])


def _draw(found: Forecast, path: Path) -> None:
    try:
        # The object-oriented API alone: pyplot would look for a display and keep figures alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name} needs matplotlib, which is not installed; {pip_install('maxlm[viz]')}") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = 0.0
    for meaning, colour, size in bars(found):
        axes.barh(0, size / 2**30, left=left, height=0.5, color=colour, label=f"{meaning}: {gib(size)}")
        left += size / 2**30
    for name, size in _marks(found):
        colour, style = ("black", "-") if name == "limit" else ("#2a8a3e", "--")
        axes.axvline(size / 2**30, color=colour, linestyle=style, linewidth=2, label=f"{name}: {gib(size)}")
    axes.set_xlim(0, _scale(found) / 2**30)
    axes.set_ylim(-0.4, 0.4)
    axes.set_yticks([])
    axes.set_xlabel("GiB")
    axes.set_title("\n".join(_head(found)), fontsize=10, loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    figure.legend(loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=120)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }
h1 { font-size: 1.2rem; margin-bottom: 0; }
.bar { position: relative; display: flex; height: 3.5rem; margin: 2.5rem 0 1.5rem; background: #f2f2f2; }
.part { flex: none; }
.mark { position: absolute; top: -0.5rem; bottom: -0.5rem; border-left: 3px solid #000; }
.mark.compiled { border-left: 3px dashed #2a8a3e; }
.mark span { position: absolute; bottom: 100%; right: 0; white-space: nowrap; font-size: 0.8rem; }
table { border-collapse: collapse; } td { padding: 0.15rem 1rem 0.15rem 0; }
td.size { text-align: right; font-variant-numeric: tabular-nums; }
.box { display: inline-block; width: 0.9rem; height: 0.9rem; vertical-align: -0.1rem; }
"""


def _page(found: Forecast) -> str:
    scale = _scale(found)
    parts = [
        f'<div class="part" style="width:{100 * size / scale:.3f}%;background:{colour}" title="{meaning}"></div>'
        for meaning, colour, size in bars(found)
    ]
    marks = [
        f'<div class="mark{"" if name == "limit" else " compiled"}" style="left:{100 * size / scale:.3f}%">'
        f"<span>{name}: {gib(size)}</span></div>"
        for name, size in _marks(found)
    ]
    rows = [
        f'<tr><td><span class="box" style="background:{colour}"></span> {meaning}</td>'
        f'<td class="size">{gib(size)}</td><td class="size">{size / found.memory.peak:.1%}</td></tr>'
        for meaning, colour, size in bars(found)
    ]
    title, facts, said = map(html.escape, _head(found))
    lines = [
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>',
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n<div>{facts}</div>\n<div><b>{said}</b></div>",
        *('<div class="bar">', *parts, *marks, "</div>", "<table>", *rows),
        f'<tr><td><b>peak, by arithmetic</b></td><td class="size"><b>{gib(found.memory.peak)}</b></td></tr>',
        "</table>\n</body>\n</html>\n",
    ]
    return "\n".join(lines)
