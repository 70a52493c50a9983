"""Where a device's memory goes, as a picture: a PNG by matplotlib, or a page of HTML that needs nothing else."""

from __future__ import annotations

import html
from pathlib import Path

from maxlm.config import UserError
from maxlm.plan.report import Report, gib, mesh_text

COLOURS = {
    "parameters": "#1f4e9c",
    "gradients": "#5b8bd0",
    "optimizer": "#9db4d3",
    "activations": "#c8501e",
    "logits": "#e39a6f",
    "working": "#d8b13c",
    "batch": "#7a7a7a",
    "copies": "#b79ad6",
}
MEANINGS = {
    "parameters": "parameters",
    "gradients": "gradients",
    "optimizer": "optimizer state",
    "activations": "activations saved for the backward pass",
    "logits": "the loss at work: logits, and gradient of the table",
    "working": "a layer at work: gathered weights, intermediates",
    "batch": "batch",
    "copies": "copies of parameters in another format",
}


def write_picture(report: Report, path: Path) -> None:
    """Draw what `report` says of memory; the file's suffix says how.

    Raises:
        UserError: the suffix is neither .png nor .html, the folder is absent, or matplotlib is and .png needs it.
    """
    check_picture(path)
    if path.suffix == ".html":
        path.write_text(_page(report), encoding="utf-8")
    else:
        _draw(report, path)


def check_picture(path: Path) -> None:
    """Raise what `write_picture` would for this name, before any work is done."""
    if path.suffix not in (".png", ".html"):
        raise UserError(f"--picture {path} ends in {path.suffix or 'nothing'}; use a name that ends in .png or .html")
    if not path.parent.is_dir():
        raise UserError(f"--picture {path}: there is no folder {path.parent}; make it, or name another file")


def parts(report: Report) -> list[tuple[str, int]]:
    """Name and bytes of each part of a device's memory at the peak; none of size 0."""
    at_peak = report.memory.at_peak
    return [(name, at_peak[name]) for name in MEANINGS if at_peak.get(name)]


def _title(report: Report) -> str:
    return f"Memory of a device: {report.parameters.total / 1e9:,.2f} billion parameters on {report.target}"


def _facts(report: Report) -> str:
    train = report.config.train
    return (
        f"{mesh_text(report.mesh)}; {train.batch_size:,} sequences of {train.seq_len:,} tokens in "
        f"{train.micro_batches} micro-batch{'es' if train.micro_batches > 1 else ''}; "
        f"remat {report.config.execution.remat.value}; {type(report.config.optimizer).__name__}"
    )


def _verdict(report: Report) -> str:
    if report.hbm_bytes is None:
        return f"{gib(report.memory.peak)} at the peak; the limit is not known"
    margin = report.hbm_bytes - report.peak
    by = report.tier.words
    least = "at least " if report.compiled is not None and report.compiled.at_least else ""
    text = f"fits, with {gib(margin)} to spare" if report.fits else f"does not fit: {least}{gib(-margin)} too much"
    return f"{text}, {by} ({gib(report.peak)} of {gib(report.hbm_bytes)})"


def _marks(report: Report) -> list[tuple[str, int]]:
    """Lines across the bar."""
    marks = [] if report.hbm_bytes is None else [("limit", report.hbm_bytes)]
    if report.compiled is not None:
        marks.append(
            ("compiler's peak, at least" if report.compiled.at_least else "compiler's peak", report.compiled.peak)
        )
    return marks


def _scale(report: Report) -> float:
    """Bytes from one end of the picture to the other."""
    return 1.04 * max([report.memory.peak, *(size for _, size in _marks(report))])


def _draw(report: Report, path: Path) -> None:
    try:
        # The object-oriented API alone: pyplot would look for a display and keep figures alive.
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise UserError(f"{path.name} needs matplotlib, which is not installed; pip install 'maxlm[viz]'") from error
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    left = 0.0
    for name, size in parts(report):
        width = size / 2**30
        label = f"{MEANINGS[name]}: {gib(size)}"
        axes.barh(0, width, left=left, height=0.5, color=COLOURS[name], label=label)
        left += width
    for name, size in _marks(report):
        colour, style = ("black", "-") if name == "limit" else ("#2a8a3e", "--")
        axes.axvline(size / 2**30, color=colour, linestyle=style, linewidth=2, label=f"{name}: {gib(size)}")
    axes.set_xlim(0, _scale(report) / 2**30)
    axes.set_ylim(-0.4, 0.4)
    axes.set_yticks([])
    axes.set_xlabel("GiB")
    axes.set_title(f"{_title(report)}\n{_facts(report)}\n{_verdict(report)}", fontsize=10, loc="left")
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


def _page(report: Report) -> str:
    scale = _scale(report)
    bars, rows = [], []
    for name, size in parts(report):
        colour, meaning = COLOURS[name], MEANINGS[name]
        width = 100 * size / scale
        bars.append(f'<div class="part" style="width:{width:.3f}%;background:{colour}" title="{meaning}"></div>')
        rows.append(
            f'<tr><td><span class="box" style="background:{colour}"></span> {meaning}</td>'
            f'<td class="size">{gib(size)}</td><td class="size">{size / report.memory.peak:.1%}</td></tr>'
        )
    for name, size in _marks(report):
        kind = "mark" if name == "limit" else "mark compiled"
        bars.append(
            f'<div class="{kind}" style="left:{100 * size / scale:.3f}%"><span>{name}: {gib(size)}</span></div>'
        )
    rows.append(f'<tr><td><b>peak, by arithmetic</b></td><td class="size"><b>{gib(report.memory.peak)}</b></td></tr>')
    title = html.escape(_title(report))
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f"<style>{_STYLE}</style>\n</head>\n<body>\n<h1>{title}</h1>\n"
        f"<div>{html.escape(_facts(report))}</div>\n<div><b>{html.escape(_verdict(report))}</b></div>\n"
        '<div class="bar">\n'
        + "\n".join(bars)
        + "\n</div>\n<table>\n"
        + "\n".join(rows)
        + "\n</table>\n</body>\n</html>\n"
    )
