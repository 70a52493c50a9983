"""What pages are made of: tables, tiles and sections as HTML, in one look, without network or script."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any


def write_page(path: Path, title: str, body: Sequence[str], *, complete: int | None = None) -> None:
    """Write a page that has its old or its new contents, whatever happens.

    Args:
        path: of the page.
        title: of its window.
        body: HTML, line by line.
        complete: the step that a run is at with all measurements made, for `report.report_step`.
    """
    page = _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(body), complete=complete)
    part = path.with_suffix(".part")
    try:
        part.write_text(page, encoding="utf-8", errors="replace")
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def cell(value: Any) -> str:
    """A value as text."""
    match value:
        case None:
            return "-"
        case bool() | str():
            return str(value)
        case int():
            return f"{value:,}"
        case float():
            return f"{value:,.5g}"
        case _:
            return json.dumps(value)


def pairs(named: Iterable[tuple[str, Any]]) -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th>{escape(key)}</th><td>{escape(cell(value))}</td></tr>" for key, value in named)
    return f"<table class=pairs>{rows}</table>" if rows else ""


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of texts under their names."""
    if not rows:
        return ""
    first = "".join(f"<th>{escape(name)}</th>" for name in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(text)}</td>" for text in row) + "</tr>" for row in rows)
    return f"<div class=scroll><table><tr>{first}</tr>{rest}</table></div>"


def tiles(named: Sequence[tuple[str, str]]) -> str:
    """Figures that are seen first."""
    inner = "".join(f"<div><span>{escape(name)}</span><b>{escape(figure)}</b></div>" for name, figure in named)
    return f"<div class=tiles>{inner}</div>" if named else ""


def section(title: str, inner: str) -> str:
    """HTML under a title; nothing where there is none."""
    return f"<h2>{escape(title)}</h2>{inner}" if inner else ""


_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="complete" content="{complete}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title><style>{style}</style></head><body><main>
{body}
</main></body></html>
"""

_STYLE = """
:root { color-scheme: light dark; --page: #fbfbfa; --text: #1d1f21; --soft: #63686e; --line: #dfe1e3; --tile: #fff;
  --raw: #a9bedb; --smooth: #1f4e9c; --eval: #c8501e; }
@media (prefers-color-scheme: dark) { :root { --page: #16181a; --text: #e6e6e4; --soft: #9aa0a6; --line: #34383c;
  --tile: #1f2225; --raw: #41597a; --smooth: #7fb0f5; --eval: #f2915f; } }
body { background: var(--page); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0; }
main { max-width: 1060px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 26px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 18px; margin: 34px 0 10px; }
.sub { color: var(--soft); margin: 2px 0 10px; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(150px, 1fr)); gap: 10px; margin: 18px 0; }
.tiles div { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 10px 12px; }
.tiles span { display: block; color: var(--soft); font-size: 13px; } .tiles b { font-size: 20px; font-weight: 600; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 440px), 1fr)); gap: 14px; }
figure { margin: 0; background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 12px; }
figcaption { font-weight: 600; margin-bottom: 6px; }
.key { font-weight: 400; font-size: 13px; margin-left: 10px; color: var(--soft);
  display: inline-block; } .key:empty { display: none; }
.key::before { content: ""; display: inline-block; width: 14px; height: 3px; margin-right: 5px;
  vertical-align: middle; }
.key.raw::before { background: var(--raw); } .key.smooth::before { background: var(--smooth); }
.key.eval::before { background: var(--eval); }
svg { display: block; width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
h3 { font-size: 15px; margin: 18px 0 8px; } figcaption i { font-weight: 400; color: var(--soft); }
rect.kept { fill: var(--raw); } rect.gone { fill: var(--eval); }
line.limit { stroke: var(--eval); stroke-width: 1.5; stroke-dasharray: 4 3; } svg text.limit { fill: var(--eval); }
del { background: color-mix(in srgb, var(--eval) 30%, transparent); }
ins { background: color-mix(in srgb, var(--smooth) 25%, transparent); text-decoration: none; }
.grid { stroke: var(--line); } polyline { fill: none; stroke-width: 1.8; }
polyline.raw { stroke: var(--raw); stroke-width: 1; } polyline.smooth { stroke: var(--smooth); }
polyline.eval { stroke: var(--eval); } circle.eval { fill: var(--eval); } circle.smooth { fill: var(--smooth); }
circle.raw { fill: var(--raw); }
pre { background: var(--tile); border: 1px solid var(--line); border-radius: 8px; padding: 12px; white-space: pre-wrap;
  overflow-wrap: anywhere; font-size: 13px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: left; padding: 3px 18px 3px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { color: var(--soft); font-weight: 500; } .pairs td { overflow-wrap: anywhere; }
.pairs th { font-family: ui-monospace, monospace; font-size: 13px; }
.side td { max-width: 260px; white-space: pre-wrap; overflow-wrap: anywhere; } td.right::after { content: " \\2713"; }
summary { cursor: pointer; padding: 5px 0; } details table { margin: 0 0 10px 16px; }
"""
