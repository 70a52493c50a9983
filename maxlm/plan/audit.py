"""What a layout must not make the compiler do; each broken rule is a line."""

from __future__ import annotations

import math
from collections.abc import Sequence

from maxlm.config import Context, RunConfig, Zero
from maxlm.plan.collectives import UNKNOWN, Collective, CollectiveKind, summed
from maxlm.shapes import arrays, device_shape
from maxlm.sharding import Layout


def forbidden(layout: Layout, found: Sequence[Collective], *, matrix_bytes: int, log: str = "") -> list[str]:
    """What a step does against the rules of its layout.

    Args:
        layout: of the step.
        found: all its collectives.
        matrix_bytes: from `smallest_matrix`; an array over fsdp that is as large or larger is a parameter or gradient.
        log: what the compiler wrote while it compiled.
    """
    sizes, config, lines = layout.mesh.shape, layout.config, []
    used = {axis for axis, size in sizes.items() if size > 1}
    exchanges = (
        "expert" in used
        or ("seq" in used and config.context is Context.ULYSSES)
        or ("stage" in used and config.virtual_stages > 1)
    )
    # The processor's compiler leaves in what moves nothing, and writes reduce-scatter as all-reduce and slice.
    accelerator = layout.mesh.devices.flat[0].platform != "cpu"
    for one, number in summed(found):
        if one.axes == UNKNOWN:
            continue
        what = f"{number} {one.kind.value} over {' x '.join(one.axes) or 'nothing'} of {one.bytes_each:,} bytes"
        if one.operation:
            what += f" (in {one.operation.split(' | ')[0]})"
        # Between slices a sum goes by way of parts: scattered within a slice, sent, gathered.
        if used <= {"data"} and config.slices == 1 and one.axes and one.kind is not CollectiveKind.ALL_REDUCE:
            lines.append(f"{what}: data parallelism sums gradients, and moves nothing else")
        to_all = one.kind in (CollectiveKind.ALL_TO_ALL, CollectiveKind.RAGGED_ALL_TO_ALL)
        if to_all and one.axes and not exchanges:
            lines.append(f"{what}: only experts, Ulysses and virtual stages exchange all with all")
        if accelerator and not one.axes:
            lines.append(f"{what}: an axis of one device has nobody to talk to")
        zero3 = config.zero is Zero.PARAMETERS and "fsdp" in one.axes
        if accelerator and zero3 and one.kind is CollectiveKind.ALL_REDUCE and one.bytes_each >= matrix_bytes:
            lines.append(
                f"{what}: ZeRO-3 gathers parameters and scatters gradients, which takes half of the bytes; if fsdp is "
                "a whole TPU torus, use sharding.data=2 and half of sharding.fsdp (docs/plan.md)"
            )
    if "Involuntary full rematerialization" in log:
        lines.append("the partitioner copies a whole array to every device to change its layout: see its warning")
    return lines


def smallest_matrix(config: RunConfig, layout: Layout) -> int:
    """Bytes, in bfloat16, of the smallest parameter of one layer that fsdp cuts, as it is when put together again."""
    sizes, zero = dict(layout.mesh.shape), config.sharding.zero
    if zero is not Zero.PARAMETERS:
        return 0
    cut = [one for one in arrays(config.model) if "embed" in one.dims]
    shards = [math.prod(device_shape(one, {**sizes, "stage": 1}, zero)) // one.stacked for one in cut]
    return min(2 * shard * sizes["fsdp"] for shard in shards)
