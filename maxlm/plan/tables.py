"""A plan, a search and a compiler's answer for people, as tables on the console."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from maxlm.config import AdamW, Dtype, OptimizerConfig, Zero
from maxlm.hardware import CHIPS
from maxlm.plan.advice import Change
from maxlm.plan.analysis import CompilerReport, Forecast, gib, mesh_text, warnings
from maxlm.plan.machines import GPUS, TPUS, limit_rule
from maxlm.plan.search import Search, differences, spelled_out

_BAR = 16
"""Characters of the whole of a device's memory."""
_WIDE = 110
"""Characters of a console that has room for every column."""
_COMPILED_MEMORY = "a device: {arguments} state and batch, {temporary} temporary, {peak} at the peak"


def print_report(found: Forecast, breaks: Sequence[str], console: Console) -> None:
    """What arithmetic finds, and what breaks first when things grow, if that was asked."""
    train, target = found.config.train, found.target
    devices = f"{target.devices:,} device{'s' if target.devices > 1 else ''}"
    console.print(
        f"{target}: {devices} as {mesh_text(found.mesh)}\n{train.batch_size:,} x {train.seq_len:,} tokens a step in "
        f"{micro_batches(found)}, remat {found.config.execution.remat.value}, {optimizer_text(found.config.optimizer)}"
    )
    console.print(_styled_verdict(found))
    sides = Table.grid(padding=(0, 4, 0, 0))
    sides.add_row(
        table_of(("parameters", ">number"), _parameters(found)),
        table_of(("memory of a device", ">size", ""), _memory(found)),
    )
    console.print(sides)
    if explained := limit_rule(target):
        console.print(f"limit: {explained}", style="dim")
    if times := list(_time(found)):
        console.print(table_of(("a step", ">time", ">sent", ""), times))
    if (bound := found.bound) is not None:
        console.print(
            Text.assemble(
                (f"at least {seconds(bound.step_seconds)} a step", "bold"),
                f", limited by {bound.limited_by}; MFU at most {bound.mfu_ceiling:.0%}, attention masked\n"
                f"at most {giga(bound.tokens_per_day)} tokens a day; {train.steps:,} steps "
                f"({giga(train.steps * found.tokens)} tokens) take {bound.days:,.1f} days, "
                f"{bound.device_hours:,.0f} device-hours\n",
                ("bounds by data sheets, nothing is measured; a real run is slower", "dim"),
            )
        )
    for line in breaks:
        console.print(Text.assemble(("breaks first: ", "bold"), line))
    _print_warnings(found, console)


def print_targets(console: Console) -> None:
    """Every chip that can be planned for."""
    names = ("target", ">memory", ">bfloat16 TFLOP/s", ">GB/s of memory", "planned by")
    console.print(table_of(names, map(_target, CHIPS)))
    console.print(
        "cpu:DEVICES: this machine's processor, whose memory and speed are not known\n"
        "TOPOLOGY: chips along each side, as 4x4x4 (v4, v5p, 7x) or 8x8 (v5e, v6e); a further :2 for two such slices.\n"
        "Every figure has its source in maxlm/hardware.py.",
        markup=False,
    )


def print_verdict(found: Forecast, console: Console) -> None:
    """Whether it fits, and what to know of that; once more, after the compiler was asked."""
    if found.memory.engine:
        console.print(f"beside the step {gib(found.memory.engine)} of the engine that writes, by arithmetic")
    console.print(_styled_verdict(found))
    _print_warnings(found, console)


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
            f"    {gib(one.margin)} to spare; step at least {seconds(one.time.step_seconds)}, "
            f"{1e6 * one.cost:,.2f} device-seconds a million tokens",
            markup=False,
        )
        if change.learns_otherwise:
            console.print("    this changes what is learned, not only how it is computed", style="dim")


def print_search(found: Search, chosen: Forecast | None, console: Console, rows: int = 10) -> None:
    """So many of the ranking, those that were compiled, and the one to take; None: nothing fits."""
    console.print(f"{found.target}: of {found.space:,} configs the best of each mesh that fits, by arithmetic")
    compiled = any(one.compiled for one in found.ranked)
    shown = [(i, one) for i, one in enumerate(found.ranked) if i < rows or one is chosen or one.compiled]
    if not shown:
        console.print("[bold red]nothing fits[/]")
        return
    left_out = set() if console.width >= _WIDE else {"limited by"}
    if all(one.config.optimizer == found.config.optimizer for _, one in shown):
        left_out.add("optimizer")
    if not compiled:
        left_out.add(">compiler")
    cells = [_candidate(f"{i + 1}{'*' if one is chosen else ''}", one) for i, one in shown]
    names = [name for name in cells[0] if name not in left_out]
    console.print(table_of(names, ([row[name] for name in names] for row in cells), "mesh"))
    console.print(
        "[dim]margin: of a device's memory. step: at least, and MFU: at most, by bound; neither is measured[/]"
    )
    if chosen is not None:
        what = differences(chosen.config, spelled_out(found.config, found.target))
        console.print(f"*: {_overrides(what)}", soft_wrap=True, markup=False)


