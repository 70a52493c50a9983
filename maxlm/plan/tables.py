"""A plan and a search for people, as tables on the console."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from maxlm.config import Adafactor, AdamW, Dtype, OptimizerConfig, Zero
from maxlm.plan.advice import Change
from maxlm.plan.report import Report, gib, mesh_text, warnings
from maxlm.plan.search import Candidate, Search, differences, spelled_out

_BAR = 16
"""Characters of the whole of a device's memory."""
_WIDE = 110
"""Characters of a console that has room for every column."""


def print_report(report: Report, console: Console) -> None:
    """Everything that the two tiers found."""
    console.print(_head(report))
    sides = Table.grid(padding=(0, 4, 0, 0))
    sides.add_row(_parameters(report), _memory(report))
    console.print(sides)
    console.print(_time(report))
    for line in report.breaks:
        console.print(_bullet("breaks first", line))
    for line in warnings(report):
        console.print(_bullet("warning", line, style="yellow"))


def print_verdict(report: Report, console: Console) -> None:
    """Whether it fits, and what to know of that; once more, after the compiler was asked."""
    console.print(_verdict(report))
    for line in warnings(report):
        console.print(_bullet("warning", line, style="yellow"))


def print_changes(changes: Sequence[Change], console: Console) -> None:
    """The cheapest ways to make a run fit."""
    if not changes:
        console.print("Nothing that was tried makes it fit: not a 64th of the batch, nor 64 times the devices.")
        return
    console.print("\n[bold]The cheapest changes that would make it fit[/], by arithmetic:")
    for number, change in enumerate(changes, 1):
        one = change.candidate
        console.print(f" {number}. {'; '.join(change.what)}", markup=False, highlight=False)
        console.print(
            f"    {gib(one.margin)} to spare; step at least {seconds(one.bound.step_seconds)}, "
            f"{1e6 * one.cost:,.2f} device-seconds a million tokens",
            markup=False,
        )
        if change.learns_otherwise:
            console.print("    this changes what is learned, not only how it is computed", style="dim")


def print_search(
    found: Search, chosen: Candidate | None, peaks: Mapping[int, int], console: Console, rows: int = 10
) -> None:
    """The ranking.

    Args:
        found: what the arithmetic ranked.
        chosen: the one to take; None: nothing fits.
        peaks: place in the ranking -> the compiler's peak there, in bytes.
        console: where to.
        rows: how many of them to show.
    """
    console.print(f"{found.target}: of {found.space:,} configs the best of each mesh that fits, by arithmetic")
    shown = list(enumerate(found.ranked[:rows]))
    shown += [(i, one) for i, one in enumerate(found.ranked) if i >= rows and (one is chosen or i in peaks)]
    table = Table(box=None, pad_edge=False)
    wide = console.width >= _WIDE
    other_optimizers = any(one.config.optimizer != found.config.optimizer for _, one in shown)
    for place, one in shown:
        cells = {"": f"{place + 1}{'*' if one is chosen else ''}", **_candidate(one)}
        if not other_optimizers:
            del cells["optimizer"]
        if not wide:
            del cells["limited by"]
        if peaks:
            cells["compiler"] = _compiled_margin(one, peaks[place]) if place in peaks else ""
        for name in list(cells)[len(table.columns) :]:
            number = name in ("margin", "step", "MFU", "sends", "compiler")
            table.add_column(name, justify="right" if number else "left", no_wrap=name != "mesh")
        table.add_row(*cells.values())
    if not shown:
        console.print("[bold red]nothing fits[/]")
        return
    console.print(table)
    console.print(
        "[dim]margin: of a device's memory. step: at least, and MFU: at most, by bound; neither is measured[/]"
    )
    if chosen is not None:
        what = differences(chosen.config, spelled_out(found.config, found.target))
        console.print(f"*: {_overrides(what)}", soft_wrap=True, markup=False)


def _overrides(what: Sequence[str]) -> str:
    """The differences as words of a command line; no word can choose a class."""
    keys = " ".join(f"--{one.replace(' = ', '=')}" for one in what if not one.startswith("optimizer = "))
    classes = [one for one in what if one.startswith("optimizer = ")]
    return "; ".join([keys or "no overrides", *(f"in the file {one}() (--out writes such a file)" for one in classes)])


def _candidate(one: Candidate) -> dict[str, str]:
    """Its cells by column."""
    config = one.config
    zero = {Zero.OPTIMIZER: "1", Zero.GRADIENTS: "2", Zero.PARAMETERS: "3"}[config.sharding.zero]
    return {
        "mesh": mesh_text(config.sharding.sizes(one.target.devices)).replace(" x ", ", "),
        "remat": config.execution.remat.value,
        "micro": str(config.train.micro_batches),
        "ZeRO": zero if config.sharding.fsdp > 1 else "-",
        "optimizer": optimizer_text(config.optimizer),
        "margin": gib(one.margin),
        "step": seconds(one.bound.step_seconds),
        "MFU": f"{one.bound.mfu_ceiling:.0%}",
        "sends": giga(sum(axis.sent for axis in one.traffic)) + "B",
        "limited by": str(one.bound.limited_by),
    }


def _compiled_margin(one: Candidate, peak: int) -> str:
    return f"{gib(one.limit - peak)} left" if peak <= one.limit else "does not fit"


