"""What serving takes, for people, as tables on the console."""

from __future__ import annotations

from rich.console import Console
from rich.text import Text

from maxlm.config import CacheFormat, WeightFormat
from maxlm.plan.analysis import gib, mesh_text
from maxlm.plan.rollout_time import RolloutTime
from maxlm.plan.serving import DeviceWork, ServingForecast, serving_warnings
from maxlm.plan.tables import giga, seconds, table_of
from maxlm.shapes import decoding_flops, prefill_flops


def print_serving(found: ServingForecast, console: Console) -> None:
    """What serving takes, and how fast it can be."""
    dtype, weights, kept_in = found.config.execution.dtype.value, found.load.weights, found.load.kv_cache
    plain = kept_in is CacheFormat.DTYPE
    devices = f"{found.target.devices:,} device{'s' if found.target.devices > 1 else ''}"
    console.print(
        f"{found.target}: {devices} as {mesh_text(found.mesh)}\n{found.texts:,} texts of {found.context:,} tokens, "
        f"weights in {dtype if weights is WeightFormat.DTYPE else weights.value}, "
        + (f"cache and products in {dtype}" if plain else f"cache in {kept_in.value}, products in {dtype}")
    )
    style = "bold" if found.limit is None else f"bold {'green' if found.fits else 'red'}"
    console.print(Text(_serving_verdict(found), style=style))
    memory = [("weights", gib(found.weight_bytes)), ("cache", gib(found.cache_bytes))]
    memory += [] if found.limit is None else [("limit", gib(found.limit))]
    work = [_work_row("a token of each text", found.step), _work_row(f"a prompt of {found.prompt:,}", found.prefill)]
    console.print(table_of(("memory of a device", ">size"), memory))
    console.print(
        table_of(("a device's work", ">FLOPs", ">weights", ">cache", ">compute", ">memory", ">at least"), work)
    )
    if (each := found.tokens_per_s) is not None and (every := found.all_tokens_per_s) is not None:
        console.print(
            f"[bold]at most {_speed(each)} tokens/s of each text, {_speed(every)} of all[/], limited by "
            f"{found.step.limited_by}; the prompt by {found.prefill.limited_by}"
        )
    if (fullest := found.fullest) is not None and (most := fullest.all_tokens_per_s) is not None:
        console.print(
            f"at most {fullest.texts:,} such texts fit, with {_speed(most)} tokens/s of all, limited by "
            f"{fullest.step.limited_by}"
        )
    model = found.config.model
    console.print(
        f"FLOPs: {giga(decoding_flops(model, found.context))} of a decoded token, "
        f"{giga(prefill_flops(model, found.prompt))} of the prompt\nthe same with maxlm.serve: "
        f"--engine.slots {found.load.slots} --engine.cache_tokens {found.cache_tokens}"
        + ("" if plain else f" --engine.kv_cache {kept_in.value}")
    )
    console.print("bounds by data sheets, without links; nothing is measured, and a real server is slower", style="dim")
    for line in serving_warnings(found):
        console.print(Text.assemble(("warning: ", "bold yellow"), line))


def print_rollout(time: RolloutTime, console: Console) -> None:
    """What writing takes, beside what learning does."""
    rows = [
        ("written", seconds(time.write_seconds), f"{time.texts:,} texts, {time.at_once:,} at once"),
        ("read", seconds(time.read_seconds), "by all models that say something of them"),
        ("learned from", seconds(time.learn_seconds), "the steps above"),
    ]
    console.print(table_of(("a rollout", ">time", ""), rows))
    console.print(
        f"[bold]at least {seconds(time.seconds)} a rollout[/], {time.write_seconds / time.seconds:.0%} of it to write, "
        f"limited by {time.limited_by}, if all texts are as long as they may be\n"
        "days and device-hours above are those of the steps alone"
    )


def _serving_verdict(found: ServingForecast) -> str:
    if found.limit is None or found.most_slots is None:
        return "no limit known, by arithmetic"
    if found.fits:
        free = found.limit - found.weight_bytes - found.cache_bytes
        return f"fits, with {gib(free)} a device for the step, by arithmetic"
    if not found.most_slots:
        return "does not fit: weights and one text are more than a device has room for, by arithmetic"
    return f"does not fit: a shard has room for {found.most_slots} of {found.load.slots} texts, by arithmetic"


def _speed(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else f"{number:.3g}"


def _work_row(name: str, work: DeviceWork) -> tuple[str, ...]:
    times = (work.compute_seconds, work.memory_seconds, work.seconds)
    sizes = (f"{giga(work.weight_bytes)}B", f"{giga(work.cache_bytes)}B")
    return name, giga(work.flops), *sizes, *("?" if time is None else seconds(time) for time in times)