def print_compiled(answer: CompilerReport, console: Console, *, cached: bool = False) -> None:
    """Memory, collectives, kernels, and what is wrong with them."""
    told: Mapping[str, Any] = answer.details
    after = "from the cache; it took" if cached else "after"
    console.print(f"\n[bold]The compiler's word[/], {after} {told['compile_cpu_seconds']:.0f} CPU seconds")
    if answer.fits:
        sizes = {name: gib(size) for name, size in told["memory"].items()}
        console.print(_COMPILED_MEMORY.format(**sizes))
        names = ("collective", "axes", ">devices", ">in text", ">runs", ">MB each", ">MB sent", "overlaps")
        console.print(table_of(names, map(_collective, told["collectives"])))
        sent = sum(one["bytes_sent"] for one in told["collectives"])
        least = "" if all(one["runs_exact"] for one in told["collectives"]) else "at least "
        console.print(f"a device sends {least}{sent / 1e9:,.3f} GB a step")
        if any(one["axes"] == ["?"] for one in told["collectives"]):
            console.print("?: its devices are written in a way that is not known; counted as all", style="yellow")
        if told["kernels"]:
            console.print(table_of(("kernel", "maker", ">calls", ">runs", "from"), map(_kernel, told["kernels"])))
        if told["spills"]:
            console.print(f"kernels spill {told['spills']:,} bytes of registers", style="yellow")
        for line in told["forbidden"]:
            console.print(f"against the layout: {line}", markup=False)
    else:
        console.print(f"does not fit: {told['message']}", markup=False)
        if answer.at_least:
            console.print(f"needs at least {gib(answer.peak)}; how much more, the compiler does not say")
        alike: Counter[tuple[str, str, str]] = Counter()  # those that differ in the operation alone, which is not shown
        for one in told["largest"]:
            place = one["allocation"]
            alike[one["shape"] or place, gib(one["size"]), one["source"] or place] += one["number"]
        rows = ((shape, size, str(number), source) for (shape, size, source), number in alike.items())
        console.print(table_of(("largest arrays", ">size", ">number", "from"), rows))
    for line in told["compiler_warnings"]:
        console.print(f"the compiler warns: {line}", style="yellow", markup=False)


def verdict(found: Forecast) -> str:
    """Whether it fits, how well, and who says so."""
    if found.limit is None:
        return f"no limit known, {found.tier.words}"
    if found.fits:
        return f"fits, with {gib(found.margin)} a device to spare, {found.tier.words}"
    least = "at least " if found.compiled is not None and found.compiled.at_least else ""
    return f"does not fit: {least}{gib(-found.margin)} a device too much, {found.tier.words}"


def micro_batches(found: Forecast) -> str:
    parts = found.config.train.micro_batches
    return f"{parts} micro-batch{'es' if parts > 1 else ''}"


def optimizer_text(optimizer: OptimizerConfig) -> str:
    """AdamW, AdamW/bf16 (its first moment) or AdamW/8bit; the others likewise."""
    name = type(optimizer).__name__
    if isinstance(optimizer, AdamW) and optimizer.eight_bit is not None:
        return f"{name}/8bit"
    return f"{name}/bf16" if optimizer.moment_dtype is Dtype.BFLOAT16 else name


def seconds(time: float) -> str:
    """Three digits, in s or ms."""
    return f"{time:,.3g} s" if time >= 1 else f"{1e3 * time:.3g} ms"


def giga(number: float) -> str:
    """Three digits and a prefix of SI."""
    for size, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= size:
            return f"{number / size:,.3g} {prefix}"
    return f"{number:,.3g} "


def table_of(columns: Sequence[str], rows: Iterable[Sequence[Any]], wraps: str = "") -> Table:
    """A column whose name begins with > is of numbers. A row may end in a style, one cell after the last column.

    `wraps`: the one column that may take several lines; by default all words may.
    """
    table = Table(box=None, pad_edge=False)
    for name in columns:
        number = name.startswith(">")
        whole = name != wraps if wraps else number
        table.add_column(name.removeprefix(">"), justify="right" if number else "left", no_wrap=whole)
    for row in rows:
        table.add_row(*row[: len(columns)], style=row[len(columns)] if len(row) > len(columns) else None)
    return table


def _styled_verdict(found: Forecast) -> Text:
    return Text(verdict(found), style="bold" if found.limit is None else f"bold {'green' if found.fits else 'red'}")


def _print_warnings(found: Forecast, console: Console) -> None:
    for line in warnings(found):
        console.print(Text.assemble(("warning: ", "bold yellow"), line))