def optimizer_text(optimizer: OptimizerConfig) -> str:
    """AdamW, AdamW/bf16 (its first moment) or Adafactor."""
    match optimizer:
        case AdamW():
            return "AdamW/bf16" if optimizer.moment_dtype is Dtype.BFLOAT16 else "AdamW"
        case Adafactor():
            return "Adafactor"


def _head(report: Report) -> Text:
    train, target = report.config.train, report.target
    text = Text(
        f"{target}: {target.devices:,} devices as {mesh_text(report.mesh)}\n"
        f"{train.batch_size:,} x {train.seq_len:,} tokens a step in {train.micro_batches} "
        f"micro-batch{'es' if train.micro_batches > 1 else ''}, remat {report.config.execution.remat.value}, "
        f"{optimizer_text(report.config.optimizer)}\n"
    )
    return text.append_text(_verdict(report))


def _verdict(report: Report) -> Text:
    text = Text()
    by = report.tier.words
    if report.hbm_bytes is None:
        text.append(f"no limit known, {by}", style="bold")
    elif report.fits:
        text.append(f"fits, with {gib(report.hbm_bytes - report.peak)} a device to spare, {by}", style="bold green")
    else:
        least = "at least " if report.compiled is not None and report.compiled.at_least else ""
        missing = gib(report.peak - report.hbm_bytes)
        text.append(f"does not fit: {least}{missing} a device too much, {by}", style="bold red")
    return text


def _parameters(report: Report) -> Table:
    count = report.parameters
    table = Table("parameters", box=None, pad_edge=False)
    table.add_column("number", justify="right")
    for name in ("embedding", "attention", "mlp", "norms", "unembedding"):
        table.add_row(name, giga(getattr(count, name)))
    table.add_row("all", giga(count.total), style="bold")
    if count.active != count.total:
        table.add_row("that a token uses", giga(count.active))
    flops = report.flops
    table.add_row("FLOPs a token", giga(flops.total))
    table.add_row("  6 N", giga(flops.parameters_term))
    table.add_row("  attention", giga(flops.attention_term))
    table.add_row("  of it causal", giga(flops.causal_attention_term))
    table.add_row("and again, by remat", giga(flops.recompute))
    table.add_row("FLOPs a step", f"{report.flops.total * report.tokens:.3g}")
    return table


def _memory(report: Report) -> Table:
    """Bars on the scale of the limit, or of the peak where none is known."""
    table = Table("memory of a device", box=None, pad_edge=False)
    table.add_column("size", justify="right", no_wrap=True)
    table.add_column("")
    scale = report.hbm_bytes or report.memory.peak
    bar = lambda size: "\u2588" * min(_BAR, round(_BAR * size / scale))
    at_peak = report.memory.at_peak
    for name, size in at_peak.items():
        if size:
            table.add_row(name, gib(size), Text(bar(size), style="blue"))
    table.add_row(
        "peak, by arithmetic", gib(report.memory.peak), Text(bar(report.memory.peak), style="blue"), style="bold"
    )
    if report.hbm_bytes is not None:
        table.add_row("limit", gib(report.hbm_bytes), "")
    other = "logits" if "working" in at_peak else "working"
    table.add_row(f"{other}, at other times", gib(getattr(report.memory, other)), "", style="dim")
    table.add_row("key/value cache", gib(report.cache), "", style="dim")
    return table


def _time(report: Report) -> RenderableType:
    """What each part would take by itself, and what that makes of a step and a run."""
    table = Table("a step", box=None, pad_edge=False)
    table.add_column("time", justify="right", no_wrap=True)
    table.add_column("sent", justify="right", no_wrap=True)
    table.add_column("")
    bound = report.bound
    if bound is not None:
        table.add_row(
            "compute",
            seconds(bound.compute_seconds / (1 - bound.bubble)),
            "",
            f"{bound.bubble:.0%} of it idle stages" if bound.bubble else "",
        )
        table.add_row("memory", seconds(bound.memory_seconds), "", f"{bound.intensity:,.0f} FLOPs a byte")
    for one in report.traffic:
        time = "?" if one.seconds is None else seconds(one.seconds)
        table.add_row(f"{one.axis} over {one.link.value}", time, f"{giga(one.sent)}B", one.what)
    if bound is None:
        return table
    train = report.config.train
    last = Text()
    last.append(f"at least {seconds(bound.step_seconds)} a step", style="bold")
    last.append(
        f", limited by {bound.limited_by}; MFU at most {bound.mfu_ceiling:.0%}\n"
        f"at most {giga(bound.tokens_per_day)} tokens a day; {train.steps:,} steps "
        f"({giga(train.steps * report.tokens)} tokens) take {bound.days:,.1f} days, "
        f"{bound.device_hours:,.0f} device-hours\n"
    )
    last.append("bounds by data sheets, nothing is measured; a real run is slower", style="dim")
    return Group(table, last)


def _bullet(label: str, line: str, style: str = "") -> Text:
    return Text.assemble((f"{label}: ", f"bold {style}".strip()), line)


def seconds(time: float) -> str:
    """Three digits, in s or ms."""
    return f"{time:,.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"


def giga(number: float) -> str:
    """Three digits and a prefix of SI."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:,.3g} {prefix}"
    return f"{number:,.3g} "