def _overrides(what: Sequence[str]) -> str:
    """The differences as words of a command line; no word can choose a class."""
    keys = " ".join(f"--{one.replace(' = ', '=')}" for one in what if not one.startswith("optimizer = "))
    classes = [one for one in what if one.startswith("optimizer = ")]
    return "; ".join([keys or "no overrides", *(f"in the file {one}() (--out writes such a file)" for one in classes)])


def _candidate(place: str, one: Forecast) -> dict[str, str]:
    """Its cells by column."""
    config = one.config
    zero = {Zero.OPTIMIZER: "1", Zero.GRADIENTS: "2", Zero.PARAMETERS: "3"}[config.sharding.zero]
    left = f"{gib(one.margin)} left" if one.margin >= 0 else "does not fit"
    return {
        "": place,
        "mesh": mesh_text(one.mesh).replace(" x ", ", "),
        "remat": config.execution.remat.value,
        "micro": str(config.train.micro_batches),
        "ZeRO": zero if config.sharding.fsdp > 1 else "-",
        "optimizer": optimizer_text(config.optimizer),
        ">margin": gib(one.analytic_margin),
        ">step": seconds(one.time.step_seconds),
        ">MFU": f"{one.time.mfu_ceiling:.0%}",
        ">sends": giga(sum(axis.sent for axis in one.traffic)) + "B",
        "limited by": one.time.limited_by,
        ">compiler": left if one.compiled else "",
    }


def _parameters(found: Forecast) -> Iterable[tuple[str, ...]]:
    count, flops = found.parameters, found.flops
    for name in ("embedding", "attention", "mlp", "norms", "unembedding"):
        yield name, giga(getattr(count, name))
    if count.mtp:
        yield "modules for further tokens", giga(count.mtp)
    if count.adapter:
        yield "adapter", giga(count.adapter)
    yield "all", giga(count.total), "bold"
    if count.active != count.total:
        yield "that a token uses", giga(count.active)
    yield "FLOPs a token", giga(flops.total)
    yield "  6 N", giga(flops.parameters_term)
    yield "  attention", giga(flops.attention_term)
    yield "  of it causal", giga(flops.causal_attention_term)
    yield "and again, by remat", giga(flops.recompute)
    yield "FLOPs a step", f"{flops.total * found.tokens:.3g}"


def _memory(found: Forecast) -> Iterable[Sequence[Any]]:
    """Bars on the scale of the limit, or of the peak where none is known."""
    memory, at_peak = found.memory, found.memory.at_peak
    bar = lambda size: Text("\u2588" * min(_BAR, round(_BAR * size / (found.limit or memory.peak))), style="blue")
    for name, size in at_peak.items():
        if size:
            yield name, gib(size), bar(size)
    yield "peak, by arithmetic", gib(memory.peak), bar(memory.peak), "bold"
    if found.limit is not None:
        yield "limit", gib(found.limit), ""
    other = "logits" if "working" in at_peak else "working"
    yield f"{other}, at other times", gib(getattr(memory, other)), "", "dim"
    yield "cache, if it decoded", gib(found.cache), "", "dim"


def _time(found: Forecast) -> Iterable[tuple[str, ...]]:
    """What each part would take by itself."""
    if (bound := found.bound) is not None:
        idle = f"{bound.bubble:.0%} of it idle stages" if bound.bubble else ""
        yield "compute", seconds(bound.compute_seconds / (1 - bound.bubble)), "", idle
        yield "memory", seconds(bound.memory_seconds), "", f"{bound.intensity:,.0f} FLOPs a byte"
    for one in found.traffic:
        time = "?" if one.seconds is None else seconds(one.seconds)
        yield f"{one.axis} over {one.link.value}", time, f"{giga(one.sent)}B", one.what


def _target(name: str) -> tuple[str, ...]:
    chip = CHIPS[name]
    form = f"tpu:{name}:TOPOLOGY" if name in TPUS else f"gpu:{name}:GPUS or HOSTSxGPUS"
    tiers = "arithmetic, compiler" if name in TPUS or name in GPUS else "arithmetic only"
    return form, gib(chip.memory), f"{chip.peak.bfloat16:,.4g}", f"{chip.bandwidth / 1e9:,.0f}", tiers


def _runs(one: Mapping[str, Any]) -> str:
    return f"{one['runs']:,}{'' if one['runs_exact'] else '+'}"


def _collective(one: Mapping[str, Any]) -> Sequence[str]:
    megabytes = (f"{size / 1e6:,.3f}" for size in (one["bytes_each"], one["bytes_sent"]))
    axes, overlaps = " x ".join(one["axes"]) or "-", "yes" if one["asynchronous"] else ""
    return one["kind"], axes, str(one["group"]), str(one["number"]), _runs(one), *megabytes, overlaps


def _kernel(one: Mapping[str, Any]) -> Sequence[str]:
    return one["name"], one["maker"], str(one["calls"]), _runs(one), one["source"]
